"Moments against brute force on every geometry, what calibration leaves behind, and the schemes in the metrics that come of it"
import copy, dataclasses, random
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fasterai_lr.budget import Budget
from fasterai_lr.calibrate import Centred, Gram, calibrate, calibrated
from fasterai_lr.decomposer import decompose
from fasterai_lr.loss import classification, regression
from fasterai_lr.metric import DiagonalMetric, Metric, make_metric
from fasterai_lr.running import Batches
from fasterai_lr.layers import Geometry
from fasterai_lr.schemes import schemes
from helpers import apart, gen, same, state_of

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('seeded')

def half_square(out): return .5*out.square().sum()

# --- moments of every geometry

@dataclass
class Case:
    "A layer and its input: hypothesis prints these fields for a failing one"
    n:int # spatial axes, 0 for a linear layer
    channels:tuple
    kw:dict = field(default_factory=dict)
    shape:tuple = () # of the input, less its channels
    seed:int = 0

    def layer(self, dtype=torch.float64):
        res = (getattr(nn, f'Conv{self.n}d') if self.n else nn.Linear)(*self.channels, **self.kw).to(dtype)
        with torch.no_grad():
            for p in res.parameters(): p.normal_(generator=gen(self.seed))
        return res

    def input(self, dtype=torch.float64):
        shape = (self.shape[0], self.channels[0], *self.shape[1:]) if self.n else (*self.shape, self.channels[0])
        return torch.randn(shape, generator=gen(self.seed+1), dtype=dtype) + .5

@st.composite
def cases(draw):
    n,ints = draw(st.integers(0, 3)),lambda lo,hi: draw(st.integers(lo, hi))
    if not n: return Case(0, (ints(1, 6), ints(1, 6)), dict(bias=draw(st.booleans())), draw(st.sampled_from([(5,), (3, 4), (2, 2, 3)])), ints(0, 99))
    g,each = draw(st.sampled_from([1, 1, 2])),lambda lo,hi: tuple(ints(lo, hi) for _ in range(n))
    kernel,dilation,stride = each(1, 3),each(1, 2),each(1, 2)
    padding = draw(st.sampled_from(['same', 'valid', 'ints']))
    kw = dict(kernel_size=kernel, dilation=dilation, stride=1 if padding=='same' else stride, groups=g, bias=draw(st.booleans()),
              padding=each(0, 2) if padding=='ints' else padding, padding_mode=draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular'])))
    size = tuple(d*(k-1) + ints(3, 4) for d,k in zip(dilation, kernel)) # larger than any padding, as reflect needs
    return Case(n, (g*ints(2, 3), g*ints(1, 3)), kw, (ints(1, 3), *size), ints(0, 99))

def rows_of(t, layer, width):
    "`[n, channels, *positions]` (or channels last for a linear layer) as `[positions, groups, width]`"
    geom = Geometry.of(layer)
    return (t.movedim(1, -1) if geom.axes else t).reshape(-1, geom.groups, width)

def brute_patches(layer, x):
    "Patches from a layer of the same geometry whose outputs are the single entries of a patch"
    geom = Geometry.of(layer)
    d = prod(geom.block_shape[2:])
    eye = torch.eye(d, dtype=x.dtype).reshape(d, *geom.block_shape[2:]).repeat(geom.groups, *[1]*(1+len(geom.kernel)))
    if not geom.axes: return x.reshape(-1, 1, d)
    picker = type(layer)(geom.inp, geom.groups*d, geom.kernel, geom.stride, geom.padding, geom.dilation, geom.groups, False, geom.padding_mode, dtype=x.dtype)
    with torch.no_grad(): picker.weight.copy_(eye); return rows_of(picker(x), layer, d)

def gram(rows): return torch.einsum('pgi,pgj->gij', rows, rows)

def outputs_of(m, layer):
    "The moment of outputs that follows from that of patches"
    W = Geometry.of(layer).to_blocks(layer.weight.detach()).double().flatten(2)
    return W@m.inputs@W.mT

@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases())
def test_moments_are_those_of_all_patches_outputs_and_gradients(case):
    layer,x = case.layer(),case.input()
    m = calibrate(nn.Sequential(layer, nn.Tanh()), x, loss=half_square)['0']
    o,rows = Geometry.of(layer).block_shape[1],brute_patches(layer, x)
    y = layer(x).detach().requires_grad_()
    g = rows_of(torch.autograd.grad(half_square(y.tanh()), y)[0], layer, o)
    bias = 0 if layer.bias is None else layer.bias.detach().view(-1, o)
    out = rows_of(y.detach(), layer, o) - bias
    # double precision, sums of at most a few hundred terms
    assert apart(m.inputs, gram(rows)/len(rows)) <= 1e-12
    assert apart(m.input_mean, rows.mean(0)) <= 1e-12
    assert apart(outputs_of(m, layer), gram(out)/len(out)) <= 1e-11
    assert m.outputs is None
    assert apart(m.output_mean, out.mean(0)) <= 1e-11
    assert apart(m.grads, gram(g)/len(x)) <= 1e-12
    assert m.positions == len(rows) and m.inputs.dtype == torch.float64

