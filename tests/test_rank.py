"Ranks: Energy and EVBMF against their definitions, references and known ranks; rank rules and their errors"
import math, pickle, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import brentq
from fasterai_lr.rank import *

quick = settings(max_examples=150, deadline=None, derandomize=True)
spectra = st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=30).map(lambda o: np.sort(o)[::-1])
fractions = st.floats(1e-6, 1)

def svals(A): return np.linalg.svd(A, compute_uv=False)
def ortho(rng, n, r): return np.linalg.qr(rng.normal(size=(n,r)))[0]

# --- Energy

@quick
@given(spectra, fractions)
def test_energy_is_the_smallest_rank_that_keeps_p(s, p):
    r,e = Energy(p)(s, (len(s),99)),s**2
    slack = 1e-9*e.sum()  # the rule forgives a relative rounding error of 1e-9 in 1-p, and sums differ in their order
    assert 1 <= r <= len(s)
    assert e[:r].sum() >= p*e.sum()-slack
    if r>1: assert e[:r-1].sum() <= p*e.sum()+slack

@quick
@given(spectra, fractions, fractions)
def test_energy_grows_with_p(s, p, q):
    assert Energy(min(p,q))(s, (len(s),99)) <= Energy(max(p,q))(s, (len(s),99))

@quick
@given(spectra, fractions, st.integers(-60,60))
def test_energy_ignores_scale(s, p, k):  # powers of two: exact in floating point
    assert Energy(p)(s, (len(s),99)) == Energy(p)(s*2.**k, (len(s),99))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('m,n,r', [(8,8,3), (64,576,30), (10,2000,4), (300,300,100), (5,5,5), (1,7,1)])
def test_energy_1_is_the_numerical_rank(m, n, r, dtype):
    g = torch.Generator().manual_seed(m+n+r)
    A = torch.randn(m,r,generator=g,dtype=dtype) @ torch.randn(r,n,generator=g,dtype=dtype)
    assert Energy(1.)(torch.linalg.svdvals(A), A.shape) == r == torch.linalg.matrix_rank(A)

@pytest.mark.parametrize('k', range(1,11))
def test_energy_of_equal_values(k): assert Energy(k/10)(torch.ones(10), (10,10)) == k  # 1-k/10 is not exact in floating point

def test_energy_keeps_small_values():
    s = 10.**-np.arange(0,13,2)  # squares down to 1e-24: lost in a sum from the left
    assert Energy(1.)(s, (7,7)) == 7

def test_energy_of_blocks():
    s = torch.tensor([[4.,2,1],[4,0,0],[1,1,1]])
    for p in (.3,.8,.9,.95,.99,1.): assert Energy(p)(s, (3,9)) == Energy(p)((s**2).sum(0).sqrt(), (3,9))
    assert Energy(.9)(torch.zeros(3,4), (4,9)) == 1

# --- the EVBMF threshold and free energy

def tau(alpha):
    "Where the free energy is continuous, by the paper's equation"
    return brentq(lambda t: math.log1p(t) + alpha*math.log1p(t/alpha) - t, 1e-3*alpha, 10, xtol=1e-15)

# mpmath.findroot at 30 digits of log(1+t)/t + a*log(1+t/a)/t = 1
roots = {1.: 2.51286241725233935, .5: 1.78264009862144222, .1: 0.822210956559877015, .01: 0.282876400655592333}

@pytest.mark.parametrize('alpha', roots)
def test_threshold_table(alpha): assert tau(alpha) == pytest.approx(roots[alpha], rel=1e-12)

def threshold(L, M):
    "What γ²/(Mσ²) of a component has to exceed"
    a,t = L/M,tau(L/M)
    return (1+t)*(1+a/t)

@quick
@given(st.floats(1e-5, 1))
def test_threshold_is_above_the_edge_of_pure_noise(alpha): assert threshold(alpha, 1) > (1+math.sqrt(alpha))**2

