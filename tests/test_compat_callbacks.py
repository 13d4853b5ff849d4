"DecomposeCallback beside fastai's own callbacks, in both orders of the list, on handwritten digits"
from functools import partial
import copy, math

import pytest, torch
from torch import nn
from torch.testing import assert_close
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.callback.core import Callback, CancelBackwardException, CancelStepException
from fastai.imports import noop
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import Adam, OptimWrapper
import fastai.callback.schedule
from helpers import flat, ids, moved, n_factored, snapshot
from learners import Watch, digit_learner, opt_funcs, quiet, stops_at, mk_learn as mk_plain
from networks import digit_net, digits
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer
from fasterai_lr.learner import *

n_iter = 4                                      # batches in an epoch
x,y = digits(200)
what = [FC_Decomposer(rank=4), ConvDecomposer('spatial', rank=3)]
def cb(at_epoch=1, ft_lr=1e-2, **kw): return DecomposeCallback(at_epoch, what, ft_lr=ft_lr, **kw)

def split(m): return [list(m[:3].parameters()), list(m[3:6].parameters()), list(m[6:].parameters())]

def mk_learn(path=None, progress=False, opt_func=Adam, **kw):
    learn = digit_learner(digit_net(), range(128), range(128, 200), bs=32, opt_func=opt_func, splitter=split, path=path, **kw)
    learn.logger = noop
    return learn if progress else quiet(learn)

def check(learn, n=3):
    "The layers are factored, the optimizer has the parameters of the model in their groups, and they all move in one more epoch"
    assert n_factored(learn.model) == n and all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert [ids(g) for g in learn.opt.param_lists] == [ids(g) for g in split(learn.model)]
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))

def both_orders(f): return pytest.mark.parametrize('order', [1, -1], ids=['before', 'after'])(f)

def fit(order, others, n=3, c=None, w=None, fit='fit_one_cycle', **kw):
    "A fit with the callback before or after `others`"
    learn,c,w = mk_learn(**kw),c or cb(),w or Watch()
    getattr(learn, fit)(n, 1e-2, cbs=[*[c, *others][::order], w])
    assert c.done
    return learn,w

# One callback each

def weights(path): return torch.load(path, weights_only=True)

@both_orders
def test_save_best(order, tmp_path):
    learn,w = fit(order, [SaveModelCallback(monitor='accuracy', fname='best')], path=tmp_path)
    saved = weights(tmp_path/'models/best.pth')
    assert w.trains == [0,3,3] and saved.keys() == learn.model.state_dict().keys() and '7.1.weight' in saved
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, saved[k])
    # the file is that of the best epoch since the swap
    best = max(v[2] for v in learn.recorder.values[1:])
    assert learn.validate()[1] == best
    check(learn)

@both_orders
def test_save_every_epoch(order, tmp_path):
    learn,w = fit(order, [SaveModelCallback(every_epoch=True, fname='m')], path=tmp_path)
    keys = [weights(tmp_path/f'models/m_{e}.pth').keys() for e in range(3)]
    assert keys[0] == digit_net().state_dict().keys() and keys[1] == keys[2] == learn.model.state_dict().keys() != keys[0]
    learn.load('m_1', with_opt=False)
    check(learn)

@both_orders
def test_early_stopping(order):
    # no value is ever better by 10, so an epoch counts as better only where counting starts: in the first, and in that of the swap
    learn,w = fit(order, [EarlyStoppingCallback(min_delta=10, patience=2)], n=8, c=cb(2))
    assert w.trains == [0,0,3,3,3] and len(learn.recorder.values) == 5
    check(learn)

@both_orders
def test_early_stopping_before_the_swap(order):
    learn,c = mk_learn(),cb(2)
    with pytest.warns(UserWarning, match='at_epoch=2 was not reached .* ended in epoch 1'):
        learn.fit(5, 1e-2, cbs=[c, EarlyStoppingCallback(min_delta=10, patience=1)][::order])
    assert not c.done
    check(learn, 0)

