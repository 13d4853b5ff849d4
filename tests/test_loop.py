"The learner's own loop on the side: what it sees is what validation sees, and nothing of a fit is changed by it"
import random

import numpy as np
import pytest
import torch
import fastai.callback.schedule # noqa: F401 - gives a Learner its `fit_one_cycle`
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.learner import ValueMetric
from fasttransform import Transform
from fastai.metrics import F1Score, Perplexity, RocAuc, accuracy, error_rate
from fasterai_lr.budget import Budget
from fasterai_lr.layers import factored_layers
from fasterai_lr.learner import *  # noqa: F403 - gives a Learner `decompose`
from fasterai_lr.loop import is_fitting, measure_metric, model_inputs
from helpers import same, snapshot
from learners import digit_learner, quiet
from networks import digits

class Counts(Callback):
    "Normalises the inputs, and counts in every way: by numbers, lists, dicts, sets and tensors, in itself and inside of what it holds"
    def before_fit(self):
        self.n,self.sizes,self.by_kind,self.kinds,self.total = 0,[],{'seen': {}},set(),torch.zeros(1)
    def before_batch(self):
        x, = self.xb
        kind = 'train' if self.training else 'valid'
        self.n += 1
        self.sizes.append(len(x))
        self.by_kind['seen'].setdefault(kind, []).append(float(x.mean()))
        self.kinds.add(kind)
        self.total += x.mean().cpu()
        self.learn.xb = (x-8)/4,
    def state(self): return self.n,self.sizes.copy(),{k: v.copy() for k,v in self.by_kind['seen'].items()},self.kinds.copy(),self.total.item()

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

def learner(*cbs, path=None, net=None, **kw):
    "A learner of digits; its callbacks may change what it sees"
    return quiet(digit_learner(net or network(), range(600), range(600, 900), bs=64, cbs=list(cbs), **kw), path)

class Aside(Callback):
    "Validates and takes inputs on the side at the start of each epoch's training"
    order = 61
    def before_train(self):
        assert is_fitting(self.learn)
        self.values = [measure_metric(self.learn), measure_metric(self.learn)]
        self.inputs = model_inputs(self.learn, self.dls.train, 100), model_inputs(self.learn, self.dls.valid, 100)

def fitted(aside, path, *cbs, n=3):
    "A learner after a fit, with callbacks of several kinds, and with or without something on the side"
    random.seed(1)
    learn = learner(*cbs, path=path, metrics=[accuracy, F1Score(average='macro')])
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    learn.fit_one_cycle(n, 1e-2, cbs=[Aside()] if aside else None)
    return learn

@pytest.mark.parametrize('make', [
    lambda: [Counts()], lambda: [Counts(), MixUp()], lambda: [CutMix()], lambda: [Counts(), MixedPrecision()], lambda: [ActivationStats(with_hist=True)],
    lambda: [GradientAccumulation(128), SaveModelCallback(), CSVLogger()], lambda: [EarlyStoppingCallback(patience=1)], lambda: [ShortEpochCallback(.5, False)]],
    ids=['counts', 'mixup', 'cutmix', 'fp16', 'stats', 'files', 'tracker', 'short'])
def test_no_trace(make, tmp_path):
    "A fit with something on the side is the same fit: weights, log, recorder, callbacks, files and random states"
    results = []
    for aside in (False, True):
        path = tmp_path/str(aside)
        path.mkdir()
        learn = fitted(aside, path, *make())
        drawn = random.random(),np.random.rand(),torch.rand(1).item(),learn.dls.train.rng.random()
        rec = learn.recorder
        logged = [list(row) for row in rec.values],[float(o) for o in rec.losses],rec.lrs,rec.iters,list(rec.metric_names)
        state = [cb.state() for cb in learn.cbs if isinstance(cb, Counts)]
        files = sorted(f.name for f in path.rglob('*') if f.is_file())
        left = learn.epoch,learn.training,learn.n_epoch,learn.dl,learn.pct_train,learn.train_iter,sorted(vars(learn))
        results.append((snapshot(learn.model), drawn, logged, state, files, left))
    (weights,*rest),(weights2,*rest2) = results
    assert rest == rest2
    for a,b in zip(weights, weights2, strict=True): assert torch.equal(a, b)

class Rows(nn.Module):
    "Returns several outputs, like a recurrent network"
    def __init__(self):
        super().__init__()
        self.net,self.state = network(),0
    def reset(self): self.state = 0
    def forward(self, x):
        self.state = self.state + 1
        out = self.net(x)
        return out, [out], [out]

