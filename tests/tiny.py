"A tiny Learner that trains on generated data without any output, and what to ask of it"
import random

import torch
from torch import nn
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop

torch.set_num_threads(1)

def splitter(m): return [list(m[:3].parameters()), list(m[3:5].parameters()), list(m[5:].parameters())]

def net():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8,12), nn.ReLU(), nn.BatchNorm1d(12), nn.Linear(12,10), nn.ReLU(), nn.LayerNorm(10), nn.Linear(10,4))
    for i in (2,5): nn.init.normal_(m[i].bias)      # Larc never moves a parameter of norm zero
    return m

def mk_learn(opt_func=Adam, splitter=splitter, path=None, model=None, n=64, **kw):
    model = model or net()
    random.seed(0)                                  # of the order in which fastai draws the training items
    g = torch.Generator().manual_seed(1)
    x,y = torch.randn(n, 8, generator=g), torch.randn(n, 4, generator=g)
    dls = Datasets(range(n), [[x.__getitem__],[y.__getitem__]], splits=[range(n),range(n)]).dataloaders(bs=16, device='cpu', num_workers=0)
    learn = Learner(dls, model, loss_func=nn.MSELoss(), opt_func=opt_func, splitter=splitter, path=path, **kw)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def snapshot(model): return [p.detach().clone() for p in model.parameters()]
def moved(before, model): return [not torch.equal(a,b) for a,b in zip(before, model.parameters(), strict=True)]
def ids(ps): return [id(p) for p in ps]
def flat(opt): return [p for pg in opt.param_lists for p in pg]
