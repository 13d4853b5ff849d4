"Parts of a model without gradients: what they do counts all the same"
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from fasterai_lr.budget import Budget
from fasterai_lr.calibrate import calibrate
from fasterai_lr.decomposer import decompose
from helpers import gen

class Parts(nn.Module):
    "A backbone and a head; `run` says how the backbone is run"
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
        self.run = run
    def forward(self, x): return self.head(self.run(self.body, x))

def plain(body, x): return body(x)

def without_grad(body, x):
    with torch.no_grad(): return body(x)

@torch.no_grad()
def decorated(body, x): return body(x)

def switched_off(body, x):
    with torch.set_grad_enabled(False): return body(x)

def reentrant(body, x): return checkpoint(body, x, use_reentrant=True)
def not_reentrant(body, x): return checkpoint(body, x, use_reentrant=False)
def layer_by_layer(body, x):
    for m in body: x = checkpoint(m, x, use_reentrant=False)
    return x

def data(n=300): return torch.randn(n, 12, generator=gen(3))

@pytest.mark.parametrize('run', [without_grad, decorated, switched_off, reentrant, not_reentrant, layer_by_layer])
def test_gradients_reach_what_a_model_runs_without_them(run):
    "Moments are those of the same model with gradients everywhere; the grad mode and torch's checkpoints are as they were"
    want,got = calibrate(Parts(plain), data()),calibrate(Parts(run), data())
    for name in want:
        for field in ('grads', 'inputs', 'input_mean', 'positions'):
            a,b = getattr(want[name], field),getattr(got[name], field)
            assert a == b if field == 'positions' else torch.equal(a, b), (name, field)
    assert not got.no_gradient and torch.is_grad_enabled()
    model,x = Parts(run),data(8).requires_grad_()
    model(x).sum().backward()
    reached = run in (reentrant, not_reentrant, layer_by_layer)
    assert (model.body[0].weight.grad is not None) == reached # with x that needs a gradient, checkpoints have one

@pytest.mark.parametrize('run', [without_grad, reentrant])
def test_the_same_model_comes_back(run):
    x = data()
    a,b = (decompose(Parts(r), Budget(macs=.4), x) for r in (plain, run))
    assert a.low_rank_plan == b.low_rank_plan
    for p,q in zip(a.parameters(), b.parameters(), strict=True): assert torch.equal(p, q)

def detached(body, x): return body(x).detach()
def inferred(body, x):
    with torch.inference_mode(): out = body(x)
    return out.clone()

def lost_without(calibration, name):
    "What it costs to lose all outputs of a layer, to second order and up to a factor"
    m,W = calibration[name],calibration.model.get_submodule(name).weight.detach().double()
    return float((m.grads[0]*(W@m.inputs[0]@W.T)).sum())

@pytest.mark.parametrize('run', [detached, inferred])
def test_what_is_detached_is_measured_by_its_outputs(run):
    "To lose all of its outputs costs as much as for the median of the other layers, whatever the scale of its weights; the record says so"
    note = 'no gradient reaches it: measured by its outputs, on the scale of the median layer'
    for scale in (1., 100.):
        model = Parts(run)
        with torch.no_grad(): model.body[2].weight.mul_(scale)
        calibration = calibrate(model, data())
        assert calibration.no_gradient == {'body.0', 'body.2'} and calibration.note('body.2') == note and calibration.note('head.0') == ''
        lost = {name: lost_without(calibration, name) for name in calibration}
        for name in ('body.0', 'body.2'): assert lost[name] == pytest.approx((lost['head.0']+lost['head.2'])/2, rel=1e-6) # float32 moments
        small = decompose(model, Budget(macs=.5), calibration)
        factored = {name: layer for name,layer in small.low_rank_plan['layers'].items() if layer['scheme']}
        assert factored and all((layer['reason'] == note) == name.startswith('body') for name,layer in factored.items())
        assert 'loss' not in small.low_rank_plan['predicted'] and small.low_rank_plan['measured']['loss'] >= 0

def test_nothing_reaches_any_layer():
    "Where nothing is known of the loss, relative errors of the outputs are what counts"
    class Nothing(nn.Module):
        def __init__(self): super().__init__(); self.net = Parts(plain)
        def forward(self, x): return self.net(x).detach()
    calibration = calibrate(Nothing(), data())
    assert len(calibration.no_gradient) == 4
    for name in calibration: assert lost_without(calibration, name) == pytest.approx(1, rel=1e-6)

class Quantised(nn.Module):
    "Rounds with a straight-through estimate: the gradient passes beside the rounding"
    def __init__(self): super().__init__(); self.net = Parts(plain)
    def forward(self, x):
        h = self.net.body(x)
        with torch.no_grad(): codes = (4*h).round()/4
        return self.net.head(h + (codes - h).detach())

def test_straight_through_estimates_are_respected():
    calibration = calibrate(Quantised(), data())
    assert not calibration.no_gradient and all(m.grads.abs().sum() > 0 for m in calibration.values())
    net = copy.deepcopy(calibration.model)
    net(data(8)).sum().backward()
    assert net.net.body[0].weight.grad.abs().sum() > 0

def test_gradients_that_a_model_computes_itself_are_not_those_of_the_loss():
    "A model that differentiates by itself, like one of forces, has the moments of one that does not"
    class Forces(nn.Module):
        def __init__(self): super().__init__(); self.net = Parts(plain)
        def forward(self, x):
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                out = self.net(x)
                force, = torch.autograd.grad(1000*out.sum(), x, create_graph=True)
            return self.net(x) + 0*force.sum()
    want,got = calibrate(Parts(plain), data()),calibrate(Forces(), data())
    for name,m in want.items(): torch.testing.assert_close(got[f'net.{name}'].grads, m.grads, rtol=1e-5, atol=1e-9) # float32 sums in another order
