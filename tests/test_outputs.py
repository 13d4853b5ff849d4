"Models whose output is no tensor: alone, and in a Learner whose callbacks unpack it; and learners with plain loaders"
import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # noqa: F403 - gives a Learner its `fit_one_cycle`
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fasterai_lr.all import Budget, DecomposeCallback, Plan, decompose, make_plan, recompose
from fasterai_lr.layers import factored_layers
from helpers import same
from learners import digit_learner, quiet
from networks import digit_cnn, digits

@dataclass
class Output:
    "Like what a transformer returns: not a dict, not a tuple"
    loss:object
    logits:torch.Tensor

Named = namedtuple('Named', 'logits hidden')
kinds = dict(
    dataclass=lambda y, h: Output(None, y), dict=lambda y, h: {'hidden': h, 'logits': y}, mapping=lambda y, h: OrderedDict(out=y, aux=h),
    tuple=lambda y, h: (y, h), nested=lambda y, h: ((y, h), [h]), named=lambda y, h: Named(y, h), list=lambda y, h: [y, h])

class Wrapped(nn.Module):
    "A network for digits that returns more than its scores"
    def __init__(self, kind):
        super().__init__()
        self.net,self.kind = digit_cnn(),kind
    def forward(self, x):
        h = self.net[:6](x)
        return self.kind(self.net[6:](h), h)

class Unpack(Callback):
    "Leaves the scores of what the model returns"
    def after_pred(self):
        out = self.pred
        while not isinstance(out, torch.Tensor):
            if isinstance(out, dict): out = out.get('logits', out.get('out'))
            else: out = out.logits if hasattr(out, 'logits') else out[0]
        self.learn.pred = out

def sure(model):
    "Make the predictions of `model` differ, so that distillation has something to improve"
    list(model.modules())[-1].weight.data *= 100
    return model

@pytest.mark.parametrize('kind', kinds.values(), ids=kinds)
def test_the_scores_are_found(kind):
    "A model that returns more is decomposed like the one that returns the scores alone, with a plan and without"
    x = digits(300)[0]
    want,got = (decompose(sure(net), Budget(macs=.25), x, distill_steps=30) for net in (digit_cnn(), Wrapped(kind)))
    assert same(want.state_dict(), got.net.state_dict()) and got.low_rank_plan['measured'] == want.low_rank_plan['measured']
    plan = Plan.of(make_plan(Wrapped(kind), x, Budget(macs=.5)).plain())
    assert factored_layers(plan.apply(Wrapped(kind), x))

def test_a_function_finds_them():
    "`output` reads what nothing else can; a plan names it and asks for it again"
    class Deep(Wrapped):
        def __init__(self): super().__init__(lambda y, h: {'hidden': h, 'deep': {'scores': y}})
    def scores(out): return out['deep']['scores']
    x = digits(300)[0]
    want,got = decompose(digit_cnn(), Budget(macs=.5), x),decompose(Deep(), Budget(macs=.5), x, output=scores)
    assert same(want.state_dict(), got.net.state_dict())
    assert got.low_rank_plan['settings']['output'] == {'function': 'scores'}
    plan = Plan.of(got.low_rank_plan)
    with pytest.raises(ValueError, match=r"^output: the plan was made with a function 'scores'.* give it again, as output=…"): plan.apply(Deep(), x)
    assert factored_layers(plan.apply(Deep(), x, output=scores))
    with pytest.raises(TypeError, match='^output: it returns dict; expected a tensor'): decompose(Deep(), Budget(macs=.5), x, output=lambda out: out['deep'])

def learner(kind, *cbs, **kw): return quiet(digit_learner(Wrapped(kind), range(600), range(600, 900), cbs=[Unpack(), *cbs], **kw))

some = 'dataclass','dict','nested'

@pytest.mark.parametrize('kind, distill', [
    *((kinds[k], 1.) for k in some),
    *(pytest.param(kind, 0., marks=[pytest.mark.slow]*(k not in some)) for k,kind in kinds.items())])
