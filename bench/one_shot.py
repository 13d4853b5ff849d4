"""Decomposition without training: accuracy against the share of MACs, parameters and time that is kept, with unlabelled images only.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/one_shot.py WEIGHTS            # a ResNet-20 on CIFAR-10
    PYTHONPATH=peer python bench/one_shot.py --net resnet18     # torchvision's on Imagenette at 128 pixels

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`; `bench/imagenette.py` finds or trains its own. Every method gets the same images; fasterai's, and those that use the weights
alone, need none and are run once. Images and models are in channels_last. Each is brought to at most the share of MACs asked for. All differences are over the same test images: `drop` is to the dense network with its standard error `se`, `behind`
to fasterai_lr without distillation at the same budget and seed (the first seed for what has none), with its 95 % interval `low` to `high`. A run that was interrupted goes on where it stopped. Latency wants
an idle machine, and so do the seconds: `calibrate`, those of the moments, and `seconds`, of all that follows; for distillation those of its steps.
"""
import argparse, time, warnings
from functools import cache, partial
from pathlib import Path

import pandas as pd, torch

import cifar, imagenette
from fasterai_lr.cost import count_macs, count_params, measure_latency
from fasterai_lr.decomposer import ConvDecomposer
from fasterai_lr.distill import distill, flip_crop_and_mix
from fasterai_lr.fit import fit
from fasterai_lr.budget import Budget
from fasterai_lr.planner import Planner

nets = dict(resnet20=(cifar.resnet20, cifar.images), resnet18=(imagenette.resnet18, imagenette.images))
ours = 'fasterai_lr'

fractions = [i/40 for i in range(40, 0, -1)] # of the full rank

def shrunk(make, macs, x, dense):
    "What `make` returns for the largest of `fractions`, found by bisection, that leaves at most the share `macs`"
    limit,low,high,best = macs*count_macs(dense, x),0,len(fractions),None
    while low < high:
        mid = at = (low+high)//2
        while at < high and (model := attempted(make, fractions[at])) is None: at += 1
        if at == high: high = mid
        elif count_macs(model, x) <= limit: high,best = mid,model
        else: low = at+1
    return best

def timed(f, *args, **kwargs):
    "What `f` returns and its seconds"
    start = time.perf_counter()
    return f(*args, **kwargs),time.perf_counter()-start

def attempted(make, f):
    try: return make(f)
    except RuntimeError: pass # fasterai's tucker at some ranks

def peer(dense, f, method):
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    return Conv_Decomposer().decompose(dense, percent_removed=1-f, method=method)

def uniform(dense, f, method='spatial'): return ConvDecomposer(method, rank=f).decompose(dense)

def blind(dense, x, macs):
    "{name: what makes the model} of the methods that see no data"
    makes = {f'fasterai {m}': partial(peer, method=m) for m in ('tucker', 'svd', 'spatial', 'cp')}
    makes |= {f'plain {label}, one fraction': partial(uniform, method=m) for label,m in (('SVD', 'svd'), ('spatial', 'spatial'))}
    return {n: partial(shrunk, partial(f, dense), macs, x, dense) for n,f in makes.items()}

def seeing(dense, x, macs, batches, planner, steps, seed):
    "{name: what makes the model} of the methods that see `batches`"
    def planned(metric, **kw):
        p = planner()
        p.metric,p.options = metric,{}
        return p.plan(Budget(macs=macs)).apply(dense, batches, moments=p.moments, metric=metric, seed=seed, **kw)
    def one_fraction():
        layers = shrunk(partial(uniform, dense), macs, x, dense).low_rank_plan['layers']
        return fit(dense, {n: (l['scheme'], l['rank']) for n,l in layers.items() if l['scheme']}, batches, planner().moments, seed=seed)
    closed = cache(lambda: planned('fisher'))
    makes = {ours: closed}
    if steps: makes[f'{ours}, distilled'] = lambda: distill(closed(), dense, batches, steps, augment=flip_crop_and_mix, seed=seed)
    return makes | {'Fisher, ranks by budget': lambda: planned('fisher', sequential=False), 'activations, ranks by budget': lambda: planned('activation', sequential=False),
                    'one fraction, sequential fit': one_fraction}

