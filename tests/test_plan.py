"Budgets that hold as counted, plans as data, and what is refused"
import copy, json, random, re, time

import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

import fasterai_lr.planner as planner_module
from fasterai_lr.calibrate import calibrate
from fasterai_lr.loss import regression
from fasterai_lr.cost import Latency, count_macs, count_params
from fasterai_lr.budget import half_saved
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose
from fasterai_lr.fit import loss_increase
from fasterai_lr.layers import Geometry, factored_layers, layer_types
from fasterai_lr.budget import Budget
from fasterai_lr.plan import Plan, Record
from fasterai_lr.planner import Option, choose, make_plan, measured_ratio
from fasterai_lr.schemes import schemes
from helpers import miss, planner, unchanged
from networks import ViT, images, plain_net, res_net, tokens, with_statistics

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures('seeded')

# --- budgets

@pytest.mark.parametrize('kind', ['params', 'macs', 'latency'])
def test_a_budget_is_one_fraction(kind):
    b = Budget(**{kind: .5})
    assert (b.kind, b.value, repr(b)) == (kind, .5, f'Budget({kind}=0.5)') and b == Budget(**{kind: .5})
    assert Budget(**{kind: 1}).value == 1
    for bad in (0, -.1, 1.01, 50, float('nan'), float('inf'), True, '.5', [.5]):
        with pytest.raises(ValueError, match=f'{kind}: .* is not a fraction above 0 and at most 1'): Budget(**{kind: bad})

def test_a_budget_of_a_metric_is_in_its_units():
    for value in (.01, 1, np.float32(2.5), 30): assert Budget(max_drop=value).value == float(value)
    for bad in (0, -.1, float('nan'), float('inf'), True, '.5', [.5]):
        with pytest.raises(ValueError, match="^max_drop: .* is not a number above 0; give how far the metric may fall, in its own units; one point of an accuracy is max_drop=0.01"): Budget(max_drop=bad)

def test_a_budget_is_given_by_name():
    with pytest.raises(TypeError, match=r"^Budget\(0.5\): a budget of what\? Give Budget\(macs=0.5\), or params, latency or max_drop by name"): Budget(.5)
    with pytest.raises(TypeError, match='max_params'): Budget(max_params=.5)

def test_a_budget_is_of_one_kind():
    with pytest.raises(ValueError, match='nothing given; expected one of'): Budget()
    with pytest.raises(ValueError, match=r"\{'params': 0.5, 'macs': 0.4\} given"): Budget(params=.5, macs=.4)

def smallest_said(e): return float(re.search(r'the smallest is (\d\.\d+)', str(e.value))[1])

# --- the choice

def options(draw_costs): # {layer: [(cost, loss), …]}, dense first
    return {n: [Option(None, None, 0., d, d)] + [Option('svd', i+1, l, c, c) for i,(c,l) in enumerate(rest)] for n,(d,rest) in draw_costs.items()}

layer = st.tuples(st.integers(20, 40), st.lists(st.tuples(st.integers(1, 19), st.floats(1e-6, 10)), max_size=4))

@given(st.dictionaries(st.sampled_from('abcd'), layer, min_size=1), st.floats(.05, 1))
@example({'a': (20, [])}, 1 - 2**-53) # a limit that is a sum of costs but for its rounding
@example({'a': (20, []), 'b': (30, [(10, 1.)])}, .6 - 2**-53)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_choice_fits_and_is_near_the_best(layers, fraction):
    from itertools import product
    opts = options(layers)
    total,least = sum(o[0].macs for o in opts.values()),sum(min(p.macs for p in o) for o in opts.values())
    limit = fraction*total*(1 + 1e-14) # `choose` takes as much for rounding
    if least > limit:
        with pytest.raises(ValueError, match=str(float(least))): choose(opts, fraction*total, 'macs')
        return
    got = choose(opts, fraction*total, 'macs')
    loss,cost = sum(o.loss for o in got.values()),sum(o.macs for o in got.values())
    every = [c for c in product(*opts.values()) if sum(o.macs for o in c) <= limit]
    assert cost <= limit and list(got) == list(opts)
    # relaxed by one option of one layer: the classical bound of the Lagrangian
    assert loss <= min(sum(o.loss for o in c) for c in every) + max(max(o.loss for o in os) for os in opts.values()) + 1e-9
    for n,os in opts.items(): # nothing that would cost no more and lose less
        assert not any(o.loss < got[n].loss and cost - got[n].macs + o.macs <= limit for o in os)
    if limit >= total: assert loss == 0

# --- budgets hold as counted

class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24, padding=1), nn.Conv2d(24, 48, 1), nn.ReLU(),
                                  nn.Conv2d(48, 48, 3, groups=4, stride=2, dilation=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(48, 16, 2, stride=2), nn.Conv2d(16, 16, (1, 5)), nn.Flatten())
        self.head = nn.Linear(16*6*2, 6)
    def forward(self, x): return self.head(self.body(x))

def conv1d(): return nn.Sequential(nn.Conv1d(4, 32, 5, padding='same'), nn.ReLU(), nn.Conv1d(32, 32, 3, stride=2, padding_mode='circular', padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32*8, 6))
def conv3d(): return nn.Sequential(nn.Conv3d(2, 12, 3), nn.ReLU(), nn.Conv3d(12, 16, (1, 3, 3)), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(128, 6))
def shared():
    l = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), l, nn.ReLU(), l, nn.ReLU(), l, nn.Linear(16, 5))