def paper_energy(g, M, x_min, variances):
    "The free energy at each of the noise `variances`, as printed, with its constant"
    a,x = len(g)/M,g/(M*variances[:,None])
    kept = x>x_min
    z = np.where(kept, x, x_min) - (1+a)
    t = (z + np.sqrt(z**2-4*a))/2
    return (x-np.log(x)).sum(1) + np.where(kept, np.log(t+1) + a*np.log(t/a+1) - t, 0).sum(1)

def spectrum(kind, rng, L):
    "Spectra with one or many minima of the free energy"
    s = {'noise':  lambda: rng.exponential(size=L),
         'decay':  lambda: np.exp(-np.arange(L)/L*rng.uniform(.5,12)),
         'broad':  lambda: 10**rng.uniform(-5,0,size=L),
         'steps':  lambda: np.concatenate([rng.uniform(5,50,L//3), rng.uniform(.05,.1,L//3), rng.uniform(5e-4,1e-3,L-2*(L//3))]),
         'pairs':  lambda: np.repeat(rng.uniform(.01,1,L//2+1),2)[:L]}[kind]()
    return np.sort(s)[::-1]

@pytest.mark.parametrize('kind', ['noise','decay','broad','steps','pairs'])
def test_the_rank_is_that_of_the_global_minimum(kind):
    "Of the free energy over all variances of the noise"
    rng = np.random.default_rng(7)
    for i in range(60):
        L = int(rng.integers(2,40)) if i else 500  # 500: more kinks than are looked at in the first round
        M = int(L*rng.choice([1,1.5,4,100]))
        s = spectrum(kind, rng, L)
        g,x,h = (s/s[0])**2,threshold(L,M),math.ceil(L*M/(L+M)-1e-9)-1
        lo,hi = max(g[h]/x, g[h:].mean())/M, g.sum()/(L*M)
        kinks = g[(g>lo*M*x) & (g<hi*M*x)]/(M*x)
        grid = np.concatenate([np.geomspace(lo, hi, 2000), kinks])
        best = grid[paper_energy(g, M, x, grid).argmin()]
        assert evbmf_rank(s, (M,L)) == (g > M*x*best).sum()

# --- EVBMF on matrices of known rank

shapes = [(50,50), (100,100), (120,80), (60,90), (400,100), (64,576), (40,800), (3000,30)]

@pytest.mark.parametrize('shape', shapes)
@pytest.mark.parametrize('part', [.02,.05,.1,.15])
def test_known_rank_plus_noise(shape, part):
    """With r=ξL signals of ν=s²/(Mσ²) each, Σγ²/(LM) is about (1+ξν)σ² and bounds the noise variance, and a signal's γ²/(Mσ²) is about (1+ν)(1+α/ν) > 1+α+ν:
    all are above the threshold x if ν > (x-1-α)/(1-xξ). The factor 1.5 is for matrices of finite size; at a factor of 1 some seeds fail, as they should."""
    L,M = sorted(shape)
    r,x = max(1,int(part*L)),threshold(L,M)
    nu = (x-1-L/M)/(1-x*r/L)
    assert nu>0
    for snr in (1.5, 2, 5, 100, 1e6):
        for seed in range(3):
            rng = np.random.default_rng(seed)
            A = math.sqrt(M*nu*snr)*ortho(rng,shape[0],r)@ortho(rng,shape[1],r).T + rng.normal(size=shape)
            assert evbmf_rank(svals(A), shape) == r

def test_signals_of_different_size():
    rng = np.random.default_rng(0)
    U,V = ortho(rng,200,12),ortho(rng,300,12)
    A = U*np.geomspace(60,2000,12)@V.T + rng.normal(size=(200,300))  # the edge of the noise is at √200+√300 = 31.5
    assert evbmf_rank(svals(A), A.shape) == 12

@pytest.mark.parametrize('shape', [(20,20), (50,50), (200,100), (64,576), (5,500), (10,1000), (10000,100)])
def test_pure_noise_has_rank_0(shape):
    for seed in range(5): assert evbmf_rank(svals(np.random.default_rng(seed).normal(size=shape)), shape) == 0

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('m,n', [(10,10), (64,64), (64,576), (576,64), (7,700), (300,200)])
def test_exact_low_rank(m, n, dtype):
    h = (m*n-1)//(m+n)  # the most EVBMF finds
    for r in sorted({1, h//2 or 1, h}):
        g = torch.Generator().manual_seed(r)
        A = torch.randn(m,r,generator=g,dtype=dtype) @ torch.randn(r,n,generator=g,dtype=dtype)
        assert evbmf_rank(torch.linalg.svdvals(A), A.shape) == r

@quick
@given(st.sampled_from(['noise','decay','broad','steps','pairs']), st.integers(1,30), st.sampled_from([1,1.5,10,1000]), st.integers(0,999), st.integers(-60,60))
def test_evbmf_ignores_scale_and_orientation_and_makes_smaller(kind, L, wide, seed, k):
    M,s = int(L*wide),spectrum(kind, np.random.default_rng(seed), L)
    r = evbmf_rank(s, (L,M))
    assert r == evbmf_rank(s*2.**k, (L,M)) == evbmf_rank(s, (M,L))
    assert r*(L+M) < L*M

@pytest.mark.parametrize('s,shape', [([1.],(1,1)), ([3.],(1,9)), ([3.],(9,1)), ([0.],(1,1)), ([0.,0],(2,2)), ([1.,1],(2,2)), ([1.,.9],(2,2)), (np.zeros(8),(8,50)), (np.ones(8),(8,50))])
def test_tiny_and_flat_matrices(s, shape): assert evbmf_rank(s, shape) == 0

def test_any_kind_of_array():
    s = torch.logspace(1, -3, 20)
    want = evbmf_rank(s.double(), (20,40))
    given = [s, s.numpy(), s.tolist(), s.flip(0), s.numpy()[::-1], s.clone().requires_grad_(), torch.nn.Parameter(s.bfloat16().double())]
    assert want>0 and [evbmf_rank(o, (20,40)) for o in given] == [want]*len(given)

@pytest.mark.parametrize('s,shape,msg', [([1.,2],(2,2),None), ([1.,2],(3,3),'expected 3'), ([1.,math.nan],(2,2),'finite'), ([math.inf,1],(2,2),'finite'), ([1.,-1],(2,2),'negative')])
def test_bad_singular_values(s, shape, msg):
    for rule in (lambda s,o: evbmf_rank(s,o), Energy(.9), EVBMF()):
        if msg is None: rule(s, shape)  # any order will do
        else:
            with pytest.raises(ValueError, match=msg): rule(s, shape)

def test_evbmf_blocks_and_multiples():
    rng = np.random.default_rng(0)
    s = np.stack([svals(20*ortho(rng,40,r)@ortho(rng,60,r).T + .1*rng.normal(size=(40,60))) for r in (3,5,1)])
    assert EVBMF()(s, (40,60)) == 5
    assert [EVBMF(m)(s, (40,60)) for m in (1,4,5,8,64)] == [5,8,5,8,64]
    assert resolve_rank(EVBMF(64), 40, lambda: s, (40,60)) == 40

# --- rank rules

@quick
@given(st.integers(1,5000), st.integers(1,5000))
def test_fraction_of_the_full_rank(k, full):
    k = min(k, full)
    assert resolve_rank(k/full, full) == k  # k/full*full may round below k
    assert resolve_rank(k/full*(1-1e-6), full) == max(1, k-1)

def test_fractions_that_rounding_would_spoil(): assert [resolve_rank(f,n) for f,n in ((.2,10),(.29,100),(.57,100),(.7,10))] == [2,29,57,7]

def test_singular_values_are_computed_only_when_needed():
    def svals(): calls.append(1); return torch.ones(4)
    for rule,n in ((.5,0), (3,0), (99,0), (np.int64(3),0), (Energy(.5),1), ('evbmf',1)):
        calls = []
        resolve_rank(rule, 4, svals, (4,4))
        assert len(calls)==n

def test_ints_come_back_as_they_are(): assert resolve_rank(99, 4) == 99
def test_evbmf_0_stays_0(): assert resolve_rank(EVBMF(8), 4, lambda: torch.ones(4), (4,4)) == 0

good = [(.5,.5), (1,1), (1.,1.), (np.float32(.5),.5), (np.int64(3),3), ('evbmf',EVBMF()), (EVBMF(8),EVBMF(8)), (Energy(.9),Energy(.9)), ((.5,4),(.5,4)), ([2,3],(2,3)),
        ({'a.*':'evbmf','b':(np.int32(2),1.)}, {'a.*':EVBMF(),'b':(2,1.)}), ({},{})]
@pytest.mark.parametrize('rule,want', good)
def test_good_ranks(rule, want):
    got = check_rank(rule)
    assert got==want and type(got) is type(want)
    assert check_rank(got)==got and pickle.loads(pickle.dumps(got))==got

bad = [(0,'rank=0',ValueError), (-3,'rank=-3',ValueError), (0.,'rank=0.0',ValueError), (1.0001,'rank=1.0001',ValueError), (-.5,'rank=-0.5',ValueError), (math.nan,'rank=nan',ValueError),
       (math.inf,'rank=inf',ValueError), ('EVB','rank=.EVB.',ValueError), (True,'rank=True',TypeError), (np.bool_(True),'rank=',TypeError), (None,'rank=None',TypeError), (Energy,'rank=',TypeError),
       ((.5,0),r'rank\[1\]=0',ValueError), ((1,2,3),'rank=',TypeError), ((.5,Energy(.5)),r'rank\[1\]=Energy',TypeError), ((True,1),r'rank\[0\]=True',TypeError), ((.5,'evbmf'),r'rank\[1\]=.evbmf',ValueError),
       ({'fc':2.},r"rank\['fc'\]=2.0",ValueError), ({'fc':(1,0)},r"rank\['fc'\]\[1\]=0",ValueError), ({'fc':{'a':1}},r"rank\['fc'\]",TypeError), ({1:.5},'key 1',TypeError), (torch.tensor(.5),'rank=',TypeError)]
@pytest.mark.parametrize('rule,msg,exc', bad)
def test_bad_ranks(rule, msg, exc):
    with pytest.raises(exc, match=msg) as e: check_rank(rule)
    assert 'expected' in str(e.value) or 'cannot hold' in str(e.value)

def test_the_argument_is_named():
    with pytest.raises(ValueError, match=r'rank_ratio=1.5: expected a fraction 0 < float <= 1'): check_rank(1.5, 'rank_ratio')

@pytest.mark.parametrize('make,exc', [(lambda: Energy(0),ValueError), (lambda: Energy(1.01),ValueError), (lambda: Energy(math.nan),ValueError), (lambda: Energy(True),TypeError), (lambda: Energy('.5'),TypeError),
                                      (lambda: EVBMF(0),ValueError), (lambda: EVBMF(1.5),TypeError), (lambda: EVBMF(True),TypeError)])
def test_bad_rules(make, exc):
    with pytest.raises(exc, match='expected'): make()

@pytest.mark.parametrize('rule', [(1,2), {'a':1}])
def test_resolve_wants_one_rank(rule):
    with pytest.raises(TypeError, match='one rank is needed'): resolve_rank(rule, 4)

def test_repr(): assert repr([Energy(.95),EVBMF(),EVBMF(8)]) == '[Energy(0.95), EVBMF(), EVBMF(multiple_of=8)]'

def test_import_leaves_scipy_alone():
    code = "import sys, fasterai_lr.rank; assert not [m for m in sys.modules if m.split('.')[0]=='scipy']"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
