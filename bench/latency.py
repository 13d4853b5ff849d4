"""Measured time of VGG-16-BN and ResNet-50 at 224×224, decomposed to a budget of latency.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/latency.py

For batches of 1 and 16, in channels_last and in torch's default format: the plan's prediction, the time of the decomposed model as a fraction of the dense one's, both measured in turns, and beside it
fasterai's Tucker with at most as many MACs. A budget that cannot be reached is raised in steps of .05. Weights do not matter for time, so these are random. The machine has to be idle.
"""
import argparse, time, warnings
from functools import cache
from pathlib import Path

import pandas as pd, torch, torchvision

from fasterai_lr.calibrate import calibrate
from fasterai_lr.cost import count_macs, count_params
from fasterai_lr.budget import Budget
from fasterai_lr.planner import Planner, measured_ratio

formats = {'channels_last': torch.channels_last, 'default': torch.contiguous_format}

def build(name, fmt):
    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval().to(memory_format=formats[fmt])

def peer(dense, percent):
    "fasterai's Tucker, `None` where it fails"
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    try: return Conv_Decomposer().decompose(dense, percent_removed=percent, method='tucker')
    except RuntimeError: return

@cache
def peer_share(name, percent):
    "The MACs that it leaves, as a share"
    dense,x = build(name, 'default'),torch.randn(1, 3, 224, 224)
    if (model := peer(dense, percent)): return count_macs(model, x)/count_macs(dense, x)

def peer_within(name, macs):
    "The smallest percentage removed that leaves at most the share `macs`"
    return next((p for i in range(1, 20) if (s := peer_share(name, p := i/20)) and s <= macs), None)

def plan_within(planner, budget):
    "The plan for `budget`, or for the next larger one, in steps of .05, that can be reached"
    try: return planner.make(Budget(latency=budget))
    except ValueError as e:
        print(e)
        return plan_within(planner, min(1., round(budget+.05, 2)))

def rows_of(name, fmt, bs, budgets, moments, moments_s, images, with_peer):
    "One row a budget; layers are timed once for all"
    dense,x = build(name, fmt),torch.randn(bs, 3, 224, 224, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=formats[fmt])
    start = time.perf_counter()
    planner = Planner(dense, images, moments=moments, sample=x)
    for budget in budgets:
        plan = plan_within(planner, budget)
        planning = time.perf_counter()-start
        small = plan.apply(dense)
        res = dict(model=name, format=fmt, batch=bs, budget=plan.budget['latency'], predicted=plan.predicted['latency'], measured=measured_ratio(dense, small, x, 20.),
                   macs=count_macs(small, x[:1])/count_macs(dense, x[:1]), params=count_params(small)/count_params(dense), moments_s=moments_s, planning_s=planning)
        if with_peer and (p := peer_within(name, res['macs'])): res |= dict(fasterai=measured_ratio(dense, peer(dense, p), x, 20.), fasterai_macs=peer_share(name, p))
        yield res
        start = time.perf_counter()

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', default=['vgg16_bn', 'resnet50'])
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 16])
    parser.add_argument('--formats', nargs='+', default=list(formats))
    parser.add_argument('--budgets', type=float, nargs='+', default=[.5, .8])
    parser.add_argument('--no-peer', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'latency.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    rows,images = [],[torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))]
    for name in args.models:
        start = time.perf_counter()
        moments = calibrate(build(name, 'default'), images)
        moments_s = time.perf_counter()-start
        for fmt in args.formats:
            for bs in args.batches:
                for r in rows_of(name, fmt, bs, args.budgets, moments, moments_s, images, not args.no_peer):
                    rows.append(r)
                    print({k: round(v, 3) if isinstance(v, float) else v for k,v in r.items()}, flush=True)
                    pd.DataFrame(rows).to_csv(args.out, index=False)
    print(pd.DataFrame(rows).round(3).to_string(index=False))

if __name__ == '__main__': main()
