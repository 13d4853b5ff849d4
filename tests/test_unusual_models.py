"Decomposition with data of models and data at the edge: dead branches, empty calls, sequences of changing length, large means, nothing to decompose"
from collections import UserDict
from contextlib import suppress
from dataclasses import replace

import numpy as np, pytest, torch
from torch import nn

from fasterai_lr.loss import regression
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose
from fasterai_lr.export import save_low_rank
from fasterai_lr.running import trace
from fasterai_lr.layers import factored_layers
from fasterai_lr.budget import Budget
from fasterai_lr.plan import Plan, measured
from fasterai_lr.calibrate import calibrate
from fasterai_lr.planner import make_plan, search_drop
from fasterai_lr.running import Batches
from fasterai_lr.schemes import schemes
from helpers import fitted, miss, planner

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures('seeded')

def mlp(): return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

# --- factors

def conv_net(): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()

@pytest.mark.parametrize('method', schemes)
def test_factors_fitted_to_data_are_balanced(method):
    net,x = conv_net(),torch.randn(64, 3, 10, 10)
    small = decompose(net, ConvDecomposer(method, .5), x)
    for factors in factored_layers(small).values():
        norms = torch.stack([f.weight.norm() for f in factors if hasattr(f, 'weight')])
        assert norms.max() < 3*norms.min() # SVDs share out singular values, not norms; unbalanced ones were 10⁵ apart

@pytest.mark.parametrize('method', schemes)
def test_one_step_of_training_keeps_what_was_fitted(method):
    net,x = conv_net(),torch.randn(64, 3, 10, 10)
    small = decompose(net, ConvDecomposer(method, .5), x)
    opt = torch.optim.Adam(small.parameters(), 1e-3)
    (small(x) - net(x)).square().mean().backward()
    opt.step()
    assert miss(small, net, x) < .5 # unbalanced factors made it 10⁴

# --- what an input is like

def test_layers_before_the_first_that_is_factored_are_left_alone():
    net,x = conv_net(),torch.randn(64, 3, 10, 10)
    small = decompose(net, FC_Decomposer(.3), x)
    assert list(factored_layers(small)) == ['6'] and all(torch.equal(small[i].weight, net[i].weight) for i in (0, 2))
    other = decompose(net, ConvDecomposer('svd', rank={'2': .3}), x)
    assert torch.equal(other[0].weight, net[0].weight) and not torch.equal(other[6].weight, net[6].weight)
    assert torch.equal(decompose(net, Budget(params=1.), x)[6].weight, net[6].weight)


@pytest.mark.parametrize('mean', [0., 100., 1000.])
@pytest.mark.parametrize('columns', [10, 1])
def test_layers_of_full_rank_keep_their_weight_whatever_the_mean_of_their_input(mean, columns):
    x = torch.randn(512, 10)
    x[:,:columns] += mean
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))
    with torch.no_grad(): net[0].bias.copy_(-net[0].weight@x.mean(0))
    same = fitted(net, {'0': ('svd', 10)}, x, loss=regression)
    assert (same[0].weight - net[0].weight).norm() < 1e-4*net[0].weight.norm() # what rounding of moments of 10⁶ in float32 leaves after the ridge
    assert miss(same, net, x) < 1e-3

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.i,self.h,self.o,self.p = nn.Linear(12, 12),nn.Linear(12, 12),nn.Linear(12, 24),nn.Linear(24, 6)
        with torch.no_grad():
            for l in (self.h, self.o, self.p): l.weight.mul_(2)
    def forward(self, x):
        h = torch.zeros(len(x), 12)
        for t in range(x.shape[1]): h = torch.tanh(self.i(x[:,t]) + self.h(h))
        return self.p(torch.relu(self.o(h)))