@both_orders
def test_plateau(order):
    learn,w = fit(order, [ReduceLROnPlateau(min_delta=10, patience=1, factor=1e3)], n=4, c=cb(ft_lr=1e-3, tail='constant'), fit='fit')
    # epoch 0 is the best; 1 again, after the swap; 2 is not: the schedule falls to 1e-5, below the tail
    assert_close(learn.recorder.lrs[::n_iter], [1e-2, 1e-3, 1e-3, 1e-5], rtol=1e-9, atol=0)
    check(learn)

@both_orders
def test_accumulation(order):
    learn,w = fit(order, [GradientAccumulation(64)])
    assert w.steps == 3*n_iter/2 and w.trains == [0,3,3]
    check(learn)

@both_orders
def test_accumulation_across_the_swap(order):
    "Three batches make a step: after the first epoch a batch is left over, and is dropped at the swap"
    learn,w = fit(order, [GradientAccumulation(96)], n=2)
    assert w.steps == 2
    check(learn)

def norm(learn): return nn.utils.get_total_norm([p.grad for p in learn.model.parameters()])

@both_orders
def test_clip(order):
    learn,w = fit(order, [GradientClip(1e-2)], w=Watch(norm))
    # clipped to the norm, less 1e-6 in the denominator; float32 sums
    assert_close(torch.stack(w.seen), torch.full((3*n_iter,), 1e-2), rtol=1e-3, atol=0)
    check(learn)

class CPUAutocast(MixedPrecision):
    "fastai's autocast is CUDA's alone; this is the CPU's"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

class Dtypes(Callback):
    "Of what the last layer gives, before MixedPrecision (order 10) makes it float again"
    order = 5
    def before_fit(self): self.seen = []
    def after_pred(self): self.seen.append(self.pred.dtype)

@both_orders
@pytest.mark.parametrize('half,dtype', [(MixedPrecision, torch.float32), (CPUAutocast, torch.bfloat16)])     # without a GPU fastai's own does nothing
def test_bf16_on_the_cpu(order, half, dtype):
    d,c = Dtypes(),DecomposeCallback(1, [FC_Decomposer(rank=1., force=True), ConvDecomposer('spatial', rank=3)], ft_lr=1e-2)
    learn,w = fit(order, [half('bf16'), d], c=c, w=Watch(lambda l: {p.dtype for p in l.model.parameters()}))
    assert set(d.seen) == {dtype} and all(s == {torch.float32} for s in w.seen) and w.trains == [0,3,3]
    # of full rank: float32 leaves 1e-6, bfloat16 with its 8 bits would leave 4e-3
    assert learn.model.low_rank_plan['layers']['7']['error'] < 1e-5
    check(learn)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='fp16 needs a GPU')
@both_orders
def test_fp16_on_a_gpu(order):
    learn,c,w = mk_learn(),cb(),Watch(lambda l: {p.dtype for p in l.model.parameters()})
    learn.dls.cuda(), learn.model.cuda()
    d = Dtypes()
    learn.fit_one_cycle(3, 1e-2, cbs=[*[c, MixedPrecision()][::order], d, w])
    assert set(d.seen) == {torch.float16} and all(s == {torch.float32} for s in w.seen) and w.trains == [0,3,3]
    assert {p.device.type for p in learn.model.parameters()} == {'cuda'}
    check(learn)

@both_orders
def test_channels_last(order):
    learn,w = fit(order, [ChannelsLast()])
    convs = [m for m in learn.model.modules() if type(m) is nn.Conv2d]
    assert len(convs) == 3 and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    assert any(not m.weight.is_contiguous() for m in convs)
    check(learn)

@both_orders
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_items(order, mix):
    learn,w = fit(order, [mix(.4)])
    assert w.trains == [0,3,3] and isinstance(learn.loss_func, CrossEntropyLossFlat)
    check(learn)

@both_orders
def test_label_smoothing(order):
    learn,w = fit(order, [], loss_func=LabelSmoothingCrossEntropyFlat(eps=.2))
    assert w.trains == [0,3,3] and learn.recorder.values[-1][1] > .2*math.log(10)/2          # a smoothed loss has a floor
    check(learn)