def encoder(): return nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 2), nn.Flatten(), nn.Linear(48, 5))

nets = {'plain': (plain_net, images), 'residual': (res_net, images), 'grouped': (Grouped, images), '1d': (conv1d, torch.randn(40, 4, 16)), '3d': (conv3d, torch.randn(20, 2, 5, 6, 6)),
        'transformer': (ViT, tokens), 'encoder': (encoder, tokens), 'shared': (shared, torch.randn(60, 8))}

@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('kind', ['params', 'macs'])
def test_the_budget_holds_as_counted_and_is_used(name, kind):
    make,x = nets[name]
    net = with_statistics(make(), x)
    plans = planner(net, x, schemes=('svd', 'spatial', 'tucker'))
    count = dict(params=count_params, macs=lambda m: count_macs(m, x[:8]))
    dense,least,last = {k:c(net) for k,c in count.items()},plans.options.least(kind),float('inf')
    for share in (0, .15, .4, .8, 1):
        value = min(1., least + share*(1-least) + 1e-9)
        plan = plans.make(Budget(**{kind: value}))
        small = plan.skeleton(net)
        got = {k: c(small)/dense[k] for k,c in count.items()}
        assert got[kind] <= value + 1e-9
        for k in got: assert abs(got[k] - plan.predicted[k]) < 1e-12              # as predicted, of both kinds
        for n,l in factored_layers(small).items():                                # never a layer that is larger
            assert count_params(l) == plan.layers[n].params_after < plan.layers[n].params_before == count_params(net.get_submodule(n))
            assert l(torch.zeros(1, *plans.uses[n].inputs[0].shape[1:])).shape[1:] == plans.uses[n].outputs[0].shape[1:]
        assert plan.predicted['loss'] <= 1.02*last                                # the Lagrangian's gap
        last = plan.predicted['loss']
    assert not plan.choices and last == 0 and got[kind] == 1                      # dense is a choice

@pytest.mark.parametrize('name', nets)
def test_planned_and_fitted_models_run_and_keep_their_size(name):
    make,x = nets[name]
    net = with_statistics(make(), x)
    plans = planner(net, x)
    plan = plans.make(Budget(macs=min(1., .3+.7*plans.options.least('macs'))))
    small = plan.apply(net, plans.calibration)
    assert abs(count_macs(small, x[:8])/count_macs(net, x[:8]) - plan.predicted['macs']) < 1e-12 and plan.predicted['macs'] <= plan.budget['macs']
    assert miss(small, net, x) < .8 and plan.choices.keys() == factored_layers(small).keys()
    assert small.low_rank_plan['layers'].keys() == {n for n,m in net.named_modules() if isinstance(m, layer_types) and n in plan.layers}
    json.dumps(small.low_rank_plan)

def test_where_there_are_many_ranks_the_lowest_is_looked_at():
    plans = planner(nn.Sequential(nn.Conv2d(64, 64, 3)), torch.randn(4, 64, 5, 5))
    ranks = [o.rank for o in plans.options['0'] if o.scheme == 'spatial'] # of a full rank of 192
    assert ranks[:3] == [1, 3, 5] and max(ranks) < 192

def test_what_stays_dense_is_listed_with_the_reason():
    net = Grouped()
    net.never = nn.Linear(5, 5)
    layers = make_plan(net, images, Budget(macs=.8)).layers
    assert layers['body.7'].reason == 'no metric is known for a transposed convolution'
    assert 'no data reaches it' in layers['never'].reason
    assert layers['body.2'].reason == 'best left dense' and all((r.status == 'factored') == (r.scheme is not None) == (not r.reason) for r in layers.values())

def test_decompose_takes_a_budget():
    net = with_statistics(plain_net(), images)
    small = decompose(net, Budget(params=.6), images)
    assert count_params(small) <= .6*count_params(net) and small.low_rank_plan['budget'] == {'params': .6}
    default = half_saved(net, images[:1])
    assert count_macs(decompose(net, data=images), images[:1]) <= default.macs*count_macs(net, images[:1])
    with pytest.raises(ValueError, match='data: Budget'): decompose(net, Budget(params=.5))

@pytest.mark.parametrize('kind', ['params', 'macs'])
@pytest.mark.parametrize('name', nets)
def test_the_smallest_value_named_can_be_reached(name, kind):
    make,x = nets[name]
    plans = planner(make().eval(), x)
    with pytest.raises(ValueError, match=f'{kind}: 1e-06 cannot be reached; the smallest is') as e: plans.make(Budget(**{kind: 1e-6}))
    smallest = smallest_said(e)
    assert plans.options.least(kind) <= smallest <= plans.options.least(kind) + 1.01e-4 # rounded up to four digits
    assert plans.make(Budget(**{kind: smallest})).predicted[kind] <= smallest

def test_a_model_without_anything_to_decompose():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match='the smallest is 1.0'): make_plan(net, images, Budget(macs=.5))
    assert not make_plan(net, images, Budget(macs=1.)).choices

