"The schemes on generated layers of every geometry: shapes, exactness at full rank, errors as predicted, errors and sizes by rank"
import copy, pickle
from collections import Counter
from dataclasses import dataclass, field
from math import prod

import pytest, torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch import nn

from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer
from fasterai_lr.layers import FactoredLayer, Geometry, recompose
from fasterai_lr.schemes import Link, Mode, Scheme, Solver, register, schemes
from fasterai_lr.tensor import cp_term_norms, hosvd_errors
from helpers import n_params

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('seeded')

# --- layers of every geometry

@dataclass
class Case:
    "A layer to be made: hypothesis prints these fields for a failing one"
    n:int # spatial axes, 0 for a linear layer
    transposed:bool
    channels:tuple # in, out
    kw:dict = field(default_factory=dict)
    size:tuple = () # of the input, one entry a spatial axis
    dtype:torch.dtype = torch.float64
    weights:str = 'normal'
    seed:int = 0

    def layer(self):
        cls = nn.Linear if not self.n else getattr(nn, f"Conv{'Transpose' if self.transposed else ''}{self.n}d")
        res,gen = cls(*self.channels, **self.kw).double(),torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in res.parameters(): p.normal_(generator=gen)
            w = res.weight
            if self.weights == 'zero': w.zero_()
            if self.weights == 'small': w.mul_(1e-3)
            if self.weights == 'low rank': w.copy_(torch.ones(1).expand_as(w)) # rank 1 in every unfolding
            if self.weights == 'decaying': w.mul_(torch.logspace(0, -6, len(w)).view(-1, *[1]*(w.dim()-1)))
        return res.to(self.dtype)

    def input(self):
        shape = (2, *(7,)*(self.seed % 2), self.channels[0]) if not self.n else (2, self.channels[0], *self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed+1), dtype=torch.float64).to(self.dtype)

sizes = {1:(1,5), 2:(1,4), 3:(1,3)} # kernels by number of axes, kept small: the cases are many

