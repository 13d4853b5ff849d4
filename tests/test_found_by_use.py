"Wrong calls that were once accepted in silence, or refused only after hours: each is one clear error before anything is computed, or a warning"
import copy, json
import numpy as np, pytest, torch
import torch.nn.functional as F
from contextlib import nullcontext
from torch import nn
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy, error_rate
from fasterai_lr.all import *
from fasterai_lr.distill import flip_crop_and_mix
from fasterai_lr.running import Batches
from helpers import planner
from networks import digits

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings('error:data.*items are too few'), pytest.mark.filterwarnings('error:No layer was decomposed')]
X,y = digits()
held_out = slice(1400, None)

class Counted(nn.Sequential):
    "Counts its calls, so that a test can say that nothing was computed"
    def forward(self, x):
        self.calls = getattr(self, 'calls', 0) + 1
        return super().forward(x)

def new_net():
    torch.manual_seed(0)
    return Counted(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                   nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

def percent(m):
    with torch.no_grad(): return (m.eval()(X[held_out]).argmax(1) == y[held_out]).float().mean().item()*100

@pytest.fixture(scope='module')
def trained():
    net = new_net()
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    gen = torch.Generator().manual_seed(0)
    for _ in range(12):
        for i in torch.randperm(1400, generator=gen).split(64):
            opt.zero_grad()
            F.cross_entropy(net(X[i]), y[i]).backward()
            opt.step()
    assert percent(net) > 90
    return net.eval()

def share(m): return percent(m)/100

@pytest.fixture
def net(trained):
    res = copy.deepcopy(trained)
    res.calls = 0
    return res

def learner(model=None, **kwargs):
    items = list(zip(X, y))
    dls = DataLoaders.from_dsets(items[:600], items[1400:], bs=50, shuffle=False, device='cpu', num_workers=0)
    return Learner(dls, model or new_net(), loss_func=nn.CrossEntropyLoss(), **{'metrics': accuracy, **kwargs})

def nothing_is_trained(learn, cb, error, match):
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(), pytest.raises(error, match=match): learn.fit(2, 1e-2, cbs=cb)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

# --- names and values of arguments

macs = Budget(macs=.5)
wrong_calls = [
    (lambda m: FC_Decomposer().decompose(m, percent_remove=.9), TypeError, r"^percent_remove=0.9: Decomposer.decompose has no argument of this name; did you mean 'percent_removed'\?$"),
    (lambda m: FC_Decomposer().decompose(m, data=X, schemes=['svd']), TypeError, "^schemes=.*no argument of this name"),
    (lambda m: decompose(m, macs, X, seeed=3), TypeError, r"^seeed=3: decompose has no argument of this name; did you mean 'seed'\?$"),
    (lambda m: decompose(m, Budget(latency=.7), X, sampel=X[:8]), TypeError, "did you mean 'sample'"),
    (lambda m: decompose(m, macs, X, schemes=('svd', 'tuker')), ValueError, r"^schemes: 'tuker' is not one of .*; did you mean 'tucker'\?$"),
    (lambda m: decompose(m, macs, X, schemes='svd'), ValueError, r"^schemes: 'svd' is not a list of schemes; give \('svd', 'spatial'\)"),
    (lambda m: decompose(m, macs, X, schemes=()), ValueError, '^schemes: the list is empty'),
    (lambda m: decompose(m, macs, X, metric='fischer'), ValueError, "^metric: 'fischer' .* did you mean 'fisher'"),
    (lambda m: decompose(m, macs, X, loss='mse'), TypeError, "^loss: 'mse' is not a function; give classification, regression"),
    (lambda m: decompose(m, macs, X, seed=.5), ValueError, '^seed: 0.5 is not an int of at least 0'),
    (lambda m: decompose(m, macs, X, most=0), ValueError, '^most: 0 is not an int of at least 1'),
    (lambda m: decompose(m, macs, X, room=-1), ValueError, '^room: -1 is not an int of at least 0'),
    (lambda m: decompose(m, macs, X, passes=24), TypeError, '^passes: was removed; leave it out: the fit now takes as long as a few passes'),
    (lambda m: decompose(m, macs, X, most=-1), ValueError, '^most: -1 is not an int of at least 1'),
    (lambda m: decompose(m, macs, X, max_size=1e4), ValueError, '^max_size: 10000.0 is not an int'),
    (lambda m: decompose(m, macs, X, distill_steps=True), ValueError, '^distill_steps: True is not an int'),
    (lambda m: decompose(m, macs, X, sequential='no'), ValueError, "^sequential: 'no' is not True or False"),
    (lambda m: decompose(m, macs, X, augment='flip'), TypeError, "^augment: 'flip' is not a function"),
    (lambda m: decompose(m, macs, X, evaluate=percent), TypeError, '^evaluate: only used with a Budget of max_drop'),
    (lambda m: decompose(m, Budget(max_drop=.1), X), ValueError, '^evaluate: none given; a budget of max_drop needs a function'),
    (lambda m: decompose(m, Budget(max_drop=.1), X, evaluate=.9), TypeError, '^evaluate: 0.9 is not a function'),
    (lambda m: decompose(m, FC_Decomposer(), seed=3), TypeError, '^seed: only used with data'),
    (lambda m: decompose(m, FC_Decomposer(), moments={}), TypeError, '^moments: was removed; give what `calibrate` returns as `data`'),
    (lambda m: decompose(m, FC_Decomposer(), X, schemes=['svd']), TypeError, '^schemes: only used with a Budget'),
    (lambda m: decompose(m, FC_Decomposer(), X, sample=X[:2]), TypeError, '^sample: only used with a Budget'),
    (lambda m: decompose(m, macs), ValueError, r'^data: Budget\(macs=0.5\) needs data'),
    (lambda m: decompose(m, .5, X), TypeError, r"^what: 0.5 is not a decomposer; give Budget\(macs=0.5\) for a fraction of the multiply-accumulates, FC_Decomposer\(0.5\)"),
    (lambda m: decompose(m, X), TypeError, '^what: a Tensor is not a decomposer; if it holds inputs of the model, give data='),
    (lambda m: decompose(m, 'svd', X), TypeError, r"^what: 'svd' is not a decomposer; give ConvDecomposer\('svd'\)"),
    (lambda m: decompose(m), ValueError, r'^what: nothing given; give data, .* or Budget\(macs=0.5\) with data .*decomposers'),
    (lambda m: ConvDecomposer('tuker'), ValueError, "^method: 'tuker' .* did you mean 'tucker'"),
    (lambda m: FC_Decomposer({'66': 3}).decompose(m), ValueError, "^rank: '66' matches no layer .* did you mean '6'"),
    (lambda m: make_plan(m, X, macs, seeed=3), TypeError, "^seeed=3: make_plan has no argument of this name; did you mean 'seed'"),
    (lambda m: make_plan(m, X, macs, evaluate=percent), ValueError, r'^evaluate: Budget\(macs=0.5\) does not use it'),
    (lambda m: tradeoff(m, X, budgest=[.5]), TypeError, "^budgest=.* did you mean 'budgets'"),
    (lambda m: tradeoff(m, X, seed='a'), ValueError, "^seed: 'a' is not an int")]

@pytest.mark.parametrize('call, error, match', wrong_calls)
def test_a_wrong_call_is_an_error_at_once(call, error, match, net):
    with pytest.raises(error, match=match): call(net)
    assert net.calls == 0

def test_a_budget_that_cannot_be_kept_to_is_an_error_before_the_moments(net):
    for budget in (Budget(macs=1e-3), Budget(params=1e-3)):
        with pytest.raises(ValueError, match=rf"^{budget.kind}: 0.001 cannot be reached; the smallest is 0.0\d+, mostly held by (Conv2d|Linear) \d+% \('"): decompose(net, budget, X)
    assert net.calls <= 4                                           # one batch, to see what the layers are used for

def test_a_sample_is_what_is_timed(net, monkeypatch):
    shapes = []
    def stand_in(planner, budget): # for the clock
        shapes.append(planner.sample[0].shape)
        return planner.make(Budget(macs=budget.value))
    monkeypatch.setattr('fasterai_lr.planner.latency_plan', stand_in)
    decompose(net, Budget(latency=.7), X[:300], sample=X[:8])
    decompose(net, Budget(latency=.7), X[:300])
    assert shapes == [X[:8].shape, X[:64].shape]

# --- a callback

@pytest.mark.parametrize('args, kwargs, error, match', [
    ((macs,), dict(ft_rl=1e-4), TypeError, "^ft_rl=0.0001: DecomposeCallback has no argument of this name; did you mean 'ft_lr'"),
    ((macs,), dict(schemes=('svd', 'tuker')), ValueError, "did you mean 'tucker'"),
    ((macs,), dict(seed=-1), ValueError, '^seed: -1'),
    ((macs,), dict(evaluate=percent), TypeError, '^evaluate: only used with a Budget of max_drop'),
    ((FC_Decomposer(),), dict(seed=3), TypeError, '^seed: only used with data'),
    ((FC_Decomposer(),), dict(data=X, schemes=['svd']), TypeError, '^schemes: only used with a Budget'),
    ((.5,), {}, TypeError, r'^what: 0.5 is not a decomposer; give Budget\(macs=0.5\)')])
def test_a_callback_is_refused_where_it_is_made(args, kwargs, error, match):
    with pytest.raises(error, match=match): DecomposeCallback(3, *args, **kwargs)

def test_a_schedule_shares_out_its_arguments(net):
    learn,cb = learner(net),DecomposeCallback({0: FC_Decomposer({'8': 4}), 1: Budget(macs=.5)}, schemes=('svd',), seed=3)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-4, cbs=cb)
    assert [r['epoch'] for r in cb.history] == [0, 1] and {l.scheme for l in factored_layers(learn.model).values()} == {'svd'}
    assert learn.model.low_rank_plan['settings']['seed'] == 3

