"The SVD routes against LAPACK in float64, over shapes, dtypes, conditioning and ranks"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from fasterai_lr import linalg
from fasterai_lr.linalg import SVD, check_finite, singular_values, truncated_svd
from helpers import gen

def orth(n, k, g): return torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]

def spectrum(kind, k):
    i = torch.arange(1, k+1, dtype=torch.float64)
    return {'flat':     torch.ones(k),
            'random':   torch.linspace(1, .01, k),
            'power':    i**-.7,
            'steep':    i**-3,
            'graded':   10**torch.linspace(0, -14, k),
            'outliers': torch.where(i<=3, 60., 1-.5*i/k),
            'deficient':torch.where(i<=k//3, 1., 0.),
            'tiny':     torch.where(i<=k//2, 1., 1e-9),
            'zero':     torch.zeros(k)}[kind].double()

KINDS = ['flat', 'random', 'power', 'steep', 'graded', 'outliers', 'deficient', 'tiny', 'zero']

def matrix(m, n, kind, dtype, seed=0, scale=1.):
    g,k = torch.Generator().manual_seed(seed),min(m, n)
    return ((orth(m, k, g)*spectrum(kind, k)) @ orth(n, k, g).T * scale).to(dtype)

def check(A, r, USV):
    "What the notebook promises; LAPACK itself needs up to 30 eps for the first two on these sizes"
    U,S,V = USV
    dtype = A.dtype if A.dtype==torch.float64 else torch.float32
    assert U.dtype==S.dtype==V.dtype==dtype
    assert U.shape==(A.shape[0],r) and S.shape==(r,) and V.shape==(r,A.shape[1])
    assert (S>=0).all() and (S.diff()<=0).all()
    A,U,S,V = (o.double() for o in (A,U,S,V))
    eps,eye,exact = torch.finfo(dtype).eps,torch.eye(r).double(),torch.linalg.svdvals(A)
    assert (U.T@U - eye).abs().max() < 50*eps
    assert (V@V.T - eye).abs().max() < 50*eps
    assert (S - exact[:r]).abs().max() <= 100*eps*exact[0]
    assert (A - (U*S)@V).norm() - exact[r:].norm() <= 50*eps*exact.norm()

@pytest.fixture(autouse=True)
def one_thread():
    "These matrices are too small to share"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=st.integers(1, 40), n=st.integers(1, 40), kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.float32, torch.float64]),
       part=st.floats(0, 1), scale=st.sampled_from([1., 1e-3, 1e6]), gram=st.booleans(), seed=st.integers(0, 99))
def test_small(m, n, kind, dtype, part, scale, gram, seed):
    "Any shape, on the way it would take and on the Gram route"
    A,r = matrix(m, n, kind, dtype, seed, scale),max(1, round(part*min(m, n)))
    svd = SVD(A)
    svd.small = not gram
    check(A, r, svd.truncate(r))

@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.sampled_from([(150,150), (150,400), (400,150), (256,300)]), kind=st.sampled_from(KINDS), 
       dtype=st.sampled_from([torch.float32, torch.float64]), part=st.sampled_from([0., .1, .5, .9, 1.]), seed=st.integers(0, 99))
def test_routes(shape, kind, dtype, part, seed):
    A,r = matrix(*shape, kind, dtype, seed),max(1, round(part*min(shape)))
    svd = SVD(A)
    check(A, r, svd.truncate(r))
    S,exact = svd.spectrum.double(),torch.linalg.svdvals(A.double())
    assert (S - exact).abs().max() <= 100*torch.finfo(dtype).eps*exact[0]
    check(A, r, svd.truncate(r)) # from what the spectrum has left behind

@pytest.mark.parametrize('dtype,top', [(torch.float32, 3e38), (torch.float64, 1.7e308)])
def test_the_largest_numbers(dtype, top):
    A = torch.diag(torch.tensor([1., -.25, .5], dtype=dtype))*top
    U,S,V = truncated_svd(A, 2)
    assert torch.equal(S, singular_values(A)[:2]) and ((S.double()/top - torch.tensor([1, .5]).double()).abs() < 1e-6).all()
    assert torch.equal((U*S)@V, A*torch.tensor([1, 0, 1])) # unit vectors, without rounding

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_exact_at_full_rank(kind, dtype):
    "Relative to the largest singular value; 'zero' has none"
    A = matrix(200, 500, kind, dtype)
    U,S,V = truncated_svd(A, 200)
    tol = {torch.float32:2e-6, torch.float64:2e-14}[dtype] # 17 and 90 eps
    assert ((U*S)@V - A).norm() <= tol*A.norm()

