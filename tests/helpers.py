"What several tests ask of models: calls of the package, comparisons and counts; for learners see `learners.py`"
import random
from contextlib import contextmanager

import numpy as np, torch
from torch import nn

from fasterai_lr.calibrate import Calibration, calibrate
from fasterai_lr.fit import fit
from fasterai_lr.layers import factored_layers
from fasterai_lr.planner import Planner

# Calls of the package

def fitted(model, choices, data, **settings)->nn.Module:
    "A copy of `model` factored as `choices` says and fitted on `data`"
    known = isinstance(data, Calibration)
    return fit(data if known else calibrate(model, data, **settings), choices).model

def planner(model, data, sample=None, **settings)->Planner:
    "A `Planner` that knows `model` from `data`"
    known = isinstance(data, Calibration)
    return Planner(data if known else calibrate(model, data, **settings), sample)

def records(model):
    "{layer name: what the plan of a decomposed `model` says of it}"
    return model.low_rank_plan['layers']

# Counts

def n_params(model):
    "The number of parameters of `model`"
    return sum(p.numel() for p in model.parameters())

def n_factored(model):
    "The number of factored layers in `model`"
    return len(factored_layers(model))

# Comparisons

def gen(seed=0):
    "A generator of random numbers that starts at `seed`"
    return torch.Generator().manual_seed(seed)

def miss(model, dense, x):
    "The relative error of the outputs of `model` against those of `dense`"
    with torch.no_grad():
        want = dense(x)
        return float((model(x) - want).norm()/want.norm())

def apart(a, b):
    "The largest difference of two tensors of one shape and dtype, relative to the largest entry of `b`"
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a,b = a.detach(),b.detach()
    return float((a - b).abs().max()/b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))

def same(a, b):
    "Are `a` and `b` equal to the last bit? They may be tensors, arrays, and collections of such"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def hooks_of(module):
    "The hooks of every kind that `module`, or torch's module of modules, has"
    return {k: list(hooks) for k,hooks in vars(module).items() if '_hooks' in k and isinstance(hooks, dict)}

def state_of(model):
    "All that a call which only reads `model` must leave as it is, for `same`"
    modules = [(n, id(m), m.training, sorted(vars(m)), hooks_of(m)) for n,m in model.named_modules()]
    tensors = {n: (id(t), t.detach().clone()) for n,t in model.state_dict(keep_vars=True).items()}
    grads = [(p.requires_grad, id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    randoms = torch.get_rng_state(),random.getstate(),np.random.get_state()
    modes = hooks_of(nn.modules.module),torch.is_grad_enabled(),torch.is_inference_mode_enabled(),torch.backends.mha.get_fastpath_enabled()
    return modules,tensors,grads,randoms,modes

@contextmanager
def unchanged(model):
    "What happens in this context leaves `model` and the random generators alone"
    before = state_of(model)
    yield
    assert same(before, state_of(model))

def snapshot(model):
    "Copies of the parameters of `model`"
    return [p.detach().clone() for p in model.parameters()]

def moved(before, model):
    "For each parameter of `model`: is it another than in the `snapshot` `before`?"
    return [not torch.equal(a, b) for a,b in zip(before, model.parameters(), strict=True)]

def ids(objects):
    "The `id` of each of `objects`"
    return [id(o) for o in objects]

def flat(opt):
    "All parameters of a fastai optimizer, group after group"
    return [p for group in opt.param_lists for p in group]