@both_orders
def test_csv_logger(order, tmp_path):
    learn,w = fit(order, [CSVLogger()], path=tmp_path)
    rows = [r.split(',') for r in (tmp_path/'history.csv').read_text().splitlines()]
    assert rows[0] == ['epoch','train_loss','valid_loss','accuracy','time'] and [r[0] for r in rows[1:]] == ['0','1','2'] and {len(r) for r in rows} == {5}
    assert_close([float(r[2]) for r in rows[1:]], [v[1] for v in learn.recorder.values], rtol=1e-6, atol=0)
    check(learn)

@both_orders
def test_graph_and_bars(order, monkeypatch, capsys):
    from fastprogress.fastprogress import ConsoleMasterBar
    drawn = []
    monkeypatch.setattr(ConsoleMasterBar, 'update_graph', lambda self, graphs, *args: drawn.append(([len(g[0]) for g in graphs], self.child)))
    learn,c = mk_learn(progress=True),cb()
    learn.logger = print
    learn.fit(3, 1e-2, cbs=[c, ShowGraphCallback()][::order])
    assert [d for d,_ in drawn] == [[n_iter*(e+1), e+1] for e in range(3)]
    assert 'epoch 1: decomposed 3 of 4 layers' in capsys.readouterr().out and n_factored(learn.model) == 3

@both_orders
@pytest.mark.parametrize('epoch', [0, 1])
def test_nan_ends_the_fit(order, epoch):
    "Before the swap: a dense learner and a warning. After it: a factored one"
    class Spoil(Callback):
        def after_loss(self):
            if self.training and self.epoch == epoch and self.iter == 2: self.learn.loss = self.learn.loss_grad = self.learn.loss_grad*math.nan
        def before_backward(self):
            if torch.isnan(self.loss): raise CancelBackwardException
        def before_step(self):
            if torch.isnan(self.loss): raise CancelStepException
    learn,c = mk_learn(),cb()
    cbs = [c, TerminateOnNaNCallback()][::order]
    if epoch: learn.fit(3, 1e-2, cbs=[*cbs, Spoil()])
    else:
        with pytest.warns(UserWarning, match='was not reached'): learn.fit(3, 1e-2, cbs=[*cbs, Spoil()])
    assert len(learn.recorder.lrs) == epoch*n_iter + 2 and c.done == bool(epoch)
    check(learn, 3*epoch)

@both_orders
def test_activation_stats(order):
    "Layers that carry hooks stay dense, and the plan says why"
    learn,c = mk_learn(),cb()
    with pytest.warns(UserWarning, match='No layer was decomposed'): learn.fit(2, 1e-2, cbs=[c, ActivationStats()][::order])
    assert {l['reason'] for l in learn.model.low_rank_plan['layers'].values()} == {'it carries hooks'} and c.done
    check(learn, 0)

@both_orders
def test_all_at_once(order, tmp_path):
    others = [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=9), ReduceLROnPlateau(patience=9), GradientAccumulation(64), GradientClip(1.), MixedPrecision('bf16'),
              ChannelsLast(), MixUp(.4), CSVLogger(), TerminateOnNaNCallback()]
    learn,w = fit(order, others, path=tmp_path, loss_func=LabelSmoothingCrossEntropyFlat())
    assert w.trains == [0,3,3] and w.steps == 3*n_iter/2
    check(learn)

@both_orders
def test_they_belong_to_the_learner(order, tmp_path):
    "Given to the Learner, not to the fit"
    c = cb()
    learn = mk_learn(path=tmp_path, cbs=[c, SaveModelCallback(fname='best'), GradientClip(1.), CSVLogger()][::order])
    learn.fit_one_cycle(3, 1e-2)
    learn.validate(), learn.get_preds()
    assert c.done and [h['epoch'] for h in c.history] == [1]
    learn.remove_cbs([SaveModelCallback, CSVLogger])
    check(learn)

