"Tucker-2 and CP: exact where they must be, errors as told, never growing with the rank, bounded, repeatable; tensorly is the reference"
import math, warnings
import pytest, torch, tensorly as tl
from hypothesis import example, given, settings, strategies as st
from tensorly.decomposition import parafac, partial_tucker
from fasterai_lr.linalg import singular_values
from fasterai_lr.tensor import *
from helpers import gen

def on_torch(): return tl.backend_context('pytorch', local_threadsafe=True)

# Relative errors of results that are exact but for rounding: a few hundred roundings of single and double precision
EXACT = {torch.float32: 2e-5, torch.float64: 1e-13}
# Two computations of the same error of order 1, one on the factors and one on the kernel
SAME  = {torch.float32: 1e-5, torch.float64: 1e-12}

# Eigenvectors of Gram matrices in double precision give squared errors to ten roundings, and errors that are about zero to the root of that
GRAM  = 2e-15
def no_more(a, b, dtype): return a <= math.sqrt(b*b+GRAM) + EXACT[dtype]

def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64).to(dtype)
def terms(shape, rank, seed=0, dtype=torch.float64): # a kernel of CP rank `rank`
    g = gen(seed)
    return cp_to_kernel([torch.randn(n, rank, generator=g, dtype=torch.float64) for n in shape]).to(dtype)
def decaying(*shape, seed=0, power=.5, dtype=torch.float64):
    W = randn(*shape, seed=seed)
    for n in shape: W = torch.tensordot(W, torch.linalg.qr(randn(n, n, seed=seed+n))[0]*torch.arange(1, n+1)**-power, dims=([0],[0]))
    return W.to(dtype)

def one_entry(shape, seed):
    W = torch.zeros(shape, dtype=torch.float64)
    W.view(-1)[seed%W.numel()] = 1
    return W

KINDS = dict(
    random = lambda shape, seed: randn(*shape, seed=seed),
    decaying = lambda shape, seed: decaying(*shape, seed=seed),
    low = lambda shape, seed: terms(shape, 2, seed),
    one_term = lambda shape, seed: terms(shape, 1, seed),
    equal_slices = lambda shape, seed: randn(*shape[:2], *[1]*(len(shape)-2), seed=seed).expand(shape).clone(),
    half_zero = lambda shape, seed: randn(*shape, seed=seed)*(torch.arange(shape[0])%2==0).view(-1, *[1]*(len(shape)-1)),
    constant = lambda shape, seed: torch.ones(shape, dtype=torch.float64),
    equal_last = lambda shape, seed: randn(*shape[:-1], 1, seed=seed).expand(shape).clone(),
    one_entry = lambda shape, seed: one_entry(shape, seed),
    spread = lambda shape, seed: randn(*shape, seed=seed)*10**(5*randn(*shape, seed=seed+1)), # entries of all sizes
    zero = lambda shape, seed: torch.zeros(shape, dtype=torch.float64),
    tiny = lambda shape, seed: randn(*shape, seed=seed)*1e-25, # its squares are below single precision
    huge = lambda shape, seed: randn(*shape, seed=seed)*1e25)  # and its squares above

shapes = st.tuples(st.integers(1, 10), st.integers(1, 10)).flatmap(
    lambda oi: st.lists(st.integers(1, 4), max_size=3).map(lambda k: (*oi, *k)))
dtypes = st.sampled_from([torch.float32, torch.float64])
@st.composite
def kernels(draw):
    return KINDS[draw(st.sampled_from(list(KINDS)))](draw(shapes), draw(st.integers(0, 99))).to(draw(dtypes))

def ranks_for(W, draw): return tuple(draw(st.integers(1, r)) for r in tucker2_full_ranks(W.shape))
def tucker_error(W, found): return relative_error(W, tucker2_to_kernel(*found))
def cp_error(W, factors): return relative_error(W, cp_to_kernel(factors))
def assert_close(a, b, tol): assert torch.dist(a.double(), b.double()) <= tol*max(1, b.double().norm()), (a, b)
def assert_orthonormal(U): assert_close(U.T@U, torch.eye(U.shape[1]), 10*SAME[U.dtype])

# Tucker-2