def test_the_estimate_of_the_loss_sums_what_the_options_say():
    net = with_statistics(plain_net(), images)
    plans = planner(net, images, schemes=('svd', 'spatial', 'slice')) # what 'cp' and 'tucker' find depends on where they start
    plan = plans.make(Budget(macs=.5))
    want = 0
    for n,(s,r) in plan.choices.items():
        scheme = schemes[s](Geometry.of(net.get_submodule(n)), n).solver(net.get_submodule(n).weight, plans.calibration.metric(n))
        want += scheme.metric.cost(scheme.blocks - scheme.approximation(r))
    assert abs(plan.predicted['loss'] - want) < 1e-6*want # float64 costs of float32 factors

def test_more_schemes_and_larger_budgets_never_lose_more():
    net = with_statistics(plain_net(), images)
    mo = calibrate(net, images)
    loss = lambda s, b: make_plan(net, mo, Budget(macs=b), schemes=s).predicted['loss']
    losses = [loss(('svd', 'spatial'), b) for b in (.3, .45, .6, .75, .9)]
    assert all(a > b for a,b in zip(losses, losses[1:]))
    for b in (.4, .6): assert loss(('svd', 'spatial', 'tucker'), b) <= 1.02*min(loss(('svd',), b), loss(('spatial', 'svd'), b)) # the Lagrangian's gap

# --- a plan is data

@pytest.fixture(scope='module')
def planned():
    torch.manual_seed(0)
    net = with_statistics(plain_net(), images)
    return net,make_plan(net, images, Budget(macs=.5), schemes=('svd', 'spatial', 'tucker'))

@pytest.fixture
def plan(planned): return copy.deepcopy(planned[1])

def test_round_trips(planned, plan, tmp_path):
    net = planned[0]
    plan.set('3', 'tucker', (3, 2))
    plan.save(tmp_path/'plan.json')
    back = Plan.load(tmp_path/'plan.json')
    assert back == plan and back.choices == plan.choices and back.choices['3'] == ('tucker', (3, 2))
    assert str(back) == str(plan) and '3' in str(plan) and '3.0' not in str(plan.summary()['rank']) and len(plan.summary()) == len(plan.layers)
    assert Plan.of(plan.apply(net).low_rank_plan).choices == plan.choices

def test_a_notebook_shows_a_table(plan):
    html = plan._repr_html_()
    assert repr(plan) == str(plan) and html.startswith("<p>Plan for {&#x27;macs&#x27;: 0.5}: ") and html.count('<tr>') == len(plan.layers) and '<th>error</th>' in html

def test_the_skeleton_takes_the_state_dict(planned, plan):
    net = planned[0]
    small,empty = plan.apply(net, images),plan.skeleton(net)
    assert not torch.equal(small(images), empty(images))
    empty.load_state_dict(small.state_dict())
    with torch.no_grad(): assert torch.equal(small(images), empty(images))
    assert {n:(l.scheme, l.rank) for n,l in factored_layers(empty).items()} == plan.choices

@pytest.mark.parametrize('args', [dict(dtype=torch.float64), dict(memory_format=torch.channels_last)])
def test_the_skeleton_is_typed_like_the_model(plan, args):
    net = plain_net().to(**args).train()
    empty = plan.skeleton(net)
    assert {p.dtype for p in empty.parameters()} == {p.dtype for p in net.parameters()} and all(m.training for m in empty.modules())
    if 'memory_format' in args: assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in empty.modules() if isinstance(m, nn.Conv2d))

def test_edits(planned, plan):
    net = planned[0]
    name = next(iter(plan.choices))
    before = plan.layers[name].params_before
    assert type(plan.set(name).apply(net).get_submodule(name)) is type(net.get_submodule(name))
    assert plan.layers[name] == Record(plan.layers[name].type, params_before=before, params_after=before, reason='set by hand')
    assert not plan.predicted # it was another plan's
    small = plan.set(name, 'svd', 2).apply(net)
    assert small.get_submodule(name).rank == 2 and small.low_rank_plan['layers'][name]['params_after'] == count_params(small.get_submodule(name))
    with pytest.raises(ValueError, match="name: 'no' is not in the plan; it has '0'"): plan.set('no', 'svd', 2)

def wider():
    net = plain_net()
    net[5] = nn.Conv2d(12, 20, 3)
    return net
def tied():
    net = plain_net()
    net.other = nn.Linear(64, 5)
    net.other.weight = net[10].weight
    return net

@pytest.mark.parametrize('model, edit, match', [
    (lambda: nn.Sequential(nn.Linear(3, 4)), ('5', 'svd', 3), "the model has no layer '"),
    (wider, ('5', 'svd', 3), r"layer '5' has 2,180 parameters, not 1,744: the plan was made for another model"),
    (lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(11))), ('5', 'svd', 3), 'the plan was made for another model'),
    (tied, ('10', 'svd', 2), "layer '10' cannot be replaced: its parameters are tied"),
    (plain_net, ('5', 'qr', 3), "layer '5': 'qr' is not one of 'svd'"),
    *[(plain_net, ('5', 'svd', r), r"layer '5': rank .* does not fit svd here; the full rank is 16") for r in (17, 0, -1, 2.5, True, None, (2, 3), '3')],
    *[(plain_net, ('5', 'tucker', r), r"layer '5': rank .* does not fit tucker here") for r in (4, (17, 3), (3, 0), (2.5, 3))],
    (plain_net, ('10', 'spatial', 2), "layer '10': Linear has no two spatial axes")])