@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases())
def test_norms_are_those_of_the_gradients_of_items(case):
    layer,x = case.layer(),case.input()
    net = nn.Sequential(layer, nn.Tanh())
    norms = calibrate(net, x, half_square)['0'].norms
    if norms is None:
        assert x.dim() == 2 or layer(x[:1]).numel() == Geometry.of(layer).out # only one position
        return
    def gradient(items): return torch.autograd.grad(half_square(net(items)), layer.weight)[0]
    whole = sum(gradient(item).square().sum() for item in x.split(1))
    y = layer(x).detach().requires_grad_()
    g = rows_of(torch.autograd.grad(half_square(y.tanh()), y)[0], layer, Geometry.of(layer).block_shape[1])
    terms = torch.einsum('pgo,pgi->pgoi', g, brute_patches(layer, x)).square().sum() # one for each position
    assert apart(norms, torch.stack((whole, terms))) <= 1e-11 # double precision, sums of at most a few hundred terms

def coherence(x, **kw): return calibrate(nn.Sequential(nn.Linear(4, 3, dtype=x.dtype)), x, half_square, **kw)['0'].coherence

def test_equal_positions_add_up_and_independent_ones_do_not():
    alike = torch.randn(16, 1, 4, dtype=torch.float64).expand(16, 25, 4)
    assert abs(coherence(alike) - 5) <= 1e-12 # the root of 25 positions
    assert coherence(alike[:,0]) == 1.        # in two dimensions each row is an item
    zeros = torch.zeros(16, 25, 4, dtype=torch.float64)
    assert coherence(zeros) > 0 and torch.isfinite(torch.tensor(coherence(zeros)))
    assert coherence(alike, most=1) == coherence(alike) # it looks at all positions

def test_errors_count_even_where_gradients_cancel():
    net,x = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)),torch.randn(40, 4, 1, 1, generator=gen(0)).expand(-1, -1, 30, 30)
    signs = torch.ones(900)
    signs[::2] = -1
    def loss(out): return (out.flatten(2)*signs).sum()
    for most in (None, 1, 2):
        known = calibrate(net, x, loss, most=most)
        assert known['0'].coherence == known['1'].coherence == .01
        assert all(p.isfinite().all() for p in decompose(net, Budget(params=.9), known, sequential=False).parameters())

class Stream(IterableDataset):
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def test_a_loader_need_not_know_its_length():
    net,x = nn.Sequential(nn.Linear(40, 3)),torch.randn(3000, 2, 40, generator=gen(0))
    want = calibrate(net, list(x[:2100].split(300)), half_square) # 2,000 items are enough
    sampled = DataLoader(x, batch_sampler=[list(range(i, i+300)) for i in range(0, 3000, 300)])
    for data in (Stream(x.split(300)), DataLoader(Stream(x.split(300)), batch_size=None), sampled, DataLoader(x, 300)):
        state = torch.get_rng_state()
        found = calibrate(net, data, half_square)
        assert torch.equal(torch.get_rng_state(), state) # a `DataLoader` draws a seed when it is read
        assert torch.equal(found['0'].inputs, want['0'].inputs) and torch.equal(found['0'].norms, want['0'].norms)
    class Loader:
        def __len__(self): raise NotImplementedError
        def __iter__(self): return iter(x.split(300))
    assert torch.equal(calibrate(net, Loader(), half_square)['0'].inputs, want['0'].inputs)

def test_an_error_costs_as_much_more_as_it_adds_up():
    layer = nn.Linear(4, 3, dtype=torch.float64)
    alike = torch.randn(16, 1, 4, dtype=torch.float64).expand(16, 25, 4)
    one,many = (calibrate(nn.Sequential(layer), x, half_square)['0'] for x in (alike[:,0], alike))
    costs = [metric_of(layer, m, 'fisher', centre=False).cost(layer.weight.detach()[None]) for m in (one, many)]
    assert abs(costs[1]/costs[0] - 5*25) <= 1e-9 # each of 25 positions counts, and they add up

@pytest.mark.parametrize('case', [Case(2, (4, 6), dict(kernel_size=3, groups=2), (3, 6, 5)), Case(0, (5, 4), {}, (6, 7))])
def test_batches_of_different_sizes_weigh_by_their_positions(case):
    net,x = nn.Sequential(case.layer(), nn.Tanh()),case.input()
    whole = calibrate(net, x, loss=half_square)['0']
    parts = calibrate(net, [x[:1], x[1:]], loss=half_square)['0']
    for k in ('grads', 'output_mean', 'inputs', 'input_mean'): assert apart(getattr(parts, k), getattr(whole, k)) <= 1e-13 # the same sums in another order

