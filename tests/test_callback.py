"DecomposeCallback: when it swaps, what stands around it, and the learning rates from then on"
from functools import partial
import copy, gc, json, math, sys, warnings, weakref

import numpy as np, pytest, torch
from torch import nn
from torch.testing import assert_close
from fastai.callback import fp16, hook # `hook` gives learners `summary`
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedNo, combine_scheds
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.learner import load_learner
from fastai.metrics import mae
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.torch_core import trainable_params
from helpers import flat, ids, moved, n_factored, same, snapshot
from learners import Watch, digit_learner, mk_learn, quiet, splitter, stops_at
from networks import linear_net
from fastai.data.core import DataLoaders
from fasterai_lr.progress import Progress
from fasterai_lr.running import n_items
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learned import calibration_batches, decompose_learner, record_line
from fasterai_lr.budget import smallest
from fasterai_lr.decomposer import FC_Decomposer
from fasterai_lr.layers import FactoredLayer
from fasterai_lr.budget import Budget
from fasterai_lr.report import plot_training

n_iter = 4              # batches in an epoch
what = FC_Decomposer(rank=2)
def cb(at_epoch=1, **kw): return DecomposeCallback(at_epoch, what, **kw)
def rates(learn): return [h['lr'] for h in learn.opt.hypers]
def tail(n, lr=1e-3): return [lr*(1 + math.cos(math.pi*k/n))/2 for k in range(n)]
# Python floats go through a handful of operations: a few units in the last place
same_lrs = partial(assert_close, rtol=1e-12, atol=1e-20)

# When

@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr'])
@pytest.mark.parametrize('at_epoch', [0, 1, 2])
def test_swaps_once_at_the_epoch(fit, at_epoch):
    learn,c,w = mk_learn(),cb(at_epoch),Watch()
    args = (2, 1, 1e-2) if fit == 'fit_sgdr' else (3, 1e-2)
    getattr(learn, fit)(*args, cbs=[c, w])
    assert w.trains == w.valids == [3*(e >= at_epoch) for e in range(3)]
    assert c.done and [h['epoch'] for h in c.history] == [at_epoch]
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())

def test_order_of_the_list_does_not_matter():
    for order in (lambda *cbs: cbs, lambda *cbs: cbs[::-1]):
        learn,c,w = mk_learn(),cb(),Watch()
        learn.fit_one_cycle(2, 1e-2, cbs=order(c, w))
        assert w.trains == [0,3]
        same_lrs(learn.recorder.lrs[n_iter:], [min(a,b) for a,b in zip(tail(n_iter), learn.recorder.lrs[n_iter:])])

def test_everything_trains_after_the_swap():
    learn,before = mk_learn(),[]
    class Grab(Callback):
        order = 62
        def before_train(self): before.append(snapshot(self.model))
    learn.fit_one_cycle(2, 1e-2, cbs=[cb(1, ft_lr=1e-3), Grab()])
    assert all(moved(before[1], learn.model)) and len(before[1]) == 3*3 + 4

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=0.9), Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_decomposing_nothing_changes_nothing(opt_func):
    "With all layers left dense (rank 8 makes none smaller) there is a warning, no tail, and the fit is the same to the last bit"
    learn = mk_learn(opt_func)
    learn.fit_one_cycle(3, 1e-2)
    dense,lrs = snapshot(learn.model),learn.recorder.lrs
    learn,c = mk_learn(opt_func),DecomposeCallback(1, FC_Decomposer(rank=8))
    with pytest.warns(UserWarning, match='No layer was decomposed.*low_rank_plan.*low_rank_summary'): learn.fit_one_cycle(3, 1e-2, cbs=c)
    assert n_factored(learn.model) == 0 and not any(moved(dense, learn.model)) and learn.recorder.lrs == lrs
    assert c.done and [h['decomposed'] for h in c.history] == [0]

@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield

@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_fine_tune_at_a_later_epoch(opt_func, no_warnings):
    learn,c,w = mk_learn(opt_func),cb(2),Watch()
    learn.fine_tune(4, 1e-2, freeze_epochs=1, cbs=[c, w])
    assert [h['epoch'] for h in c.history] == [2] and w.trains == [0,0,3,3]
    assert all(p.requires_grad for p in learn.model.parameters())

def test_fine_tune_that_never_gets_there():
    learn,c = mk_learn(),cb(2)
    with pytest.warns(UserWarning, match='at_epoch=2 was not reached .* n_epoch=2,') as rec: learn.fine_tune(2, 1e-2, cbs=c)
    assert sum('at_epoch' in str(r.message) for r in rec) == 1 and not c.done