def test_a_plan_that_does_not_fit_is_refused_before_anything_happens(plan, model, edit, match):
    net,(name,scheme,rank) = model(),edit
    plan.layers[name].scheme,plan.layers[name].rank = scheme,rank                    # as in an edited file
    for use in (plan.check, plan.skeleton, plan.apply, lambda m: plan.apply(m, images), lambda m: decompose(m, plan)):
        with unchanged(net), pytest.raises(ValueError, match=match): use(net)

@pytest.mark.parametrize('text', ['', 'PK\x03', '[]', '{}', '{"layers": []}', '{"layers": {"a": 3}}', '{"layers": {"a": {"type": "Linear"}}}'])
def test_files_that_hold_no_plan(text, tmp_path):
    (tmp_path/'p.json').write_text(text)
    with pytest.raises(ValueError, match='p.json.* is not a plan'): Plan.load(tmp_path/'p.json')

def test_what_else_is_refused():
    net = plain_net()
    with pytest.raises(TypeError, match='budget: 0.5 is not a Budget'): make_plan(net, images, .5)
    with pytest.raises(ValueError, match="schemes: 'qr' is not one of 'svd'"): make_plan(net, images, Budget(macs=.5), schemes=('qr',))
    with pytest.raises(ValueError, match="metric: 'plain' is not one of"): make_plan(net, images, Budget(macs=.5), metric='plain')
    with pytest.raises(ValueError, match='evaluate: none given; a budget of max_drop needs'): make_plan(net, images, Budget(max_drop=.1))

def test_planning_leaves_the_model_and_random_states_alone():
    net,state = with_statistics(res_net(), images).train(),torch.get_rng_state()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, images), 32, shuffle=True)
    with unchanged(net), torch.inference_mode(): make_plan(net, data, Budget(macs=.6))
    assert net.training and torch.equal(state, torch.get_rng_state()) and not any(m._forward_hooks for m in net.modules())

# --- a budget of accuracy

@pytest.mark.parametrize('drop, want', [(.1, .55), (.3, .4), (.001, .9)]) # and the share of MACs from which on the metric is kept
def test_the_smallest_model_that_keeps_the_metric(drop, want, planned):
    net,calls = planned[0],[]
    dense = count_macs(net, images[:2])
    def evaluate(m): # falls below what is allowed at a known size
        share = count_macs(m, images[:2])/dense
        calls.append(share)
        return 1. if share >= want else 1 - 2*drop
    plan = make_plan(net, images, Budget(max_drop=drop), evaluate=evaluate)
    assert calls[0] == 1 and len(calls) <= 7                                      # the dense model and a handful
    assert want <= plan.predicted['macs'] < 1.08*want                            # a 64th of the range, 1 to 1/20, and a step of a rank
    assert plan.budget == {'max_drop': drop} and plan.measured['metric'] >= plan.measured['dense_metric'] - drop
    inside = [c for c in calls[1:] if c >= want]
    assert plan.predicted['macs'] == pytest.approx(min(inside), abs=1e-12)        # the smallest of those that passed
    json.dumps(plan.plain())

def test_the_model_that_was_judged_comes_back(planned):
    net,seen = planned[0],[]
    dense = count_macs(net, images[:2])
    def evaluate(m):
        seen.append(m)
        return 1. if count_macs(m, images[:2]) >= .5*dense else 0.
    state = decompose(net, Budget(max_drop=.1), images, evaluate=evaluate).state_dict()
    same = [m for m in seen if m.state_dict().keys() == state.keys() and all(torch.equal(t, state[k]) for k,t in m.state_dict().items())]
    assert len(same) == 1 and evaluate(same[0]) == 1.

def test_a_budget_of_accuracy_for_a_model_of_one_number():
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    res = decompose(net, Budget(max_drop=.1), x, loss=regression, evaluate=lambda m: 1.)
    assert count_macs(res, x) < .5*count_macs(net, x) and res(x).shape == (64,)

def test_a_looser_budget_of_accuracy_never_gives_a_larger_model(planned):
    net = planned[0]
    with torch.no_grad(): want = net(images)
    def evaluate(m):
        with torch.no_grad(): return -(m(images) - want).norm()/want.norm()       # a tensor
    sizes = [make_plan(net, images, Budget(max_drop=d), evaluate=evaluate).predicted['macs'] for d in (.02, .1, .3, 1.)]
    assert all(a >= b for a,b in zip(sizes, sizes[1:])) and sizes[0] > sizes[-1]

def test_where_nothing_may_be_lost_the_model_stays_dense(planned):
    plan = make_plan(planned[0], images, Budget(max_drop=.01), evaluate=lambda m: 1. if not factored_layers(m) else 0.)
    assert not plan.choices and plan.predicted['macs'] == 1

# --- a budget of time