@settings(max_examples=200, deadline=None)
@given(kernels(), st.data())
def test_tucker2(W, data):
    "Shapes, orthonormal bases, the error formula, and never above what the HOSVD promises"
    ro,ri = ranks_for(W, data.draw)
    core,Uo,Ui = found = tucker2(W, (ro,ri))
    assert [x.shape for x in found] == [(ro,ri,*W.shape[2:]), (W.shape[0],ro), (W.shape[1],ri)]
    assert {x.dtype for x in found} == {W.dtype}
    assert_orthonormal(Uo); assert_orthonormal(Ui)
    # the core is the kernel in the bases, so that ‖W-approx‖² = ‖W‖²-‖core‖²
    scale = W.double().norm().item() or 1.
    assert_close(core.double()/scale, torch.einsum('oi...,oa,ib->ab...', W.double()/scale, Uo.double(), Ui.double()), SAME[W.dtype])
    err = tucker_error(W, found)
    if W.any(): assert abs(err**2 - (1-(core.double().norm()/scale).item()**2)) <= SAME[W.dtype]
    assert no_more(err, hosvd_errors(W)[ro-1,ri-1], W.dtype)

@settings(max_examples=100, deadline=None)
@given(kernels())
def test_tucker2_full_rank_is_exact(W):
    assert tucker_error(W, tucker2(W, tucker2_full_ranks(W.shape))) <= EXACT[W.dtype]

@settings(max_examples=100, deadline=None)
@given(kernels(), st.data())
def test_hosvd_errors(W, data):
    "The table falls along both axes to zero, and is what the truncated HOSVD leaves"
    E = hosvd_errors(W)
    assert E.shape == tucker2_full_ranks(W.shape) and E.dtype == torch.float64
    assert (E.diff(dim=0)<=0).all() and (E.diff(dim=1)<=0).all() and E[-1,-1] == 0 and E.max() <= 1
    ro,ri = ranks_for(W, data.draw)
    # where singular values are equal their vectors are arbitrary: a distinct spectrum for the comparison
    V = decaying(*W.shape, seed=3)
    assert abs(tucker_error(V, tucker2(V, (ro,ri), max_sweeps=0)) - hosvd_errors(V)[ro-1,ri-1].item()) <= 1e-9

def test_hosvd_errors_at_full_other_rank_are_the_tails_of_the_mode_spectra():
    W = decaying(12, 9, 3, 3)
    for A,E in zip(channel_unfoldings(W), (hosvd_errors(W)[:,-1], hosvd_errors(W)[-1])):
        s2 = singular_values(A).square()
        assert_close(E, ((s2.sum()-s2.cumsum(0)).clamp_min(0)/s2.sum()).sqrt(), 1e-7) # the reference cancels: sqrt of 1e-16

@pytest.mark.parametrize('shape,ranks', [((24,16,3,3), (8,6)), ((16,24,5), (10,3)), ((12,8,2,3,2), (5,5)), ((20,20), (6,6))])
@pytest.mark.parametrize('make', [randn, decaying])
def test_tucker2_beside_tensorly(shape, ranks, make):
    W = make(*shape)
    with on_torch(): (core,Us),_ = partial_tucker(W, rank=list(ranks), modes=[0,1], tol=1e-8, n_iter_max=200)
    theirs = relative_error(W, tucker2_to_kernel(core, *Us))
    # from the same start the two climb the same hill: equal but for where each stops (tol²: a squared error's relative change)
    assert abs(tucker_error(W, tucker2(W, ranks, max_sweeps=200, tol=1e-8))/theirs - 1) <= 1e-4
    assert tucker_error(W, tucker2(W, ranks)) <= theirs*1.005 # at the defaults

@settings(max_examples=60, deadline=None)
@given(kernels(), st.data())
def test_tucker2_from_lower_ranks_never_grows(W, data):
    full = tucker2_full_ranks(W.shape)
    few = lambda f: sorted(data.draw(st.lists(st.integers(1, f), min_size=3, max_size=3)))
    path = list(zip(few(full[0]), few(full[1])))
    if data.draw(st.booleans()): path.append(full)
    errors = [tucker_error(W, f) for f in rank_path(tucker2, W, path)]
    E = hosvd_errors(W)
    assert all(no_more(b, a, W.dtype) for a,b in zip(errors, errors[1:]))
    assert all(no_more(e, E[ro-1,ri-1], W.dtype) for e,(ro,ri) in zip(errors, path))
    assert path[-1]!=full or errors[-1] <= EXACT[W.dtype]

