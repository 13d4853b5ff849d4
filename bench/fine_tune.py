"""A decomposition in a fastai fit, two epochs of training included, against the dense network trained for the same two epochs: a ResNet-20 on CIFAR-10.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning einops
    PYTHONPATH=peer python bench/fine_tune.py WEIGHTS

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`. All methods see the 50,000 training images twice, flipped and shifted at random, in the same order. Differences are of the same
10,000 test images, with the standard error of the paired difference. What each run came to is kept in a folder outside the project, so that an interrupted bench goes on where it was.
"""
import argparse, copy, time, warnings
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
from one_shot import peer, shrunk
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.cost import count_macs, count_params
from fasterai_lr.fit import output_loss
from fasterai_lr.layers import evaluating, factored_layers
from fasterai_lr.budget import Budget

class Images(DataLoader):
    "Batches of images `x`, uint8, and labels; for training flipped and shifted by up to four pixels at random, image by image"
    def __init__(self, x, y, bs, train):
        super().__init__(range(len(x)), bs=bs, shuffle=train, drop_last=train)
        self.x,self.y,self.train = F.pad(x, (4,)*4) if train else x,y,train

    def create_batches(self, samps): yield from map(self.draw, self.chunkify(samps))

    def draw(self, idxs):
        n = torch.tensor(idxs)
        x = self.moved(n) if self.train else self.x[n]
        return normalised(x).contiguous(memory_format=torch.channels_last), self.y[n]

    def moved(self, n):
        i,j,flip = torch.randint(9, (len(n), 1)),torch.randint(9, (len(n), 1)),torch.rand(len(n), 1) < .5
        a = torch.arange(32)
        rows,cols = i + a,j + torch.where(flip, 31-a, a)
        return self.x[n[:,None,None,None], torch.arange(3)[:,None,None], rows[:,None,:,None], cols[:,None,None,:]]

class BFloat16(Callback):
    "fastai's `MixedPrecision` is for GPUs; on a CPU with bfloat16 instructions this halves the time"
    order = 10
    def before_batch(self):
        self.cast = torch.autocast('cpu', torch.bfloat16)
        self.cast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.cast.__exit__(None, None, None)

class Teacher(Callback):
    "What `DecomposeCallback(distill=…)` adds to the loss, for models that were not decomposed by it"
    order = 61
    def __init__(self, model, weight): self.teacher,self.weight = model,weight
    def after_pred(self):
        with torch.no_grad(): self.want = self.teacher(*self.xb)
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad + self.weight*output_loss(self.pred, self.want.float())

class FrozenStatistics(Callback):
    "BatchNorm in eval mode"
    order = 62
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()

class FrobeniusDecay(Callback):
    "Decay of the product of the factors (Khodak et al. 2021)"
    order = 62
    def __init__(self, weight): self.weight = weight
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad + self.weight/2*sum(l.weight.square().sum() for l in factored_layers(self.model).values())

class AtStart(Callback):
    "Which test images are right before the first step"
    order = 63
    def __init__(self, test): self.test = test
    def before_train(self):
        if self.epoch == 0: self.right = right(self.model, *self.test)

@torch.no_grad()
def right(model, x, y, bs=250):
    with evaluating(model):
        return torch.cat([model(normalised(b).contiguous(memory_format=torch.channels_last)).argmax(1) for b in x.split(bs)]) == y

def tucker(dense, share): return shrunk(partial(peer, dense, method='tucker'), share, torch.zeros(1, 3, 32, 32), dense)

base = dict(peak=1e-3, distill=1.)
runs = {'dense': dict(distill=0.), 'dense, with its former self as teacher': {}, 'fasterai tucker': {}, 'fasterai tucker, no distillation': dict(distill=0.), 'fasterai_lr': {},
        'fasterai_lr, no distillation': dict(distill=0.), 'fasterai_lr, peak 1e-4': dict(peak=1e-4), 'fasterai_lr, peak 3e-3': dict(peak=3e-3),
        'fasterai_lr, SGD, peak 0.02': dict(opt=SGD, peak=.02), 'fasterai_lr, BatchNorm in eval mode': dict(helpers=[FrozenStatistics]),
        'fasterai_lr, Frobenius decay 1e-4': dict(helpers=[partial(FrobeniusDecay, 1e-4)])}

def train(name, share, dense, train, test, epochs, bs, seed, peak, distill, opt=Adam, helpers=()):
    "The model, and which test images are right before and after"
    model,cbs = copy.deepcopy(dense),[BFloat16(), AtStart(test), *[h() for h in helpers]]
    if name.startswith('fasterai tucker'): model = tucker(dense, share)
    if name.startswith('fasterai_lr'):
        idx = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:2000]
        cbs.append(DecomposeCallback(0, Budget(macs=share), ft_lr=peak, distill=distill, data=list(normalised(train[0][idx]).split(128))))
    elif distill: cbs.append(Teacher(dense, distill))
    set_seed(seed)
    dls = DataLoaders(Images(*train, bs, True), Images(*test, 500, False), device='cpu')
    learn = Learner(dls, model.to(memory_format=torch.channels_last), loss_func=nn.CrossEntropyLoss(), opt_func=opt, cbs=cbs)
    with learn.no_bar(): learn.fit_one_cycle(epochs, peak)
    return learn.model, learn.at_start.right, right(learn.model, *test)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('weights')
    parser.add_argument('--macs', type=float, nargs='+', default=[.5, .37])
    parser.add_argument('--runs', nargs='+', default=list(runs), help='; '.join(runs))
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--bs', type=int, default=128)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kept', type=Path, default=fastai_path('model')/'fine_tune', help='folder for what each run came to')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'fine_tune.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    dense,data = resnet20(args.weights).to(memory_format=torch.channels_last),[pixels(s) for s in ('train', 'test')]
    for name in args.runs:
        for share in [1.] if name.startswith('dense') else args.macs: one(name, share, dense, data, args)
    table(args.kept).to_csv(args.out, index=False)

def one(name, share, dense, data, args):
    "Carry out one run and keep what it came to"
    file = args.kept/f'{name} {share} {args.seed}.pt'
    if file.exists(): return
    start,x = time.perf_counter(),torch.zeros(1, 3, 32, 32)
    model,before,after = train(name, share, dense, *data, args.epochs, args.bs, args.seed, **(base | runs[name]))
    row = dict(method=name, budget=share, seed=args.seed, macs=count_macs(model, x)/count_macs(dense, x), params=count_params(model)/count_params(dense),
               before=100*before.float().mean().item(), accuracy=100*after.float().mean().item(), seconds=time.perf_counter()-start)
    print({k: round(v, 3) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(row=row, right=after), file)

def table(kept):
    "One row for each run in the folder, compared with the dense network of the same seed"
    res = [torch.load(f) for f in sorted(kept.glob('*.pt'))]
    dense = {r['row']['seed']: r['right'] for r in res if r['row']['method'] == 'dense'}
    def compared(row, right):
        drop = 100*(dense[row['seed']].float() - right.float())
        return row | dict(drop=drop.mean().item(), se=(drop.std()/len(drop)**.5).item())
    order = {n:i for i,n in enumerate(runs)}
    return pd.DataFrame([compared(**r) for r in res]).sort_values(['method', 'budget'], key=lambda c: c.map(order) if c.name == 'method' else -c)

if __name__ == '__main__': main()