class Clock:
    "Stands for `measure_latency`: a model takes the milliseconds of its layers, by a made-up rule"
    def __init__(self, of_layer): self.of_layer,self.calls = of_layer,0
    def ms(self, model): return sum(self.of_layer(m) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    def __call__(self, models, sample, *args, **kwargs):
        self.calls += 1
        if isinstance(models, nn.Module): return Latency(self.ms(models), 0., self.ms(models))
        items = models.items() if isinstance(models, dict) else enumerate(models)
        res = {k: Latency(self.ms(m), 0., self.ms(m)) for k,m in items}
        return res if isinstance(models, dict) else list(res.values())
    def inside(self, model, sample): return {n: self.ms(m) for n,m in model.named_modules()}
    def start(self, monkeypatch):
        monkeypatch.setattr(planner_module, 'measure_latency', self)
        monkeypatch.setattr(planner_module, 'latency_per_layer', self.inside)

def by_size(m): return .01 + m.weight.numel()*1e-3                                # and an overhead for each call
def costly_spatial(m): return by_size(m)*(20 if isinstance(m, nn.Conv2d) and (m.kernel_size[0] == 1) != (m.kernel_size[1] == 1) else 1)

def timed_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5)).eval()

@pytest.mark.parametrize('rule', [by_size, costly_spatial])
@pytest.mark.parametrize('value', [.5, .8])
def test_no_layer_of_a_plan_for_latency_is_slower_than_dense(monkeypatch, rule, value):
    clock,net = Clock(rule),timed_net()
    clock.start(monkeypatch)
    plan = make_plan(net, images, Budget(latency=value))
    small = plan.skeleton(net)
    assert plan.choices
    for n,l in factored_layers(small).items(): assert clock.ms(l) < clock.ms(net.get_submodule(n))
    if rule is costly_spatial: assert {s for s,_ in plan.choices.values()} == {'svd'}
    ratio = clock.ms(small)/clock.ms(net)
    assert plan.measured['latency'] == pytest.approx(ratio) and ratio <= value    # as measured in the end
    assert abs(plan.predicted['latency'] - ratio) < .02                           # straight lines between four ranks of an affine rule
    assert plan.budget == {'latency': value} and plan.predicted['macs'] == pytest.approx(count_macs(small, images[:4])/count_macs(net, images[:4]))
    for _,r in plan.choices.values(): assert r % 4 == 0 or r < 16

def test_where_factors_are_slower_no_latency_can_be_saved(monkeypatch):
    Clock(lambda m: 1.).start(monkeypatch)                                         # every call takes as long
    with pytest.raises(ValueError, match='latency: 0.5 cannot be reached; the smallest is 1.0'): make_plan(timed_net(), images, Budget(latency=.5))
    assert not make_plan(timed_net(), images, Budget(latency=1.)).choices

def test_where_the_model_is_slower_than_its_layers_the_plan_is_made_again(monkeypatch):
    clock = Clock(by_size)
    clock.start(monkeypatch)
    monkeypatch.setattr(planner_module, 'measured_ratio', lambda dense, other, sample, once: min(1., 1.15*clock.ms(other)/clock.ms(dense)))
    plan = make_plan(timed_net(), images, Budget(latency=.6))
    assert plan.measured['latency'] <= .6 and plan.predicted['latency'] < .6/1.1 and plan.budget == {'latency': .6}

def test_where_the_model_is_faster_than_its_layers_nothing_is_given_away(monkeypatch):
    clock = Clock(by_size)
    clock.start(monkeypatch)
    monkeypatch.setattr(planner_module, 'measured_ratio', lambda dense, other, sample, once: .7*clock.ms(other)/clock.ms(dense))
    plan = make_plan(timed_net(), images, Budget(latency=.5))
    assert .45 <= plan.measured['latency'] <= .5 and plan.predicted['latency'] > .6 and plan.budget == {'latency': .5} # .7 of .6 and more

def timed_plan(monkeypatch, ratio, value): # `ratio`: what is measured, from the share that the layers have
    "A plan for a budget of time, and the shares that were tried"
    clock,shares = Clock(by_size),[]
    clock.start(monkeypatch)
    monkeypatch.setattr(planner_module, 'measured_ratio', lambda dense, other, sample, once: ratio(shares.append(clock.ms(other)/clock.ms(dense)) or shares[-1]))
    return make_plan(timed_net(), images, Budget(latency=value)),shares

@pytest.fixture(scope='module')
def least_time():
    "The smallest share of time that the layers of `timed_net` say can be reached"
    with pytest.MonkeyPatch.context() as m:
        Clock(by_size).start(m)
        with pytest.raises(ValueError, match='cannot be reached') as e: make_plan(timed_net(), images, Budget(latency=.01))
    return smallest_said(e)

def test_a_budget_that_only_the_whole_model_reaches_is_reached(monkeypatch, least_time):
    value = .9*least_time                                                          # of the layers by themselves it cannot be had
    plan,shares = timed_plan(monkeypatch, lambda share: .85*share, value)
    assert plan.measured['latency'] <= value and plan.predicted['latency'] > value and len(shares) == 1
    assert plan.budget == {'latency': value}

@pytest.mark.parametrize('above', [1.05, .5])                                      # of what the layers say is the least
def test_a_budget_that_the_fastest_model_misses_cannot_be_reached(monkeypatch, least_time, above):
    value,ratio = above*least_time,lambda share: min(1., 1.2*share)
    with pytest.raises(ValueError, match=f'latency: {value} cannot be reached; the smallest is ') as e: timed_plan(monkeypatch, ratio, value)
    smallest = smallest_said(e)
    assert abs(smallest - 1.2*least_time) < .03                                    # both are rounded up to a hundredth
    assert timed_plan(monkeypatch, ratio, smallest)[0].measured['latency'] <= 1.01*smallest