@pytest.mark.parametrize('length', [1, 2])
def test_the_order_of_batches_of_different_lengths_does_not_matter(length):
    net,batches = Recurrent(),[torch.randn(16, t, 12) for t in (length, 8, 8, 8)]
    what = {'i': ('svd', 4), 'h': ('svd', 4), 'o': ('svd', 4)}
    known = calibrate(net, batches)
    there,back = (fitted(net, what, replace(known, batches=Batches(b))) for b in (batches, batches[::-1]))
    x = torch.randn(64, 8, 12)
    assert miss(there, back, x) < 1e-3 # float32 sums in another order; with a part of the calls only it was 0.3

class Experts(nn.Module):
    "Each item goes to one of the experts, which may get none"
    def __init__(self):
        super().__init__()
        self.gate,self.experts,self.head = nn.Linear(8, 3),nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),nn.Linear(8, 4)
    def forward(self, x):
        to,out = self.gate(x).argmax(-1),torch.zeros_like(x)
        for i,e in enumerate(self.experts):
            j = (to == i).nonzero()[:,0]
            out = out.index_put((j,), e(x[j]))
        return self.head(out)

@pytest.mark.parametrize('sequential', [True, False])
def test_experts_that_get_nothing_in_some_batches(sequential):
    net,data = Experts(),[torch.randn(2, 8) for _ in range(40)]
    full = {n: ('svd', 8) for n in ('experts.0', 'experts.1', 'experts.2')} | {'gate': ('svd', 3)}
    assert miss(fitted(net, full, data, sequential=sequential), net, torch.cat(data)) < 1e-3 # the ridge's pull
    small = decompose(net, FC_Decomposer(.25), data)
    assert {'gate', 'experts.0', 'experts.1', 'experts.2'} <= set(factored_layers(small)) and all(p.isfinite().all() for p in small.parameters())

def test_experts_that_are_sent_other_items_stay_what_they_are():
    net,data,x = Experts(),[torch.randn(12, 8) for _ in range(40)],torch.randn(50, 8)
    small = fitted(net, {n: ('svd', 8) for n in ('experts.0', 'experts.1', 'experts.2')} | {'gate': ('svd', 1)}, data)
    assert (net.gate(x).argmax(-1) != small.gate(x).argmax(-1)).float().mean() > .1
    for e,f in zip(net.experts, small.experts): assert miss(f, e, x) < 1e-3 # the ridge's pull; fitted to what another item's output was, it is tenths

# --- what the loss depends on

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.norm = nn.Conv2d(16, 32, 3, padding=1, bias=False),nn.Conv2d(32, 16, 3, padding=1, bias=False),nn.BatchNorm2d(16)
    def forward(self, x): return torch.relu(x + self.norm(self.b(torch.relu(self.a(x)))))

def test_a_branch_on_which_nothing_depends_is_cut_first():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Branch(), Branch(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x = torch.randn(64, 3, 8, 8)
    for _ in range(20): net(x)
    nn.init.zeros_(net.eval()[2].norm.weight)
    plan = make_plan(net, x, Budget(macs=.6))
    assert set(plan.choices) == {'2.a', '2.b'}
    assert miss(plan.apply(net, x), net, x) < 1e-5

@pytest.mark.parametrize('tokens', [10, 32]) # 32: as many as features
def test_a_batchnorm_over_tokens_takes_no_mean_of_features(tokens):
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(tokens), nn.ReLU(), nn.Flatten(), nn.Linear(32*tokens, 5))
    x = torch.randn(64, tokens, 16)
    net(x)
    assert trace(net.eval(), ['0'], x)['0'].norm is None
    small = decompose(net, FC_Decomposer({'0': 4}), x)
    h = torch.randn(64, tokens, 32)
    with torch.no_grad(): assert (small[1](h) - net[1](h)).abs().max() < 1e-5 # float32; a mean of features would move it by .1

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers,self.head = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2, enable_nested_tensor=True),nn.Linear(16, 4)
    def forward(self, x, mask): return self.head(self.layers(x, src_key_padding_mask=mask)[:,0])

