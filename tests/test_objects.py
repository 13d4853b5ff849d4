"What a Calibration, a Loss and a Change promise: gathered once, read alike everywhere, copied once"
import copy, json

import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fasterai_lr.all import *
from fasterai_lr.calibrate import calibrated
from fasterai_lr.learned import output_kind
from fasterai_lr.loss import Classification
from fasterai_lr.settings import Settings
from networks import digits

torch.set_num_threads(1)

X,Y = digits()
questions = torch.stack([Y % 2 == 0, Y > 4, Y % 3 == 0, Y == 1], 1).float() # four labels of each digit

def trained(n_out, loss, targets):
    "A small network that has learned `targets`"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
                        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, n_out))
    opt = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(4):
        for i in torch.randperm(1400).split(50):
            l = loss(net(X[i]), targets[i])
            opt.zero_grad()
            l.backward()
            opt.step()
    return net.eval().requires_grad_(False)

@pytest.fixture(scope='module')
def net(): return trained(10, F.cross_entropy, Y)

@pytest.fixture(scope='module')
def labelled(): return trained(4, F.binary_cross_entropy_with_logits, questions)

@pytest.fixture(scope='module')
def calibration(net): return calibrate(net, X[:400])

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

# --- Calibration

@pytest.mark.parametrize('what', [Budget(macs=.5), Budget(params=.3), FC_Decomposer(Energy(.8)), [ConvDecomposer('spatial', .25), FC_Decomposer(.25)]])
def test_a_calibration_does_as_its_data_do(net, calibration, what):
    assert same(decompose(net, what, calibration), decompose(net, what, X[:400]))

def test_a_calibration_is_gathered_once(net, calibration):
    calls = []
    handle = net.register_forward_hook(lambda m, x, out: calls.append(len(x[0])))
    try: small = make_plan(net, calibration, Budget(macs=.4))
    finally: handle.remove()
    assert small.choices and calls == [64]*2 # one batch, to see how layers are used and to count
    assert dict(calibration).keys() == {'0', '2', '5', '7'} and 'Calibration of 4 layers with 400 items' == repr(calibration)

def test_a_plan_and_a_learner_take_a_calibration(net, calibration):
    plan = make_plan(net, calibration, Budget(macs=.4))
    assert same(plan.apply(net, calibration), plan.apply(net, X[:400]))
    learn = Learner(DataLoaders([(X[:64], Y[:64])]), copy.deepcopy(net), loss_func=nn.CrossEntropyLoss())
    learn.decompose(Budget(macs=.4), calibration)
    assert same(learn.model, plan.apply(net, calibration))

def test_a_calibration_may_be_read_in_another_metric(net, calibration):
    want = decompose(net, Budget(macs=.4), X[:400], metric='activation')
    assert same(decompose(net, Budget(macs=.4), calibration, metric='activation'), want)
    assert calibrated(net, calibration, Settings(most=3)).settings.most == 3 and calibration.settings.most is None

@pytest.mark.parametrize('wrong, match', [(dict(loss=regression), '^loss: Regression.*, but the calibration was made with Classification'),
                                          (dict(seed=3), '^seed: 3, but'), (dict(max_size=9), '^max_size: 9, but')])
def test_moments_of_other_settings_are_not_taken(net, calibration, wrong, match):
    with pytest.raises(ValueError, match=match): decompose(net, Budget(macs=.4), calibration, **wrong)

def test_moments_of_another_model_are_not_taken(labelled, calibration):
    with pytest.raises(ValueError, match="^data: the calibration is of another model, whose layer '7' is Linear"): decompose(labelled, Budget(macs=.4), calibration)

def test_a_second_decomposition_takes_the_calibration_of_the_dense_model(net, calibration):
    small = decompose(net, Budget(macs=.5), calibration)
    smaller = decompose(small, Budget(macs=.3), calibration)
    assert count_macs(smaller, X[:1]) < .31*count_macs(net, X[:1])

# --- Loss

def test_gradients_of_labels_have_the_fisher_information_of_labels(labelled):
    p = labelled(X[:200]).sigmoid().double()
    got = calibrate(labelled, [X[:200]]*50, multilabel)['7'].grads[0]
    want = (p*(1-p)).mean(0).diag()
    assert (got - want).abs().max() < .02 # 10,000 random signs, of terms of at most 1/4: off the diagonal a standard error of .0025

def test_the_increase_of_labels_is_that_of_their_loss(labelled):
    small = decompose(labelled, Budget(macs=.3), X[:400], loss=multilabel)
    want,out = labelled(X[:400]).double(),small(X[:400]).double()
    loss = lambda o: F.binary_cross_entropy_with_logits(o, want.sigmoid(), reduction='sum')/400
    assert small.low_rank_plan['measured']['loss'] == pytest.approx(float(loss(out) - loss(want)), rel=1e-6)
    assert json.loads(json.dumps(small.low_rank_plan))['settings']['loss'] == 'multilabel'

def test_a_learner_with_labels_knows_them(labelled):
    learn = Learner(DataLoaders([(X[:64], questions[:64])]), copy.deepcopy(labelled), loss_func=BCEWithLogitsLossFlat())
    assert output_kind(learn) == multilabel
    learn.decompose(Budget(macs=.5), X[:400])
    plan = learn.model.low_rank_plan
    assert plan['settings']['loss'] == 'multilabel' and Plan.of(plan).settings.loss == multilabel
    assert 0 <= plan['measured']['loss'] < .1

def test_labels_are_decomposed_better_as_labels(labelled):
    "With the same parameters, the answers of the smaller network are nearer to those of the dense one"
    def wrong(loss, macs):
        small = decompose(labelled, Budget(macs=macs), X[:400], loss=loss, sequential=False)
        return float(F.binary_cross_entropy_with_logits(small(X[1400:]), labelled(X[1400:]).sigmoid()))
    for macs in (.3, .2): assert wrong(multilabel, macs) < wrong(regression, macs) - .002 # .0030 and .0102

def test_class_scores_on_the_last_axis():
    class Last(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(x)[:,None] # one position, classes last
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    a,b = calibrate(net, X[:100]),calibrate(Last(net), X[:100], Classification(axis=-1))
    for n in a: assert (a[n].grads - b[f'net.{n}'].grads).abs().max() < 1e-6*a[n].grads.abs().max() # float32 sums in another order

# --- Change

class Copied(nn.Identity):
    "Counts how often it is copied"
    n = 0
    def __deepcopy__(self, memo):
        Copied.n += 1
        return Copied()

@pytest.mark.parametrize('what, data', [(Budget(macs=.5), X[:200]), (FC_Decomposer(.25), None), ([FC_Decomposer(.25), ConvDecomposer('spatial', .25)], X[:200]), (None, X[:200])])
def test_the_model_is_copied_once(net, what, data):
    model = nn.Sequential(*net, Copied())
    Copied.n = 0
    decompose(model, what, data)
    assert Copied.n == 1