def test_a_budget_that_is_missed_three_times_is_said(monkeypatch):
    with pytest.warns(UserWarning, match='latency: no plan reaches 0.6; the nearest of 3 plans measures 0.64') as w:
        plan,shares = timed_plan(monkeypatch, lambda share: .64, .6)               # and would if there were nothing left
    assert sum('latency' in str(o.message) for o in w) == 1 and len(shares) == 3 and shares == sorted(shares, reverse=True) and plan.measured['latency'] == .64

def test_what_is_left_of_a_budget_of_time_is_worth_one_more_plan(monkeypatch):
    times = iter([.4, .42])
    plan,shares = timed_plan(monkeypatch, lambda share: next(times), .5)
    assert len(shares) == 2 and shares[0] < shares[1] and plan.measured['latency'] == .42

def test_a_plan_that_leaves_all_dense_is_not_timed(monkeypatch):
    Clock(lambda m: 1.).start(monkeypatch)
    monkeypatch.setattr(planner_module, 'measured_ratio', lambda *args, **kwargs: 1.2)  # noise, of a model beside itself
    plan = make_plan(timed_net(), images, Budget(latency=1.))
    assert not plan.choices and plan.measured['latency'] == 1

@pytest.mark.parametrize('share', [.9, .2, 1e-6])                                  # of the layers, in the time of the whole
@pytest.mark.parametrize('seed', range(4))
def test_all_of_the_time_is_enough_for_dense(monkeypatch, seed, share):
    "Whatever the sums of milliseconds round to, and however a model measures beside the dense one"
    rng,net = random.Random(seed),timed_net()
    times = {n: rng.random() for n,_ in net.named_modules()}
    Clock(by_size).start(monkeypatch)
    monkeypatch.setattr(planner_module, 'latency_per_layer', lambda model, sample: times | {'': sum(times.values())/share})
    monkeypatch.setattr(planner_module, 'measured_ratio', lambda *args, **kwargs: 1.02)
    assert not make_plan(net, images, Budget(latency=1.)).choices

def test_a_compiled_model_is_planned_for_time_too():
    net = timed_net()
    plan = make_plan(torch.compile(net, backend='eager'), images, Budget(latency=1.))
    assert plan.layers and not plan.choices and plan.measured['latency'] == 1

def test_no_faster_model_than_dense_is_no_plan(monkeypatch):
    with pytest.raises(ValueError, match='latency: 0.9 cannot be reached; the smallest is 1.0'): timed_plan(monkeypatch, lambda share: 1.1, .9)

@pytest.mark.parametrize('once,calls', [(50., 10), (3000., 3), (10., 17)])         # 15 and two before, the more the faster
def test_slow_models_are_called_for_nothing_but_the_measurement(once, calls):
    models = {k: nn.Sequential(nn.Identity()) for k in 'ab'}
    seen = []
    for k,m in models.items(): m.register_forward_hook(lambda *_, k=k: seen.append(k) or time.sleep(.003)) # more than what is the least of a measurement
    measured_ratio(*models.values(), torch.zeros(1), seconds=1., once=once)
    assert seen.count('a') == seen.count('b') == calls

def test_options_are_timed_once_for_all_budgets_of_time(monkeypatch):
    clock = Clock(by_size)
    clock.start(monkeypatch)
    monkeypatch.setattr(planner_module, 'measured_ratio', lambda dense, other, sample, once: clock.ms(other)/clock.ms(dense))
    plans = planner(timed_net(), images)
    first = plans.make(Budget(latency=.8))
    calls = clock.calls
    assert plans.make(Budget(latency=.5)).predicted['latency'] < first.predicted['latency'] and clock.calls == calls > 0

def test_layers_of_one_shape_are_timed_once(monkeypatch):
    clock = Clock(by_size)
    clock.start(monkeypatch)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.ReLU())))
    plans = planner(net, torch.randn(50, 64))
    options = plans.timed_options
    total = options.totals['latency']
    assert clock.calls == 1 and len(options) == 6 and total == pytest.approx(6*by_size(net[0]))
    assert [[(o.scheme, o.rank, o.latency) for o in os] for os in options.values()] == [[(o.scheme, o.rank, o.latency) for o in options['0']]]*6
    assert len({o.loss for os in options.values() for o in os if o.rank == 8}) == 6 # but each has losses of its own

def test_a_layer_takes_the_time_that_it_has_in_the_model(monkeypatch):
    "By itself it may be faster or slower than between others; what it becomes is as much faster in there"
    clock,net = Clock(by_size),timed_net()
    clock.start(monkeypatch)
    alone,times = planner(net, images).timed_options,{'0': 3., '2': .5}
    monkeypatch.setattr(planner_module, 'latency_per_layer', lambda model, sample: {n: times.get(n, 1.)*t for n,t in clock.inside(model, sample).items()} | {'': 70.})
    inside = planner(net, images).timed_options
    assert inside.totals['latency'] == 70. != alone.totals['latency']
    for n in alone: assert [o.latency for o in inside[n]] == pytest.approx([times.get(n, 1.)*o.latency for o in alone[n]])