def test_a_learner_refuses_too(net):
    learn = learner(net)
    for kwargs,match in ((dict(seeed=3), "did you mean 'seed'"), (dict(sead=3), "did you mean 'seed'")):
        with pytest.raises(TypeError, match=match): learn.decompose(macs, **kwargs)
    with pytest.raises(TypeError, match="did you mean 'budgets'"): learn.plot_tradeoff(budgest=[.5])
    with pytest.raises(ValueError, match="^metric: 'fischer'"): learn.tradeoff(metric='fischer')
    assert net.calls == 0

# --- what a plan was made with

def half_square(out): return .5*(out*out.detach()).sum()

def test_a_plan_is_applied_with_the_settings_that_it_was_made_with(net):
    data = X[:200]
    plan = make_plan(net, data, macs, loss=regression, metric='activation', seed=7, most=500)
    there = Plan.of(json.loads(json.dumps(plan.plain())))
    want = decompose(net, macs, data, loss=regression, metric='activation', seed=7, most=500)
    for p in (plan, there):
        got = p.apply(net, data)
        assert got.low_rank_plan['measured'] == want.low_rank_plan['measured']
        assert all(torch.equal(t, want.state_dict()[k]) for k,t in got.state_dict().items())
    other = there.apply(net, data, loss=classification)              # what is said then counts
    assert other.low_rank_plan['measured']['loss'] != want.low_rank_plan['measured']['loss']
    assert other.low_rank_plan['settings']['loss'] == 'classification' and other.low_rank_plan['settings']['seed'] == 7

