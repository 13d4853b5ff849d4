"""The dense models and the inputs that the files in this folder belong to

They depend on nothing but draws of NumPy's `RandomState.random_sample`, which NumPy promises not to change,
and on arithmetic that every machine rounds alike. So they are the same in every version of torch.
Change nothing here: the files stay as they are, and so must these.
"""
import copy
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np, torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

folder = Path(__file__).resolve().parent

def uniform(rng, *shape): return rng.random_sample(shape)*2 - 1

def weight(rng, shape):
    "A sum of six outer products, each half as large as the one before: a low rank of it is not ambiguous"
    res = np.zeros(shape)
    for r in range(6):
        term = np.array(.5**r*sqrt(3**len(shape)/np.prod(shape[1:])))
        for n in shape: term = term[...,None]*uniform(rng, n)
        res = res + term
    return res

def filled(model, seed=0):
    "`model` with new values in all parameters and buffers; what a norm scales by is positive"
    rng = np.random.RandomState(seed)
    with torch.no_grad():
        for n,t in (*model.named_parameters(), *model.named_buffers()):
            if not t.is_floating_point(): continue
            new = weight(rng, tuple(t.shape)) if t.dim() > 1 else uniform(rng, *t.shape)
            owner = model.get_submodule(n.rpartition('.')[0])
            if isinstance(owner, nn.modules.batchnorm._NormBase) and n.endswith(('weight', 'running_var')): new = 1 + new/2
            t.copy_(torch.from_numpy(new))
    return model.eval()

def inputs(*shape, seed=1): return torch.from_numpy(uniform(np.random.RandomState(seed), *shape)).float()

def data(*shape, seed=2): return list(inputs(*shape, seed=seed).split(8))

# Every scheme, and every type of layer

convs = nn.Conv1d, nn.Conv2d, nn.Conv3d
transposed = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d

def kind(n, odd, back):
    "A convolution with `n` axes, or a transposed one; odd: groups, a stride, circular padding, no bias"
    k = (3, 2, 3)[:n] if odd else (3, 3, 1)[:n]
    args = dict(groups=1+odd, stride=1+odd, bias=not odd)
    if back: return transposed[n-1](4, 6, k, padding=tuple(o//2 for o in k), output_padding=odd, **args)
    if odd: return convs[n-1](4, 6, k, padding=1, padding_mode='circular', **args)
    return convs[n-1](4, 6, k, padding='same', dilation=(2, 1, 1)[:n], **args)

class Kinds(nn.Module):
    "Layers named after the scheme that is to factor them and the number of their axes"
    def __init__(self):
        super().__init__()
        self.linear,self.plain = nn.Linear(8, 6),nn.Linear(8, 6, bias=False)
        for i,s in enumerate(('svd', 'spatial', 'tucker', 'cp', 'slice')):
            for n in (1, 2, 3):
                odd = (i+n) % 2
                if n > 1 or s not in ('spatial', 'slice'): self.add_module(f'{s}{n}', kind(n, odd, False))
                if n == 2 or s in ('svd', 'cp'): self.add_module(f'{s}{n}_back', kind(n, odd, True))

    def forward(self, x, *maps): # `[n, 8]`, and `[n, 4, *sizes]` with 1, 2 and 3 sizes
        res = [self.linear(x), self.plain(x)]
        for m in self.children():
            if hasattr(m, 'kernel_size'): res.append(m(maps[len(m.kernel_size)-1]).flatten(1))
        return torch.cat(res, 1)

def kinds(): return filled(Kinds())
kinds_inputs = inputs(1, 8), inputs(1, 4, 5, seed=2), inputs(1, 4, 3, 3, seed=3), inputs(1, 4, 2, 3, 2, seed=4)

# Every way to ask for a rank, and layers that stay dense

class Odd(nn.Linear): "A subclass, which is left dense"

class Ranks(nn.Module):
    def __init__(self):
        super().__init__()
        self.share,self.energy,self.evbmf,self.noise = (nn.Linear(8, 8) for _ in range(4))
        self.unnamed,self.small,self.odd = nn.Linear(8, 8),nn.Linear(8, 2),Odd(8, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.tied,self.hooked,self.tied_too = (nn.Linear(8, 8) for _ in range(3))
        self.tied_too.weight = self.tied.weight
        self.hooked.register_forward_hook(lambda m, args, out: 2*out)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.ints,self.fractions,self.evbmf_conv = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.depthwise,self.pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=4),nn.Conv2d(4, 4, 1)

    def forward(self, x, maps): # `[n, t, 8]` and `[n, 4, h, w]`
        res = [self.attention(x, x, x, need_weights=False)[0]]
        for m in self.children():
            if m is not self.attention: res.append(m(maps if hasattr(m, 'kernel_size') else x))
        return torch.cat([o.flatten(1) for o in res], 1)

def ranks():
    model = filled(Ranks())
    with torch.no_grad(): model.noise.weight.copy_(torch.from_numpy(uniform(np.random.RandomState(5), 8, 8)))
    return model
ranks_inputs = inputs(1, 2, 8), inputs(1, 4, 3, 3, seed=2)

# Layers of several dtypes

class Dtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.single,self.wide,self.short = nn.Linear(8, 8),nn.Linear(8, 8).double(),nn.Linear(8, 8).bfloat16()
        self.wide_conv,self.short_conv = nn.Conv1d(4, 6, 3).double(),nn.Conv1d(4, 6, 3, bias=False).bfloat16()

    def forward(self, x, maps): # `[n, 8]` and `[n, 4, length]`
        res = []
        for m in self.children():
            i = maps if hasattr(m, 'kernel_size') else x
            res.append(m(i.to(next(m.parameters()).dtype)).flatten(1).double())
        return torch.cat(res, 1)

def dtypes(): return filled(Dtypes())
dtypes_inputs = inputs(2, 8), inputs(2, 4, 5, seed=2)

# A part of it decomposed by itself, twice, for a budget

def net():
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.ReLU())
    return filled(nn.Sequential(body, nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5)))