@torch.no_grad()
def is_right(model, x, y, bs=250):
    "Which of the images get their label, as booleans"
    return torch.cat([model.eval()(b).argmax(1) for b in x.split(bs)]) == y

def mean_and_se(a, b):
    "Percentage points by which `b` is below `a` on the same images, and the standard error"
    d = 100*(a.float() - b.float())
    return d.mean().item(), (d.std()/len(d)**.5).item()

def row(model, dense, x, right, right_dense):
    "What is measured of one model"
    ms,(drop,se) = measure_latency([dense, model], x[:16], 7),mean_and_se(right_dense, right)
    kept = {k: count(model)/count(dense) for k,count in (('macs', lambda m: count_macs(m, x[:1])), ('params', count_params))}
    return kept | dict(latency=ms[1].ms/ms[0].ms, accuracy=100*right.float().mean().item(), drop=drop, se=se)

def load_images(images, *args):
    x,y = images(*args)
    return x.contiguous(memory_format=torch.channels_last),y

def with_intervals(rows, right):
    "The rows as a table, each with the 95 % interval of how far it is behind ours"
    def interval(r):
        same = (ours, r.budget, r.seed)
        if same not in right: return [None]*3
        behind,se = mean_and_se(right[same], right[r.method, r.budget, r.seed])
        return behind, behind-1.96*se, behind+1.96*se
    table = pd.DataFrame(rows)
    return table.assign(**dict(zip(('behind', 'low', 'high'), zip(*(interval(r) for r in table.itertuples())))))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('weights', nargs='?')
    parser.add_argument('--net', choices=nets, default='resnet20')
    parser.add_argument('--macs', type=float, nargs='+', default=[.5, .37, .25])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the draw of images; methods without one are run with the first')
    parser.add_argument('--images', type=int, default=2000, help='unlabelled training images')
    parser.add_argument('--steps', type=int, default=350, help='of self-distillation; 0: none')
    parser.add_argument('--methods', nargs='+', help='only these')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    load,images = nets[args.net]
    dense,test = load(args.weights).to(memory_format=torch.channels_last),load_images(images, 'test')
    out = args.out or Path(__file__).parent/'results'/f'one_shot_{args.net}.csv'
    bits = out.with_suffix('.pth') # which test images each model got right, for the intervals
    rows,right = (pd.read_csv(out).to_dict('records'),torch.load(bits)) if bits.exists() else ([],{})
    right['dense'] = is_right(dense, *test)
    print(f'dense: {right["dense"].float().mean():.2%} of {len(test[0]):,} images')
    for seed in args.seeds:
        x,_ = load_images(images, 'train', args.images, seed)
        batches = list(x.split(128))
        planner = cache(lambda batches=batches, seed=seed: timed(Planner, dense, batches, seed=seed))
        for macs in args.macs:
            sees,blinds = seeing(dense, x[:1], macs, batches, lambda planner=planner: planner()[0], args.steps, seed),blind(dense, x[:1], macs) if seed == args.seeds[0] else {}
            for name,make in (sees | blinds).items():
                key = name,macs,seed
                if key in right or name not in (args.methods or [name]): continue
                calibrate = planner()[1] if name in sees else 0.
                model,seconds = timed(make)
                if model is None: continue
                right[key] = is_right(model, *test)
                rows.append(dict(method=name, budget=macs, seed=seed, **row(model, dense, x, right[key], right['dense']), calibrate=calibrate, seconds=seconds))
                print({k: round(v, 3) if isinstance(v, float) else v for k,v in rows[-1].items()}, flush=True)
                out.parent.mkdir(exist_ok=True)
                with_intervals(rows, right).to_csv(out, index=False)
                torch.save(right, bits)
    table = pd.read_csv(out).groupby(['method', 'budget'], sort=False)[['macs', 'params', 'latency', 'drop', 'behind']].agg(['mean', 'std', 'count'])
    print(table.round(2).to_string())

if __name__ == '__main__': main()