class Mean(Callback):
    "A metric of its own, known when a validation ends"
    def before_validate(self): self.sums = []
    def after_batch(self):
        if not self.training: self.sums.append(self.pred.mean().item())
    def after_validate(self): self.value = sum(self.sums)/len(self.sums)
    def mean_output(self): return self.value

class Doubles(Callback):
    "Changes the outputs, and the loss"
    def after_pred(self): self.learn.pred = 2*self.pred
    def after_loss(self): self.learn.loss = self.loss + 1

def with_mean(**kw):
    mean = Mean()
    return learner(mean, metrics=ValueMetric(mean.mean_output), **kw)

@pytest.mark.parametrize('make', [
    lambda: learner(Counts()), lambda: learner(metrics=[]), lambda: learner(Doubles(), metrics=[]), lambda: learner(Counts(), Doubles(), metrics=error_rate),
    lambda: learner(metrics=F1Score(average='macro')), lambda: learner(metrics=Perplexity()), lambda: learner(metrics=RocAuc()), with_mean,
    lambda: learner(MixUp()), lambda: learner(CutMix()), lambda: learner(MixedPrecision()),
    lambda: learner(ModelResetter(), RNNCallback(), net=Rows())],
    ids=['counts', 'loss', 'changed_loss', 'changed_output', 'f1', 'perplexity', 'auc', 'value', 'mixup', 'cutmix', 'fp16', 'rnn'])
def test_measured_as_by_validate(make):
    "What is measured is what `learn.validate` says, to the last digit, before, in and after a fit"
    learn = make()
    col = 0 if not learn.metrics else 1
    assert measure_metric(learn) == learn.validate()[col]
    aside = Aside()
    learn.fit(2, 1e-3, cbs=aside)
    before_last = learn.recorder.values[0][1+col]
    assert aside.values == [before_last, before_last] # weights are the same as after the first epoch
    assert measure_metric(learn) == learn.validate()[col]

def test_inputs_are_those_of_the_model():
    "What is taken is what arrives at the model after every callback, without augmentation"
    learn = learner(Counts(), MixUp())
    taken = model_inputs(learn, learn.dls.valid, 100)
    x = digits()[0][600:700]
    assert [len(xb) for xb, in taken] == [64, 36] and torch.equal(torch.cat([xb for xb, in taken]), (x-8)/4)

@pytest.mark.parametrize('budget', [Budget(params=.1), Budget(max_drop=.02)], ids=str)
def test_a_callback_that_normalises_is_as_good_as_normalised_data(budget):
    "The same model comes back, to the last bit, and the same figures stand in its plan"
    class Normalise(Callback):
        def before_batch(self): self.learn.xb = tuple(4*x - 2 for x in self.xb)
    class Scaled(Transform):
        def encodes(self, x:torch.Tensor): return 4*x - 2 if x.is_floating_point() else x
    plans = []
    for kw in (dict(cbs=[Normalise()]), dict(tfms=[Scaled()])):
        learn = quiet(digit_learner(network(), range(600), range(600, 900), **kw))
        learn.fit_one_cycle(3, 1e-2)
        learn.decompose(budget)
        plans.append((learn.model.low_rank_plan, snapshot(learn.model), learn.validate()))
    (plan,weights,values),(plan2,weights2,values2) = plans
    assert factored_layers(learn.model) and plan == plan2 and same(weights, weights2) and values == values2

def test_a_short_epoch_is_measured_and_taken_whole():
    "A callback that cuts validations short has no say in what is measured or taken"
    learn = learner(ShortEpochCallback(.5))
    assert sum(len(xb) for xb, in model_inputs(learn, learn.dls.valid, 1000)) == 300
    assert measure_metric(learn) == measure_metric(learner())

class Stops(Callback):
    "Interrupts the training of the first epoch"
    order = 100
    def before_batch(self):
        if self.training and self.iter == 2: raise KeyboardInterrupt

def test_after_an_interrupt_a_new_callback_starts_as_for_validate():
    "An interrupted fit leaves a learner in training, and there is no fit"
    learn = learner(MixUp())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=Stops())
    assert learn.training and learn.dl is learn.dls.train and not is_fitting(learn)
    learn.add_cb(Counts()) # which has counted nothing yet
    assert measure_metric(learn) == learn.validate()[1] == measure_metric(learn)
