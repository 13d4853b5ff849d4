"Compiled models: they are decomposed like the models inside, and compiled again"
import copy

import matplotlib; matplotlib.use('agg')
import pytest
import torch
from torch import nn
from fastai.callback.schedule import *  # noqa: F403 - gives a Learner its `fit_one_cycle`
from fastai.losses import CrossEntropyLossFlat
from fasterai_lr.all import Budget, ConvDecomposer, DecomposeCallback, FC_Decomposer, decompose, load_low_rank, make_plan, plot_spectra, recompose, save_low_rank, summarize
from fasterai_lr.layers import factored_layers, inner_model
from helpers import same
from learners import digit_learner, quiet
from networks import digit_cnn, digits

class Counting:
    "A compiler that only counts how often it compiles"
    def __init__(self): self.n = 0
    def __call__(self, graph, inputs):
        self.n += 1
        return graph.forward

def is_compiled(model): return '_orig_mod' in model._modules
def alike(a, b): return same(a.state_dict(), b.state_dict())

@pytest.fixture(autouse=True)
def fresh(): torch.compiler.reset(); yield; torch.compiler.reset()

@pytest.mark.parametrize('what', [None, Budget(macs=.5), Budget(params=.5), [FC_Decomposer(), ConvDecomposer('spatial', .5)]], ids=str)
def test_the_model_inside_is_decomposed(what):
    x = digits(200)[0]
    data = None if isinstance(what, list) else x
    compiled,want = torch.compile(digit_cnn(), backend='eager'),decompose(digit_cnn(), what, data)
    got = decompose(compiled, what, data)
    assert is_compiled(got) and is_compiled(compiled) and not factored_layers(compiled._orig_mod)
    assert alike(got._orig_mod, want) and list(got._orig_mod.low_rank_plan['layers']) == list(want.low_rank_plan['layers'])
    torch.testing.assert_close(got(x), want(x), rtol=1e-5, atol=1e-6) # the same kernels, perhaps in another order
    assert list(summarize(got).index) == list(summarize(want).index) and alike(recompose(got)._orig_mod, recompose(want))

def test_plans_and_files_know_the_names_inside(tmp_path):
    x = digits(200)[0]
    compiled = torch.compile(digit_cnn(), backend='eager')
    plan = make_plan(compiled, x, Budget(macs=.5))
    assert all(name in dict(digit_cnn().named_modules()) for name in plan.layers)
    small = plan.apply(compiled, x)
    save_low_rank(small, tmp_path/'small')
    for model in (digit_cnn(), compiled):
        loaded = load_low_rank(model, tmp_path/'small')
        assert is_compiled(loaded) == is_compiled(model) and alike(inner_model(loaded), small._orig_mod)

@pytest.mark.slow
def test_a_budget_of_time_is_measured_compiled():
    "What is timed at the end is compiled; the dense model is too"
    counting = Counting()
    net = torch.compile(nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)), backend=counting)
    x = torch.randn(256, 2048)
    small = decompose(net, Budget(latency=.7), x)
    assert counting.n >= 2 and is_compiled(small) and factored_layers(small._orig_mod)

@pytest.mark.parametrize('what', [None, Budget(macs=.4), pytest.param(Budget(max_drop=.05), marks=pytest.mark.slow)], ids=str)
def test_in_a_learner(what, tmp_path):
    "A Learner of a compiled model decomposes the model inside, in a fit and outside, and goes on with a compiled one"
    results = []
    for compiled in (False, True):
        counting,net = Counting(),digit_cnn()
        model = torch.compile(net, backend=counting) if compiled else net
        learn = quiet(digit_learner(model, range(600), range(600, 800), loss_func=CrossEntropyLossFlat()), tmp_path)
        learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, what))
        n = counting.n
        record, = learn.recorder.decomposed
        assert record['decomposed'] and record['metric_before'] == learn.recorder.values[0][2] # as the first epoch's validation has it
        if compiled:
            assert is_compiled(learn.model) and n >= 2
            learn.validate()
            assert counting.n <= n+1 # for evaluation, at most
        learn.save_low_rank('small')
        other = quiet(digit_learner(digit_cnn(), range(600), range(600, 800)), tmp_path).load_low_rank('small', with_opt=False)
        assert alike(other.model, inner_model(learn.model))
        results.append((learn, record))
    (plain,a),(learn,b) = results
    assert {k: v for k,v in a.items() if 'metric' not in k} == pytest.approx({k: v for k,v in b.items() if 'metric' not in k}, rel=.02) # training differs in rounding
    learn.decompose(Budget(macs=.2))
    assert is_compiled(learn.model) and factored_layers(inner_model(learn.model)) and len(learn.validate()) == 2
    assert list(learn.low_rank_summary().index) == list(plain.low_rank_summary().index) # the names inside

def test_a_model_that_compiles_itself():
    "`model.compile()` leaves the names as they are; what comes back can be run, and compiled"
    x,net = digits(200)[0],digit_cnn()
    want = decompose(copy.deepcopy(net), Budget(macs=.5), x)
    net.compile(backend='eager')
    small = decompose(net, Budget(macs=.5), x)
    assert alike(small, want)
    torch.testing.assert_close(small(x), want(x), rtol=1e-5, atol=1e-6) # as above

def test_a_layer_that_is_compiled_by_itself():
    "What is undone, computed and trained is the layer that is there now, not the one that was compiled"
    net,x = digit_cnn(),torch.randn(2, 16, 8, 8)
    net[2] = torch.compile(net[2], backend='eager')
    learn = quiet(digit_learner(net, range(600), range(600, 800)))
    learn.fit(3, 3e-3)
    learn.fit(2, 3e-3, cbs=DecomposeCallback(1, ConvDecomposer('spatial', .1), max_drop=0.))
    assert not factored_layers(learn.model) and torch.equal(learn.model[2](x), learn.model[2]._orig_mod(x)) # undone: it cost .2
    learn.decompose(ConvDecomposer('spatial', .25))
    layer, = (m for n,m in factored_layers(learn.model).items() if n.startswith('2.'))
    assert is_compiled(learn.model[2]) and learn.model[2]._orig_mod is layer and torch.equal(learn.model[2](x), layer(x))
    before = [p.detach().clone() for p in layer.parameters()]
    learn.fit(1, 3e-3)
    assert torch.equal(learn.model[2](x), layer(x)) and not any(map(torch.equal, before, layer.parameters()))

class Whole(nn.Module):
    "A model of its own class, which has no length: neither has what torch makes of it"
    def __init__(self): super().__init__(); self.net = digit_cnn()
    def forward(self, x): return self.net(x)

@pytest.mark.usefixtures('close_figures')
def test_a_model_without_a_length():
    x,compiled = digits(200)[0],torch.compile(Whole(), backend='eager')
    small = decompose(compiled, Budget(macs=.5), x)
    assert is_compiled(small) and factored_layers(small._orig_mod)
    assert len(plot_spectra(compiled, plan=small)) == 4
    learn = quiet(digit_learner(compiled, range(600), range(600, 800)))
    learn.fit(2, 1e-3, cbs=DecomposeCallback(1, Budget(macs=.5), distill=1.))
    assert factored_layers(inner_model(learn.model)) and len(learn.tradeoff((.4,))) == 2