@pytest.mark.parametrize('freeze_epochs', [0, 1, 2])
def test_fine_tune_of_a_single_group(freeze_epochs, no_warnings):
    "Nothing can be frozen there; the first fit is the first one all the same"
    learn,c,w = mk_learn(splitter=trainable_params),cb(3),Watch()
    for _ in range(2): # the second time there is nothing left to decompose
        learn.fine_tune(4, 1e-2, freeze_epochs=freeze_epochs, cbs=[c, w])
        assert learn.opt.frozen_idx == 0 and [h['epoch'] for h in c.history] == [3]

@pytest.mark.parametrize('freeze_epochs', [0, 1])
def test_fine_tune_of_a_single_group_that_never_gets_there(freeze_epochs):
    learn,c = mk_learn(splitter=trainable_params),cb(2)
    for _ in range(2):
        with pytest.warns(UserWarning, match='at_epoch=2 was not reached .* n_epoch=2,') as rec: learn.fine_tune(2, 1e-2, freeze_epochs=freeze_epochs, cbs=c)
        assert sum('at_epoch' in str(r.message) for r in rec) == 1 and not c.done
    with pytest.warns(UserWarning, match='at_epoch=2 was not reached .* n_epoch=1,'): learn.fit(1, 1e-2, cbs=c)

def test_a_fit_inside_of_fine_tune_is_no_part_of_it():
    "Another learner's fit, in a callback, warns for itself"
    class Aside(Callback):
        def before_train(self):
            with pytest.warns(UserWarning, match='at_epoch=5 was not reached .* n_epoch=1,'): mk_learn().fit(1, 1e-2, cbs=cb(5))
    mk_learn(splitter=trainable_params).fine_tune(1, 1e-2, cbs=Aside())

new_head = 'at_epoch=0 decomposes the model before its head is trained. Use at_epoch=1 or later'

@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('split', [splitter, trainable_params])
def test_fine_tune_at_0_warns_of_a_new_head(opt_func, split, no_warnings):
    "Before anything is decomposed; a trained model is decomposed before the fit, without a warning"
    learn,c = mk_learn(opt_func, split),cb(0)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', new_head)
        with pytest.raises(UserWarning, match=new_head): learn.fine_tune(2, 1e-2, cbs=c)
    assert not c.history and n_factored(learn.model) == 0
    learn = mk_learn(opt_func, split)
    decompose_learner(learn, what)
    learn.fine_tune(1, 1e-2)

def test_a_frozen_fit_at_0_warns_of_a_new_head():
    learn = mk_learn()
    learn.freeze()
    with pytest.warns(UserWarning, match=new_head) as rec: learn.fit(1, 1e-2, cbs=cb(0))
    assert len(rec) == 1

def test_a_fit_at_0_of_all_layers_does_not_warn(no_warnings):
    "Nobody can tell whether they have been trained elsewhere"
    mk_learn().fit(1, 1e-2, cbs=cb(0))

@pytest.mark.parametrize('split', [splitter, trainable_params])
def test_fine_tune_at_0_has_a_tail_in_both_fits(split, no_warnings):
    learn,c,w = mk_learn(splitter=split),cb(0, ft_lr=1e-6),Watch()
    with pytest.warns(UserWarning, match=new_head): learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=[c, w])
    assert len(c.history) == 1 and w.trains == [3,3]
    same_lrs(learn.recorder.lrs[:-1], tail(2*n_iter, 1e-6)[:-1])       # in the last step the schedule is lower
    learn.fit(1, 1e-2, cbs=c)                       # not after a fit without frozen layers
    assert learn.recorder.lrs == [1e-2]*n_iter

@pytest.mark.filterwarnings('ignore:DecomposeCallback. at_epoch=0')
def test_the_tail_after_a_frozen_fit_is_not_that_of_lr_find(tmp_path):
    learn,plain = mk_learn(path=tmp_path, cbs=cb(0)),mk_learn(path=tmp_path)
    learn.freeze()
    learn.fit(1, 1e-2)
    for l in (learn, plain): l.lr_find(num_it=8, show_plot=False)
    assert learn.recorder.lrs == plain.recorder.lrs
    learn.fit(1, 1e-2)
    same_lrs(learn.recorder.lrs, tail(n_iter))

