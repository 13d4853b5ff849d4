"""Measure the time of VGG-16-BN and ResNet-50 at 224×224, decomposed to a latency budget.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/latency.py

prints, for batches of 1 and 16, in channels_last and in torch's default format: the time that the plan
predicts, the measured time of the decomposed model as a fraction of the dense one's (both take turns), and
the same for fasterai's Tucker with at most as many MACs. A budget that cannot be reached is raised in steps
of .05. Weights do not matter for time, so these are random. Run it on an idle machine.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse
from functools import cache
from pathlib import Path

import pandas as pd, torch, torchvision

from fasterai_lr.budget import Budget
from fasterai_lr.calibrate import calibrate, calibrated
from fasterai_lr.cost import count_macs, count_params
from fasterai_lr.planner import Planner, measured_ratio
from one_shot import rounded, timed

formats = {'channels_last': torch.channels_last, 'default': torch.contiguous_format}

def build(name, fmt='default'):
    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval().to(memory_format=formats[fmt])

def random_images(n, seed):
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(seed))

# fasterai's Tucker

def tucker(dense, removed):
    "Decompose with a part of the ranks removed; `None` if that fails"
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    try: return Conv_Decomposer().decompose(dense, percent_removed=removed, method='tucker')
    except RuntimeError: return None

@cache
def tucker_share(name, removed):
    "Return the share of MACs that `tucker` leaves; `None` if it fails"
    dense,x = build(name),torch.randn(1, 3, 224, 224)
    model = tucker(dense, removed)
    if model is not None: return count_macs(model, x)/count_macs(dense, x)

def tucker_within(name, macs):
    "Find the smallest part to remove that leaves at most the share `macs`; `None` if there is none"
    for i in range(1, 20):
        share = tucker_share(name, i/20)
        if share and share <= macs: return i/20

def beside_tucker(name, dense, x, macs):
    "Measure fasterai's Tucker with at most the share `macs`; return `{}` if it cannot go that far"
    removed = tucker_within(name, macs)
    if removed is None: return {}
    ratio = measured_ratio(dense, tucker(dense, removed), x, 20.)
    return dict(fasterai=ratio, fasterai_macs=tucker_share(name, removed))

# This library

def plan_at_least(planner, budget):
    "Plan for `budget`, or for the next larger one, in steps of .05, that can be reached"
    try: return planner.make(Budget(latency=budget))
    except ValueError as e:
        print(e)
        return plan_at_least(planner, min(1., round(budget+.05, 2)))

def rows_of(name, calibration, fmt, bs, budgets):
    "Yield a row for each budget, the dense model and a batch; layers are timed only once, in the first"
    dense = build(name, fmt)
    x = random_images(bs, 1).contiguous(memory_format=formats[fmt])
    planner = Planner(calibrated(dense, calibration, calibration.settings), sample=x)
    for budget in budgets:
        plan,planning_s = timed(plan_at_least, planner, budget)
        small = plan.apply(dense)
        row = dict(model=name, format=fmt, batch=bs, budget=plan.budget['latency'],
                   predicted=plan.predicted['latency'], measured=measured_ratio(dense, small, x, 20.),
                   macs=count_macs(small, x[:1])/count_macs(dense, x[:1]),
                   params=count_params(small)/count_params(dense), planning_s=planning_s)
        yield row,dense,x

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--models', nargs='+', default=['vgg16_bn', 'resnet50'])
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 16])
    parser.add_argument('--formats', nargs='+', default=list(formats))
    parser.add_argument('--budgets', type=float, nargs='+', default=[.5, .8])
    parser.add_argument('--no-peer', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'latency.csv')
    args = parser.parse_args()
    rows = []
    for name in args.models:
        calibration,seconds = timed(calibrate, build(name), [random_images(8, 0)])
        for fmt in args.formats:
            for bs in args.batches:
                for row,dense,x in rows_of(name, calibration, fmt, bs, args.budgets):
                    row['moments_s'] = seconds
                    if not args.no_peer: row |= beside_tucker(name, dense, x, row['macs'])
                    rows.append(row)
                    print(rounded(row), flush=True)
                    pd.DataFrame(rows).to_csv(args.out, index=False)
    print(pd.DataFrame(rows).round(3).to_string(index=False))

if __name__ == '__main__': main()