def test_records_hold_the_error_in_the_metric():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()
    plans = planner(net, torch.randn(64, 3, 8, 8))
    plan = plans.make(Budget(macs=.4))
    assert plan.choices
    for n,(scheme,rank) in plan.choices.items():
        layer,metric = net.get_submodule(n),plans.calibration.metric(n)
        W = Geometry.of(layer).to_blocks(layer.weight.detach()).double()
        s = schemes[scheme](Geometry.of(layer), n).solver(layer.weight, metric)
        want = (metric.cost(W - s.approximation(rank))/metric.cost(W))**.5
        assert abs(plan.layers[n].error - want) < 1e-6 # the jitter in the moment of the outputs
        assert 0 < want < 1

# --- what was predicted, and what was measured

def noted(model): return model.low_rank_plan['predicted'],model.low_rank_plan['measured']

def check_measured(dense, small, x, loss=None): # by definition, on the data that it was made with
    found = noted(small)[1]
    want = dict(params=count_params(small)/count_params(dense), macs=count_macs(small, x[:8])/count_macs(dense, x[:8]))
    for k,v in want.items(): assert found[k] == pytest.approx(v, abs=1e-12)
    assert found['loss'] == pytest.approx(loss_increase(dense, small, x, *[loss]*(loss is not None)), rel=1e-6) and found['loss'] > 0
    json.dumps(small.low_rank_plan)

@pytest.mark.parametrize('kind', ['params', 'macs', 'max_drop', 'latency'])
def test_a_budget_predicts_and_measures(kind, monkeypatch):
    net,clock = timed_net(),Clock(by_size)
    clock.start(monkeypatch)
    evaluate = dict(evaluate=lambda m: count_params(m)/count_params(net)) if kind == 'max_drop' else {}
    small = decompose(net, Budget(**{kind: .6}), images, **evaluate)
    predicted,measured = noted(small)
    check_measured(net, small, images)
    for k in ('params', 'macs'): assert predicted[k] == pytest.approx(measured[k], abs=1e-12)
    assert 0 < measured['loss'] < predicted['loss']                                # an estimate, of what the fit then makes smaller
    assert predicted.keys() == {'loss', 'params', 'macs'} | ({'latency'} if kind == 'latency' else set())
    assert measured.keys() == {'loss', 'params', 'macs'} | {'latency': {'latency'}, 'max_drop': {'metric', 'dense_metric'}}.get(kind, set())
    assert (clock.calls > 0) == (kind == 'latency')                                # no other budget times anything

def test_a_plan_measures_what_it_is_applied_to():
    net = with_statistics(res_net(), images)
    plan = make_plan(net, images, Budget(macs=.6))
    before = copy.deepcopy(plan)
    for small in (plan.apply(net, images[:40]), decompose(net, plan, images[:40])):
        check_measured(net, small, images[:40])
        assert noted(small)[0] == plan.predicted
    assert noted(plan.apply(net)) == (plan.predicted, {}) and plan.measured == before.measured == {} # without data nothing is run

def test_decomposers_with_data_measure_too():
    net = with_statistics(plain_net(), images)
    for small in (decompose(net, [FC_Decomposer(.3), ConvDecomposer('tucker', .4)], images), ConvDecomposer('spatial', .4).decompose(net, data=images)):
        check_measured(net, small, images)
        predicted,plans = noted(small)[0],planner(net, images)
        parts = [schemes[l.scheme](l.geometry, n).solver(net.get_submodule(n).weight, plans.calibration.metric(n)).costs([l.rank])[0] for n,l in factored_layers(small).items()]
        assert len(parts) >= 2 and predicted == {'loss': pytest.approx(sum(parts))}
    assert noted(decompose(net, FC_Decomposer(.3))) == ({}, {})                    # nothing to measure on

def test_other_losses_and_metrics_claim_nothing_about_the_loss():
    net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 6))
    x = torch.randn(60, 8)
    small = decompose(net, Budget(macs=.6), x, loss=regression)
    check_measured(net, small, x, regression)
    assert noted(small)[1]['loss'] < noted(small)[0]['loss']                       # of the fit
    small = decompose(net, Budget(macs=.6), x, loss=lambda out: out.square().sum())
    assert 'loss' in noted(small)[0] and 'loss' not in noted(small)[1]             # an estimate, but no labels to measure with
    for what in (Budget(macs=.6), FC_Decomposer(.3)): assert 'loss' not in noted(decompose(net, what, x, metric='activation'))[0]

def test_layers_without_data_or_metric_are_listed_by_name():
    net = Grouped()
    net.never = nn.Linear(30, 30)
    by_rank,by_budget = (decompose(net, what, images).low_rank_plan['layers'] for what in ([FC_Decomposer(.3), ConvDecomposer('svd', .3)], Budget(macs=.8)))
    for n,why in {'never': 'no data reaches it', 'body.7': 'no metric is known for a transposed convolution'}.items():
        assert by_rank[n]['status'] == 'factored' and by_rank[n]['reason'] == f'{why}: decomposed by its weight alone'
        assert by_budget[n]['status'] == 'dense' and by_budget[n]['reason'].startswith(why)
    capped = decompose(net, ConvDecomposer('tucker', (60, 4), force=True), images).low_rank_plan['layers']['body.7']
    assert 'capped' in capped['reason'] and capped['reason'].endswith('; no metric is known for a transposed convolution: decomposed by its weight alone')