def test_fine_tune_keeps_the_body_frozen_after_the_swap():
    learn,grabbed = mk_learn(),[]
    class Grab(Callback):
        order = 62
        def before_train(self): self.before = snapshot(self.model)
        def after_train(self): grabbed.append(moved(self.before, self.model))
    learn.fine_tune(1, 1e-1, freeze_epochs=2, cbs=[cb(1, ft_lr=1e-2), Grab()])
    # frozen: the body's factors; BatchNorm trains all the same (`train_bn`); then LayerNorm and the head's factors
    assert grabbed[1] == [False]*3 + [True]*2 + [False]*3 + [True]*5
    assert all(grabbed[2])

def test_start_epoch():
    for start,want in [(1, [0,3]), (2, [3])]:
        learn,c,w = mk_learn(),cb(2),Watch()
        learn.fit_one_cycle(3, 1e-2, start_epoch=start, cbs=[c, w])
        assert w.trains == want and c.history[0]['epoch'] == 2 and c.history[0]['step'] == (2-start)*n_iter
    learn,c = mk_learn(),cb(0)
    learn.fit(3, 1e-2, start_epoch=2, cbs=c)        # later than `at_epoch`
    assert c.history[0]['epoch'] == 2
    same_lrs(learn.recorder.lrs, tail(n_iter))

def test_one_instance_swaps_once_and_has_one_tail():
    learn,c = mk_learn(),cb()
    learn.fit(2, 1e-2, cbs=c)
    model = learn.model[0]
    learn.fit(3, 1e-2, cbs=c)
    assert learn.model[0] is model and len(c.history) == 1
    assert learn.recorder.lrs == [1e-2]*3*n_iter    # the clamp of the first fit is gone

def test_a_used_callback_is_quiet_in_the_same_learner_and_warns_in_another(tmp_path):
    learn,c = mk_learn(path=tmp_path),cb()
    learn.fit(2, 1e-2, cbs=c)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1, 1e-2, cbs=c)
        other = mk_learn(path=tmp_path, cbs=c)
        other.validate(), other.get_preds(), other.lr_find(num_it=8, show_plot=False)
    with pytest.warns(UserWarning, match='already decomposed .* make a new callback') as rec: other.fit(2, 1e-2)
    assert len(rec) == 1 and n_factored(other.model) == 0 and other.recorder.lrs == [1e-2]*2*n_iter

def test_persistent_callback_never_swaps_outside_of_training(tmp_path):
    learn = mk_learn(path=tmp_path, cbs=cb(0))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=8, show_plot=False)
        with torch.no_grad(): learn.summary()
    assert n_factored(learn.model) == 0 and not learn.decompose_cb.done
    learn.fit(1, 1e-2)
    assert n_factored(learn.model) == 3
    learn.lr_find(num_it=8, show_plot=False)
    learn.validate(), learn.get_preds()
    before = snapshot(learn.model)
    learn.fit_one_cycle(1, 1e-2)
    assert all(moved(before, learn.model)) and len(learn.decompose_cb.history) == 1

def test_lr_find_finds_the_same_with_and_without(tmp_path):
    lrs = []
    for cbs in (None, cb(0)):
        learn = mk_learn(path=tmp_path, cbs=cbs)
        learn.lr_find(num_it=8, show_plot=False)
        lrs.append(learn.recorder.lrs)
    assert lrs[0] == lrs[1]

def test_interrupted_lr_find_does_not_switch_it_off(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if hasattr(self.learn, 'lr_finder'): raise KeyboardInterrupt
    learn = mk_learn(path=tmp_path, cbs=[cb(0), Stop()])
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=8, show_plot=False)
    learn.fit(1, 1e-2)
    assert n_factored(learn.model) == 3

def test_never_reached_warns():
    learn,c = mk_learn(),cb(2)
    with pytest.warns(UserWarning, match='at_epoch=2 was not reached .* n_epoch=2, ended in epoch 1'): learn.fit(2, 1e-2, cbs=c)
    assert not c.done and n_factored(learn.model) == 0
    class Early(Callback):
        def after_epoch(self): raise CancelFitException()
    with pytest.warns(UserWarning, match='n_epoch=5, ended in epoch 0'): learn.fit(5, 1e-2, cbs=[c, Early()])
    learn.fit(3, 1e-2, cbs=c)
    assert c.done

@pytest.mark.parametrize('kw', [dict(at_epoch=-1), dict(at_epoch=1.), dict(at_epoch=True), dict(at_epoch='2'), dict(at_epoch=None), dict(ft_lr=0), dict(ft_lr=-1e-3),
    dict(ft_lr=math.inf), dict(ft_lr=math.nan), dict(ft_lr='1e-4'), dict(ft_lr=slice(1e-4)), dict(ft_lr=True), dict(tail='linear'), dict(tail=None)])
