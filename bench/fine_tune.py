"""Compare a network that is decomposed in a fastai fit of two epochs with the dense network, trained for the
same two epochs: a ResNet-20 on CIFAR-10.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/fine_tune.py WEIGHTS

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`. All methods see the 50,000 training
images twice, flipped and shifted at random, in the same order. Differences are over the same 10,000 test
images, with the standard error of the paired difference. The result of each run is kept in a folder outside
the project, so you can interrupt the benchmark and continue it later.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse, copy
from functools import partial
from pathlib import Path

import pandas as pd, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Adam, Callback, DataLoaders, Learner, SGD, set_seed
from fastai.data.external import fastai_path
from fastai.data.load import DataLoader
from fastai.callback.schedule import *

from cifar import normalised, pixels, resnet20
from one_shot import mean_and_se, peer, rounded, shrunk, timed
from fasterai_lr.budget import Budget
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.cost import count_macs, count_params
from fasterai_lr.layers import factored_layers
from fasterai_lr.loss import classification
from fasterai_lr.running import evaluating

# Data and callbacks

def inputs(x):
    "Turn uint8 images into inputs of the network"
    return normalised(x).contiguous(memory_format=torch.channels_last)

class Images(DataLoader):
    """Batches of images and labels. For training, each image is flipped and shifted by up to four pixels at
    random"""
    def __init__(self, x, y, bs, train):
        super().__init__(range(len(x)), bs=bs, shuffle=train, drop_last=train)
        self.x = F.pad(x, (4,)*4) if train else x
        self.y = y
        self.train = train

    def create_batches(self, samps): yield from map(self.draw, self.chunkify(samps))

    def draw(self, idxs):
        n = torch.tensor(idxs)
        x = self.moved(n) if self.train else self.x[n]
        return inputs(x),self.y[n]

    def moved(self, n):
        i,j = torch.randint(9, (len(n), 1)),torch.randint(9, (len(n), 1))
        flip = torch.rand(len(n), 1) < .5
        a = torch.arange(32)
        rows,cols = i + a,j + torch.where(flip, 31-a, a)
        channels = torch.arange(3)[:,None,None]
        return self.x[n[:,None,None,None], channels, rows[:,None,:,None], cols[:,None,None,:]]

class BFloat16(Callback):
    "Train in bfloat16 on a CPU, in about half the time; fastai's `MixedPrecision` is for GPUs"
    order = 10
    def before_batch(self):
        self.cast = torch.autocast('cpu', torch.bfloat16)
        self.cast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.cast.__exit__(None, None, None)

class Teacher(Callback):
    "Add to the loss what `DecomposeCallback(distill=…)` adds, for other models"
    order = 61
    def __init__(self, model, weight): self.teacher,self.weight = model,weight
    def after_pred(self):
        with torch.no_grad(): self.want = self.teacher(*self.xb)
    def after_loss(self):
        if not self.training: return
        distance = classification.distance(self.pred, self.want.float())
        self.learn.loss_grad = self.loss_grad + self.weight*distance

class FrozenStatistics(Callback):
    "Train with BatchNorm in eval mode"
    order = 62
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()

class FrobeniusDecay(Callback):
    "Decay the product of the factors (Khodak et al. 2021)"
    order = 62
    def __init__(self, weight): self.weight = weight
    def after_loss(self):
        if not self.training: return
        squares = sum(l.weight.square().sum() for l in factored_layers(self.model).values())
        self.learn.loss_grad = self.loss_grad + self.weight/2*squares

class AtStart(Callback):
    "Record which test images are right before the first step"
    order = 63
    def __init__(self, test): self.test = test
    def before_train(self):
        if self.epoch == 0: self.right = right(self.model, *self.test)

@torch.no_grad()
def right(model, x, y, bs=250):
    "Find the images that get their label, as booleans"
    with evaluating(model):
        guesses = torch.cat([model(inputs(b)).argmax(1) for b in x.split(bs)])
    return guesses == y

# The runs

def tucker(dense, share):
    "Decompose with fasterai's Tucker to at most this share of the MACs"
    return shrunk(partial(peer, dense, method='tucker'), share, torch.zeros(1, 3, 32, 32), dense)

base = dict(peak=1e-3, distill=1.)
runs = {
    'dense': dict(distill=0.),
    'dense, with its former self as teacher': {},
    'fasterai tucker': {},
    'fasterai tucker, no distillation': dict(distill=0.),
    'fasterai_lr': {},
    'fasterai_lr, no distillation': dict(distill=0.),
    'fasterai_lr, peak 1e-4': dict(peak=1e-4),
    'fasterai_lr, peak 3e-3': dict(peak=3e-3),
    'fasterai_lr, SGD, peak 0.02': dict(opt=SGD, peak=.02),
    'fasterai_lr, BatchNorm in eval mode': dict(helpers=[FrozenStatistics]),
    'fasterai_lr, Frobenius decay 1e-4': dict(helpers=[partial(FrobeniusDecay, 1e-4)])}

class Bench:
    "The dense network, the data, and the length of the training"
    def __init__(self, weights, epochs, bs, seed):
        self.dense = resnet20(weights).to(memory_format=torch.channels_last)
        self.train_data,self.test_data = pixels('train'),pixels('test')
        self.epochs,self.bs,self.seed = epochs,bs,seed

    def run(self, name, share):
        "Return the row of one run, and which test images are right after it"
        options = base | runs[name]
        (model,before,after),seconds = timed(self._train, name, share, **options)
        x = torch.zeros(1, 3, 32, 32)
        row = dict(method=name, budget=share, seed=self.seed,
                   macs=count_macs(model, x)/count_macs(self.dense, x),
                   params=count_params(model)/count_params(self.dense),
                   before=percent(before), accuracy=percent(after), seconds=seconds)
        return row,after

    def _train(self, name, share, peak, distill, opt=Adam, helpers=()):
        "Return the model, and which test images are right before and after the training"
        model = copy.deepcopy(self.dense)
        at_start = AtStart(self.test_data)
        cbs = [BFloat16(), at_start, *[helper() for helper in helpers]]
        if name.startswith('fasterai tucker'): model = tucker(self.dense, share)
        if name.startswith('fasterai_lr'): cbs.append(self._decomposing(share, peak, distill))
        elif distill: cbs.append(Teacher(self.dense, distill))
        set_seed(self.seed)
        train,test = Images(*self.train_data, self.bs, True),Images(*self.test_data, 500, False)
        learn = Learner(DataLoaders(train, test, device='cpu'), model.to(memory_format=torch.channels_last),
                        loss_func=nn.CrossEntropyLoss(), opt_func=opt, cbs=cbs)
        with learn.no_bar(): learn.fit_one_cycle(self.epochs, peak)
        return learn.model,at_start.right,right(learn.model, *self.test_data)

    def _decomposing(self, share, peak, distill):
        x,_ = self.train_data
        idx = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:2000]
        data = list(normalised(x[idx]).split(128))
        return DecomposeCallback(0, Budget(macs=share), ft_lr=peak, distill=distill, data=data)

def percent(right): return 100*right.float().mean().item()

def table(kept):
    "Compare each run in the folder with the dense network of the same seed, a row for each"
    found = [torch.load(f) for f in sorted(kept.glob('*.pt'))]
    dense = {r['row']['seed']: r['right'] for r in found if r['row']['method'] == 'dense'}
    rows = []
    for r in found:
        drop,se = mean_and_se(dense[r['row']['seed']], r['right'])
        rows.append(r['row'] | dict(drop=drop, se=se))
    order = {n:i for i,n in enumerate(runs)}
    def key(column): return column.map(order) if column.name == 'method' else -column
    return pd.DataFrame(rows).sort_values(['method', 'budget'], key=key)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('weights')
    parser.add_argument('--macs', type=float, nargs='+', default=[.5, .37])
    parser.add_argument('--runs', nargs='+', default=list(runs), help='; '.join(runs))
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kept', type=Path, default=fastai_path('model')/'fine_tune',
                        help='folder for the result of each run')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'fine_tune.csv')
    args = parser.parse_args()
    bench = Bench(args.weights, args.epochs, args.bs, args.seed)
    args.kept.mkdir(parents=True, exist_ok=True)
    for name in args.runs:
        for share in [1.] if name.startswith('dense') else args.macs:
            file = args.kept/f'{name} {share} {args.seed}.pt'
            if file.exists(): continue
            row,right_after = bench.run(name, share)
            print(rounded(row), flush=True)
            torch.save(dict(row=row, right=right_after), file)
    table(args.kept).to_csv(args.out, index=False)

if __name__ == '__main__': main()