@pytest.mark.parametrize('kind', ['macs', 'max_drop'])
def test_the_seed_of_a_plan_is_that_of_its_fit(kind, net):
    data,evaluate = X[:200],dict(evaluate=share) if kind == 'max_drop' else {}
    budget = Budget(**{kind: .5 if kind == 'macs' else .02})
    a,b = (make_plan(net, data, budget, seed=7, most=100, **evaluate).apply(net, data) for _ in range(2))
    c = decompose(net, budget, data, seed=7, most=100, **evaluate)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p,q,r in zip(a.parameters(), b.parameters(), c.parameters()))
    assert a.low_rank_plan['settings']['seed'] == 7

def test_a_function_of_yours_is_named_in_the_file_and_asked_for_again(net, tmp_path):
    plan = make_plan(net, X[:200], macs, loss=half_square)
    same = plan.apply(net, X[:200])                                  # in the process that made it, it is there
    plan.save(tmp_path/'p.json')
    back = Plan.load(tmp_path/'p.json')
    with pytest.raises(ValueError, match="^loss: the plan was made with a function 'half_square', .* give it again, as loss=…"): back.apply(net, X[:200])
    again = back.apply(net, X[:200], loss=half_square)
    assert all(torch.equal(p, q) for p,q in zip(same.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="^loss: the plan was made with"): learner(net).decompose(back, X[:200])
    distilled = Plan.of(make_plan(net, X[:200], macs, distill_steps=2, augment=flip_crop_and_mix).plain())
    with pytest.raises(ValueError, match='^augment: .* give it again, as augment=…'): distilled.apply(net, X[:200])
    assert back.skeleton(net) and back.apply(net)                    # neither needs it

def test_a_learners_plan_is_applied_without_it(net):
    learn = learner(copy.deepcopy(net))
    learn.decompose(macs)
    plan = Plan.of(learn.model.low_rank_plan)
    got = plan.apply(net, X[:200]).low_rank_plan
    assert got['settings']['loss'] == 'classification' and got['measured']['loss'] > 0

@pytest.mark.parametrize('settings, match', [({'sede': 1}, "^plan: settings: 'sede' is unknown; did you mean 'seed'"), ({'seed': -1}, '^plan: seed: -1'), ({'loss': 'mse'}, "^plan: settings: loss 'mse'"),
    ({'loss': {}}, "^plan: settings: {} has no 'name'"), ([], None), ('x', "^plan: settings: 'x' is not a dict")])
def test_settings_that_a_file_has_wrong(settings, match, net):
    data = make_plan(net, X[:200], macs).plain() | dict(settings=settings)
    with pytest.raises(ValueError, match=match) if match else nullcontext(): Plan.of(data)

# --- a plan that is edited

def by_hand(plan, name, scheme, rank): return plan.set(name, scheme, rank)

def in_the_file(plan, name, scheme, rank):
    data = json.loads(json.dumps(plan.plain()))
    data['layers'][name] |= dict(scheme=scheme, rank=list(rank) if isinstance(rank, tuple) else rank, status='factored')
    return Plan.of(data)

@pytest.mark.parametrize('edit', [by_hand, in_the_file])
@pytest.mark.parametrize('data', [None, X[:300]])
def test_an_edit_is_measured_anew(edit, data, net):
    plan = edit(make_plan(net, X[:300], macs), '2', 'tucker', (4, 4))
    rec = plan.apply(net, data).low_rank_plan['layers']['2']
    assert (rec['rank'], rec['full_rank'], rec['params_after']) == ([4, 4], [16, 8], 8*4 + 4*4*9 + 4*16 + 16)
    assert dict(plan.summary().loc['2', ['rank', 'full_rank', 'params_after']]) == {k: rec[k] for k in ('rank', 'full_rank', 'params_after')}
    if data is None: want = decompose(net, ConvDecomposer('tucker', {'2': (4, 4)})).low_rank_plan['layers']['2']['error']
    else: want = decompose(net, ConvDecomposer('tucker', {'2': (4, 4)}), data).low_rank_plan['layers']['2']['error']
    if data is None: assert rec['error'] == pytest.approx(want, rel=1e-6)              # float32
    else:
        plans = planner(net, data)
        metric = plans.calibration.metric('2')
        cost, = schemes['tucker'](net_geometry(net[2]), '2').solver(net[2].weight, metric).costs([(4, 4)])
        assert rec['error'] == pytest.approx((cost/metric.total)**.5, rel=1e-6)

def net_geometry(layer):
    from fasterai_lr.layers import Geometry
    return Geometry.of(layer)

def test_what_is_not_edited_keeps_its_error(net):
    plan = make_plan(net, X[:300], macs)
    before = {n: r.error for n,r in plan.layers.items()}
    rec = by_hand(plan, '2', 'tucker', (4, 4)).apply(net, X[:300]).low_rank_plan['layers']
    assert {n: r['error'] for n,r in rec.items() if n != '2'} == {n: e for n,e in before.items() if n != '2'}

def test_numbers_of_numpy_are_numbers(net, tmp_path):
    plan = make_plan(net, X[:300], macs).set('2', 'tucker', (np.int64(4), np.int32(4))).set('6', 'svd', np.int64(9))
    plan.measured['mine'] = np.float32(.5)
    plan.save(tmp_path/'p.json')
    assert Plan.load(tmp_path/'p.json').choices['2'] == ('tucker', (4, 4)) and plan.apply(net)[6].rank == 9
    plan.measured['mine'] = object()
    with pytest.raises(TypeError, match=r"^plan\['measured'\]\['mine'\]: .* is a object, which a plan cannot hold"): plan.save(tmp_path/'p.json')
    assert Plan.load(tmp_path/'p.json').measured['mine'] == .5       # the older file is still there

@pytest.mark.parametrize('args, match', [(('2', 'tuker', 3), "^scheme: 'tuker' .* did you mean 'tucker'"), (('2', 'svd', 0), '^rank: 0'), (('2', 'svd', 2.5), '^rank: 2.5'), (('2', 'svd'), '^rank: None'),
    (('2', 'tucker', (3, 0)), r'^rank: \(3, 0\)'), (('22', 'svd', 3), "^name: '22' is not in the plan; .* did you mean '2'")])
def test_a_wrong_edit_is_refused(args, match, net):
    plan = make_plan(net, X[:300], macs)
    before = copy.deepcopy(plan.layers)
    with pytest.raises(ValueError, match=match): plan.set(*args)
    assert plan.layers == before

# --- how much a metric may fall

def test_a_fraction_cannot_fall_by_one(net):
    too_much = r'max_drop: 1 would allow everything: {} is a fraction, [\d.]+ for the dense model, and max_drop is in its units; one point is max_drop=0.01$'
    for call in (decompose, lambda m, b, x, evaluate: make_plan(m, x, b, evaluate=evaluate)):
        with pytest.raises(ValueError, match=too_much.format('share')): call(net, Budget(max_drop=1), X, evaluate=share)
    assert net.calls == 2                                            # two evaluations, and nothing else
    for metric in (accuracy, error_rate):
        with pytest.raises(ValueError, match=too_much.format(metric.__name__)): learner(net, metrics=metric).decompose(Budget(max_drop=1))
        for cb in (DecomposeCallback(1, Budget(max_drop=1)), DecomposeCallback(1, FC_Decomposer(), max_drop=1)):
            nothing_is_trained(learner(metrics=metric), cb, ValueError, too_much.format(metric.__name__))

def test_a_metric_that_is_no_fraction_may_fall_by_more(net):
    one_point = decompose(net, Budget(max_drop=1), X[:600], evaluate=percent)
    assert percent(net) - 1 <= percent(one_point) < 100 and count_macs(one_point, X[:1]) < .8*count_macs(net, X[:1])
    learn = learner(net, metrics=[])
    learn.decompose(Budget(max_drop=1.5))  # the loss
    assert len(factored_layers(learn.model)) > 0

# --- little data

@pytest.mark.parametrize('n, enough', [(1, 256), (60, 256)])
def test_too_little_data_is_said_once_and_noted(n, enough, net):
    for make in (lambda: decompose(net, macs, X[:n]), lambda: FC_Decomposer(.3).decompose(net, data=X[:n]), lambda: Plan.of(make_plan(net, X, macs).plain()).apply(net, X[:n])):
        with pytest.warns(UserWarning) as w: small = make()
        assert [str(o.message) for o in w] == [f'data: {n} items are too few to measure the layers well, and accuracy may suffer; {enough} are enough']
        assert small.low_rank_plan['data'] == dict(items=n, enough=enough)
    assert decompose(net, macs, X[:256]).low_rank_plan['data'] == dict(items=256, enough=256)   # no warning: one would be an error here

def test_the_number_that_would_do_does(net):
    with pytest.warns(UserWarning, match='256 are enough'): one = decompose(net, macs, X[:1])
    assert percent(one) < percent(net) - 20 and percent(net) - 2 < percent(decompose(net, macs, X[:256]))

# --- a second decomposition

def test_a_budget_is_always_of_the_dense_model(net):
    dense,data = count_macs(net, X[:1]),X[:600]
    small = decompose(net, Budget(macs=.5), data)
    learn = learner(copy.deepcopy(small))
    learn.decompose(Budget(macs=.25))
    for smaller in (decompose(small, Budget(macs=.25), data), make_plan(small, data, Budget(macs=.25)).apply(small, data), learn.model):
        assert .2*dense < count_macs(smaller, X[:1]) <= .25*dense and percent(smaller) > percent(net) - 5
        assert smaller.low_rank_plan['measured']['macs'] == pytest.approx(count_macs(smaller, X[:1])/dense, abs=1e-9)
    with pytest.warns(UserWarning, match='No layer was decomposed.* factored Linear'): same = decompose(small, Budget(macs=.9), data) # it has less already
    assert all(torch.equal(p, q) for p,q in zip(same.parameters(), small.parameters()))
    assert same.low_rank_plan['measured']['macs'] == pytest.approx(count_macs(small, X[:1])/dense, abs=1e-9)
    for plan in (make_plan(net, data, Budget(macs=.9)), Plan.of(small.low_rank_plan)):
        assert count_params(plan.apply(small, data)) <= count_params(small) and count_params(plan.apply(small)) <= count_params(small)
    smaller = decompose(net, Budget(macs=.9), data)
    assert decompose(smaller, None, data).low_rank_plan['budget'] == decompose(net, None, data).low_rank_plan['budget'] # so is half of what can be saved

# --- what is read and counted once

class Loader:
    "Counts how often it is gone through, and draws other items each time"
    def __init__(self): self.times = 0
    def __iter__(self):
        self.times += 1
        yield from X[torch.randperm(1400)[:200]].split(50)

@pytest.mark.parametrize('what', [Budget(macs=.5), Budget(params=.5), Budget(max_drop=.1), FC_Decomposer(.5), None])
def test_a_loader_is_read_once(what, net):
    loader,evaluate = Loader(),dict(evaluate=share) if what == Budget(max_drop=.1) else {}
    small = decompose(net, what, loader, **evaluate)
    assert factored_layers(small) and loader.times == 1
    Plan.of(small.low_rank_plan).set('6', 'svd', 1).apply(small, again := Loader())
    assert again.times == 1

def test_a_loader_that_fails_is_read_anew():
    batches,fails = X[:200].split(50),[True, False]
    class Failing:
        def __len__(self): return 4
        def __iter__(self):
            yield from batches[:2]
            if fails.pop(0): raise OSError('disk')
            yield from batches[2:]
    data = Batches(Failing())
    assert torch.equal(data.first[0], batches[0])
    with pytest.raises(OSError, match='disk'): list(data)
    assert len(list(data)) == len(data) == 4 and not fails

@pytest.mark.parametrize('budget', [Budget(macs=.5), Budget(params=.5), None])
def test_a_model_is_run_twice_to_see_what_its_layers_do(budget, net):
    calibration = calibrate(net, X[:300])
    def calls(f):
        net.calls = 0
        small = f()
        return small,net.calls
    small,n = calls(lambda: decompose(net, budget, calibration))
    assert calls(lambda: Plan.of(small.low_rank_plan).apply(net, calibration))[1] == n - 1 # a plan knows the MACs

# --- kinds of data

def test_a_tuple_is_a_batch_and_a_list_holds_batches(net):
    want = decompose(net, macs, X[:200])
    for data in ((X[:200], y[:200]), [(X[i:i+64], y[i:i+64]) for i in range(0, 192, 64)] + [(X[192:200], y[192:200])], list(X[:200].split(64))):
        assert all(torch.equal(p, q) for p,q in zip(decompose(net, macs, data).parameters(), want.parameters()))

class Named(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, pixels): return self.net(pixels)

def test_a_dict_is_a_batch(net):
    want,got = decompose(net, macs, X[:200]),decompose(Named(net), macs, dict(pixels=X[:200], labels=y[:200]))
    assert all(torch.equal(p, q) for p,q in zip(got.parameters(), want.parameters()))

def broken(net, name, value):
    net.get_parameter(name).data.view(-1)[3] = value
    return net

def inference(_=None):
    with torch.inference_mode(): return new_net()

@pytest.mark.parametrize('model, data, match', [
    (lambda m: broken(m, '2.weight', float('nan')), X, "^model: its parameter '2.weight' holds NaN or infinity$"),
    (lambda m: broken(m, '6.bias', float('inf')), X, "^model: its parameter '6.bias' holds NaN or infinity$"),
    (lambda m: m, torch.where(torch.arange(1797)[:,None,None,None] == 70, float('nan'), X), '^data: batch 1 holds NaN or infinity$'),
    (lambda m: nn.Sequential(*m[:2], nn.BatchNorm2d(8), *m[2:]), None, "^model: its values are NaN or infinite at layer '3', although the data is finite$"),
    (inference, X, r"^model: '0.weight' was made inside torch.inference_mode\(\), .* copy.deepcopy\(model\)$"),
    (lambda m: m, [X[:0], X[:9]], '^data: batch 0 holds no items$'),
    (lambda m: m, [X[:9], X[:0]], '^data: batch 1 holds no items$'),
    (lambda m: m, X[:0], '^data: batch 0 holds no items$'),
    (lambda m: m, [], '^data: it holds no batch; give at least one$'),
    (lambda m: m, torch.tensor(3.), '^data: a batch is the single number 3.0'),
    (lambda m: m, X[:9,0,0], r'^data: the model cannot be called with inputs \[9, 8\] of float32: '),
    (lambda m: m, X[:9].double(), r'^data: the model cannot be called with inputs \[9, 1, 8, 8\] of float64: '),
    (lambda m: m, X[:9].split(5), '^data: a tuple is one batch, inputs and targets, but its tensors have 5 and 4 items; give a list for several batches$'),
    (lambda m: m, X[:9].split(3), r'^data: the model cannot be called with inputs .*; a tuple is one batch, give a list for several$'),
    (lambda m: m, [dict(image=X[:9])], r'^data: the model cannot be called with inputs image \[9, 1, 8, 8\] of float32: ')])
@pytest.mark.parametrize('what', [Budget(macs=.5), FC_Decomposer(.5), None])
def test_what_is_wrong_with_model_or_data_is_one_error(model, data, match, what, net):
    net = model(net)
    if data is None:
        net[2].running_var[0] = float('nan')
        data = X
    before = copy.deepcopy(net.eval().state_dict())
    with pytest.raises((TypeError, ValueError), match=match): decompose(net, what, data)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k,v in net.state_dict().items())