def test_wrong_arguments(kw):
    with pytest.raises(ValueError, match=f'^{list(kw)[0]}: '): DecomposeCallback(**{'at_epoch': 1, **kw})

def test_wrong_what():
    with pytest.raises(TypeError, match='^what: '): DecomposeCallback(1, 'svd')
    assert DecomposeCallback(np.int64(1), ft_lr=np.float32(.5)).at_epoch == 1

@pytest.mark.parametrize('rank,match', [({'head': 2}, 'head'), ({'99': 2}, '99'), ({'x.*': .5}, 'x'), ({'2': 2}, '2'), ({'0': 99}, '99')])
def test_a_wrong_name_or_rank_is_found_before_the_first_epoch(rank, match, tmp_path):
    c = DecomposeCallback(5, FC_Decomposer(rank=rank))
    learn = mk_learn(path=tmp_path, cbs=c)
    before = snapshot(learn.model)
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=8, show_plot=False)
    with pytest.raises(ValueError, match=match): learn.fit(9, 1e-2)
    assert learn.recorder.lrs == [] and not any(moved(before, learn.model))
    learn.remove_cb(c)
    check_dense_and_trains(learn)

# The tail

def test_cosine_tail_exactly():
    learn = mk_learn()
    learn.fit_one_cycle(3, 1e-2, cbs=cb(1))
    same_lrs(learn.recorder.lrs[n_iter:2*n_iter], tail(2*n_iter)[:n_iter])
    assert learn.recorder.hps['lr'] == learn.recorder.lrs
    dense = mk_learn()
    dense.fit_one_cycle(3, 1e-2)
    # up to the swap the schedule, from there on the lower of the two
    same_lrs(learn.recorder.lrs, [min(a,b) for a,b in zip(dense.recorder.lrs, [math.inf]*n_iter + tail(2*n_iter))])
    assert learn.recorder.hps['mom'] == dense.recorder.hps['mom']

def test_constant_tail_and_plain_fit():
    learn = mk_learn()
    learn.fit(3, 1e-2, cbs=cb(1, tail='constant'))
    same_lrs(learn.recorder.lrs, [1e-2]*n_iter + [1e-3]*2*n_iter)
    learn = mk_learn()
    learn.fit(2, 1e-5, cbs=cb(1, tail='constant'))
    assert learn.recorder.lrs == [1e-5]*2*n_iter    # never above the schedule
    learn = mk_learn()
    learn.fit(2, 1e-2, cbs=cb(0))
    same_lrs(learn.recorder.lrs, tail(2*n_iter))

@pytest.mark.parametrize('tail_name', ['cosine', 'constant'])
@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_discriminative_ratios_stay(tail_name, opt_func):
    learn,w = mk_learn(opt_func),Watch(rates)
    learn.fit_one_cycle(2, slice(1e-4,1e-2), cbs=[cb(1, tail=tail_name), w])
    lrs = np.array(w.seen)
    assert_close(lrs[:,0]/lrs[:,2], np.full(len(lrs), 1e-2), rtol=1e-9, atol=0)
    assert_close(lrs[:,1]/lrs[:,2], np.full(len(lrs), 1e-1), rtol=1e-9, atol=0)
    same_lrs([float(o) for o in lrs[n_iter:,2]], learn.recorder.lrs[n_iter:])
    assert lrs[n_iter,2] <= 1e-3 < lrs[n_iter-1,2]

def test_a_schedule_at_zero_stays_at_zero():
    learn = mk_learn()
    sched = ParamScheduler({'lr': combine_scheds([.5,.5], [SchedNo(1e-2,1e-2), SchedNo(0.,0.)])})
    learn.fit(2, 1e-2, cbs=[sched, cb(1)])
    assert learn.recorder.lrs[n_iter:] == [0.]*n_iter

def test_plateau_lowers_the_schedule_beneath():
    learn = mk_learn()
    learn.fit(4, 1e-2, cbs=[cb(1, tail='constant'), ReduceLROnPlateau(min_delta=10, patience=1, factor=100.)])
    # an unreachable min_delta: after its first epoch, every epoch is one without improvement; the swap starts the count anew
    got = learn.recorder.lrs[::n_iter]
    same_lrs(got, [1e-2, 1e-3, 1e-3, 1e-4])

def test_decay_of_the_fit_survives():
    learn = mk_learn()
    learn.fit(2, 1e-2, wd=0.1, cbs=cb())
    assert [h['wd'] for h in learn.opt.hypers] == [0.1]*3

# What stands around it

