"""Decomposition without training: accuracy against the share of MACs, of a ResNet-20 trained on CIFAR-10, with unlabelled images only.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/one_shot.py WEIGHTS

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`. Every method gets the same images; fasterai's, and those that use the weights alone, need none.
Each is brought to at most the share of MACs asked for. Differences are of the same test images, with the standard error of the paired difference.
"""
import argparse, time, warnings
from functools import partial
from pathlib import Path

import pandas as pd, torch

from cifar import images, predictions, resnet20
from fasterai_lr.cost import count_macs, count_params, measure_latency
from fasterai_lr.decomposer import ConvDecomposer, decompose
from fasterai_lr.fit import distill, fit, flip_and_crop
from fasterai_lr.plan import Budget, Planner

def shrunk(make, macs, x, dense, fractions=[i/40 for i in range(40, 0, -1)]):
    "What `make` returns for the largest of the fractions that leaves at most the share `macs`"
    total = count_macs(dense, x)
    for f in fractions:
        try: model = make(f)
        except RuntimeError: continue # fasterai's tucker at some ranks
        if count_macs(model, x) <= macs*total: return model

def peers():
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    methods = 'tucker','svd','spatial','cp'
    return {f'fasterai {m}': (lambda dense,f,m=m: Conv_Decomposer().decompose(dense, percent_removed=1-f, method=m)) for m in methods}

def uniform(dense, f, method='spatial', **kw): return ConvDecomposer(method, rank=f).decompose(dense, **kw)

def methods(dense, planner, x, macs, batches, steps, with_peers, seed):
    "yields (name, model, seconds) for one share of MACs"
    def timed(name, f):
        start = time.perf_counter()
        return name,f(),time.perf_counter()-start
    if with_peers:
        for name,make in peers().items(): yield timed(name, lambda: shrunk(partial(make, dense), macs, x, dense))
        yield timed('plain SVD, one fraction', lambda: shrunk(partial(uniform, dense, method='svd'), macs, x, dense))
        yield timed('plain spatial, one fraction', lambda: shrunk(partial(uniform, dense), macs, x, dense))
    def planned(metric, **kw):
        planner.metric,planner.options = metric,{}
        return planner.plan(Budget(macs=macs)).apply(dense, batches, moments=planner.moments, metric=metric, seed=seed, **kw)
    yield timed('activations, ranks by budget', lambda: planned('activation', sequential=False))
    yield timed('Fisher, ranks by budget', lambda: planned('fisher', sequential=False))
    def one_fraction():
        model = shrunk(partial(uniform, dense), macs, x, dense)
        return fit(dense, {n: (l['scheme'], l['rank']) for n,l in model.low_rank_plan['layers'].items() if l['scheme']}, batches, planner.moments, seed=seed)
    yield timed('one fraction, sequential fit', one_fraction)
    name,closed,seconds = timed('fasterai_lr', lambda: planned('fisher'))
    yield name,closed,seconds
    if steps:
        name,model,more = timed('fasterai_lr, distilled', lambda: distill(closed, dense, batches, steps, augment=flip_and_crop, seed=seed))
        yield name,model,seconds+more

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('weights')
    parser.add_argument('--macs', type=float, nargs='+', default=[.64, .5, .37, .25])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--images', type=int, default=2000, help='unlabelled training images')
    parser.add_argument('--steps', type=int, default=350, help='of self-distillation; 0: none')
    parser.add_argument('--test', type=int, default=None, help='test images; all of them by default')
    parser.add_argument('--no-peers', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'one_shot.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    dense,(test,labels),rows = resnet20(args.weights),images('test', args.test),[]
    right = predictions(dense, test) == labels
    print(f'dense: {right.float().mean():.2%} of {len(test):,} images')
    for seed in range(args.seeds):
        x,_ = images('train', args.images, seed)
        batches = list(x.split(128))
        start = time.perf_counter()
        planner = Planner(dense, batches, seed=seed)
        setup = time.perf_counter()-start
        for macs in args.macs:
            for name,model,seconds in methods(dense, planner, x[:1], macs, batches, args.steps, not args.no_peers and seed==0, seed):
                if model is None: continue
                ok = predictions(model, test) == labels
                drop = 100*(right.float() - ok.float())
                ms = measure_latency([dense, model], x[:16], 7)
                rows.append(dict(method=name, budget=macs, seed=seed, macs=count_macs(model, x[:1])/count_macs(dense, x[:1]), params=count_params(model)/count_params(dense),
                                 latency=ms[1].ms/ms[0].ms, accuracy=100*ok.float().mean().item(), drop=drop.mean().item(), se=(drop.std()/len(drop)**.5).item(), seconds=seconds + (setup if name.startswith('fasterai_lr') else 0)))
                print({k: round(v, 3) if isinstance(v, float) else v for k,v in rows[-1].items()}, flush=True)
                args.out.parent.mkdir(exist_ok=True)
                pd.DataFrame(rows).to_csv(args.out, index=False)
    table = pd.DataFrame(rows).groupby(['method', 'budget'], sort=False)[['macs', 'drop']].agg(['mean', 'std', 'count'])
    print(table.round(2).to_string())

if __name__ == '__main__': main()