def test_positions_are_drawn_where_there_are_many():
    net,x = nn.Sequential(Case(2, (3, 4), dict(kernel_size=3)).layer()),torch.randn(30, 3, 12, 12, dtype=torch.float64)
    every,some,again,other = (calibrate(net, [x]*8, half_square, most=m, seed=s)['0'] for m,s in ((10**6, 0), (1000, 0), (1000, 0), (1000, 1))) # half of that many for the moments
    assert every.positions == 8*3000 and some.positions == 8*500
    assert torch.equal(some.inputs, again.inputs) and not torch.equal(some.inputs, other.inputs)
    # 4,000 draws of products with a standard deviation of at most √2: 5 standard errors are .11; every entry would be wrong if the rows were
    assert (some.inputs - every.inputs).abs().max() < .11
    assert torch.equal(some.grads, every.grads)                                  # gradients are never drawn
    enough = calibrate(net, [x]*8, half_square)['0']
    assert enough.positions == 8*512                                             # the least of a batch
    beyond = calibrate(net, [x]*8, half_square, most=1000, max_size=4)['0']
    assert apart(beyond.outputs, outputs_of(some, net[0])) <= 1e-12              # outputs are those of the same positions

@pytest.mark.parametrize('groups', [1, 2])
def test_products_keep_their_precision_whatever_is_switched_on(groups):
    rows,g = Centred(torch.randn(300, groups, 8, generator=gen())),Gram()
    torch.set_float32_matmul_precision('medium')
    try:
        with torch.autocast('cpu', dtype=torch.bfloat16): g.add(rows, rows)
    finally: torch.set_float32_matmul_precision('highest')
    plain = (rows.rows + rows.near).double()
    assert apart(g.mean, gram(plain)/300) <= 1e-6                                # float32; bfloat16 would leave two or three digits
    assert torch.equal(g.mean, g.mean.mT)

def test_a_shared_layer_is_one_layer_used_twice():
    shared = nn.Linear(4, 4).double()
    net,x = nn.Sequential(shared, nn.Tanh(), shared),torch.randn(20, 4, dtype=torch.float64)
    found = calibrate(net, x, half_square)
    assert list(found) == ['0']
    a = shared(x).detach().requires_grad_()
    b = shared(a.tanh())
    ga, = torch.autograd.grad(half_square(b), a)
    both,h = b.detach(),a.detach().tanh()                                        # the gradient of half a square is the output
    assert apart(found['0'].grads[0], (ga.T@ga + both.T@both)/20) <= 1e-13       # summed over the uses
    assert apart(found['0'].inputs[0], (x.T@x + h.T@h)/40) <= 1e-13              # averaged over the positions of both

def test_an_in_place_activation_changes_nothing():
    conv,x = nn.Conv2d(3, 4, 3),torch.randn(6, 3, 6, 6)
    a,b = (calibrate(nn.Sequential(conv, nn.ReLU(inplace)), x, half_square)['0'] for inplace in (False, True))
    for k in ('grads', 'inputs'): assert torch.equal(getattr(a, k), getattr(b, k))

def test_the_covariance_of_nearly_constant_inputs_survives_float32():
    x = 1e3 + torch.randn(4000, 6, generator=gen())
    m = calibrate(nn.Linear(6, 3), x, half_square)['']
    cov = (m.inputs - m.input_mean[...,None]*m.input_mean[:,None])[0]
    assert apart(cov, torch.cov(x.double().T, correction=0)) <= 1e-5 # float32 products of numbers near one; uncentred ones would be wrong by .1

# --- losses

def seen(loss, logits, n): # the second moment of the loss's gradient at `logits`
    out = logits.expand(n, *logits.shape).clone().requires_grad_()
    v, = torch.autograd.grad(loss(out, gen()), out)
    return v.double()

def test_gradients_of_a_classifier_have_the_covariance_of_its_own_labels():
    logits = torch.tensor([2., 0., -1., 1.])
    v,p = seen(classification, logits, 40_000),logits.double().softmax(0)
    assert (v.T@v/len(v) - (p.diag() - p[:,None]*p)).abs().max() < .008 # 40,000 draws of at most |v|² ≤ 1 with a standard error below .0015

def test_dense_prediction_is_a_classifier_at_every_position():
    logits = torch.randn(3, 2, 2)
    v,p = seen(classification, logits, 40_000),logits.double().softmax(0)
    for i in range(2):
        for j in range(2): assert (v[:,:,i,j].T@v[:,:,i,j]/len(v) - (p[:,i,j].diag() - p[:,i,j,None]*p[:,i,j])).abs().max() < .008
    assert (v[:,:,0,0].T@v[:,:,1,1]/len(v)).abs().max() < .008 # and independent between them

