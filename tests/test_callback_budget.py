"Budgets, schedules, the guard and the teacher of `DecomposeCallback`, on scikit-learn's digits"
import copy
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.vision.all import (accuracy, BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, CutMix, Datasets, error_rate, FocalLossFlat, GradientAccumulation,
                               LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, Learner, MixUp, MSELossFlat, OptimWrapper, SGD, set_seed, TensorImage, Transform)
from dataclasses import replace
from functools import partial
from fasterai_lr.loss import classification, multilabel, regression
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learned import calibration_batches, metric_value, output_kind
from fasterai_lr.cost import count_macs, count_params
from fasterai_lr.decomposer import ConvDecomposer, decompose, FC_Decomposer
from fasterai_lr.layers import factored_layers
from fasterai_lr.learner import *
from fasterai_lr.budget import Budget
from fasterai_lr.planner import make_plan
from learners import digit_learner
from networks import digits

X,Y = digits()

def net():
    torch.manual_seed(0)
    conv = lambda i,o,s=1: (nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(*conv(1, 16), *conv(16, 32), *conv(32, 32, 2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))

class Noise(Transform):
    "Random augmentation: only for training items"
    split_idx,seen = 0,0
    def encodes(self, x:torch.Tensor):
        type(self).seen += 1
        return x + 100 if x.is_floating_point() else x

def learner(tfms=(), **kw): return digit_learner(net(), range(800), range(800, 1000), tfms, bs=100, **kw)

def quiet_fit(learn, n, cbs, lr=1e-2):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, cbs=cbs)

def share(learn): return count_macs(learn.model, X[:1])/count_macs(net(), X[:1])

def test_half_of_the_macs():
    learn = learner()
    quiet_fit(learn, 4, DecomposeCallback(2, Budget(macs=.5), ft_lr=3e-3))
    assert .4 < share(learn) <= .5 and learn.validate()[1] > .8
    assert learn.model.low_rank_plan['budget'] == {'macs': .5}

def test_a_schedule_truncates_what_is_factored_already():
    learn,sizes = learner(),[]
    class Sizes(Callback):
        order = 70
        def before_train(self): sizes.append((share(self.learn), {n:count_params(l) for n,l in factored_layers(self.model).items()}))
    c = DecomposeCallback({1: Budget(macs=.7), 2: Budget(macs=.4), 3: Budget(macs=.25)}, ft_lr=3e-3)
    quiet_fit(learn, 5, [c, Sizes()])
    for got,most in zip(sizes[1:4], (.7, .4, .25)): assert most-.1 < got[0] <= most
    for (_,a),(_,b) in zip(sizes[1:3], sizes[2:4]):
        assert set(a) <= set(b) and all(b[n] <= a[n] for n in a)  # nothing comes back, nothing grows
    assert not any('.' in n for n in sizes[-1][1])                # no chain inside a chain
    assert c.done and [h['epoch'] for h in c.history] == [1, 2, 3] == [d['epoch'] for d in learn.recorder.decomposed]
    ids = {id(p) for p in learn.model.parameters()}
    assert ids == {id(p) for l in learn.opt.param_lists for p in l}
    assert learn.validate()[1] > .8