net_inputs = inputs(3, 3, 6, 6),
def net_data(): return data(64, 3, 6, 6)

# Large enough for a plan by time; only its plan is in a file

def large(): return filled(nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 8)))
large_inputs = inputs(2, 768),
def large_data(): return data(32, 768)

# A training loop and a Learner

def mlp():
    # the norm comes first: a bias before one may have no gradient but rounding, of which Adam makes whole steps
    return filled(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(),
                                nn.Linear(10, 4)))
mlp_inputs = inputs(3, 8),

sgd = dict(lr=1e-2, momentum=.9)

def step(model, opt):
    "Of a plain training loop"
    opt.zero_grad()
    model(mlp_inputs[0]).square().sum().backward()
    opt.step()

def mk_learn(path, opt_func):
    "A quiet Learner whose epochs are one batch, so that the order of the items makes no difference"
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import Datasets
    from fastai.data.transforms import ItemGetter
    from fastai.imports import noop
    from fastai.learner import Learner
    items,all16 = list(zip(inputs(16, 8, seed=6), inputs(16, 4, seed=7))),range(16)
    sets = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[all16, all16])
    dls = sets.dataloaders(bs=16, device='cpu', num_workers=0)
    learn = Learner(dls, mlp(), loss_func=nn.MSELoss(), opt_func=opt_func, path=path, model_dir='.')
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def optimizers():
    from fastai.optimizer import Adam, OptimWrapper, SGD
    return dict(adam=Adam, sgd=partial(SGD, mom=.9), adamw=partial(OptimWrapper, opt=torch.optim.AdamW))

# What is compared

def outputs(model, xs):
    "The outputs in float64, in which the same weights give the same numbers on every machine, but for 1e-15"
    model = copy.deepcopy(model).eval().double()
    with torch.no_grad(): return model(*(x.double() for x in xs)).numpy()