def test_regression_has_unit_covariance():
    v = seen(regression, torch.zeros(3), 40_000)
    assert (v.T@v/len(v) - torch.eye(3)).abs().max() < .04 # a standard error of at most √2/200 = .007

def test_gradients_scale_with_positions_not_with_samples():
    logits = nn.Conv2d(2, 3, 1)
    x = torch.randn(5, 2, 4, 4)
    one,many = calibrate(logits, [x]*20)[''].grads,calibrate(logits, [x.repeat(2, 1, 1, 1)]*20)[''].grads
    assert abs(many.diagonal(dim1=1, dim2=2).sum()/one.diagonal(dim1=1, dim2=2).sum() - 1) < .05 # the same expectation, 1,600 draws or more

class Dict(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(4, 3)
    def forward(self, x): return {'logits': self.fc(x)}

def test_what_no_loss_is_known_for_is_said():
    x = torch.randn(8, 4)
    class Text(nn.Linear):
        def forward(self, x): return str(super().forward(x))
    with pytest.raises(TypeError, match='loss: the model returns str, not a tensor; give output='): calibrate(Text(4, 3), x)
    with pytest.raises(TypeError, match='output: it returns dict; expected a tensor'): calibrate(Dict(), x, output=lambda o: o)
    with pytest.raises(TypeError, match="output: 'logits' is not a function"): calibrate(Dict(), x, output='logits')
    with pytest.raises(ValueError, match=r'loss: an output of shape \[8\]'): calibrate(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), x)
    with pytest.raises(ValueError, match=r'loss: it returns \[8, 3\]'): calibrate(nn.Linear(4, 3), x, lambda o: o)
    with pytest.raises(TypeError, match="loss: 'mse' is not a function"): calibrate(nn.Linear(4, 3), x, 'mse')
    with pytest.raises(ValueError, match="^data: batch 0 holds NaN or infinity"): calibrate(Dict(), x/0, lambda o: o['logits'].sum())
    by_output = calibrate(Dict(), x, regression, output=lambda o: o['logits'])
    assert by_output.settings.loss.output is by_output.settings.output
    own = calibrate(net := Dict(), x, lambda o: half_square(o['logits']))['fc']
    y = net.fc(x).detach().double()
    assert apart(own.grads[0], y.T@y/8) <= 1e-6 # float32 products

# --- data

def test_every_kind_of_data_gives_the_same():
    from fastai.data.core import DataLoaders
    net,x,y = nn.Linear(4, 3).double(),torch.randn(20, 4, dtype=torch.float64),torch.zeros(20)
    ds = TensorDataset(x, y)
    class ByName(nn.Module):
        def __init__(self): super().__init__(); self.fc = net
        def forward(self, pixels): return self.fc(input=pixels)
    want = calibrate(net, x, half_square)['']
    kinds = [[x[:12], x[12:]], [(x[:12], y[:12]), (x[12:], y[12:])], [[x]], DataLoader(ds, 8), DataLoader(ds, 8, shuffle=True),
             DataLoaders(DataLoader(ds, 8), DataLoader(TensorDataset(x*0, y), 8)), Batches(x, bs=7)]
    for data in kinds: assert apart(calibrate(net, data, half_square)[''].inputs, want.inputs) <= 1e-13
    assert apart(calibrate(ByName(), [dict(pixels=x, labels=y)], half_square)['fc'].grads, want.grads) <= 1e-13 # and a layer may be called by name
    assert len(next(iter(Batches([(x, x, y)])))) == 2

@pytest.mark.parametrize('data, error, match', [(3, TypeError, 'int holds no batches'), ('path', TypeError, 'str holds no batches'), ([], ValueError, 'holds no batch'),
    (iter([torch.zeros(2, 4)]), TypeError, 'only once'), ([3], TypeError, 'a batch is int')])
def test_what_is_no_data(data, error, match):
    with pytest.raises(error, match=match): calibrate(nn.Sequential(nn.Identity(), nn.Linear(4, 3)), data)

def test_batches_are_loaded_one_by_one_also_with_a_progress_bar():
    events = []
    class Loader:
        def __len__(self): return 3
        def __iter__(self):
            for _ in range(3): events.append('load'); yield torch.randn(4, 4)
    class Net(nn.Linear):
        def forward(self, x): events.append('run'); return super().forward(x)
    net,lengths = nn.Sequential(Net(4, 4), nn.Linear(4, 2)),[]
    for bar in (None, lambda it: lengths.append(len(it)) or it):
        events.clear()
        calibrate(net, Loader(), progress=bar)
        assert events == ['load', 'run']*3
    assert lengths == [3, 1] # the batches, then the one layer that is no subclass

# --- what is left behind

class Interrupts(nn.Module):
    "Raises `what` in the second batch"
    def __init__(self, what): super().__init__(); self.what,self.n = what,0
    def forward(self, x):
        self.n += 1
        if self.what and self.n == 2: raise self.what
        return x