# Ways to fit

def test_it_learns():
    "What all this is for: the digits are recognised before the swap, and again at the end"
    learn,w = fit(1, [], n=12, c=cb(6), fit='fit')
    before,end = learn.recorder.values[5][2],learn.recorder.values[-1][2]
    assert before > .8 and end > before - .1 and w.trains == [0]*6 + [3]*6

@pytest.mark.parametrize('name', opt_funcs)
def test_every_optimizer_in_a_fit(name):
    "fastai's and torch's: the factors' groups, and what is kept for each parameter, are as a new optimizer would have them"
    learn = mk_plain(opt_funcs[name])
    learn.fit(3, 1e-2, cbs=DecomposeCallback(1, FC_Decomposer(rank=2), ft_lr=1e-2))        # `fit_one_cycle` wants one with momentum
    assert n_factored(learn.model) == 3 and ids(flat(learn.opt)) == ids(learn.model.parameters())
    inner = learn.opt.opt if isinstance(learn.opt, OptimWrapper) else learn.opt
    assert {id(p) for p in inner.state} <= set(ids(learn.model.parameters()))
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model))

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_reset_opt(opt_func):
    learn,c,w = mk_learn(opt_func=opt_func),cb(),Watch()
    learn.fit(1, 1e-2)
    old = learn.opt
    learn.fit_one_cycle(2, 1e-2, cbs=[c, w], reset_opt=True)
    assert learn.opt is not old and w.trains == [0,3]
    learn.fit(1, 1e-2, reset_opt=True)
    check(learn)

def test_lr_find_before_and_after(tmp_path):
    learn,c = mk_learn(path=tmp_path),cb()
    for found in (0, 3):
        state = copy.deepcopy(learn.model.state_dict())
        learn.lr_find(num_it=6, show_plot=False)
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, state[k])
        assert n_factored(learn.model) == found
        learn.fit_one_cycle(2, 1e-2, cbs=c)
    check(learn)

@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr', 'fine_tune'])
def test_discriminative_learning_rates(fit):
    learn,w = mk_learn(),Watch(lambda l: [h['lr'] for h in l.opt.hypers])
    args = (2, 1) if fit == 'fit_sgdr' else (3,)
    # `fine_tune` and `fit` make slices in their own ways; all have three groups, the last with the highest rate
    lr = 1e-2 if fit == 'fine_tune' else slice(1e-4, 1e-2)
    getattr(learn, fit)(*args, lr, cbs=[cb(1, ft_lr=1e-3), w])
    lrs = torch.tensor(w.seen, dtype=torch.float64)
    ratio = lrs[:,0]/lrs[:,2]
    # the ratio of the groups is that of the schedule before the swap and after it
    assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
    assert ratio[0] < .1 and len(lrs) == 3*n_iter and w.trains == [0,3,3]
    assert (lrs[n_iter:,2] <= 1e-3*(1+1e-9)).all() and (lrs[n_iter-1,2] > 1e-3 or fit == 'fine_tune')
    check(learn)