class Solves(TorchDispatchMode):
    "Counts `qr`, which the randomised route takes for each pass, and eigenproblems, which the Gram route solves"
    def __init__(self, monkeypatch):
        super().__init__()
        self.qr,self.eigen,solve = 0,0,linalg.Eigen
        def counted(G):
            self.eigen += 1
            return solve(G)
        monkeypatch.setattr(linalg, 'Eigen', counted)
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.qr += func.overloadpacket is torch.ops.aten.linalg_qr
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('kind', ['power', 'steep', 'deficient', 'outliers'])
def test_randomized_keeps_the_promise_or_declines(kind, dtype, monkeypatch):
    A = matrix(300, 600, kind, dtype)
    with Solves(monkeypatch) as solves: taken = truncated_svd(A, 5)
    check(A, 5, taken)
    assert solves.qr
    if kind=='steep': assert not solves.eigen

def test_randomized_declines_a_flat_spectrum(monkeypatch):
    "Noise has no gap to find: with an honest estimate two passes are enough to see it"
    A = torch.randn(300, 600, generator=gen())
    with Solves(monkeypatch) as solves: truncated_svd(A, 5)
    assert 0 < solves.qr <= 2*2 and solves.eigen

def test_randomized_is_chosen_and_declined(monkeypatch):
    for kind,taken in (('steep',True), ('flat',False)):
        A = matrix(400, 500, kind, torch.float32) if kind=='steep' else torch.randn(400, 500, generator=gen())
        with Solves(monkeypatch) as solves: found = truncated_svd(A, 4)
        check(A, 4, found)
        assert solves.qr and (not solves.eigen) == taken
    with Solves(monkeypatch) as solves: truncated_svd(A, 200)
    assert not solves.qr and solves.eigen # too many for it
    svd = SVD(A)
    assert len(svd.spectrum) > 4
    with Solves(monkeypatch) as solves: svd.truncate(4)
    assert not solves.qr # eigenvectors are there already