class Mixed(nn.Module):
    def __init__(self, what=None):
        super().__init__()
        self.conv,self.bn,self.drop,self.stop,self.fc = nn.Conv2d(3, 6, 3),nn.BatchNorm2d(6),nn.Dropout(.5),Interrupts(what),nn.Linear(6, 4)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.bn.eval(); self.conv.requires_grad_(False)
        self.fc.weight.grad = torch.ones_like(self.fc.weight)
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(lambda *a: None)
    def forward(self, x): return self.hooked(self.fc(self.block(self.stop(self.drop(self.bn(self.conv(x)).relu_().flatten(2).mT))).mean(1)))

@pytest.mark.parametrize('caller', [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('what', [None, ValueError('no'), KeyboardInterrupt()], ids=['whole', 'error', 'interrupt'])
def test_nothing_is_left_behind(caller, what):
    net = Mixed(what)
    class Noisy(torch.utils.data.Dataset): # draws from every random generator that there is
        def __len__(self): return 12
        def __getitem__(self, i): return torch.randn(3, 6, 6)*random.random()*np.random.rand(), 0
    with caller():
        before = state_of(net)
        with pytest.raises(type(what)) if what else nullcontext(): found = calibrate(net, DataLoader(Noisy(), 4, shuffle=True))
        assert same(before, state_of(net))
    if what: return
    assert set(found) == {'conv', 'fc', 'block.linear1', 'block.linear2'} # not what carries hooks or is read by attention
    assert all(m.grads.abs().sum() > 0 for m in found.values())           # gradients flow also for callers without and through frozen layers

def test_data_that_stops_in_the_middle_leaves_nothing_either():
    net,x = Mixed(),torch.randn(4, 3, 6, 6)
    class Broken(list):
        def __iter__(self): yield x; raise OSError('disk')
    before = state_of(net)
    with pytest.raises(OSError, match='disk'): calibrate(net, Broken())
    assert same(before, state_of(net))

def test_data_that_require_a_gradient_get_none():
    x = torch.randn(8, 4, requires_grad=True)
    calibrate(nn.Linear(4, 3), x)
    assert x.grad is None

def test_parts_that_a_model_runs_without_gradients_count_like_the_others():
    class Backbone(nn.Module):
        def __init__(self): super().__init__(); self.body,self.head = nn.Linear(4, 5),nn.Linear(5, 3)
        def forward(self, x):
            with torch.no_grad(): h = self.body(x).relu()
            return self.head(h)
    found = calibrate(Backbone(), torch.randn(9, 4))
    assert 0 < found['body'].grads.abs().sum() and 0 < found['head'].grads.abs().sum() and not found.no_gradient
    assert found['body'].inputs.diagonal(dim1=1, dim2=2).min() > 0

@pytest.mark.parametrize('dtype, rel', [(torch.bfloat16, .03), (torch.float16, .004)]) # a few roundings of 2⁻⁹ and 2⁻¹² on the way
def test_models_in_half_precision(dtype, rel):
    net,x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),torch.randn(50, 6)
    want,got = calibrate(net, x, half_square),calibrate(net.to(dtype), x.to(dtype), half_square)
    assert {p.dtype for p in net.parameters()} == {dtype}
    for n,m in got.items():
        assert m.grads.dtype == m.inputs.dtype == torch.float64
        for k in ('grads', 'inputs', 'input_mean'): assert apart(getattr(m, k), getattr(want[n], k)) <= rel

def test_layers_that_are_not_reached_or_cannot_be_replaced_are_absent():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1))
    net[1].weight = net[0].weight                                              # tied
    class Skips(nn.Module):
        def __init__(self): super().__init__(); self.net,self.never = net,nn.Linear(3, 3)
        def forward(self, x): return self.net(x)
    assert set(calibrate(Skips(), torch.randn(5, 4, 4), half_square)) == {'net.2'}

# --- the size limit

class Products(TorchDispatchMode):
    "The shapes of all matrix products"
    def __init__(self):
        super().__init__()
        self.shapes = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func.overloadpacket) in ('aten.mm', 'aten.addmm', 'aten.bmm', 'aten.baddbmm', 'aten.baddbmm_'): self.shapes.append(out.shape[-2:])
        return out

def test_no_moment_above_the_limit_is_formed():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 12), nn.Linear(12, 40))
    with Products() as products: found = calibrate(net, torch.randn(10, 4, 6, 6), max_size=36)
    assert set(found) == {'0', '2', '3'} and found['3'].grads.shape == (1, 40) # too many outputs: the diagonal
    assert found['0'].inputs.shape == (1, 36, 36) and found['2'].inputs is None and found['2'].outputs.shape == (1, 12, 12)
    assert products.shapes and all(min(s) <= 36 and s[0]*s[1] <= 36**2 for s in products.shapes)
    full = calibrate(net, torch.randn(10, 4, 6, 6, generator=gen()), max_size=96)['2']
    assert full.inputs.shape == (1, 96, 96)

