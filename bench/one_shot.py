"""Decompose without training, with unlabelled images only: accuracy against the share of MACs, parameters and
time that is kept.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/one_shot.py WEIGHTS            # a ResNet-20 on CIFAR-10
    PYTHONPATH=peer python bench/one_shot.py --net resnet18     # torchvision's on Imagenette at 128 pixels

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`; `bench/imagenette.py` finds or trains
its own. Every method gets the same images. fasterai's methods, and those that use the weights alone, need
none and run once. Images and models are in channels_last. Each method keeps at most the share of MACs that
you set. All differences are over the same test images: `drop` is the distance to the dense network, with its
standard error `se`; `behind` is the distance to fasterai_lr without distillation at the same budget and seed
(the first seed for methods without one), with its 95 % interval `low` to `high`. `calibrate` is the seconds
of the calibration, `seconds` those of everything after it; for distillation, those of its steps. Measure
times on an idle machine. If you interrupt a run, start it again to continue.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse, time
from functools import cache, cached_property, partial
from pathlib import Path

import pandas as pd, torch

import cifar, imagenette
from fasterai_lr.budget import Budget
from fasterai_lr.calibrate import calibrate
from fasterai_lr.cost import count_macs, count_params, measure_latency
from fasterai_lr.decomposer import ConvDecomposer, decompose
from fasterai_lr.distill import distill, flip_crop_and_mix
from fasterai_lr.fit import fit
from fasterai_lr.plan import Plan

nets = dict(resnet20=(cifar.resnet20, cifar.images), resnet18=(imagenette.resnet18, imagenette.images))
ours = 'fasterai_lr'

def timed(f, *args, **kwargs):
    "Return the result of `f` and the seconds it took"
    start = time.perf_counter()
    res = f(*args, **kwargs)
    return res,time.perf_counter()-start

# Methods without data: one fraction of the full rank for all layers

fractions = [i/40 for i in range(40, 0, -1)] # of the full rank

def shrunk(make, macs, x, dense):
    "Find by bisection the model of `make` for the largest fraction that leaves at most the share `macs`"
    limit,best = macs*count_macs(dense, x),None
    low,high = 0,len(fractions)
    while low < high:
        middle = at = (low+high)//2
        model = attempted(make, fractions[at])
        while model is None and at+1 < high:
            at += 1
            model = attempted(make, fractions[at])
        if model is None: high = middle
        elif count_macs(model, x) <= limit: high,best = middle,model
        else: low = at+1
    return best

def attempted(make, fraction):
    "Return the model of `make`, or `None` if it fails, as fasterai's Tucker does at some ranks"
    try: return make(fraction)
    except RuntimeError: return None

def peer(dense, fraction, method):
    "Decompose with fasterai"
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    return Conv_Decomposer().decompose(dense, percent_removed=1-fraction, method=method)

def uniform(dense, fraction, method='spatial'):
    "Decompose with this library, each weight by itself"
    return ConvDecomposer(method, rank=fraction).decompose(dense)

def without_images(dense, x, macs):
    "Return {name: function that makes the model} for the methods that see no data"
    makes = {f'fasterai {m}': partial(peer, dense, method=m) for m in ('tucker', 'svd', 'spatial', 'cp')}
    makes['plain SVD, one fraction'] = partial(uniform, dense, method='svd')
    makes['plain spatial, one fraction'] = partial(uniform, dense)
    return {name: partial(shrunk, make, macs, x, dense) for name,make in makes.items()}

# Methods with data

class WithImages:
    "The methods that see unlabelled images"
    def __init__(self, dense, x, seed):
        self.dense,self.seed = dense,seed
        self.batches = list(x.split(128))

    @cached_property
    def timed_calibration(self): return timed(calibrate, self.dense, self.batches, seed=self.seed)
    @property
    def calibration(self): return self.timed_calibration[0]
    @property
    def seconds(self): return self.timed_calibration[1]

    def by_budget(self, macs, **settings):
        "Decompose to a share of the MACs"
        return decompose(self.dense, Budget(macs=macs), self.calibration, **settings)

    def one_fraction(self, macs):
        "Decompose with one fraction of the full rank for all layers, and fit the factors"
        alone = shrunk(partial(uniform, self.dense), macs, self.batches[0][:1], self.dense)
        return fit(self.calibration, Plan.of(alone.low_rank_plan).choices).model

    def distilled(self, model, steps):
        return distill(model, self.dense, self.batches, steps, augment=flip_crop_and_mix, seed=self.seed)

    def methods(self, macs, steps):
        "Return {name: function that makes the model}"
        fitted = cache(partial(self.by_budget, macs))
        makes = {ours: fitted}
        if steps: makes[f'{ours}, distilled'] = lambda: self.distilled(fitted(), steps)
        makes['Fisher, ranks by budget'] = partial(self.by_budget, macs, sequential=False)
        makes['activations, ranks by budget'] = partial(self.by_budget, macs, metric='activation',
                                                        sequential=False)
        makes['one fraction, sequential fit'] = partial(self.one_fraction, macs)
        return makes

# What is measured

@torch.no_grad()
def is_right(model, x, y, bs=250):
    "Find the images that get their label, as booleans"
    model.eval()
    guesses = torch.cat([model(b).argmax(1) for b in x.split(bs)])
    return guesses == y

def mean_and_se(a, b):
    "Return by how many points `b` is below `a` on the same images, and the standard error"
    difference = 100*(a.float() - b.float())
    se = difference.std()/len(difference)**.5
    return difference.mean().item(),se.item()

def costs(model, dense, x):
    "Return the shares of MACs, parameters and time that `model` keeps"
    times = measure_latency(dict(dense=dense, model=model), x[:16], 7)
    return dict(macs=count_macs(model, x[:1])/count_macs(dense, x[:1]),
                params=count_params(model)/count_params(dense),
                latency=times['model'].ms/times['dense'].ms)

def accuracy(right, right_dense):
    "Return the accuracy, and by how many points it is below that of the dense model"
    drop,se = mean_and_se(right_dense, right)
    return dict(accuracy=100*right.float().mean().item(), drop=drop, se=se)

def rounded(row): return {k: round(v, 3) if isinstance(v, float) else v for k,v in row.items()}

class Results:
    "A row for each run, and the test images that its model got right, in two files"
    def __init__(self, out):
        self.out,self.bits = out,out.with_suffix('.pth')
        self.rows,self.right = [],{}
        if not self.bits.exists(): return
        self.rows = pd.read_csv(out).to_dict('records')
        self.right = torch.load(self.bits)

    def add(self, key, right, **measured): # `key`: method, budget and seed
        self.right[key] = right
        method,budget,seed = key
        self.rows.append(dict(method=method, budget=budget, seed=seed, **measured))
        print(rounded(self.rows[-1]), flush=True)
        self.out.parent.mkdir(exist_ok=True)
        self.table().to_csv(self.out, index=False)
        torch.save(self.right, self.bits)

    def table(self):
        "Return the rows, each with its distance to ours and the 95 % interval"
        return pd.DataFrame([row | self._behind(row) for row in self.rows])

    def _behind(self, row):
        mine = self.right[row['method'], row['budget'], row['seed']]
        same = ours,row['budget'],row['seed']
        if same not in self.right: return dict(behind=None, low=None, high=None)
        behind,se = mean_and_se(self.right[same], mine)
        return dict(behind=behind, low=behind-1.96*se, high=behind+1.96*se)

    def summary(self):
        "Return mean, deviation and number of the runs of each method and budget"
        groups = self.table().groupby(['method', 'budget'], sort=False)
        return groups[['macs', 'params', 'latency', 'drop', 'behind']].agg(['mean', 'std', 'count'])

def load_images(images, *args):
    x,y = images(*args)
    return x.contiguous(memory_format=torch.channels_last),y

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('weights', nargs='?')
    parser.add_argument('--net', choices=nets, default='resnet20')
    parser.add_argument('--macs', type=float, nargs='+', default=[.5, .37, .25])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                        help='for the draw of images; methods without images use the first')
    parser.add_argument('--images', type=int, default=2000, help='unlabelled training images')
    parser.add_argument('--steps', type=int, default=350, help='steps of self-distillation; 0: none')
    parser.add_argument('--methods', nargs='+', help='run only these methods')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.out is None: args.out = Path(__file__).parent/'results'/f'one_shot_{args.net}.csv'
    return args

def main():
    args = arguments()
    load,images = nets[args.net]
    dense = load(args.weights).to(memory_format=torch.channels_last)
    test = load_images(images, 'test')
    results = Results(args.out)
    right_dense = results.right['dense'] = is_right(dense, *test)
    print(f'dense: {right_dense.float().mean():.2%} of {len(right_dense):,} images')
    for seed in args.seeds:
        x,_ = load_images(images, 'train', args.images, seed)
        seeing = WithImages(dense, x, seed)
        for macs in args.macs:
            makes = seeing.methods(macs, args.steps)
            with_data = list(makes)
            if seed == args.seeds[0]: makes |= without_images(dense, x[:1], macs)
            for name,make in makes.items():
                key = name,macs,seed
                if key in results.right or name not in (args.methods or [name]): continue
                calibration_seconds = seeing.seconds if name in with_data else 0.
                model,seconds = timed(make)
                if model is None: continue
                right = is_right(model, *test)
                results.add(key, right, **costs(model, dense, x), **accuracy(right, right_dense),
                            calibrate=calibration_seconds, seconds=seconds)
    print(results.summary().round(2).to_string())

if __name__ == '__main__': main()
