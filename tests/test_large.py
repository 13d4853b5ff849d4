"Moments of more layers than fit into memory: the same plans and factors to the last bit, in few passes and within the room"
import gc
from math import inf

import pytest, torch
from torch import nn

from fasterai_lr import Budget, FC_Decomposer, decompose
from fasterai_lr.calibrate import calibrate, gather_moments
from fasterai_lr.loss import regression
from fasterai_lr.planner import make_plan
from fasterai_lr.store import moments_size
from helpers import same

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('seeded')

class Mixed(nn.Module):
    "A convolution with a BatchNorm, a layer called three times, two layers with one weight, a layer without gradients, one without data; listed backwards"
    def __init__(self):
        super().__init__()
        self.last,self.unused = nn.Linear(24, 6),nn.Linear(24, 24)
        self.tied2,self.tied1 = nn.Linear(24, 24),nn.Linear(24, 24)
        self.tied2.weight = self.tied1.weight
        self.again,self.cut = nn.Linear(24, 24, bias=False),nn.Linear(24, 24)
        self.norm,self.conv = nn.BatchNorm2d(24),nn.Conv2d(3, 24, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        x = x + self.cut(x).detach().sigmoid()
        for _ in range(3): x = x + self.again(x).tanh()
        return self.last(self.tied2(self.tied1(x).relu()).relu())

def perceptron(n=6, width=32):
    return nn.Sequential(*(m for _ in range(n) for m in (nn.Linear(width, width), nn.Tanh())))

images = lambda: torch.randn(80, 3, 8, 8)
one_moment = 8*32*32 # bytes, of a layer of `perceptron`

@pytest.fixture
def passes(monkeypatch):
    "The arguments of each pass over the data, after model, data and settings"
    made = []
    def counted(model, batches, settings, *args):
        made.append(args)
        return gather_moments(model, batches, settings, *args)
    monkeypatch.setattr('fasterai_lr.calibrate.gather_moments', counted)
    return made

# --- the same results

@pytest.mark.parametrize('room', [0, 12_000, 30_000])
def test_moments_are_the_same(room, passes):
    net,x = Mixed().eval(),images()
    known,short = (calibrate(net, list(x.split(16)), regression, moments_room=r, most=400) for r in (2**32, room)) # positions are drawn
    assert set(known.moments.held) == set(known) and set(short.moments.held) < set(short)
    assert list(known) == list(short) and 'unused' not in short and len(passes) > 2 # the layer without gradients is compared with all others
    assert known.no_gradient == short.no_gradient == {'cut'} and known.enough == short.enough
    for name in known:
        assert same(vars(known[name]), vars(short[name]))
        assert torch.equal(known.grads(name), short.grads(name))
        assert known.note(name) == short.note(name)

@pytest.mark.parametrize('kw', [{}, dict(sequential=False), dict(metric='activation'), dict(max_size=25), dict(max_size=8)], ids=str)
def test_networks_are_the_same(kw):
    net,x = Mixed().eval(),images()
    a,b = (decompose(net, Budget(params=.7), x, loss=regression, moments_room=room, progress=False, **kw) for room in (2**32, 9_000))
    plans = [m.low_rank_plan for m in (a, b)]
    for plan in plans: del plan['settings']
    assert plans[0] == plans[1] and same(a.state_dict(), b.state_dict())

def test_decomposers_give_the_same_networks():
    net,x = Mixed().eval(),images()
    a,b = (decompose(net, FC_Decomposer(.5), x, loss=regression, moments_room=room) for room in (2**32, 0))
    assert same(a.state_dict(), b.state_dict())

# --- few passes

def test_where_nothing_is_short_there_is_one_pass(passes):
    net,x = perceptron(),torch.randn(200, 32)
    known = calibrate(net, x, regression, moments_room=12*one_moment)
    for p in (.8, .5): decompose(net, Budget(macs=p), known)
    assert len(passes) == 1

def test_passes_are_as_few_as_groups(passes):
    net,x = perceptron(),torch.randn(200, 32)
    known = calibrate(net, x, regression, moments_room=4*one_moment)           # two layers of six, or the gradients of four
    plan = make_plan(net, known, Budget(macs=.5))
    assert [names for names,*_ in passes] == [['0', '2'], ['4', '6'], ['8', '10']]
    del passes[:]
    plan.apply(net, known)
    chosen = list(plan.choices)
    assert passes == [(chosen[:4], True)] + [(chosen[4:], True)]*(len(chosen) > 4)

def test_the_order_of_the_run_is_that_of_the_passes(passes):
    net,x = Mixed().eval(),images()
    known = calibrate(net, x, regression, moments_room=12_000)
    plan = make_plan(net, known, Budget(params=.6))
    del passes[:]
    plan.apply(net, known)
    assert list(plan.choices) == ['last', 'again', 'cut', 'conv']
    assert passes == [(['cut', 'again', 'last'], True)]                        # those of `conv` are held still

# --- within the room

@pytest.fixture
def new_bytes():
    "A function that counts the bytes of all square matrices in float64 that were made since the start, each block of memory once"
    gc.collect()
    gc.freeze() # older objects need not be searched
    def count():
        new = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.float64 and o.shape[-2:] == (32, 32) and not o.is_meta]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}.values())
    yield count
    gc.unfreeze()

@pytest.mark.parametrize('room', [0, 4*one_moment, inf])
def test_what_is_held_fits(room, monkeypatch, new_bytes):
    net,x,seen = perceptron(8),torch.randn(200, 32),[]
    def looked(*args):
        seen.append(new_bytes())
        found = gather_moments(*args)
        seen.append(new_bytes())
        return found
    monkeypatch.setattr('fasterai_lr.calibrate.gather_moments', looked)
    known = calibrate(net, x, regression, moments_room=min(room, 2**32))
    for name in known:
        known.metric(name)
        seen.append(new_bytes())
    everything = sum(map(moments_size, known.moments.outlines.values()))
    assert everything == 16*one_moment
    assert max(seen) == (everything if room == inf else max(room, 2*one_moment)) # one layer at least
    decompose(net, Budget(macs=.5), known)
    del known,name
    gc.collect()
    assert new_bytes() == 0