def test_beyond_the_limit_outputs_and_means_are_the_same():
    net,x = nn.Sequential(nn.Linear(30, 5)).double(),torch.randn(40, 30, dtype=torch.float64) + 1
    small,large = calibrate(net, x, half_square, max_size=8)['0'],calibrate(net, x, half_square)['0']
    assert small.inputs is None
    assert apart(small.outputs, outputs_of(large, net[0])) <= 1e-11            # double precision, by another way
    for k in ('output_mean', 'input_mean', 'grads'): assert apart(getattr(small, k), getattr(large, k)) <= 1e-11

def test_where_both_sides_are_beyond_the_limit_the_diagonals_are_kept():
    net,x = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 4)).double(),torch.randn(40, 30, dtype=torch.float64) + 1
    full,outs,both = (calibrate(net, x, half_square, max_size=m)['0'] for m in (8192, 40, 20))
    for m in (outs, both):
        assert m.grads.shape == (1, 50) and m.outputs is None
        assert apart(m.grads, full.grads.diagonal(dim1=1, dim2=2)) <= 1e-11   # double precision, by another way
    assert apart(outs.inputs, full.inputs) <= 1e-11
    assert apart(both.inputs, full.inputs.diagonal(dim1=1, dim2=2)) <= 1e-11
    for k in ('output_mean', 'input_mean'): assert apart(getattr(both, k), getattr(full, k)) <= 1e-11

@pytest.mark.parametrize('kind', ['fisher', 'activation'])
@pytest.mark.parametrize('max_size', [40, 20])
def test_diagonal_metrics_cost_what_full_ones_with_these_diagonals_do(kind, max_size):
    net,x = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 4)).double(),torch.randn(400, 30, dtype=torch.float64)*torch.logspace(0, -1, 30) + .2
    m,W = calibrate(net, x, max_size=max_size)['0'],net[0].weight.detach()[None]
    geom = Geometry.of(net[0])
    full = dataclasses.replace(m, grads=torch.diag_embed(m.grads), inputs=m.inputs if m.inputs.dim() == 3 else torch.diag_embed(m.inputs) + (1 - torch.eye(30))*m.input_mean[...,None]*m.input_mean[...,None,:])
    metric,want = make_metric(geom, m, W, kind),Metric(geom, full, W, kind)
    assert type(metric) is DiagonalMetric and type(make_metric(geom, full, W, kind)) is Metric
    D = torch.randn_like(W)
    assert metric.cost(D) == pytest.approx(want.cost(D), rel=1e-9) and metric.total == pytest.approx(want.total, rel=1e-5) # a little is added to the moment of outputs
    a,b = (schemes['svd'](geom, '0').solver(net[0].weight, t) for t in (metric, want))
    assert 'use svd' in schemes['cp'](Geometry(4, 4, (3, 3), (1, 1), (0, 0), (1, 1)), 'x').solver(torch.zeros(4, 4, 3, 3), metric).misfit()
    for r in (1, 7, 29, 30):
        assert a.costs([r])[0] == pytest.approx(b.costs([r])[0], rel=1e-4, abs=1e-9*metric.total)
        assert apart(a.approximation(r), b.approximation(r)) <= 1e-3          # which the float32 of the chain rounds
    assert apart(a.approximation(30), W) <= 1e-6

def test_gradients_of_half_precision_models_that_are_small_are_seen():
    net,x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),torch.randn(4, 3, 64, 64)
    with torch.no_grad(): net[4].weight.mul_(.03)                              # gradients of 10⁻⁶, where half precision is spaced by 6·10⁻⁸
    want,got = calibrate(net, x)['0'],calibrate(copy.deepcopy(net).half(), x.half())['0']
    assert apart(got.grads, want.grads) <= .01

def metric_of(layer, moments, kind='fisher', centre=None):
    geom = Geometry.of(layer)
    W = geom.to_blocks(layer.weight.detach())
    return Metric(geom, moments, W, kind, geom.bias if centre is None else centre)

def test_beyond_the_limit_svd_is_nearly_the_same():
    net,x = nn.Sequential(nn.Linear(60, 10), nn.Tanh(), nn.Linear(10, 4)).double(),torch.randn(4000, 60, dtype=torch.float64)*torch.logspace(0, -1, 60)
    small,large = (calibrate(net, x, max_size=m) for m in (20, 8192))
    by_inputs = metric_of(net[0], large['0'])
    for rank in (2, 5, 8):
        ws = [schemes['svd'](Geometry.of(net[0]), '0').solver(net[0].weight, metric_of(net[0], m['0'])).approximation(rank) for m in (small, large)]
        costs = [by_inputs.cost(net[0].weight.detach() - w) for w in ws]
        assert costs[1] <= costs[0] <= 1.001*costs[1] # the optimum, and what differs by the damping of 10⁻³ only
    other = schemes['spatial'](Geometry(4, 4, (3, 3), (1, 1), (0, 0), (1, 1)), 'x').solver(torch.zeros(4, 4, 3, 3), metric_of(net[0], small['0']))
    assert 'use svd' in other.misfit()