def test_eigenproblem_is_solved_once(monkeypatch):
    calls,run = [],linalg.Eigen
    monkeypatch.setattr(linalg, 'Eigen', lambda G: calls.append(G.dtype) or run(G))
    svd = SVD(matrix(200, 300, 'random', torch.float32))
    for r in (50, 100, 150): svd.truncate(r)
    assert calls==[torch.float32]
    _ = svd.spectrum; svd.truncate(200); svd.truncate(50)
    assert calls==[torch.float32, torch.float64] # the smallest, 0.01 of the largest, ask for more digits

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(20,30), (200,300), (300,200), (3,20,30)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_error(kind, shape, dtype):
    A = torch.stack([matrix(*shape[-2:], kind, dtype, seed) for seed in range(shape[0])]) if len(shape)==3 else matrix(*shape, kind, dtype)*1e-9
    svd,eps = SVD(A),torch.finfo(dtype).eps
    for r in (2, min(shape[-2:])//2, min(shape[-2:])):
        U,S,V = svd.truncate(r)
        want = ((U*S[...,None,:]).double()@V.double() - A.double()).norm()/A.double().norm() if A.any() else 0.
        # a difference of squares right to a few eps, of at least 1e-3: a few 1000 eps, halved by the root
        for s in (svd, SVD(A)): assert abs(s.error(r)-want) <= 50*eps + 2000*eps*want
    with pytest.raises(ValueError, match='must be an integer from 1'): svd.error(0)

def test_deterministic_and_leaves_the_global_generator_alone():
    A = matrix(300, 600, 'steep', torch.float32)
    state = torch.get_rng_state()
    a,b = truncated_svd(A, 4),truncated_svd(A, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x,y in zip(a, b))

@pytest.mark.parametrize('shape', [(1,1), (1,7), (7,1), (1,300), (300,1)])
def test_vectors(shape):
    A = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    check(A, 1, truncated_svd(A, 1))
    torch.testing.assert_close(singular_values(A), A.norm()[None])

@pytest.mark.parametrize('shape', [(6,9), (200,300)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(shape, dtype):
    A = matrix(*shape, 'random', dtype)
    check(A.float(), 5, truncated_svd(A, 5))

@pytest.mark.parametrize('r', [1, 3, 5])
def test_batches(r):
    A = torch.randn(4, 2, 5, 7, generator=torch.Generator().manual_seed(2))
    U,S,V = truncated_svd(A, r)
    assert U.shape==(4,2,5,r) and S.shape==(4,2,r) and V.shape==(4,2,r,7) and singular_values(A).shape==(4,2,5)
    for i in range(4):
        for j in range(2): check(A[i,j], r, (U[i,j], S[i,j], V[i,j]))

def test_strides_do_not_matter():
    A = matrix(160, 500, 'power', torch.float32)
    wide = torch.zeros(160, 1000)
    wide[:,::2] = A
    for B in (A.T.contiguous().T, wide[:,::2]):
        assert not B.is_contiguous()
        check(B, 60, truncated_svd(B, 60))
        check(B.T, 60, truncated_svd(B.T, 60))

@pytest.mark.parametrize('scale', [1e-36, 1e-30, 1e-22, 1e-12, 1e12, 1e22, 1e30])
@pytest.mark.parametrize('r', [3, 100, 200])
def test_squares_out_of_range(scale, r):
    "The square of 1e30 is no float32, that of 1e-30 is zero in it"
    A = matrix(200, 300, 'power', torch.float32)*scale
    U,S,V = truncated_svd(A, r)
    check(A.double().div(scale).float(), r, (U, S.double().div(scale).float(), V))

@pytest.mark.parametrize('mode', ['medium', 'autocast'])
def test_low_precision_modes_around(mode):
    A = matrix(200, 300, 'power', torch.float32)
    was = torch.get_float32_matmul_precision()
    try:
        if mode=='medium': torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', torch.bfloat16, enabled=mode=='autocast'): out = truncated_svd(A, 50)
        assert torch.get_float32_matmul_precision()==('medium' if mode=='medium' else was)
    finally: torch.set_float32_matmul_precision(was)
    check(A, 50, out)

def test_parameters_and_the_input_itself():
    A = torch.nn.Parameter(matrix(200, 300, 'power', torch.float32))
    before = A.detach().clone()
    svd = SVD(A)
    for out in (*svd.truncate(200), *svd.truncate(3), svd.spectrum): 
        assert not out.requires_grad and type(out) is torch.Tensor
        out.zero_() # the caller's own: neither A nor what a later call gives may change
    assert torch.equal(A, before)
    check(A.detach(), 50, svd.truncate(50))
    small = SVD(A[:20])
    for out in (*small.truncate(20), small.spectrum): out.zero_()
    check(A[:20].detach(), 20, small.truncate(20))

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_not_finite(bad):
    A = torch.ones(200, 300)
    A[3,4] = bad
    for f in (lambda: truncated_svd(A, 2, 'features.7'), lambda: singular_values(A, 'features.7'), lambda: check_finite(A, 'features.7')):
        with pytest.raises(ValueError, match='features.7 holds 1 NaN or Inf among its 60000 entries'): f()

@pytest.mark.parametrize('rank', [0, -1, 6, 2.0, True, None])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=r'the rank of fc must be an integer from 1 to 5, got'): truncated_svd(torch.ones(5, 9), rank, 'fc')

@pytest.mark.parametrize('A,error,text', [
    (torch.ones(3, 4, dtype=torch.int64), TypeError, 'fc must hold real floating point numbers, got torch.int64'),
    (torch.ones(3, 4, dtype=torch.complex64), TypeError, 'fc must hold real floating point numbers, got torch.complex64'),
    (torch.ones(3), ValueError, r'fc must be a matrix .*got shape \[3\]'),
    (torch.ones(0, 4), ValueError, r'got shape \[0, 4\]'),
    ([[1.,2.]], TypeError, 'fc must be a tensor, got list')])
def test_what_is_no_matrix(A, error, text):
    with pytest.raises(error, match=text): truncated_svd(A, 1, 'fc')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kind', KINDS)
def test_cuda(kind):
    A = matrix(300, 600, kind, torch.float32)
    for r in (3, 150, 300):
        out = truncated_svd(A.cuda(), r)
        assert all(o.is_cuda for o in out)
        check(A, r, [o.cpu() for o in out])
