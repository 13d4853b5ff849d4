"""One look at every kind of learner: what a budget records of the metric is what `learn.validate` says, and what fastai can do with the dense model it can do with the small one

`python tests/test_every_application.py` prints what is recorded and what `validate` says, and what fastai cannot do, as two tables"""
import re, sys, tempfile, warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest, torch
from torch.utils._pytree import tree_leaves
from fastai.callback.core import Callback
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from applications import made
from helpers import n_factored, n_params, same
from learners_of_every_kind import kinds, scores_and_boxes
from small_data import seed
from fasterai_lr.budget import Budget
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learned import reset_model
from fasterai_lr.learner import *
from fasterai_lr.loop import model_inputs

def learner(name, path):
    "A learner of a kind, always the same"
    if name == 'bert': pytest.importorskip('transformers')
    return made(kinds[name].make, path)

# The metric

def said(learn):
    "What `validate` says of the learner's first metric, or of its loss where it has none"
    return learn.validate()[1 if learn.metrics else 0]

@dataclass
class Seen:
    "What is recorded of the metric before and after a decomposition and at the end, and what `validate` says then"
    metric:str
    recorded:list
    validated:list

class Validates(Callback):
    "Lets another learner validate the model when an epoch's training begins, before or after its decomposition"
    def __init__(self, other, order): self.other,self.order,self.values = other,order,{}
    def before_train(self):
        self.other.model = self.model
        self.values[n_factored(self.model)] = said(self.other)
        reset_model(self.model.train())

def in_a_fit(name, path, with_metrics, fit):
    "Look at a budget in the last epoch of `fit`"
    kind,learn,other = kinds[name],learner(name, path/'one'),learner(name, path/'other')
    if not with_metrics: learn.metrics = other.metrics = []
    before,after = Validates(other, 60),Validates(other, 62)
    c,dense = DecomposeCallback(3, Budget(params=kind.params), ft_lr=1e-2, **kind.kwargs),n_params(learn.model)
    fit(learn, cbs=[c, before, after])
    record, = learn.recorder.decomposed
    n = record['decomposed']
    assert n == n_factored(learn.model) > 0 and n_params(learn.model) == record['params_after'] <= kind.params*dense
    recorded = [record[f'metric_{when}'] for when in ('before', 'after', 'end')]
    return Seen(record['metric'], recorded, [before.values[0], after.values[n], said(learn)])

def one_cycle(learn, cbs=None): learn.fit_one_cycle(4, 1e-2, cbs=cbs)
def fine_tune(learn, cbs): learn.fine_tune(4, 1e-2, freeze_epochs=1, cbs=cbs)

def outside(name, path):
    "Look at a budget after a fit, as far as `decompose` prints it"
    kind,learn = kinds[name],learner(name, path)
    one_cycle(learn)
    before,dense = said(learn),n_params(learn.model)
    with redirect_stdout(StringIO()) as printed:
        learn.logger = print
        learn.decompose(Budget(params=kind.params), **kind.kwargs)
    assert n_factored(learn.model) and n_params(learn.model) <= kind.params*dense
    with learn.no_logging(): after = said(learn)
    metric,*recorded = re.search(r', (\w+) (\S+) -> (\S+)$', printed.getvalue(), re.M).groups()
    return Seen(metric, [float(o) for o in recorded], [float(f'{o:.4f}') for o in (before, after)])

ways = dict(fit_one_cycle=lambda name, path: in_a_fit(name, path, True, one_cycle),
            fine_tune=lambda name, path: in_a_fit(name, path, False, fine_tune), # by the loss
            outside=outside)

@pytest.mark.parametrize('way', [pytest.param(way, marks=[pytest.mark.slow]*(way != 'fit_one_cycle')) for way in ways])
@pytest.mark.parametrize('name', kinds)
def test_what_is_recorded_is_what_validate_says(name, way, tmp_path):
    "To the last digit: that of the number in a fit, that of the line outside"
    seen = ways[way](name, tmp_path)
    assert seen.recorded == seen.validated

# Afterwards

def predictions(learn, kind): return learn.get_preds(dl=learn.dls.valid, reorder=False)
def predict(learn, kind): return learn.predict(kind.item(learn))
def tta(learn, kind): return learn.tta(n=2)

def interpretation(learn, kind):
    interp = Interpretation.from_learner(learn)
    return interp.top_losses(3),interp[[0, 1]]