# --- schemes in a metric

def layer_and_moments(groups=1, out=12, inp=8, dtype=torch.float64, seed=0, zero=None):
    conv = Case(2, (inp, out), dict(kernel_size=(3, 2), groups=groups, padding=1), (12, 6, 5), seed)
    layer,x = conv.layer(dtype),conv.input(dtype)
    with torch.no_grad(): layer.weight.mul_(torch.logspace(0, -1, out, dtype=dtype).view(-1, 1, 1, 1))
    head = nn.Linear(out, 5).to(dtype)
    if zero == 'weights': nn.init.zeros_(layer.weight)
    if zero == 'outputs': layer.weight.data[:3] = 0
    if zero == 'inputs': x[:,:2] = 0
    if zero == 'gradients': nn.init.zeros_(head.weight)
    if zero == 'channel gradients': head.weight.data[:,:4] = 0
    if zero == 'variance': x = torch.ones_like(x)
    if zero == 'data': x = torch.zeros_like(x)
    net = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return layer,calibrate(net, x)['0']

def scheme_of(name, layer, moments, kind='fisher', centre=True):
    return schemes[name](Geometry.of(layer), 'conv').solver(layer.weight, metric_of(layer, moments, kind, centre))

def some_ranks(s):
    full = s.scheme.full()
    return [(2, 1), (3, 3), full] if isinstance(full, tuple) else sorted({1, max(1, full//2), full})

@pytest.mark.parametrize('name', schemes)
@pytest.mark.parametrize('kind', ['fisher', 'activation'])
@pytest.mark.parametrize('groups', [1, 2])
# float64: whitening by matrices with a condition of up to 1e6 costs 1e6 roundings of 1e-16; float32: the weights' own rounding, 6e-8, through sums of 50 products
@pytest.mark.parametrize('dtype, eps', [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=['double', 'float'])
def test_at_full_rank_every_scheme_reproduces_the_layer_in_any_metric(name, kind, groups, dtype, eps):
    layer,moments = layer_and_moments(groups, dtype=dtype)
    s = scheme_of(name, layer, moments, kind)
    built = s.build(s.scheme.largest(), layer)
    assert built.weight.dtype == dtype
    assert apart(built.weight, layer.weight) <= eps
    x = torch.randn(3, 8, 6, 5, dtype=dtype)
    assert apart(built(x), layer(x)) <= eps

# where the matrix is thin (more outputs than patch entries), its whitened root is singular
@pytest.mark.parametrize('out, inp', [(60, 4), (12, 8)])
def test_at_full_rank_svd_reproduces_thin_layers(out, inp):
    layer,moments = layer_and_moments(1, out, inp)
    s = scheme_of('svd', layer, moments)
    assert s.scheme.full() == min(out, inp*6)
    assert apart(s.build(s.scheme.full(), layer).weight, layer.weight) <= 1e-9 # double precision, see above
    assert all(abs(c - s.metric.cost(s.blocks - s.approximation(r))) <= 1e-9*s.metric.cost(s.blocks) for r,c in zip(range(1, s.scheme.full()+1), s.costs(range(1, s.scheme.full()+1))))

@pytest.mark.parametrize('name', schemes)
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('kind, centre', [('fisher', True), ('activation', False)])
def test_costs_are_those_of_the_approximations(name, groups, kind, centre):
    layer,moments = layer_and_moments(groups)
    s = scheme_of(name, layer, moments, kind, centre)
    for r,c in zip(some_ranks(s), s.costs(some_ranks(s)), strict=True):
        want = s.metric.cost(s.scheme.geom.to_blocks(layer.weight.detach()) - s.scheme.geom.to_blocks(s.build(r, layer).weight.detach()))
        assert abs(c - want) <= 1e-8*s.metric.cost(s.blocks) # double precision, relative to all that there is to lose

def test_the_activation_cost_is_half_the_squared_error_of_the_outputs():
    layer,x = Case(2, (4, 6), dict(kernel_size=3, bias=False)).layer(),torch.randn(20, 4, 7, 7, dtype=torch.float64)
    metric = metric_of(layer, calibrate(layer, x, half_square)[''], 'activation', centre=False)
    D = torch.randn_like(layer.weight)
    want = .5*F.conv2d(x, D).square().sum(1).mean()
    assert want <= metric.cost(D[None]) <= 1.0012*want # the ridge adds 10⁻³ of the diagonal and 10⁻⁵ of its mean; the diagonal is nearly all here

@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.integers(1, 4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_other_weight_of_the_rank_beats_svd(seed, groups, rank):
    layer,moments = _fixed[groups]
    s,g = scheme_of('svd', layer, moments),gen(seed)
    best = s.approximation(rank).flatten(2)
    least = s.metric.cost(s.blocks - best.reshape(s.blocks.shape))
    U,S,Vh = torch.linalg.svd(best, full_matrices=False)
    noise = lambda t: t + 10**float(torch.rand(1, generator=g)*4-5)*torch.randn(t.shape, generator=g, dtype=t.dtype)
    near = noise(U[...,:rank]*S[:,None,:rank])@noise(Vh[:,:rank])                  # close by
    plain = torch.linalg.svd(s.blocks.flatten(2), full_matrices=False)
    far = plain[0][...,:rank]*plain[1][:,None,:rank]@plain[2][:,:rank]           # the best in another norm
    for w in (near, far): assert s.metric.cost(s.blocks - w.reshape(s.blocks.shape)) >= least*(1-1e-9)

_fixed = {g: layer_and_moments(g) for g in (1, 2)}

@pytest.mark.parametrize('groups', [1, 2])
def test_costs_of_svd_fall_with_the_rank_to_nothing(groups):
    layer,moments = _fixed[groups]
    s = scheme_of('svd', layer, moments)
    costs = s.costs(range(1, s.scheme.full()+1))
    assert all(a >= b for a,b in zip(costs, costs[1:])) and costs[0] > costs[-2] > costs[-1] == 0

@given(st.integers(0, 10**6), st.sampled_from(['svd', 'spatial', 'tucker', 'cp', 'slice']), st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_refined_factors_never_cost_more(seed, name, groups):
    layer,moments = layer_and_moments(groups, seed=seed % 997)
    s = scheme_of(name, layer, moments)
    for r in some_ranks(s):
        plain,refined = (s.metric.cost(s.blocks - s.scheme.geom.to_blocks(s.build(r, layer, w).weight.detach())) for w in (s.weights(r), s.refined(r)))
        assert refined <= plain*(1+1e-9) + 1e-12*s.metric.cost(s.blocks) # rounding, and at full rank the jitter of 10⁻⁸ in the solve, squared

@pytest.mark.parametrize('name', schemes)
@pytest.mark.parametrize('zero', ['weights', 'outputs', 'inputs', 'gradients', 'channel gradients', 'variance', 'data'])
def test_what_is_dead_or_constant_breaks_nothing(name, zero):
    for out in (12, 60):
        layer,moments = layer_and_moments(1, out, 8, torch.float32, zero=zero)
        s = scheme_of(name, layer, moments)
        for r in some_ranks(s):
            for ws in (s.weights(r), s.refined(r)): assert all(w.isfinite().all() for w in ws)
        assert all(0 <= c < float('inf') for c in s.costs(some_ranks(s)))
        assert (s.build(s.scheme.largest(), layer).weight - layer.weight).abs().max() <= 2e-5*max(layer.weight.abs().max(), 1e-30) # float32, where G or A is nearly singular

def test_metrics_that_do_not_exist():
    layer,moments = _fixed[1]
    with pytest.raises(ValueError, match="metric: 'plain' is not one of 'fisher', 'activation';"): metric_of(layer, moments, 'plain')

@pytest.mark.parametrize('layer, x', [(nn.Linear(20, 70), (300, 20)), (nn.Conv2d(6, 90, (1, 3), groups=2), (20, 6, 8, 8))])
def test_both_gram_matrices_of_svd_say_the_same(layer, x):
    layer = copy.deepcopy(layer).double()
    moments = calibrate(nn.Sequential(layer, nn.Tanh()), torch.randn(x, dtype=torch.float64), half_square)['0']
    narrow,wide = metric_of(layer, moments),metric_of(layer, moments)
    assert narrow.narrow
    wide.narrow = False
    a,b = (schemes['svd'](Geometry.of(layer), 'layer').solver(layer.weight, m) for m in (narrow, wide))
    ranks = list(range(1, a.scheme.full()+1))
    for m,n in zip(a.costs(ranks), b.costs(ranks)): assert abs(m - n) <= 1e-9*narrow.total # outputs have 1e-12 on their diagonal, times their number
    assert apart(a.approximation(2), b.approximation(2)) <= 1e-8                # vectors of a Gram matrix in double precision
    assert apart(a.approximation(ranks[-1]), a.blocks) <= 1e-12

def test_a_calibration_for_another_model_sees_how_that_one_uses_its_layers():
    x = torch.randn(40, 3, 6, 6)
    with_norm = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    without = nn.Sequential(with_norm[0], nn.ReLU())
    calibration = calibrate(with_norm, x, regression)
    assert calibration.uses['0'].norm == '1' # seen before it is given to the other
    assert calibrated(without, calibration, calibration.settings).uses['0'].norm is None
    assert calibrated(with_norm, calibration, calibration.settings).uses is calibration.uses