@pytest.mark.parametrize('n', [1, 2])
def test_frozen_groups(n):
    "Gradual unfreezing: the swap happens while the first groups are frozen"
    learn,w = mk_learn(),Watch()
    learn.freeze_to(n)
    learn.fit_one_cycle(2, 1e-2, cbs=[cb(), w])
    groups = split(learn.model)
    assert learn.opt.frozen_idx == n and w.trains == [0,3]
    norm = {id(p) for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    for i,g in enumerate(groups): assert [p.requires_grad for p in g] == [i >= n or id(p) in norm for p in g]
    frozen = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert moved(frozen, learn.model) == [p.requires_grad for g in groups for p in g]
    learn.unfreeze()
    check(learn)

def test_freeze_after_the_swap():
    learn,_ = fit(1, [])
    learn.freeze()
    for p in learn.model.parameters(): p.grad = None        # fastai's optimizers go on stepping by momentum while there are zeros
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    still = [n for m,(n,p) in zip(moved(before, learn.model), learn.model.named_parameters()) if not m]
    assert still == ['0.weight', '0.bias', '3.0.weight', '3.1.weight', '3.1.bias']          # BatchNorm trains though frozen
    learn.unfreeze()
    check(learn)

@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle'])
def test_start_epoch(fit):
    learn,w = mk_learn(),Watch()
    getattr(learn, fit)(4, 1e-2, start_epoch=2, cbs=[cb(1), w])
    assert w.trains == [3,3]
    check(learn)

# What cannot work

def refused(cbs, match, **kw):
    learn,c = mk_learn(**kw),cb(3)
    with pytest.raises((RuntimeError, TypeError), match=match): learn.fit(5, 1e-2, cbs=[c, *cbs])
    assert learn.recorder.lrs == [] and not c.done
    return learn

class Average(Callback):
    "A moving average of the weights, kept beside each parameter"
    def before_fit(self): self.pairs = [(p, p.detach().clone()) for p in self.model.parameters()]
    def after_step(self):
        for p,q in self.pairs: q.lerp_(p.detach(), .1)

class Spy(Callback):
    "Holds a layer by name"
    def before_fit(self): self.layers = {'head': self.model[-1]}

@pytest.mark.parametrize('other,match', [(Average, 'Average holds .*`pairs`'), (Spy, 'Spy holds .*`layers`'), (partial(ActivationStats, every=3), 'ActivationStats holds .*`modules`')])
def test_callbacks_that_hold_old_parameters_are_refused(other, match):
    check(refused([other()], match), 0)

def test_other_references_are_fine():
    "Other weights, the model itself, names, layers that nothing replaces"
    class Holds(Callback):
        def before_fit(self): self.others,self.whole,self.names,self.norm = [w+1 for w in snapshot(self.model)],[self.model],['0'],self.model[1]
    learn,w = fit(1, [Holds()])
    assert w.trains == [0,3,3]
    check(learn)

def test_a_torch_optimizer_that_is_not_wrapped_is_refused():
    class Bare(torch.optim.SGD):
        "With the few methods that a fit without a schedule calls"
        frozen_idx,hypers = 0,[]
        def set_hypers(self, **kw): pass
    refused([], 'OptimWrapper', opt_func=lambda groups, lr: Bare([p for g in groups for p in g], lr=lr))

def test_a_torch_optimizer_around_another_is_refused():
    class Outer(torch.optim.Optimizer):
        "As `ZeroRedundancyOptimizer` and its like: the inner one has lists of its own"
        def __init__(self, params, lr=1e-3):
            super().__init__(params, dict(lr=lr))
            self.optim = torch.optim.SGD([p for g in self.param_groups for p in g['params']], lr=lr)
        def step(self): self.optim.step()
    refused([], 'Outer wraps another optimizer', opt_func=partial(OptimWrapper, opt=Outer))

@pytest.mark.parametrize('at', [0, 1, 3])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), MemoryError('layer')])
def test_an_interrupt_at_any_layer_leaves_a_dense_learner(at, error, tmp_path):
    "After the interrupt, training goes on with the state that the optimizer had, and the same callback decomposes in the next fit"
    rank = stops_at(at, error)
    learn,c = mk_learn(path=tmp_path),DecomposeCallback(1, [FC_Decomposer(rank), ConvDecomposer('spatial', rank)], ft_lr=1e-2)
    with pytest.raises(type(error)): learn.fit_one_cycle(3, 1e-2, cbs=[c, SaveModelCallback(fname='best'), GradientAccumulation(64)])
    assert learn.model.state_dict().keys() == digit_net().state_dict().keys() and not hasattr(learn.model, 'low_rank_plan') and not c.done
    assert [learn.opt.state[p]['step'] for p in learn.model.parameters()] == [2]*len(list(learn.model.parameters()))
    assert not c in learn.cbs
    check(learn, 0)
    learn.fit(2, 1e-2, cbs=c)
    check(learn, 4)