@pytest.mark.parametrize('opt_func', [SGD, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_the_guard_restores_model_and_optimizer(opt_func):
    def run(cbs):
        set_seed(1)
        learn = learner(opt_func=opt_func)
        quiet_fit(learn, 5, cbs)
        return learn
    guarded,dense = run(DecomposeCallback(3, [FC_Decomposer(1), ConvDecomposer('spatial', 1)], max_drop=.01)),run([])
    rec, = guarded.recorder.decomposed
    assert rec['decomposed'] == 0 and rec['metric_before'] - rec['metric_after'] > .01 and rec['params_after'] == count_params(net())
    assert not factored_layers(guarded.model) and not hasattr(guarded.model, 'low_rank_plan')
    for (n,a),b in zip(guarded.model.state_dict().items(), dense.model.state_dict().values()): assert torch.equal(a, b), n

def test_the_guard_lets_pass_what_is_good_enough():
    learn = learner()
    quiet_fit(learn, 4, DecomposeCallback(3, Budget(macs=.8), max_drop=.1))
    assert factored_layers(learn.model) and learn.recorder.decomposed[0]['metric_after'] > 0

def test_calibration_sees_no_augmentation_and_leaves_no_trace():
    Noise.seen = 0
    learn = learner([Noise()])
    learn.dls.train.one_batch()
    assert Noise.seen > 0
    Noise.seen = 0
    state = torch.get_rng_state(),np.random.get_state()[1].copy()
    bs = calibration_batches(learn, 150)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()
    x = torch.cat([b[0] for b in bs])
    assert len(x) == 150 and x.max() <= 1 and type(x) is torch.Tensor and all(len(b) == 1 for b in bs)
    assert all((X[:800] == row).flatten(1).all(1).any() for row in x) # training items
    assert torch.equal(x, torch.cat([b[0] for b in calibration_batches(learn, 150)]))

def test_the_teacher_shapes_the_loss_and_is_freed():
    losses = {}
    for distill in (0., 10.):
        learn,c = learner(),DecomposeCallback(0, Budget(macs=.3), distill=distill, ft_lr=1e-9) # no step to speak of
        class Grad(Callback):
            def after_loss(self, distill=distill):
                if self.training: losses.setdefault(distill, []).append(float(self.loss_grad.detach()) - float(self.loss.detach()))
            order = 80
        quiet_fit(learn, 1, [c, Grad()])
        assert c.teacher is None
    assert max(map(abs, losses[0.])) < 1e-6 < min(losses[10.])

class WeightedLoss(CrossEntropyLossFlat): "A loss of a user's own"

@pytest.mark.parametrize('loss,axis', [(CrossEntropyLossFlat(), -1), (CrossEntropyLossFlat(axis=1), 1), (nn.CrossEntropyLoss(), 1), (nn.NLLLoss(), 1), (F.cross_entropy, 1), (partial(F.cross_entropy, label_smoothing=.1), 1),
    (FocalLossFlat(), -1), (LabelSmoothingCrossEntropy(), 1), (LabelSmoothingCrossEntropyFlat(), -1), (WeightedLoss(), -1), (BCEWithLogitsLossFlat(), None), (MSELossFlat(), None), (nn.MSELoss(), None)])
def test_the_loss_tells_the_kind_of_output(loss, axis):
    learn = learner()
    learn.loss_func = loss
    assert output_kind(learn).axis == axis
    seeded = lambda: torch.Generator().manual_seed(0)
    by_label = isinstance(loss, BCEWithLogitsLossFlat)
    out,want = torch.randn(6, 10, generator=seeded()),classification if axis else multilabel if by_label else regression
    assert output_kind(learn)(out, seeded()) == want(out, seeded())

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_items_are_classified_too(mix):
    "MixUp replaces the learner's loss by its own during training"
    seen = []
    class See(Callback):
        order = 62
        def before_train(self): seen.append((self.loss_func, output_kind(self.learn).axis, metric_value(self.learn)))
    learn = learner()
    learn.metrics = None
    quiet_fit(learn, 1, [mix(), See()])
    assert seen[0][0] is not learn.loss_func and seen[0][1] == -1 and seen[0][2] < 0

@pytest.mark.parametrize('shape,axis', [((6,10,3,3), 1), ((6,4,10), -1), ((6,4,10), 2)])
def test_class_scores_along_any_axis(shape, axis):
    g = torch.Generator().manual_seed(0)
    a,b = torch.randn(2, *shape, generator=g)
    kind = replace(output_kind(learner()), axis=axis)
    assert torch.equal(kind.distance(a, b), classification.distance(a.movedim(axis, 1), b.movedim(axis, 1)))
    assert kind.distance(a, b) != regression.distance(a, b)

def test_distillation_of_a_learner_knows_its_classes():
    "`distill_steps` goes by the divergence of class probabilities, as `decompose` does"
    learn = learner()
    kw = dict(metric='activation', distill_steps=40)                # a metric without random signs; of 40 steps either loss keeps what it learned, by a tenth at least
    want = decompose(learn.model, Budget(macs=.3), X[:50], **kw)
    other = decompose(learn.model, Budget(macs=.3), X[:50], loss=regression, **kw)
    learn.decompose(Budget(macs=.3), X[:50], **kw)
    for (n,a),b in zip(learn.model.state_dict().items(), want.state_dict().values()): assert torch.equal(a, b), n
    assert any(not torch.equal(a, b) for a,b in zip(other.parameters(), want.parameters()))

def test_the_teacher_under_accumulation():
    "Accumulated gradients are those of the batches together, with the teacher's part of the loss as much as without"
    grads = {}
    for acc in (1, 2):
        set_seed(0)
        learn = learner(splitter=lambda m: [list(m.parameters())], opt_func=SGD)
        learn.dls.train.bs,learn.dls.train.shuffle = 400//acc,False
        class Grad(Callback):
            order = 70
            def before_step(self, acc=acc): grads.setdefault(acc, [p.grad.clone() for p in self.model.parameters()])
        class Still(Callback):
            "BatchNorm would make a batch more than its halves"
            order = 70
            def before_train(self): self.model.eval()
        quiet_fit(learn, 1, [DecomposeCallback(0, FC_Decomposer(4), distill=3.), Grad(), Still(), *([GradientAccumulation(400)] if acc > 1 else [])])
    # fastai sums the mean losses of batches, weighted by their items: of two halves twice the gradient of the whole, times 200 items over 400
    for a,b in zip(grads[1], grads[2]): torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)

def test_a_plan_in_the_callback():
    learn = learner()
    plan = make_plan(net().eval(), X[:200], Budget(params=.4))
    quiet_fit(learn, 2, DecomposeCallback(1, plan))
    assert {n: l.rank for n,l in factored_layers(learn.model).items()} == {n: r for n,(_,r) in plan.choices.items()}
    other = copy.deepcopy(plan)
    other.layers['0'].type = 'Linear'
    other.set('0', 'svd', 2)
    learn = learner()
    with pytest.raises(ValueError, match="layer '0' is Conv2d, not Linear"): quiet_fit(learn, 2, DecomposeCallback(1, other))
    assert not factored_layers(learn.model)

def test_a_schedule_may_begin_with_the_default_and_end_with_a_budget_of_its_own_metric():
    learn,c = learner(),DecomposeCallback({0: None, 1: Budget(max_drop=500.)}, data=X[:250], evaluate=lambda m: -count_params(m))
    quiet_fit(learn, 2, c)
    assert [h['epoch'] for h in c.history] == [0, 1] and factored_layers(learn.model)

def test_accuracy_as_a_budget():
    learn = learner()
    quiet_fit(learn, 4, [])
    dense = learn.validate()[1]
    learn.decompose(Budget(max_drop=.02))
    assert learn.validate()[1] >= dense - .02 - 1e-6 and share(learn) < .8
    assert learn.model.low_rank_plan['budget'] == {'max_drop': .02}

def test_the_metric_is_that_of_validate():
    learn = learner()
    assert abs(metric_value(learn) - learn.validate()[1]) < 1e-6
    learn.metrics = []
    assert abs(metric_value(learn) + learn.validate()[0]) < 1e-5 # means of means of float32 losses

def rmse(p, y): return (p.softmax(1) - F.one_hot(y, 10)).square().mean().sqrt()

@pytest.mark.parametrize('metric', [error_rate, rmse, None])
def test_less_of_an_error_is_better(metric):
    "With the error rate as its metric, as in fastai's first lesson, the guard and the budget of accuracy are about its rise"
    learn = learner()
    learn.metrics = metric
    with learn.no_logging():
        quiet_fit(learn, 3, DecomposeCallback(2, [FC_Decomposer(1), ConvDecomposer('spatial', 1)], max_drop=.01))
    rec, = learn.recorder.decomposed
    assert rec['decomposed'] == 0 and rec['metric_after'] > rec['metric_before'] + .01
    dense = metric_value(learn)
    assert abs(dense + learn.validate()[bool(metric)]) < 1e-6 and dense < 0
    learn.decompose(Budget(max_drop=.02), X[:50])
    assert dense - .02 - 1e-6 <= metric_value(learn) and share(learn) < .95

@pytest.mark.parametrize('kw,match', [(dict(at_epoch={}), 'empty schedule'), (dict(at_epoch={-1: None}), '-1 is not an epoch'), (dict(at_epoch={1: FC_Decomposer()}, what=Budget(macs=.5)), 'together with a schedule'),
    (dict(at_epoch=1, max_drop='x'), 'max_drop'), (dict(at_epoch=1, distill=-1), 'distill')])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): DecomposeCallback(**kw)

def test_a_model_with_two_inputs_and_typed_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a,self.b,self.head = nn.Linear(32, 64),nn.Linear(32, 64),nn.Linear(128, 10)
        def forward(self, a, b): return self.head(torch.cat([self.a(a), self.b(b)], 1).relu())
    left,right = (lambda i: TensorImage(X[i].flatten()[:32])),(lambda i: TensorImage(X[i].flatten()[32:]))
    dls = Datasets(range(500), [[left], [right], [Y.__getitem__]], splits=[range(400), range(400, 500)], n_inp=2).dataloaders(bs=50, device='cpu')
    learn = Learner(dls, Two(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    quiet_fit(learn, 2, DecomposeCallback(1, Budget(params=.7)))
    assert factored_layers(learn.model) and count_params(learn.model) <= .7*count_params(Two())

def test_nothing_to_save_is_said_before_anything_changes():
    learn = learner()
    learn.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    learn.model(X[:2])
    with pytest.raises(ValueError, match='macs: 0.1 cannot be reached; the smallest is'): learn.decompose(Budget(macs=.1))
    assert not factored_layers(learn.model)
