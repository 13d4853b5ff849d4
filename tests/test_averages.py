"Averages and copies of weights that callbacks hold: followed, or refused before the first epoch"
import copy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # noqa: F403 - gives a Learner its `fit_one_cycle`
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fasterai_lr.all import Budget, ConvDecomposer, DecomposeCallback, FC_Decomposer
from fasterai_lr.layers import factored_layers
from fasterai_lr.loop import measure_metric
from learners import digit_learner, quiet
from networks import digit_cnn, digit_net

class Averaging(Callback):
    "Averages the weights from the start"
    order = 70
    def __init__(self, make): self.make,self.average,self.steps = make,None,0
    def before_fit(self):
        if self.average is None: self.average = self.make(self.model)
    def after_step(self):
        self.steps += 1
        if hasattr(self.average, 'update_parameters'): self.average.update_parameters(self.model)
        else: self.average.update(self.model)

def ema(model): return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.95), use_buffers=True)
def timm_ema(model):
    from timm.utils import ModelEmaV3
    return ModelEmaV3(model, decay=.95)

def learner(*cbs): return quiet(digit_learner(digit_cnn(), range(600), range(600, 800), cbs=list(cbs)))

decomposers = [FC_Decomposer(), ConvDecomposer('spatial', .5)]
@pytest.mark.parametrize('what', [Budget(macs=.5), decomposers], ids=['budget', 'decomposers'])
@pytest.mark.parametrize('make', [AveragedModel, ema, timm_ema])
def test_averages_follow(make, what):
    "An average goes on with the new structure, is no worse than before by much, and ends as good as the model"
    torch.manual_seed(0)
    averaging = Averaging(make)
    learn = learner(averaging)
    learn.fit_one_cycle(3, 1e-2, cbs=DecomposeCallback(2, what))
    model,average = learn.model,averaging.average.module
    assert factored_layers(average).keys() == factored_layers(model).keys() and average.low_rank_plan['layers'].keys() == model.low_rank_plan['layers'].keys()
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()] and averaging.steps == 36
    assert not any(p is q for p in average.parameters() for q in model.parameters())
    value,own = measure_metric(learn, average),measure_metric(learn)
    assert value > own - .05

def test_an_average_is_kept_only_where_it_can_be_mixed():
    "An average of factors that are not those of the model, though of nearly the same matrix, would be of no use: here .29, and the model .92"
    torch.manual_seed(0)
    averaging = Averaging(AveragedModel)
    learn = quiet(digit_learner(digit_net(), range(1200), range(1200, 1797), cbs=[averaging]))
    learn.fit_one_cycle(4, 5e-3, cbs=DecomposeCallback(2, Budget(params=.5)))
    assert measure_metric(learn, averaging.average.module) > measure_metric(learn) - .03

class OnLearner(Callback):
    "Keeps an average on the learner, and in itself too if it `holds` it"
    order = 70
    def __init__(self, holds): self.holds = holds
    def before_fit(self):
        self.learn.ema = ema(self.model)
        if self.holds: self.same = self.ema
    def after_step(self): self.ema.update_parameters(self.model)

@pytest.mark.parametrize('holds', [False, True])
def test_an_average_on_the_learner_is_followed_once(holds):
    learn = learner(OnLearner(holds))
    learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5)))
    assert [p.shape for p in learn.ema.module.parameters()] == [p.shape for p in learn.model.parameters()]
    assert factored_layers(learn.model)

def test_of_two_starts_of_an_average_the_better_is_taken():
    "An average that is worse than the model starts anew from it; one that is better is decomposed by the same plan"
    for spoil in (False, True):
        averaging = Averaging(AveragedModel)
        learn = learner(averaging)
        learn.fit_one_cycle(2, 1e-2)
        other = averaging.average.module if spoil else learn.model
        with torch.no_grad(): other[8].weight.add_(.2*torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
        learn.decompose(Budget(macs=.9))
        average = averaging.average
        same = all(torch.equal(p, q) for p,q in zip(average.module.parameters(), learn.model.parameters(), strict=True))
        assert same == spoil and (average.n_averaged == 0) == spoil
        assert measure_metric(learn, average.module) >= measure_metric(learn)

def test_an_average_of_an_undone_decomposition_stays():
    averaging = Averaging(AveragedModel)
    learn = learner(averaging)
    learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, FC_Decomposer(rank=1), max_drop=0.))
    assert not factored_layers(learn.model) and not factored_layers(averaging.average.module) and averaging.average.n_averaged == 24

class Copies(Callback):
    "Holds copies of the weights in several ways"
    def __init__(self, make): self.make = make
    def before_fit(self): self.held = self.make(self.model)

@pytest.mark.parametrize('make', [
    copy.deepcopy, lambda m: [copy.deepcopy(m)], lambda m: {n: p.detach().clone() for n,p in m.named_parameters()},
    lambda m: [p.detach().clone() for p in m.parameters()], lambda m: copy.deepcopy(m.state_dict())],
    ids=['module', 'list', 'dict', 'tensors', 'state'])
def test_other_copies_are_refused_before_the_first_epoch(make):
    learn = learner(Copies(make))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(RuntimeError, match='DecomposeCallback: Copies holds a copy of weights of the model .in `held`.*AveragedModel'):
        learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5)))
    assert learn.recorder.lrs == [] and all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

class CopiesToLearner(Copies):
    "Holds them on the learner"
    def before_fit(self): self.learn.held = self.make(self.model)

def test_a_copy_on_the_learner_is_refused_too():
    with pytest.raises(RuntimeError, match='Learner holds a copy of weights of the model .in `held`'):
        learner(CopiesToLearner(copy.deepcopy)).fit(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5)))

def test_the_model_itself_is_no_copy():
    "Whoever holds the model, or a part that is not replaced, has what it becomes"
    net = digit_cnn()
    held = Copies(lambda m: [m, m[0]])
    learn = quiet(digit_learner(torch.nn.Sequential(net), range(600), range(600, 800), cbs=[held]))
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5)))
    assert factored_layers(held.held[1]) and held.held[0] is learn.model

def test_another_network_of_the_same_kind_is_no_copy():
    "A teacher with weights of its own does no harm"
    torch.manual_seed(5)
    teacher = digit_learner(digit_cnn(), range(600), range(600, 800)).model
    with torch.no_grad():
        for p in teacher.parameters(): p.add_(.1)
    learn = learner(Copies(lambda m: teacher))
    learn.fit_one_cycle(1, 1e-2, cbs=DecomposeCallback(0, Budget(macs=.5)))
    assert factored_layers(learn.model)