def check_dense_and_trains(learn):
    assert n_factored(learn.model) == 0 and not hasattr(learn.model, 'low_rank_plan')
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))

@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('no memory')])
def test_an_interrupt_leaves_a_dense_learner(error):
    learn,c = mk_learn(),DecomposeCallback(1, FC_Decomposer(rank=stops_at(1, error)))
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    with pytest.raises(type(error)): learn.fit(3, 1e-2, cbs=c)
    assert not c.done and before.keys() == dict(learn.model.named_parameters()).keys()
    check_dense_and_trains(learn)
    learn.fit(2, 1e-2, cbs=c)                       # the same callback, again
    assert c.done and n_factored(learn.model) == 3

def test_save_best_from_before_the_swap(tmp_path):
    "A loss that is best at epoch 0: without a new start the dense weights would be loaded into the factored model"
    learn = mk_learn(path=tmp_path)
    values = iter([1., 5., 4., 6.])
    class Fake(Callback):
        order = 55                                  # after the Recorder, before the trackers
        def after_epoch(self): self.recorder.values[-1] = [0., next(values)]
    save = SaveModelCallback(fname='best')
    learn.fit(4, 1e-2, cbs=[cb(1), save, Fake()])
    assert n_factored(learn.model) == 3 and save.best == 4.

def test_save_best_when_the_fit_ends_in_the_epoch_of_the_swap(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1: raise CancelFitException()
    learn = mk_learn(path=tmp_path)
    learn.fit(3, 1e-2, cbs=[cb(1), SaveModelCallback(fname='best'), Stop()])
    assert n_factored(learn.model) == 3

@pytest.mark.parametrize('kw', [dict(every_epoch=True), dict(at_end=True), dict(with_opt=True)])
def test_save_other_ways(tmp_path, kw):
    learn = mk_learn(path=tmp_path)
    learn.fit(2, 1e-2, cbs=[cb(1), SaveModelCallback(fname='m', **kw)])
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))

def test_early_stopping_counts_anew(tmp_path):
    values = iter([1., 2., 3., 4., 5., 6.])
    class Fake(Callback):
        order = 55
        def after_epoch(self): self.recorder.values[-1] = [0., next(values)]
    learn,w = mk_learn(),Watch()
    learn.fit(6, 1e-2, cbs=[cb(2), EarlyStoppingCallback(patience=2), Fake(), w])
    assert w.trains == [0,0,3,3,3]                   # it would have stopped after epoch 2: epoch 2 is the new best, 3 and 4 are worse

def test_gradient_accumulation_starts_anew():
    learn,seen = mk_learn(),[]
    class Grab(Callback):
        order = 62
        def before_train(self):
            seen.append((self.gradient_accumulation.count, [p.grad is None or not p.grad.any() for p in self.model.parameters()]))
    # batches of 16: the third of four makes the 40 items of a step, the gradients of the fourth are left over
    learn.fit(2, 1e-2, cbs=[GradientAccumulation(40), cb(1, ft_lr=1e-2), Grab()])
    count,empty = seen[1]
    assert count == 0 and all(empty)

@pytest.mark.parametrize('others', [[GradientClip], [TerminateOnNaNCallback], [partial(MixUp, .4)], [CSVLogger], [partial(MixedPrecision, amp_mode='bf16')], [BnFreeze]])
def test_works_with(others, tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.fit_one_cycle(2, 1e-2, cbs=[cb(1, ft_lr=1e-3), *[o() for o in others]])
    assert n_factored(learn.model) == 3
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))

def test_csv_log_stays_a_table(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.fit(2, 1e-2, cbs=[cb(1), CSVLogger()])
    lines = (tmp_path/'history.csv').read_text().splitlines()
    assert len(lines) == 3 and len({l.count(',') for l in lines}) == 1

def test_non_native_mixed_precision_is_refused():
    class CPU(NonNativeMixedPrecision):
        "What it does to the optimizer, without its check for a GPU"
        def before_fit(self):
            self.model_pgs,self.master_pgs = fp16.get_master(self.opt)
            self.old_pgs = self.opt.param_lists
            fp16._copy_state(self.learn.opt, self.model_pgs, self.master_pgs)
    learn = mk_learn()
    with pytest.raises(RuntimeError, match='to_fp16'): learn.fit(3, 1e-2, cbs=[cb(2), CPU()])
    check_dense_and_trains(learn)

def test_root_layer():
    learn = mk_learn(model=nn.Linear(8,4), splitter=lambda m: list(m.parameters()))
    learn.fit(2, 1e-2, cbs=cb())
    assert isinstance(learn.model, FactoredLayer) and learn.model.low_rank_plan['layers']['']['status'] == 'factored'
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())