@st.composite
def cases(draw, axes=(0,1,2,3)):
    n = draw(st.sampled_from(axes))
    ints = lambda lo, hi: draw(st.integers(lo, hi))
    tup = lambda lo, hi: tuple(ints(lo, hi) for _ in range(n)) if draw(st.booleans()) else ints(lo, hi)
    full = lambda v: v if isinstance(v, tuple) else (v,)*n
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    weights = draw(st.sampled_from(['normal']*5 + ['decaying', 'low rank', 'small', 'zero']))
    common = dict(dtype=dtype, weights=weights, seed=ints(0, 999))
    if n == 0: return Case(0, False, (ints(1, 12), ints(1, 12)), dict(bias=draw(st.booleans())), **common)
    transposed,groups = draw(st.integers(0, 3)) == 0,draw(st.sampled_from([1,1,2,3]))
    lo = 2 if groups > 1 else 1 # a block of one input channel is a depthwise layer's
    channels = groups*ints(lo, 5),groups*ints(1, 5)
    kernel,dilation,stride = tup(*sizes[n]),tup(1, 2),tup(1, 3)
    kw = dict(kernel_size=kernel, stride=stride, dilation=dilation, groups=groups, bias=draw(st.booleans()))
    reach = [d*(k-1) for d,k in zip(full(dilation), full(kernel))]
    if transposed:
        kw['padding'] = tuple(ints(0, (r+1)//2) for r in reach)
        kw['output_padding'] = tuple(ints(0, max(s, d)-1) for s,d in zip(full(stride), full(dilation)))
        return Case(n, True, channels, kw, tuple(ints(2, 4) for _ in reach), **common)
    kw['padding_mode'] = draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular']))
    kind = draw(st.sampled_from(['int', 'tuple', 'same', 'valid']))
    if kind == 'same': kw['stride'] = 1
    kw['padding'] = ints(0, 2) if kind == 'int' else tuple(ints(0, 2) for _ in reach) if kind == 'tuple' else kind
    return Case(n, False, channels, kw, tuple(r+3+ints(0, 3) for r in reach), **common) # larger than any padding, as reflect needs

# Relative to the weight and the input the factors of a float64 layer are right to a few hundred roundings (2e-16): an SVD's error grows
# mildly with the size. In the other dtypes the factors are computed in float32 or better and then rounded to the dtype,
# once each (at most five factors), and every layer of the chain rounds its output again. CP's terms may be larger than the kernel,
# and cancel: what is rounded are they.
tolerance = {torch.float64: 2e-13, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

def dense_output(layer, x): return copy.deepcopy(layer).double()(x.double())
def distance(a, b): return (a.detach().double()-b.detach().double()).norm().item()

def solver_of(name, layer): return schemes[name](Geometry.of(layer)).solver(layer.weight)

def size(solver, rank, norm):
    "How much larger what is summed up is than the weight of norm `norm`"
    if solver.scheme.name != 'cp' or not norm: return 1.
    return max(1., torch.stack([cp_term_norms(f) for f in solver.decompositions(rank)]).norm().item()/norm)

def path(s):
    "A few ranks in ascending order, the last of them exact"
    if not s.takes_pairs: return sorted({1, s.largest()//3 or 1, s.full(), s.largest()})
    (a,b),half = s.full(),lambda n: n//2 or 1
    return sorted({(1,1), (half(a),1), (half(a),half(b)), (a,half(b)), (a,b)})

seen = Counter()

def holds(name, case):
    "All that a scheme promises about one layer"
    layer,x = case.layer(),case.input()
    solver,y,tol = solver_of(name, layer),dense_output(layer, x),tolerance[case.dtype]
    s = solver.scheme
    assert solver.misfit() is None
    seen[name] += 1
    norm,errors = layer.weight.double().norm().item(),[]
    reach = norm*x.double().norm().item() + y.norm().item() # the size of what is summed up, also where the sums cancel
    for rank in path(s):
        new,why = solver.build(rank, layer),f'{name} at rank {rank}'
        out,weight = new(x),new.weight.detach().double()
        assert out.shape == y.shape and new.weight.shape == layer.weight.shape, why
        assert out.dtype == new.weight.dtype == case.dtype, why
        assert n_params(new) == s.n_params(rank), why
        assert repr(s.skeleton(rank)) == repr(new), why
        # the chain computes what its product says: one dense layer with that weight
        product = copy.deepcopy(layer).double()
        product.weight.data = weight
        times = tol*size(solver, rank, norm)
        assert distance(out, product(x.double())) <= times*reach, why
        # the error is the one predicted
        error = solver.error(rank)
        assert abs(distance(weight, layer.weight) - error*norm) <= times*norm, why
        errors.append(error)
    # at full rank both the output and the weight are the dense layer's
    assert errors[-1] <= 3e-5 if case.dtype != torch.float64 else errors[-1] <= tol, why
    assert distance(out, y) <= tol*reach and distance(weight, layer.weight) <= tol*norm, why
    # errors are at most 1, and never grow with the rank
    assert max(errors) <= 1 + tol
    eps = 1e-6 if case.dtype != torch.float64 else 1e-12 # what error() itself is off by: rounding in the dtype of the computation
    assert all(b <= a+eps for a,b in zip(errors, errors[1:])), f'{name}: {errors} at {path(s)}'

def many(n): return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

@many(500)
@given(cases())
def test_svd(case): holds('svd', case)

@many(500)
@given(cases((2,3)))
def test_spatial(case): holds('spatial', case)

@many(450)
@given(cases((1,2,2,3)))
def test_tucker(case): holds('tucker', case)

@many(400)
@given(cases((1,2,2,3)))
@example(Case(3, True, (3,4), dict(kernel_size=2, bias=False), (2,2,2), torch.float16, 'decaying', 365)) # terms of ten times its norm
def test_cp(case): holds('cp', case)

@many(450)
@given(cases((2,3)))
def test_slice(case): holds('slice', case)

def test_these_were_over_two_thousand_cases():
    if set(seen) != {'svd', 'spatial', 'tucker', 'cp', 'slice'}: pytest.skip('not all of the tests above ran')
    assert sum(seen.values()) >= 2000, seen

# --- what else is promised of a scheme

@many(40)
@given(st.sampled_from(['cp', 'tucker']), st.tuples(st.integers(2, 8), st.integers(2, 8)), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99))
def test_errors_of_neighbouring_ranks_never_grow(name, channels, kernel, seed):
    layer = Case(2, False, channels, dict(kernel_size=kernel), seed=seed).layer() # both have local optima: solved one by one, these do grow
    solver = solver_of(name, layer)
    s = solver.scheme
    ranks = range(1, min(s.largest(), 16)+1) if name == 'cp' else [(s.full()[0]//2 or 1, i) for i in range(1, s.full()[1]+1)]
    errors = [solver.error(r) for r in ranks]
    assert all(b <= a+1e-12 for a,b in zip(errors, errors[1:])), errors

@many(100)
@given(cases((1,2,3)))
def test_tucker_is_at_least_as_good_as_the_hosvd(case):
    layer = case.layer()
    s = solver_of('tucker', layer)
    core = [hosvd_errors(b) for b in s.blocks]
    share = [b.double().norm()**2/max(s.blocks.double().norm()**2, 1e-300) for b in s.blocks]
    for ro,ri in path(s.scheme):
        bound = sum(e[ro-1,ri-1]**2*w for e,w in zip(core, share))**.5
        assert s.error((ro,ri)) <= bound + (1e-12 if case.dtype == torch.float64 else 1e-6) # rounding of both errors

wishes = st.one_of(st.sampled_from([.1, .25, .5, .75, 1.]), st.integers(1, 12))

@many(300)
@given(cases(), st.sampled_from(list(schemes)), wishes)
def test_a_layer_is_replaced_only_by_a_smaller_one_unless_forced(case, method, wish):
    layer = case.layer()
    decomposer = lambda force: ConvDecomposer(method, wish, force=force) if case.n else FC_Decomposer(wish, force=force)
    new,forced = decomposer(False).decompose(layer),decomposer(True).decompose(layer)
    plan,fplan = (m.low_rank_plan['layers'][''] for m in (new, forced))
    same = lambda a, b: all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    for m,r in ((new, plan), (forced, fplan)):
        assert (r['status'] == 'factored') == isinstance(m, FactoredLayer)
        assert r['params_before'] == n_params(layer) and r['params_after'] == n_params(m)
        if r['status'] == 'dense': assert r['reason'] and type(m) is type(layer) and same(m, layer)
    smaller = n_params(new) < n_params(layer)
    assert smaller if plan['status'] == 'factored' and case.n else n_params(new) <= n_params(layer)
    if fplan['status'] == 'dense': assert any(w in fplan['reason'] for w in ('above its full rank', 'spatial axes', 'depthwise'))
    elif n_params(forced) < n_params(layer): assert plan == fplan
    assert forced(case.input()).shape == layer(case.input()).shape

def conv(**kw): return nn.Conv2d(12, 16, 3, padding=1, **kw)
def low(method, layer, rank=2): return ConvDecomposer(method, rank, force=True).decompose(layer)

@pytest.mark.parametrize('method', list(schemes))
def test_train_mode_and_requires_grad_are_kept(method):
    layer = conv().eval()
    layer.weight.requires_grad_(False)
    new = low(method, layer)
    assert not any(m.training for m in new.modules())
    assert [(n.split('.')[1], p.requires_grad) for n,p in new.named_parameters()][-1] == ('bias', True)
    assert not any(p.requires_grad for n,p in new.named_parameters() if n.endswith('weight'))
    assert all(m.training for m in low(method, conv()).modules()) and all(p.requires_grad for p in low(method, conv()).parameters())
    back = recompose(new)
    assert not back.training and not back.weight.requires_grad and back.bias.requires_grad

@pytest.mark.parametrize('method', list(schemes))
def test_channels_last_is_kept(method):
    layer = conv().to(memory_format=torch.channels_last)
    new,x = low(method, layer),torch.randn(2, 12, 8, 8).to(memory_format=torch.channels_last)
    for p in new.parameters(): assert p.dim() < 4 or p.is_contiguous(memory_format=torch.channels_last)
    assert new(x).is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous() for p in low(method, conv()).parameters())
    layer = nn.Conv3d(8, 8, 3).to(memory_format=torch.channels_last_3d)
    for p in low(method, layer).parameters(): assert p.dim() < 5 or p.is_contiguous(memory_format=torch.channels_last_3d)

@pytest.mark.parametrize('method', list(schemes))
def test_copies_pickles_and_state_dicts_compute_the_same(method, tmp_path):
    layer,x = conv(groups=2),torch.randn(2, 12, 8, 8)
    new = low(method, layer)
    torch.save(new, tmp_path/'whole.pth')
    shell = schemes[method](Geometry.of(layer)).skeleton(new.rank) # knows no weights
    assert all(p.is_meta for p in shell.parameters())
    shell = shell.to_empty(device='cpu')
    shell.load_state_dict(new.state_dict())
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), torch.load(tmp_path/'whole.pth', weights_only=False), shell):
        assert repr(other) == repr(new) and other.geometry == new.geometry
        assert torch.equal(other(x), new(x)) and torch.equal(other.weight, new.weight)

@pytest.mark.parametrize('method', list(schemes))
@pytest.mark.parametrize('groups', [1, 2])
def test_the_product_is_differentiable(method, groups):
    layer = nn.Conv2d(4, 4, (3,2), groups=groups, bias=False, dtype=torch.float64)
    new = low(method, layer, rank=1 if method == 'slice' else 2)
    params = dict(new.named_parameters())
    product = lambda *ps: torch.func.functional_call(Weight(new), {f'of.{n}': p for n,p in zip(params, ps)}, ())
    assert torch.autograd.gradcheck(product, tuple(params.values()))
    # the same by another way: what the chain does to the output is what its product does
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    by_chain = torch.autograd.grad(new(x).square().sum(), list(params.values()))
    by_weight = torch.autograd.grad(F.conv2d(x, new.weight, groups=groups).square().sum(), list(params.values()))
    for a,b in zip(by_chain, by_weight): assert torch.allclose(a, b, rtol=1e-10, atol=1e-10) # float64, sums of a few hundred terms

class Weight(nn.Module):
    "What `layer.weight` is, as a module"
    def __init__(self, of): super().__init__(); self.of = of
    def forward(self): return self.of.weight

def test_the_product_by_einsum():
    new = {m: low(m, conv()) for m in ('svd', 'spatial', 'tucker', 'cp')}
    rules = dict(svd='rihw,orab->oihw', spatial='riha,orbw->oihw', tucker='piab,qphw,oqcd->oihw', cp='riab,rche,rdfw,orgj->oihw')
    for m,rule in rules.items(): # float32 sums of a few terms of order one
        assert torch.allclose(new[m].weight, torch.einsum(rule, *(l.weight for l in new[m])), atol=1e-5), m

@pytest.mark.parametrize('layer,firsts', [
    (nn.Conv2d(4, 6, 3, stride=2), dict(svd=[(2,2), (1,1)], spatial=[(2,1), (1,2)], tucker=[(1,1), (2,2), (1,1)], cp=[(1,1), (2,1), (1,2), (1,1)], slice=[(2,1), (1,2)])),
    (nn.Conv2d(4, 6, (1,3), stride=2), dict(svd=[(2,2), (1,1)], spatial=[(2,1), (1,2)], tucker=[(2,1), (1,2), (1,1)], cp=[(2,1), (1,2), (1,1)], slice=[(2,1), (1,2)])),
    (nn.Conv2d(4, 6, (3,1), stride=2), dict(svd=[(2,2), (1,1)], spatial=[(2,2), (1,1)], tucker=[(1,2), (2,1), (1,1)], cp=[(1,2), (2,1), (1,1)], slice=[(2,2), (1,1)]))])
def test_strides_go_on_the_first_factor_that_can_carry_them(layer, firsts):
    for method,strides in firsts.items():
        assert [l.stride for l in low(method, layer, rank=1) if hasattr(l, 'stride')] == strides, method

@pytest.mark.parametrize('method', ['svd', 'spatial', 'slice'])
def test_singular_values_are_shared_out_equally(method):
    first,last = (l.weight.detach().double() for l in low(method, conv(), 3) if hasattr(l, 'weight'))
    def norms(w, axis): return w.movedim(axis, 0).flatten(1).norm(dim=1).sort()[0]
    if method == 'slice': assert abs(first.norm()-last.norm()) < 1e-4 # float32; one SVD for each slice
    else: assert torch.allclose(norms(first, 0), norms(last, 1), rtol=1e-4)

@pytest.mark.parametrize('method', list(schemes))
def test_random_numbers_are_left_alone(method):
    layer = conv()
    torch.manual_seed(1); a = torch.rand(1)
    torch.manual_seed(1); one = low(method, layer); b = torch.rand(1)
    assert a == b
    assert torch.equal(one.weight, low(method, layer).weight) # and the result is the same each time

# --- a sixth scheme, from outside

class InputSideSolver(Solver):
    "The truncated SVD of the matrix (i | o h w)"
    def unfolding(self): return self.blocks.transpose(1, 2).flatten(2)
    def svd(self): return torch.linalg.svd(self.unfolding(), full_matrices=False)
    def modes(self): return [Mode(self.scheme.full(), lambda: self.svd()[1], self.unfolding().shape[1:])]
    def tensors(self, rank):
        U,S,Vh = self.svd()
        return [(U[...,:rank]*S[:,None,:rank]).transpose(1, 2), Vh[:,:rank].unflatten(2, (self.scheme.o, *self.scheme.k)).transpose(1, 2)]
    def error(self, rank): return float((self.svd()[1][:,rank:].square().sum()/self.blocks.square().sum()).sqrt())

class InputSide(Scheme):
    "The matrix (i | o h w), which no scheme of the package takes: pointwise to `rank` channels, then the whole kernel"
    name = 'input side'
    solver_class = InputSideSolver
    def full(self): return min(self.i, self.o*prod(self.k))
    def links(self, rank): return [Link(self.i, rank), Link(rank, self.o, self.geom.axes)]

@pytest.fixture
def sixth():
    yield register(InputSide)
    del schemes[InputSide.name]

def test_a_scheme_from_outside_needs_two_classes_and_one_line(sixth):
    net,x = nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(16, 16, 5, stride=2, groups=2, bias=False)).double(),torch.randn(2, 12, 9, 9).double()
    new = ConvDecomposer('input side', rank=.5).decompose(net)
    assert [(r['scheme'], r['rank']) for r in new.low_rank_plan['layers'].values()] == [('input side', 6), ('input side', 4)]
    assert new(x).shape == net(x).shape and n_params(new) < n_params(net)
    exact = ConvDecomposer('input side', rank=1., force=True).decompose(net)
    assert distance(exact(x), net(x)) <= 1e-12*net(x).norm() # float64 rounding
    ConvDecomposer('input side', rank=.5)
    with pytest.raises(ValueError, match="'input side'"): ConvDecomposer('input')

def test_a_scheme_without_a_name_is_refused():
    class Nameless(Scheme): pass
    with pytest.raises(ValueError, match='Nameless.name'): register(Nameless)
    assert None not in schemes

# --- layers beyond LAPACK's reach, where the SVD takes other routes

@pytest.mark.parametrize('method,layer', [('svd', nn.Linear(400, 300)), ('svd', nn.Conv2d(80, 160, 3)), ('spatial', nn.Conv2d(60, 70, 3)), ('svd', nn.Linear(200, 1500))])
@pytest.mark.parametrize('power', [0., .7, 2.]) # how fast the spectrum falls
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_errors_of_larger_layers_are_the_tails_of_their_spectra(method, layer, power, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    make = lambda: solver_of(method, layer)
    U,S,Vh = torch.linalg.svd(make().unfolding()[0].double(), full_matrices=False)
    if power: S = S[0]*torch.arange(1, len(S)+1).double()**-power
    A = (U*S)@Vh
    if method == 'spatial': A = A.view(layer.in_channels, 3, layer.out_channels, 3).permute(2, 0, 1, 3)
    with torch.no_grad(): layer.weight.copy_(A.reshape(layer.weight.shape))
    tail = lambda r: (S[r:].square().sum()/S.square().sum()).sqrt().item()
    s,eps = make(),1e-5 if dtype == torch.float32 else 1e-12 # a few dozen epsilons, and more where a small tail is a difference of large sums
    for r in (1, 3, 10, 40, 120, len(S)-1, len(S)):
        assert abs(s.error(r) - tail(r)) <= eps
        if r in (3, 120): assert abs(distance(s.build(r, layer).weight, layer.weight)/layer.weight.double().norm() - s.error(r)) <= eps
    asc = [make().error(r) for r in (1, 3, 10, 40, 120)] # each on its own
    assert all(b <= a+eps for a,b in zip(asc, asc[1:]))