def test_the_way_out_of_inference_mode(net):
    frozen = inference()
    copied = copy.deepcopy(frozen)
    assert decompose(copied, macs, X) and decompose(frozen, FC_Decomposer(.5))
    with torch.inference_mode():
        data = X[:600].clone()                                       # made in inference mode, as a loader may do inside of it
        inside = decompose(net, macs, data)
    assert not any(p.is_inference() for p in inside.parameters())
    assert all(torch.equal(p, q) for p,q in zip(inside.parameters(), decompose(net, macs, X[:600]).parameters()))

# --- a model that comes back as it was

class Conv1D(nn.Module):
    "A linear layer of a kind that is not known here, as GPT-2 has them"
    def __init__(self, i, o): super().__init__(); self.weight,self.bias = nn.Parameter(torch.randn(i, o)/i**.5),nn.Parameter(torch.zeros(o))
    def forward(self, x): return x@self.weight + self.bias

def gpt(): return nn.Sequential(nn.Embedding(50, 16), Conv1D(16, 64), nn.GELU(), Conv1D(64, 16), nn.Flatten(), nn.Linear(64, 1))

tokens = torch.randint(50, (512, 4), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('make', [lambda m: decompose(m, [FC_Decomposer(), ConvDecomposer()]), lambda m: FC_Decomposer().decompose(m), lambda m: decompose(m, None, tokens, loss=regression)])
def test_a_model_that_comes_back_unchanged_is_said(make):
    with pytest.warns(UserWarning, match=r"No layer was decomposed; the model is unchanged. Its parameters are held by Conv1D 71% \('1', '3'\), Embedding 27% \('0'\), Linear 2% \('5'"): same = make(gpt())
    assert not factored_layers(same)

def test_what_cannot_be_reached_names_what_holds_the_rest():
    for budget in (Budget(macs=.5), Budget(params=.5)):
        with pytest.raises(ValueError, match=rf'^{budget.kind}: 0.5 cannot be reached; the smallest is 1.0, mostly held by Conv1D (71|99)% '): decompose(gpt(), budget, tokens, loss=regression)
        nothing_is_trained(learner(nn.Sequential(nn.Flatten(), Conv1D(64, 100), nn.Linear(100, 10))), DecomposeCallback(1, budget), ValueError, f'{budget.kind}: 0.5 cannot be reached; .* Conv1D ')

def test_who_asks_for_all_of_it_gets_no_warning(net):
    same = decompose(net, Budget(macs=1.), X[:256])                  # a warning would be an error here
    assert not factored_layers(same)

# --- neighbours of these, which a review found

def test_a_second_budget_is_kept_to_in_its_own_kind():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
    count = dict(params=lambda m: count_params(m), macs=lambda m: count_macs(m, X[:1]))
    for first,second in (('params', 'macs'), ('macs', 'params')):
        for schemes in (('svd', 'spatial'), ('cp',)):
            small = decompose(dense, Budget(**{first: .4}), X[:300], schemes=schemes)
            smaller = decompose(small, Budget(**{second: .35}), X[:300])
            assert count[second](smaller) <= .35*count[second](dense) and count[second](smaller) <= count[second](small)

def edited(plan, name, **changes):
    data = json.loads(json.dumps(plan.plain()))
    data['layers'][name].update(changes)
    return Plan.of(data)

def test_an_edit_of_the_file_needs_no_other_entry(net):
    plan = make_plan(net, X[:300], Budget(macs=.3))
    factored,dense = edited(plan, '8', scheme='svd', rank=3),edited(plan, '6', scheme=None)
    assert factored.predicted == dense.predicted == {} and np.isnan(factored.summary().loc['8', 'error'])
    rec = factored.apply(net, X[:300]).low_rank_plan['layers']['8']
    assert (rec['status'], rec['reason'], rec['rank'], rec['full_rank'], rec['params_after']) == ('factored', '', 3, 10, 3*74 + 10) and 0 < rec['error'] < 1
    rec = dense.apply(net, X[:300]).low_rank_plan['layers']['6']
    assert (rec['status'], rec['rank'], rec['params_after'], rec['error']) == ('dense', None, 256*64 + 64, None)
    two = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten())
    x = torch.randn(200, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    swapped = [make_plan(two, x, Budget(macs=.7), loss=regression).set('0', 'tucker', r) for r in ((2, 6), (6, 2))]
    for p in swapped: p.apply(two, x)
    assert edited(swapped[0], '0', rank=[6, 2]).apply(two, x).low_rank_plan['layers']['0']['error'] == pytest.approx(swapped[1].layers['0'].error, rel=1e-9)

def test_a_plan_can_be_applied_again(net):
    plan = make_plan(net, X[:300], macs)
    first = plan.apply(net, X[:300]).low_rank_plan['layers']
    plan.apply(net)
    plan.apply(net, X[:300], metric='activation')
    again = plan.apply(net, X[:300]).low_rank_plan['layers']
    errors = [[record.pop('error') or 0. for record in layers.values()] for layers in (first, again)]
    assert again == first and errors[1] == pytest.approx(errors[0], rel=1e-12) # sums in double precision

def test_a_plan_and_decompose_agree_on_a_decomposed_model(net):
    data = X[:300]
    small = decompose(net, [FC_Decomposer({'6': 6})], data)
    for share in (.6, .3):
        plan = make_plan(net, data, Budget(macs=share))
        a,b = plan.apply(small, data),decompose(small, plan, data)
        assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters())) and a.low_rank_plan['measured'] == b.low_rank_plan['measured']
        assert b.low_rank_plan['measured']['macs'] == pytest.approx(count_macs(b, X[:1])/count_macs(net, X[:1]), abs=1e-9)
    again = decompose(small, ConvDecomposer('spatial', .5), data)
    assert again.low_rank_plan['measured']['macs'] == pytest.approx(count_macs(again, X[:1])/count_macs(net, X[:1]), abs=1e-9)