def export(learn, kind):
    "The outputs of the learner that comes out of the file, and what it predicts"
    learn.export('learner.pkl')
    loaded = load_learner(learn.path/'learner.pkl')
    assert n_factored(loaded.model) == n_factored(learn.model)
    preds = loaded.get_preds(dl=learn.dls.valid, reorder=False)
    if 'predict' in kind.cannot: return preds
    return preds,loaded.predict(kind.item(learn))

uses = dict(predictions=predictions, predict=predict, tta=tta, interpretation=interpretation, export=export)

def numbers(o): return [leaf.as_subclass(torch.Tensor) for leaf in tree_leaves(o) if isinstance(leaf, torch.Tensor)]

def used(learn, kind):
    "{use: all numbers that come out}, for what fastai can do"
    res = {}
    for use,f in uses.items():
        seed() # some of fastai's transforms are random in TTA
        if use not in kind.cannot: res[use] = numbers(f(learn, kind))
    return res

def shapes(results): return {use: [o.shape for o in out] for use,out in results.items()}

@pytest.mark.parametrize('name', kinds)
def test_afterwards(name, tmp_path):
    "All that fastai can do with the dense learner it can do with the decomposed one, and with one that was loaded, in the same way"
    kind,learn = kinds[name],learner(name, tmp_path)
    learn.fit_one_cycle(1, 1e-2)
    for use,error in kind.cannot.items():
        with pytest.raises((AttributeError, TypeError, RuntimeError), match=error): uses[use](learn, kind)
    dense = used(learn, kind)
    learn.decompose(Budget(params=kind.params), **kind.kwargs)
    small = used(learn, kind)
    assert n_factored(learn.model) and shapes(small) == shapes(dense) and not same(small, dense)
    assert all(o.isfinite().all() for out in small.values() for o in out)
    if 'export' in small: assert same(small['export'][:len(small['predictions'])], small['predictions'])
    file,again = learn.save_low_rank('small'),learner(name, tmp_path/'again')
    again.load_low_rank(file)
    assert again.validate() == learn.validate() and same(used(again, kind), small)

# A detector

def scores(found): return torch.cat([o['scores'] for o in found])
def first_scores(found): return found[0].get('scores').sum()

@pytest.mark.parametrize('options, match', [
    (dict(), 'loss: the model returns list'), (dict(loss=scores_and_boxes, distill_steps=3), 'loss: the model returns list'),
    (dict(loss=scores_and_boxes, distill=.5), 'distill: the model returns list'), (dict(loss=first_scores, output=scores), "no attribute 'get'")])
def test_what_cannot_be_read_or_compared_is_said_before_the_first_epoch(options, match, tmp_path):
    learn = learner('detection', tmp_path)
    with pytest.raises((TypeError, AttributeError), match=match): learn.fit(2, 1e-2, cbs=DecomposeCallback(1, Budget(params=.3), **options))
    assert learn.recorder.lrs == [] and n_factored(learn.model) == 0

@pytest.mark.parametrize('options', [dict(loss=scores_and_boxes), dict(output=scores)])
def test_a_function_that_reads_a_detector_is_all_it_takes(options, tmp_path):
    "In a fit, and outside, where nothing warns that the model cannot be run"
    learn = learner('detection', tmp_path)
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, Budget(params=.5), **options))
    assert n_factored(learn.model) and n_params(learn.model) <= .5*n_params(learner('detection', tmp_path).model)
    learn = learner('detection', tmp_path)
    learn.decompose(**options)
    assert learn.model.low_rank_plan['budget'].keys() == {'macs'}

@pytest.mark.parametrize('n', [1, 2, 20])
def test_images_in_lists_are_taken_whole(n, tmp_path):
    "The first axis of an image is that of the colours: nothing is cut off there where fewer items than colours are asked for"
    learn = learner('detection', tmp_path)
    taken = model_inputs(learn, learn.dls.valid, n)
    want = [images for images,_ in learn.dls.valid]
    assert same([images for images, in taken], want[:len(taken)]) and len(taken) == (1 if n < 3 else 3)

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    print('| learner | budget | metric | recorded: before | after | at the end | validate: before | after | at the end |', '|---'*9 + '|', sep='\n')
    for name in sys.argv[1:] or kinds:
        for way,look in ways.items():
            seen = look(name, Path(tempfile.mkdtemp()))
            cells = [f'{o:.4f}' if way == 'outside' else repr(o) for o in seen.recorded], [str(o) for o in seen.validated]
            print('', name, way, seen.metric, *(' | '.join([*c, ''][:3]) for c in cells), '', sep=' | ')