@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_dense_layers_are_freed(opt_func, tmp_path):
    learn = mk_learn(opt_func, path=tmp_path, cbs=cb(1))
    old = [weakref.ref(p) for p in learn.model[0].parameters()] + [weakref.ref(learn.model[0])]
    learn.fit_one_cycle(2, 1e-2)
    gc.collect()
    assert [r() for r in old] == [None]*3

def test_export_and_save_after_the_swap(tmp_path):
    learn = mk_learn(path=tmp_path, cbs=cb(1))
    learn.fit_one_cycle(2, 1e-2)
    x = torch.randn(5,8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): y = learn.model.eval()(x)
    learn.export('e.pkl')
    back = load_learner(tmp_path/'e.pkl')
    with torch.no_grad(): assert torch.equal(back.model.eval()(x), y)
    assert back.decompose_cb.done and back.model.low_rank_plan == learn.model.low_rank_plan
    learn.save('m')
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))
    learn.load('m')
    assert not any(moved(before, learn.model))
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))

@pytest.mark.parametrize('at', range(2*n_iter))
@pytest.mark.parametrize('order', [0, 70])           # before or after the learning rate is lowered
def test_a_cancelled_batch(at, order):
    class Skip(Callback):
        def before_batch(self):
            if self.training and self.train_iter == self.at: self.at += 99; raise CancelBatchException()
    skip = Skip()
    skip.at,skip.order = at,order
    learn,c = mk_learn(),cb(1)
    learn.fit(2, 1e-2, cbs=[c, skip])
    assert skip.at == at+99 and n_factored(learn.model) == 3
    assert [h['lr'] for h in learn.opt.hypers] == [1e-2]*3      # the schedule's own, given back

# What it shows

def test_the_recorder_has_one_fit():
    a,b = DecomposeCallback(0, FC_Decomposer(rank={'0': 2})),DecomposeCallback(1, FC_Decomposer(rank={'3': 2}))
    learn = mk_learn(cbs=[a, b])
    learn.fit(2, 1e-2)
    assert learn.recorder.decomposed == a.history + b.history and [h['epoch'] for h in learn.recorder.decomposed] == [0,1]
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, FC_Decomposer(rank={'6': 2})))
    assert [h['step'] for h in learn.recorder.decomposed] == [n_iter]
    learn.fit(1, 1e-2)
    assert learn.recorder.decomposed == [] and len(a.history) == len(b.history) == 1

def test_a_later_fit_is_not_plotted_with_the_records_of_an_earlier_one():
    marks = lambda learn: [l for l in plot_training(learn.recorder)[0].get_lines() if l.get_label().startswith('decomposed')]
    learn = mk_learn()
    learn.fit(2, 1e-2, cbs=cb(1))
    assert len(marks(learn)) == 1
    learn.fit(1, 1e-2)
    assert not marks(learn)

def test_calibration_without_a_validation_set():
    learn = mk_learn()
    learn.dls = DataLoaders(learn.dls.train)
    assert sum(map(n_items, (b[0] for b in calibration_batches(learn, 20)))) == 20

def test_records_and_plan():
    learn,c = mk_learn(),cb(1)
    n = sum(p.numel() for p in learn.model.parameters())
    learn.fit(2, 1e-2, cbs=c)
    m = sum(p.numel() for p in learn.model.parameters())
    one, = c.history
    assert one is learn.recorder.decomposed[0] and len(learn.recorder.decomposed) == 1
    losses = [v[1] for v in learn.recorder.values]
    # 8*12 + 12*10 + 10*4, and with two more or less columns each
    assert one == dict(epoch=1, step=n_iter, decomposed=3, layers=3, params_before=n, params_after=m, macs_before=256, macs_after=2*(8+12+12+10+10+4),
                       metric='loss', metric_before=losses[0], metric_after=one['metric_after'], metric_end=losses[1])
    assert one['metric_after'] not in losses and math.isfinite(one['metric_after'])
    json.dumps([c.history, learn.model.low_rank_plan])
    assert not hasattr(learn, 'decompose_cb')