def test_the_estimate_is_the_increase_where_its_assumptions_hold():
    x = torch.randn(4000, 12)*torch.logspace(0, -1, 12) + .5
    net = nn.Sequential(nn.Linear(12, 9))                                          # of a squared error, so that gradients do not depend on the inputs
    for rank in (2, 4, 5):
        small = decompose(net, FC_Decomposer(rank, force=True), x, loss=regression, sequential=False)
        predicted,measured = (d['loss'] for d in noted(small))
        assert measured == pytest.approx(predicted, rel=.05)                       # the gradients are drawn: their covariance is one of 4,000 samples, a little damped

@pytest.mark.parametrize('max_size', [40, 20]) # below the outputs, and below both sides
@pytest.mark.parametrize('what', [Budget(params=.5), FC_Decomposer(.3)], ids=['budget', 'rank'])
@pytest.mark.parametrize('kw', [{}, dict(sequential=False), dict(metric='activation')], ids=['sequential', 'closed', 'activation'])
def test_layers_with_too_many_outputs_are_decomposed_by_diagonals_and_listed(max_size, what, kw):
    net,x = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 8)),torch.randn(400, 30)*torch.logspace(0, -2, 30)
    small = decompose(net, what, x, max_size=max_size, **kw)
    records = small.low_rank_plan['layers']
    assert records['0']['status'] == 'factored' and records['0']['reason'] == 'too many outputs for a full moment: weighted by its diagonal'
    assert 'too many' not in records['2']['reason']
    ranks = {n:l.rank for n,l in factored_layers(small).items()}
    if isinstance(what, Budget): assert count_params(small) <= .5*count_params(net)
    assert miss(small, net, x) < .8*miss(decompose(net, FC_Decomposer(ranks)), net, x) # of inputs that differ in size, diagonals already tell a lot

# --- structure

@pytest.mark.parametrize('layer,fmt', [(nn.Conv2d(8, 12, 3), torch.channels_last), (nn.Conv3d(8, 12, 3), torch.channels_last_3d), (nn.Conv2d(8, 12, 3), torch.contiguous_format)])
def test_a_skeleton_lies_in_memory_like_its_layer(layer, fmt):
    net = nn.Sequential(layer).to(memory_format=fmt)
    plan = Plan({'0': Record(type(layer).__name__, 'spatial', 2)})
    for small in (plan.skeleton(net), plan.apply(net)):
        assert [f.weight.is_contiguous(memory_format=fmt) for f in small[0]] == [True]*2 and len(factored_layers(small)) == 1
        assert any(f.weight.is_contiguous() for f in small[0]) == (fmt == torch.contiguous_format)

def test_arguments_of_the_fit_need_data():
    net = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(TypeError, match='seed: only used with data'): Plan({'0': Record('Linear', 'svd', 2)}).apply(net, seed=1)
    with pytest.raises(TypeError, match="^layers: '0' is a dict, not a Record; `Plan.of` makes a plan of plain data"): Plan({'0': dict(type='Linear', scheme='svd', rank=2)})

# --- layers that the data does not reach

class Half(nn.Module):
    "Only the first layers are called"
    def __init__(self, **layers):
        super().__init__()
        self.a,self.b = nn.Linear(24, 24),nn.Linear(24, 5)
        for name,layer in layers.items(): self.add_module(name, layer)
    def forward(self, x): return self.b(self.a(x).relu())

@pytest.mark.parametrize('known', [True, False])
def test_a_factored_layer_that_the_data_does_not_reach_stays_as_it_is(known):
    "Also where the plan would make it smaller; without data it becomes so"
    net,x = Half(never=nn.Linear(24, 24), up=nn.ConvTranspose2d(8, 8, 2)),torch.randn(64, 24)
    small = decompose(net, [FC_Decomposer(8), ConvDecomposer('svd', 6)])
    plan = make_plan(net, x, Budget(macs=.5)).set('a', 'svd', 4).set('never', 'svd', 2).set('up', 'svd', 2)
    if not known: del small.low_rank_plan
    again = plan.apply(small, x)
    for name,rank in dict(never=8, up=6).items():
        layer,record = again.get_submodule(name),again.low_rank_plan['layers'][name]
        assert layer.rank == record['rank'] == rank and record['status'] == 'factored' and record['scheme'] == 'svd'
        assert record['params_after'] == count_params(layer) and (record['error'] is not None) == known
        assert all(torch.equal(p, q) for p,q in zip(layer.parameters(), small.get_submodule(name).parameters(), strict=True))
    assert again.a.rank == 4 and count_params(again) < count_params(small)
    assert again.low_rank_plan['measured']['params'] == count_params(again)/count_params(net)
    assert Plan.of(again.low_rank_plan).choices.keys() == factored_layers(again).keys()
    assert plan.apply(small).never.rank == 2

def test_a_dense_layer_that_the_data_does_not_reach_cannot_be_planned():
    net,x = Half(never=nn.Linear(24, 24)),torch.randn(64, 24)
    plan = make_plan(net, x, Budget(macs=.5)).set('a', 'svd', 4).set('never', 'svd', 2)
    for model in (net, decompose(net, FC_Decomposer({'a': 8}))):
        with pytest.raises(ValueError, match="^choices: no data reaches 'never'"): plan.apply(model, x)