def test_of_two_starts_the_better_is_taken_also_where_the_kept_norms_round_alike():
    "In float32 two bases that keep the same norm but for 1e-8 of it may lose 1e-5 and 1e-4"
    g = gen(107)
    W = torch.randn(4, 5, 3, generator=g, dtype=torch.float64)
    W = (W*10**(5*torch.randn(4, 5, 3, generator=g, dtype=torch.float64))).float()
    path = [(1, 1), (2, 4), (3, 4)]
    errors = [tucker_error(W, f) for f in rank_path(tucker2, W, path)]
    E = hosvd_errors(W)
    assert all(no_more(e, E[ro-1,ri-1], W.dtype) for e,(ro,ri) in zip(errors, path))

# CP

@settings(max_examples=200, deadline=None)
@given(kernels(), st.integers(1, 24), st.integers(0, 9), st.sampled_from([0, 1, 15, 30]))
# More terms than these have: some vanish, below single precision
@example(KINDS['equal_slices']((7,2,4), 68).float(), 4, 0, 15)
@example(KINDS['equal_slices']((7,2,4), 69).float(), 6, 0, 15)
@example(KINDS['equal_slices']((7,2,4), 96).float(), 6, 0, 15)
@example(KINDS['equal_slices']((7,2,4), 33).float(), 6, 0, 15)
@example(KINDS['equal_slices']((7,2,4), 33), 6, 0, 15)
@example(KINDS['equal_last']((5,4,3,2), 0).float(), 11, 0, 30)
@example(KINDS['constant']((7,2,4), 0).float(), 6, 0, 15)
@example(KINDS['one_entry']((7,2,4), 5).float(), 6, 0, 15)
@example(KINDS['one_term']((6,5,3), 0).float()*1e-20, 12, 0, 30)
@example(KINDS['one_term']((6,5,3), 0).float()*1e18, 12, 0, 30)
@example(KINDS['constant']((6,1,3,4), 0), 10, 0, 30)
def test_cp(W, rank, seed, max_sweeps):
    "Shapes, finite and balanced factors, bounded terms, never worse than nothing; the same seed, the same factors"
    state = torch.get_rng_state()
    factors = cp(W, rank, seed=seed, max_sweeps=max_sweeps)
    assert torch.equal(state, torch.get_rng_state())
    assert [f.shape for f in factors] == [(n,rank) for n in W.shape] and {f.dtype for f in factors} == {W.dtype}
    assert all(f.isfinite().all() for f in factors)
    assert all(torch.equal(f, torch.ones_like(f)) for f in factors[2:] if len(f)==1)
    assert all(torch.equal(a, b) for a,b in zip(factors, cp(W, rank, seed=seed, max_sweeps=max_sweeps)))
    err,scale = cp_error(W, factors),W.double().norm().item()
    assert err <= 1+SAME[W.dtype]
    # single precision measures squared errors to about 1e-7, which caps the logarithm of the bound
    floor = math.sqrt(EXACT[W.dtype])*1e-2
    assert cp_term_norms(factors).double().norm().item() <= math.sqrt(1 + 2000*math.log(1/max(min(err, 1), floor)))*scale
    norms = torch.stack([f.double().norm(dim=0) for f,n in zip(factors, W.shape) if n>1]) if W.numel()>1 else torch.ones(1, rank)
    if norms.any(): assert_close(norms/norms.max(), (norms.mean(0)/norms.max()).expand_as(norms), 1e-4 if W.dtype==torch.float32 else 1e-12)

@settings(max_examples=100, deadline=None)
@given(kernels(), st.integers(0, 3))
def test_cp_is_exact_from_exact_rank_on(W, more):
    assert cp_exact_rank(W.shape) == math.prod(W.shape)//max(W.shape) <= math.prod(W.shape[2:])*min(W.shape[:2])
    factors = cp(W, cp_exact_rank(W.shape)+more)
    assert cp_error(W, factors) <= EXACT[W.dtype]
    scale = W.double().norm().item()
    assert abs(cp_term_norms(factors).norm().item() - scale) <= SAME[W.dtype]*scale # the terms are orthogonal