def test_the_line_in_the_log(capsys):
    learn = mk_learn()
    learn.logger = print
    learn.fit(2, 1e-2, cbs=cb(1))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith('[0,') and out[3].startswith('[1,')
    one, = learn.recorder.decomposed
    b,a,e = [f"{one[f'metric_{k}']:.4f}" for k in ('before', 'after', 'end')]
    assert out[1:3] == [f'epoch 1: decomposed 3 of 3 layers, loss {b} -> {a}', '    326 -> 182 parameters (0.56x), 256 -> 112 MACs (0.44x)']
    assert out[4:] == [f'loss: {b} before the decomposition, {a} after it, {e} at the end']
    learn = mk_learn()
    with learn.no_logging(): learn.fit(2, 1e-2, cbs=cb(1))
    assert capsys.readouterr().out == ''

def test_the_lines_of_several_decompositions(capsys):
    "The last one has the first value, the one after the last decomposition, and that at the end; what is undone counts for neither"
    learn = mk_learn()
    learn.logger = print
    learn.fit(4, 1e-2, cbs=DecomposeCallback({1: FC_Decomposer(rank=3), 2: what}))
    one,two = learn.recorder.decomposed
    b,a,e = [f'{o:.4f}' for o in (one['metric_before'], two['metric_after'], two['metric_end'])]
    assert capsys.readouterr().out.splitlines()[-1] == f'loss: {b} before the first decomposition, {a} after the last, {e} at the end'
    learn = mk_learn()
    learn.logger = print
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, FC_Decomposer(rank=1), max_drop=0))
    one, = learn.recorder.decomposed
    b,a = [f"{one[f'metric_{k}']:.4f}" for k in ('before', 'after')]
    assert capsys.readouterr().out.splitlines()[1:3] == ['epoch 1: decomposed and undone', f'    loss {b} -> {a} is worse by more than max_drop=0']

def test_the_lines_of_large_models_fit_into_a_terminal():
    "At most 88 columns up to a billion parameters, also where the epoch and the number of layers have three digits"
    record = dict(decomposed=123, layers=456, metric='top_k_accuracy', metric_before=.98, metric_after=.97)
    for params,macs in [(999_499_999, 999_499_999_999), (1_000_000_000, 123_456_789_012), (999_999, 999_999)]:
        lines = record_line(record | dict(params_before=params, params_after=params - 1, macs_before=macs, macs_after=macs - 1)).splitlines()
        assert len(lines) == 2 and len('epoch 123: ' + lines[0]) <= 88 and len(lines[1]) <= 88

def test_with_fastai_bars(capsys, monkeypatch):
    monkeypatch.setattr(Progress, 'patience', -1.) # a bar at once
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    learn = mk_learn()
    learn.logger = print
    learn.add_cb(ProgressCallback())
    class Bars(Callback):
        order = 62
        def before_train(self): assert self.progress.mbar.child is self.progress.pbar
    learn.fit(2, 1e-2, cbs=[cb(1), Bars()])
    out = capsys.readouterr().out
    assert '| decomposing layer 1 of 3, 0:00 so far' in out # the layers' bar, with its label
    line = next(l for l in out.splitlines() if 'decomposed' in l)
    assert line.split('\r')[-1].startswith('epoch 1: decomposed 3 of 3')    # on a line of its own, the bar cleared away
    assert '100.00% [4/4' in out.split('decomposed')[1]                     # the epoch's bar went on
    assert 'decomposing' not in out.split('decomposed')[1]

def test_the_line_does_not_stand_behind_the_bar_of_the_fit(capsys):
    "A quick decomposition opens no bar of its own, which would have cleared the line; in a file the record has a line to itself"
    learn = mk_learn()
    learn.logger = print
    learn.add_cb(ProgressCallback())
    learn.fit(2, 1e-2, cbs=cb(1))
    line, = [l for l in capsys.readouterr().out.split('\n') if 'decomposed' in l]
    assert line.startswith('epoch 1: decomposed 3 of 3')

def test_values_of_the_record():
    "Of the validation before the swap where the fit has had one, measured where not; as `validate` would have had them"
    seen = []
    class Aside(Callback):
        def __init__(self, order): self.order = order
        def before_train(self):
            other = mk_learn(model=copy.deepcopy(self.model), metrics=mae)
            seen.append(other.validate())
    for at in (0, 1):
        seen.clear()
        learn,c = mk_learn(metrics=mae),cb(at)
        learn.fit(2, 1e-2, cbs=[Aside(59), c, Aside(63)])
        one, = c.history
        assert one['metric'] == 'mae' and one['metric_end'] == learn.recorder.values[-1][2]
        # means of float32 batches; `validate` does the same
        assert_close([one['metric_before'],one['metric_after']], [float(o[1]) for o in seen[2*at:2*at+2]], rtol=1e-6, atol=0)