def test_in_a_fit(kind, distill):
    "The same fit as that of the model that returns the scores alone, to the last bit"
    wrapped,plain = learner(kind),quiet(digit_learner(digit_cnn(), range(600), range(600, 900)))
    for learn in (wrapped, plain):
        torch.manual_seed(1)
        learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5), distill=distill))
    assert wrapped.recorder.decomposed[0] == plain.recorder.decomposed[0] and wrapped.recorder.values == plain.recorder.values
    assert same(wrapped.model.net.state_dict(), plain.model.state_dict())

def test_whatever_a_learner_offers():
    learn = learner(kinds['dataclass'])
    learn.fit_one_cycle(2, 1e-2)
    dense = copy.deepcopy(learn.model)
    table = learn.tradeoff((.5,))
    assert table.accuracy[0] == learn.validate()[1] and table.loss.notna().all()
    own = learn.tradeoff((.5,), loss=lambda scores: .5*scores.square().sum()) # of what the callback leaves, as in `decompose`
    assert own.accuracy[0] == table.accuracy[0] and len(own) == 2
    learn.plot_spectra(data=digits(100)[0])
    learn.decompose(Budget(max_drop=.03))
    assert factored_layers(learn.model) and learn.validate()[1] >= table.accuracy[0] - .03
    both = learn.compare({'dense': dense, 'decomposed': learn.model})
    assert both.accuracy.tolist() == [table.accuracy[0], learn.validate()[1]]

class Reads(Callback):
    "Unpacks by what it noted of the batch"
    def before_batch(self): self.n = len(self.xb[0])
    def after_pred(self): self.learn.pred = self.pred.logits[:self.n]

def test_what_cannot_be_read_is_an_error_before_the_first_epoch():
    "A callback that fails outside of a batch, or leaves no tensor: nothing is trained, nothing is changed"
    class Text(Callback):
        def after_pred(self): self.learn.pred = str(self.pred)
    class Odd(CrossEntropyLossFlat):
        def __call__(self, pred, y): return torch.zeros((), requires_grad=True) + 0*len(pred)
    learn = quiet(digit_learner(Wrapped(kinds['dict']), range(600), range(600, 900), cbs=[Text()], loss_func=Odd(), metrics=[]))
    before = [p.clone() for p in learn.model.parameters()]
    for distill in (0., 1.):
        with pytest.raises(TypeError, match='output: it returns str; expected a tensor'):
            learn.fit(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5), distill=distill))
        assert learn.recorder.lrs == [] and same(before, list(learn.model.parameters())) and not factored_layers(learn.model)

# --- plain loaders

def plain_learner(path, net=None):
    "A learner with torch's own DataLoaders"
    x,y = digits(900)
    train,valid = (DataLoader(TensorDataset(x[s], y[s]), batch_size=50, shuffle=s.start == 0) for s in (slice(0, 600), slice(600, 900)))
    return quiet(Learner(DataLoaders(train, valid), net or digit_cnn(), loss_func=CrossEntropyLossFlat(), metrics=accuracy), path)

def test_everything_works_with_plain_loaders(tmp_path):
    learn = plain_learner(tmp_path)
    learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.6)))
    record, = learn.recorder.decomposed
    assert record['decomposed'] and {'metric_after', 'macs_after'} <= record.keys()
    dense = recompose(learn.model)
    assert learn.compare({'dense': dense, 'small': learn.model}).accuracy['small'] == learn.validate()[1]
    table = learn.tradeoff((.5,))
    assert table.accuracy.notna().all() and len(table) == 2
    assert learn.plot_tradeoff((.5,)).get_ylabel() == 'accuracy'
    assert 'macs_after' in learn.low_rank_summary() and learn.export_onnx('small') == tmp_path/'small.onnx'
    learn.decompose(Budget(max_drop=.05))
    assert learn.validate()[1] > 0