def test_a_part_of_a_decomposed_model_knows_its_layers(net):
    whole = decompose(Named(net), Budget(macs=.3), dict(pixels=X[:300]))
    part = whole.net
    with pytest.warns(UserWarning, match='No layer was decomposed'): same = decompose(part, Budget(macs=.9), X[:300])
    for n,l in factored_layers(part).items(): assert same.low_rank_plan['layers'][n]['rank'] == l.rank and same.low_rank_plan['layers'][n]['scheme'] == l.scheme

@pytest.mark.parametrize('call, error, match', [
    (lambda m: decompose(m, macs, [X, y]), ValueError, '^data: a list holds batches, but its tensors look like inputs and targets; give a tuple'),
    (lambda m: decompose(m, macs, X, loss=nn.CrossEntropyLoss()), TypeError, r'^loss: CrossEntropyLoss\(\) cannot be called with 1 argument; give classification'),
    (lambda m: decompose(m, macs, X, loss=F.cross_entropy), TypeError, '^loss: .* cannot be called with 1 argument'),
    (lambda m: decompose(m, macs, X, loss=nn.CrossEntropyLoss), TypeError, '^loss: .* is not a function'),
    (lambda m: decompose(m, macs, X, augment=lambda x: x), TypeError, '^augment: .* cannot be called with 2 arguments'),
    (lambda m: decompose(m, macs, X, seed=2**64), ValueError, '^seed: 18446744073709551616 is too large'),
    (lambda m: decompose(m, macs, X, progress=3), TypeError, '^progress: 3 is not a function'),
    (lambda m: make_plan(m, X, macs, 'activation'), TypeError, "^evaluate: 'activation' is not a function; .* by name"),
    (lambda m: make_plan(m, X, X), TypeError, "^budget: 'Tensor' is not a Budget"),
    (lambda m: make_plan(None, X, macs), TypeError, '^model: NoneType is not an nn.Module'),
    (lambda m: decompose(m, Budget(max_drop=.1), X, evaluate=lambda m: None), TypeError, '^evaluate: it returns NoneType, not a number'),
    (lambda m: decompose(m, Budget(max_drop=.1), X, evaluate=lambda m: float('inf')), ValueError, '^evaluate: it returns inf for the dense model')])