@settings(max_examples=60, deadline=None)
@given(kernels(), st.lists(st.integers(1, 20), min_size=2, max_size=4))
@example(KINDS['low']((10,4,2,4), 5), [15, 15, 17]) # exact but for rounding, which the sweeps' own errors do not see
@example(KINDS['one_term']((8,8,1,4), 43).float(), [2, 5, 9])
def test_cp_error_never_grows(W, ranks):
    errors = [cp_error(W, f) for f in rank_path(cp, W, sorted(ranks), max_sweeps=10)]
    assert all(b <= a+EXACT[W.dtype] for a,b in zip(errors, errors[1:])), errors

@pytest.mark.parametrize('shape', [(12,10), (12,1,5), (1,10,5), (1,1,5,4), (6,8,1,1), (6,8,1,1,1), (7,1,1,3,1)])
def test_cp_of_a_matrix_is_the_truncated_svd(shape):
    W = randn(*shape)
    s = singular_values(W.reshape(W.shape[0], -1) if W.shape[0]>1 and W.shape[1]>1 else W.squeeze())
    for r in (1, 3): assert cp_error(W, cp(W, r)) == pytest.approx((s[r:].square().sum()/s.square().sum()).sqrt().item(), abs=1e-12)

@pytest.mark.parametrize('shape,rank', [((16,12,3,3), 4), ((10,14,5), 3), ((8,8,3,3,3), 3), ((20,1,3,3), 2), ((1,20,3,3), 2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_cp_finds_a_sum_of_few_terms(shape, rank, dtype):
    W = terms(shape, rank, dtype=dtype)
    # single precision resolves squared errors to about 1e-7; in double precision the sweeps end at the default `max_sweeps`
    assert cp_error(W, cp(W, rank)) <= (1e-3 if dtype==torch.float32 else 1e-5)

@pytest.mark.parametrize('shape', [(6,5,3,3), (6,5,4), (5,6,3,3,2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_cp_of_one_term_is_exact_at_once(shape, dtype):
    W = terms(shape, 1, dtype=dtype)
    assert cp_error(W, cp(W, 1, max_sweeps=5)) <= (1e-5 if dtype==torch.float32 else 1e-7)

def their_cp(W, rank, **kwargs):
    "tensorly's weights and factors"
    with on_torch(), warnings.catch_warnings():
        warnings.simplefilter('ignore') # on fewer singular vectors than components
        return parafac(W, rank, init='svd', random_state=0, **kwargs)

@pytest.mark.parametrize('make', [randn, decaying])
@pytest.mark.parametrize('shape,rank', [((32,24,3,3), 12), ((32,24,3,3), 40), ((24,32,5), 16), ((12,10,3,3,3), 16), ((24,24,1,7), 16)])
def test_cp_is_no_worse_than_parafac(shape, rank, make):
    W = make(*shape)
    with on_torch(): theirs = relative_error(W, tl.cp_to_tensor(their_cp(W, rank, n_iter_max=100)))
    assert cp_error(W, cp(W, rank)) <= theirs*1.002 # local optima: two starts differ by a few tenths of a percent

def test_cp_terms_stay_small_where_the_best_approximation_does_not_exist():
    "a∘a∘b + a∘b∘a + b∘a∘a has rank 3, and two terms that come ever closer grow without limit (de Silva and Lim 2008)"
    W = BORDER.double()
    factors = cp(W, 2, max_sweeps=500, tol=0)
    err = cp_error(W, factors)
    assert err < .1
    assert cp_term_norms(factors).square().sum() <= 1000*math.log(1/err**2)*W.norm()**2

def test_cp_bounds_the_terms_at_hardly_any_error():
    "Those of an unbounded fit, tensorly's, grow with every sweep"
    W = decaying(32, 24, 3, 3)
    bounded = cp(W, 24, max_sweeps=300)
    weights,factors = their_cp(W, 24, n_iter_max=300, tol=0)
    free = [factors[0]*weights, *factors[1:]]
    assert cp_term_norms(bounded).norm() < min(8*W.norm(), cp_term_norms(free).norm()/2)
    assert cp_error(W, bounded) < 1.02*cp_error(W, free)

def test_more_sweeps_and_a_start_do_not_hurt():
    W = decaying(24, 20, 3, 3)
    one,many = cp(W, 10, max_sweeps=5),cp(W, 10)
    assert cp_error(W, many) <= cp_error(W, one)
    assert cp_error(W, cp(W, 10, init=one)) <= cp_error(W, one)
    assert cp_error(W, cp(W, 12, init=many, max_sweeps=0)) == pytest.approx(cp_error(W, many), rel=1e-12) # new terms start at zero
    assert not torch.equal(cp(W, 10, seed=0)[0], cp(W, 10, seed=1)[0])

@pytest.mark.parametrize('scales', [(1e30, 1e-35, 1e5), (1e15, 1e15, 1e-30)])
def test_cp_from_factors_of_any_balance(scales):
    "Squares of such factors are outside single precision, the terms are not"
    W = decaying(12, 10, 3, dtype=torch.float32)
    start = cp(W, 4)
    again = cp(W, 6, init=[f*s for f,s in zip(start, scales)], max_sweeps=5)
    assert cp_error(W, again) <= cp_error(W, start) + EXACT[W.dtype]
    assert_close(*(f.norm(dim=0) for f in again[:2]), 1e-5) # a few roundings of single precision

@pytest.mark.parametrize('max_sweeps', [0, 5])
@pytest.mark.parametrize('scale', [-3., 1e20])
def test_cp_from_worse_than_nothing(max_sweeps, scale):
    W = decaying(12, 10, 3, dtype=torch.float32)
    start = [f*scale for f in cp(W, 4)]
    assert cp_error(W, cp(W, 6, init=start, max_sweeps=max_sweeps)) <= 1+EXACT[W.dtype]

# a∘a∘b + a∘b∘a + b∘a∘a, which two large terms that nearly cancel come ever closer to
BORDER = sum(torch.einsum('i,j,k->ijk', *x) for a,b in [torch.eye(4)[:2]] for x in ((a,a,b), (a,b,a), (b,a,a)))

@pytest.mark.parametrize('size', [1e-4, 1e-7, 2e-10, 1e-12]) # of each of three factors: squares from 1e-8 to 1e-72
@pytest.mark.parametrize('which', [[True, False], [True, True]])
def test_cp_from_terms_that_have_all_but_vanished(size, which):
    W,factor = BORDER,torch.where(torch.tensor(which), size, 1.)
    start = [f*factor for f in cp(W, 2, max_sweeps=500, tol=0)]
    for rank in (2, 3):
        factors = cp(W, rank, init=start)
        assert all(f.isfinite().all() for f in factors)
        assert cp_error(W, factors) < .01 # of one term alone: .75

def test_cp_spends_no_terms_on_channels_that_are_zero():
    "New terms start from singular vectors, and those of zero singular values are orthogonal to the kernel"
    W = decaying(12, 8, 3, 3)
    V = torch.zeros(12, 16, 3, 3, dtype=W.dtype)
    V[:,::2] = W
    factors = cp(V, 16)
    assert (cp_term_norms(factors)>1e-6).all()
    assert cp_error(V, factors) == pytest.approx(cp_error(W, cp(W, 16)), rel=.05) # two starts, two local optima

def test_cp_puts_new_terms_where_a_start_has_none():
    W = decaying(12, 10, 3, 3)
    none = cp(W, 6, max_sweeps=0)
    assert not any(f.any() for f in none)
    assert cp_error(W, cp(W, 6, init=none)) == pytest.approx(cp_error(W, cp(W, 6)), rel=.05) # another local optimum, as good

# Both

@pytest.mark.parametrize('dtype,power', [(torch.float32, -120), (torch.float32, 120), (torch.float64, -1000), (torch.float64, 1000)])
def test_the_scale_does_not_matter(dtype, power):
    "Powers of two scale without rounding: the same factors, up to where squares are far outside the dtype's range"
    W,scale = decaying(12, 10, 3, 3, dtype=dtype),2.**power
    V,tol = W*scale,SAME[dtype]
    assert_close(hosvd_errors(V), hosvd_errors(W), tol)
    assert relative_error(V, V*.75) == pytest.approx(.25) and relative_error(V, W) >= 1
    for error in (lambda W: cp_error(W, cp(W, 6)), lambda W: cp_error(W, cp(W, 7, init=cp(W, 6))), lambda W: cp_error(W, cp(W, 90)),
                  lambda W: tucker_error(W, tucker2(W, (5,4))), lambda W: tucker_error(W, tucker2(W, (6,6), init=tucker2(W, (5,4))))):
        assert error(V) == pytest.approx(error(W), abs=tol)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_single(dtype):
    W = randn(12, 10, 3, 3).to(dtype)
    assert all(torch.equal(a, b) for a,b in zip(cp(W, 6), cp(W.float(), 6)))
    assert all(torch.equal(a, b) for a,b in zip(tucker2(W, (6,5)), tucker2(W.float(), (6,5))))

def test_parameters_are_left_alone_and_results_carry_no_graph():
    W = torch.nn.Parameter(randn(12, 10, 3, 3, dtype=torch.float32))
    before = W.detach().clone()
    for x in [*cp(W, 6), *tucker2(W, (6,5)), hosvd_errors(W)]: assert not x.requires_grad
    assert torch.equal(W, before) and W.grad is None

@pytest.mark.parametrize('backend', ['numpy', 'pytorch'])
def test_tensorly_keeps_its_backend(backend):
    before = tl.get_backend()
    try:
        tl.set_backend(backend)
        cp(randn(6, 5, 3, 3), 4); tucker2(randn(6, 5, 3, 3), (3,3)); hosvd_errors(randn(6, 5, 3, 3))
        assert tl.get_backend() == backend
    finally: tl.set_backend(before)

def test_a_kernel_not_contiguous_in_memory():
    W = randn(3, 12, 3, 10).permute(1, 3, 0, 2)
    assert_close(cp_to_kernel(cp(W, 6)), cp_to_kernel(cp(W.contiguous(), 6)), 1e-12)
    assert_close(tucker2_to_kernel(*tucker2(W, (6,5))), tucker2_to_kernel(*tucker2(W.contiguous(), (6,5))), 1e-12)

W = randn(8, 6, 3, 3)
@pytest.mark.parametrize('call,match', [
    (lambda: tucker2(W, (9,6)), r'from \(1, 1\) to \(8, 6\), got \(9, 6\)'),
    (lambda: tucker2(W, (8,0)), r'got \(8, 0\)'),
    (lambda: tucker2(W, (.5,.5)), 'integers'),
    (lambda: tucker2(W, 4), 'pair'),
    (lambda: tucker2(W, (4,4,4)), 'pair'),
    (lambda: tucker2(W, (4,4), init=tucker2(W, (5,4))), 'init'),
    (lambda: tucker2(W, (4,4), init=tucker2(randn(7, 6, 3, 3), (2,2))), 'init'),
    (lambda: cp(W, 0), 'rank must be an integer of at least 1, got 0'),
    (lambda: cp(W, 2.), 'got 2.0'),
    (lambda: cp(W, 4, init=cp(W, 5)), 'rank 4'),
    (lambda: cp(W, 4, init=cp(W, 3)[:3]), 'init'),
    (lambda: cp(W, 4, init=[f*math.nan for f in cp(W, 3)]), 'init holds'),
    (lambda: cp(torch.full((4,4,3), math.nan), 2), 'NaN'),
    (lambda: tucker2(torch.full((4,4,3), math.inf), (2,2)), 'Inf'),
    (lambda: cp(torch.zeros(4), 2), r'\[o,i,\*k\]'),
    (lambda: hosvd_errors(torch.zeros(0, 4, 3)), 'non-empty'),
    (lambda: tucker2(torch.zeros(4, 4, 1, 1, 1, 1), (2,2)), '0 to 3 spatial axes')])
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match): call()

@pytest.mark.parametrize('call', [lambda: cp([[1.]], 1), lambda: tucker2(torch.ones(3, 3, dtype=torch.int64), (1,1))])
def test_wrong_type(call):
    with pytest.raises(TypeError, match='kernel must be a floating point tensor'): call()