def test_distillation_of_an_encoder_with_padding():
    mask = torch.zeros(16, 6, dtype=torch.bool)
    mask[:,4:] = True
    data = [(torch.randn(16, 6, 16), mask, torch.zeros(16))]
    net = Encoder().eval()
    nn.init.normal_(net.head.weight)
    losses = [measured(net, decompose(net, Budget(macs=.45), data, distill_steps=n), data)['loss'] for n in (0, 150)]
    assert losses[1] < .5*losses[0]

# --- nothing to do, and records

def test_models_without_a_layer_that_data_says_something_of():
    net,x = mlp(),torch.randn(64, 16)
    once = decompose(net, FC_Decomposer(.3))
    twice = decompose(once, FC_Decomposer(.2), x)
    with torch.no_grad(): assert torch.equal(twice(x), once(x))
    up = nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.Flatten())
    assert list(factored_layers(decompose(up, ConvDecomposer('svd'), torch.randn(8, 4, 5, 5)))) == ['0'] # by its weight alone
    words,w = nn.Sequential(nn.Embedding(10, 4), nn.Flatten()),torch.randint(10, (8, 3))
    for what in (Budget(params=1.), Budget(macs=1.), FC_Decomposer()):
        if what == Budget(macs=1.):
            with pytest.raises(ValueError, match="the model has no macs to save"): decompose(words, what, w)
        else: assert torch.equal(decompose(words, what, w)(w), words(w))

def test_a_plan_of_few_words_makes_a_model_like_any_other(tmp_path):
    small = Plan.of({'layers': {'0': dict(type='Linear', scheme='svd', rank=3)}}).apply(mlp())
    save_low_rank(small, tmp_path/'m.pth')
    assert list(factored_layers(decompose(small, FC_Decomposer(.3)))) == ['0', '2']

def test_a_layer_of_zeros_has_no_error():
    net = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4))
    nn.init.zeros_(net[0].weight)
    assert decompose(net, FC_Decomposer(.25), torch.randn(64, 8)).low_rank_plan['layers']['0']['error'] == 0

def test_budgets_in_numbers_of_numpy(tmp_path):
    plan = make_plan(mlp(), torch.randn(64, 16), Budget(macs=np.float32(.5)))
    plan.save(tmp_path/'p.json')
    assert Plan.load(tmp_path/'p.json') == plan

def test_batches_of_any_mapping():
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.net = mlp()
        def forward(self, x): return self.net(x)
    net,x = Named(),torch.randn(16, 16)
    a,b = (decompose(net, Budget(macs=.5), [kind(x=x, labels=torch.zeros(16))]) for kind in (dict, UserDict))
    assert torch.equal(a(x), b(x))
    with pytest.raises(TypeError, match='augment: .* dicts'): decompose(net, Budget(macs=.5), [dict(x=x)], distill_steps=1, augment=lambda x, gen: x)

def test_a_metric_that_no_budget_keeps():
    net,x = mlp(),torch.randn(64, 16)
    known = planner(net, x)
    with pytest.warns(UserWarning, match='max_drop: 0.01 cannot be met'): change = search_drop(known, Budget(max_drop=.01), lambda m: float(m is net))
    same = change.finished()
    assert not change.plan.choices and not factored_layers(same) and same.low_rank_plan['measured'].items() >= dict(metric=1., dense_metric=1.).items()
    with torch.no_grad(): assert torch.equal(same(x), net(x))
    with pytest.raises(ValueError, match='evaluate: it returns nan'): search_drop(known, Budget(max_drop=.01), lambda m: float('nan'))

def test_a_layer_set_to_dense_has_no_error():
    plan = make_plan(mlp(), torch.randn(64, 16), Budget(macs=.5))
    name = next(iter(plan.choices))
    assert plan.set(name).layers[name].error is None

def test_a_budget_of_time_leaves_the_random_state_alone():
    net,x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)),torch.randn(64, 256)
    before = torch.get_rng_state()
    with suppress(ValueError): make_plan(net, x, Budget(latency=.9)) # on a busy machine it may be out of reach
    assert torch.equal(torch.get_rng_state(), before)