def test_other_wrong_calls(call, error, match, net):
    with pytest.raises(error, match=match): call(net)
    assert net.calls == 0

def acc(pred, targ): return (pred.argmax(1) == targ).float().mean()

def test_a_callback_finds_what_is_wrong_before_it_trains():
    named = Plan.of(make_plan(new_net().eval(), X[:300], macs, loss=half_square).plain())
    with pytest.raises(ValueError, match="^loss: the plan was made with a function 'half_square'"): DecomposeCallback(1, named)
    with pytest.raises(TypeError, match='^evaluate: 0.9 is not a function'): DecomposeCallback(1, Budget(max_drop=.1), evaluate=.9)
    for data,match in ((3, 'data: int holds no batches'), ([], 'data: it holds no batch'), (X[:9,0,0], 'data: the model cannot be called with inputs')):
        for what in (FC_Decomposer(), macs, None): nothing_is_trained(learner(), DecomposeCallback(1, what, data=data), (TypeError, ValueError), match)
        with pytest.raises((TypeError, ValueError), match=match): learner().decompose(data=data)
    nothing_is_trained(learner(metrics=acc), DecomposeCallback(1, FC_Decomposer(.1), max_drop=1), ValueError, 'max_drop: 1 would allow everything: acc is a fraction')

def test_what_looks_wrong_and_is_not(net):
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.mask,self.net = nn.Parameter(torch.full((4,), -torch.inf), requires_grad=False),net
        def forward(self, x): return self.net(x)
    assert factored_layers(decompose(Masked(), macs, X[:300]))
    assert factored_layers(decompose(net, macs, X[:300], sample=(X[:8], y[:8])))                            # inputs and targets
    def r2_score(m): return .4
    assert decompose(net, Budget(max_drop=1), X[:300], evaluate=r2_score)                                   # it has no lower bound
    dense = make_plan(net, X[:300], macs)
    for n in dense.choices: dense.set(n)
    assert not factored_layers(decompose(net, dense, X[:300]))                                              # no warning, as in the next line
    assert not factored_layers(FC_Decomposer().decompose(net, exclude=['*']))
    pixels = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 40, 3, padding=1))        # 40 classes for each of 64 pixels
    assert decompose(pixels, Budget(macs=.9), X[:30]).low_rank_plan['data'] == dict(items=30, enough=16)