class Odd(Callback):
    "Gives the model something that its loader does not have, but only in a fit: to fastai it is a callback that watches"
    remove_on_fetch = True
    def before_batch(self): self.learn.xb = (self.xb[0], 1.)

class Scaled(nn.Sequential):
    "Cannot be run by itself: only `Odd` has a scale for it"
    def forward(self, x, scale): return super().forward(x*scale)

def test_the_record_leaves_no_trace():
    "The same weights and statistics to the last bit, whether it measures or not"
    class Measured(Scaled):
        def forward(self, x, scale=1.): return super().forward(x, scale)
    res = []
    for kind in (Measured, Scaled):
        learn = mk_learn(model=kind(*linear_net()))
        learn.fit_one_cycle(3, 1e-2, cbs=[Odd(), cb(0)])
        res.append(learn.model.state_dict())
        assert ('macs_after' in learn.recorder.decomposed[0]) == ('metric' in learn.recorder.decomposed[0]) == (kind is Measured)
    assert same(*res)

@pytest.mark.parametrize('wish', [None, Budget(macs=.5), what])
def test_the_look_before_the_first_epoch_leaves_no_trace(wish):
    "Dropout draws the same random numbers with the callback as without: those of a fit are the same up to the decomposition"
    def losses(*cbs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(.5), nn.Linear(32, 10))
        learn = quiet(digit_learner(model, range(200), range(200, 300)))
        learn.fit(2, 1e-2, cbs=cbs)
        return learn.recorder.losses[:4]
    assert losses(DecomposeCallback(1, wish)) == losses()

def test_what_cannot_be_measured_is_left_out(capsys):
    learn = mk_learn(model=Scaled(*linear_net()))
    learn.logger = print
    learn.fit(1, 1e-2, cbs=[Odd(), cb(0)])
    one, = learn.recorder.decomposed
    assert one.keys() == {'epoch', 'step', 'decomposed', 'layers', 'params_before', 'params_after'} and n_factored(learn.model) == 3
    assert capsys.readouterr().out.splitlines()[:2] == ['epoch 0: decomposed 3 of 3 layers', '    326 -> 182 parameters (0.56x)']
    learn = mk_learn(model=Scaled(*linear_net()))
    with pytest.warns(UserWarning, match='cannot run outside the fit, .* by their weights alone .ValueError: data: the model cannot'): learn.fit(1, 1e-2, cbs=[Odd(), DecomposeCallback(0)])
    assert n_factored(learn.model) == 3 and not learn.model.low_rank_plan['budget']
    learn = mk_learn(model=Scaled(*linear_net()))
    with pytest.raises(ValueError, match='(?s)data: the model cannot be called with inputs .*scale'): learn.fit(3, 1e-2, cbs=[Odd(), DecomposeCallback(2, Budget(macs=.9))])        # before the first epoch
    assert learn.recorder.lrs == [] and n_factored(learn.model) == 0

def test_what_a_callback_gives_the_model_is_given_on_the_side_too():
    "With a callback that has a say in what a batch is, the same model is run, measured and fitted like any other"
    class Scale(Odd): remove_on_fetch = False
    learn,plain = mk_learn(model=Scaled(*linear_net())),mk_learn()
    for l,cbs in ((learn, [Scale()]), (plain, [])): l.fit(2, 1e-2, cbs=[*cbs, DecomposeCallback(1, Budget(macs=.9))])
    assert same(learn.model.state_dict(), plain.model.state_dict()) and learn.recorder.decomposed[0] == plain.recorder.decomposed[0]

def test_half_of_what_can_be_saved_by_default():
    learn = mk_learn()
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1))
    least = smallest(linear_net(), torch.zeros(1, 8))
    assert learn.model.low_rank_plan['budget'] == {'macs': math.ceil((1+least)/2*1e3)/1e3} and n_factored(learn.model)

# Outside of a fit

def test_decompose_learner():
    learn = mk_learn()
    rec = decompose_learner(learn, what)
    assert learn.opt is None and n_factored(learn.model) == 3 and rec['decomposed'] == 3
    learn.fit(1, 1e-2)
    learn = mk_learn()
    learn.fit(1, 1e-2)
    decompose_learner(learn)
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model)) and ids(flat(learn.opt)) == ids(learn.model.parameters())

def test_decompose_learner_warns_where_nothing_is_left_to_do():
    learn = mk_learn()
    decompose_learner(learn, what)
    with pytest.warns(UserWarning, match='No layer was decomposed'): rec = decompose_learner(learn, what)
    assert rec['decomposed'] == 0 and rec['params_before'] == rec['params_after'] and n_factored(learn.model) == 3
