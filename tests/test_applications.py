"fastai's applications: each trains through the callback on small data, decomposes what it can, and says by name why the rest stays dense"
import math, re

import pytest, torch
from torch.testing import assert_close
from fastai.vision.all import resnet18, resnet34, unet_learner
from applications import apps, dense_apps, depthwise, made, vision, what
from helpers import ids, moved, snapshot
from small_data import mask_dls
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learned import calibration_batches
from fasterai_lr.budget import smallest
from fasterai_lr.cost import count_params
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer
from fasterai_lr.layers import factored_layers
from fasterai_lr.learner import *
from fasterai_lr.budget import Budget

# parameters that the models never use
unused = {'0.model.head.norm.weight', '0.model.head.norm.bias', 'bn_cont.weight', 'bn_cont.bias'}

def groups(learn):
    "What the learner's own splitter makes of the model: groups of ids"
    res = learn.splitter(learn.model)
    return [ids(g) for g in res] if isinstance(res[0], (list,tuple)) or hasattr(res[0], 'map') else [ids(res)]

def check_plan(learn, n, dense):
    "`n` layers are factored, the others are those in `dense`, with their reasons; the table says so too"
    layers = learn.model.low_rank_plan['layers']
    left = {k: l['reason'] for k,l in layers.items() if l['status'] == 'dense'}
    assert len(factored_layers(learn.model)) == len(layers) - len(left) == n
    assert all(any(re.fullmatch(p, k) and left[k] == r for p,r in dense.items()) for k in left), left
    assert all(any(re.fullmatch(p, k) for k in left) for p in dense), left
    table = learn.low_rank_summary()
    assert {k: r for k,r in table.reason.items() if k in left} == left and (table.status == 'factored').sum() == n
    return table

def check_trains(learn):
    "The optimizer has what the splitter gives, every parameter that is used moves, and validation and predictions work"
    assert [ids(g) for g in learn.opt.param_lists] == groups(learn)
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    still = {k for m,(k,_) in zip(moved(before, learn.model), learn.model.named_parameters()) if not m}
    assert still <= unused and all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert all(math.isfinite(v) for v in learn.validate())

@pytest.mark.parametrize('name', apps)
def test_application(name, tmp_path):
    make,n,dense = apps[name]
    learn,c = made(make, tmp_path),DecomposeCallback(1, what, ft_lr=1e-2)
    with learn.no_bar(): learn.fit_one_cycle(2, 1e-2, cbs=c)
    assert [h['epoch'] for h in learn.recorder.decomposed] == [1] and len(learn.recorder.values) == 2
    table = check_plan(learn, n, dense)
    assert table.macs_after['total'] < table.macs_before['total'] and table.params_after['total'] < table.params_before['total']
    with learn.no_bar():
        check_trains(learn)
        preds,_ = learn.get_preds(reorder=False) # fastai cannot bring the texts of a language model into order
    assert torch.isfinite(preds).all() and len(preds) > 0

@pytest.mark.parametrize('name', dense_apps)
def test_application_without_a_layer_to_decompose(name, tmp_path):
    make,dense = dense_apps[name]
    learn = made(make, tmp_path)
    before = learn.model.state_dict().keys()
    with learn.no_bar(), pytest.warns(UserWarning, match='No layer was decomposed'): learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1))
    assert learn.model.state_dict().keys() == before
    with learn.no_bar():
        check_plan(learn, 0, dense)
        check_trains(learn)

@pytest.mark.filterwarnings('ignore:distill') # three steps are few
@pytest.mark.parametrize('name', apps)
def test_application_with_a_budget(name, tmp_path):
    "Each keeps to a budget halfway between the dense model and the smallest that it can be, with the dense one as its teacher before and after, and trains on"
    learn = made(apps[name][0], tmp_path)
    n,least = count_params(learn.model),smallest(learn.model, calibration_batches(learn, 2)[0], 'params')
    c = DecomposeCallback(1, Budget(params=(1+least)/2), ft_lr=1e-2, distill=.5, distill_steps=3)
    with learn.no_bar(): learn.fit_one_cycle(2, 1e-2, cbs=c)
    rec, = c.history
    assert 0 < rec['decomposed'] == len(factored_layers(learn.model)) and count_params(learn.model) == rec['params_after'] <= (1+least)/2*n
    assert rec['macs_after'] <= rec['macs_before'] and math.isfinite(rec['metric_after']) and rec['metric_end'] == learn.recorder.values[-1][-1]
    table = learn.low_rank_summary()
    assert all(r for r,s in zip(table.reason, table.status) if s == 'dense')            # whatever stays dense has a reason
    with learn.no_bar(): check_trains(learn)

@pytest.mark.parametrize('name', ['convnext', 'tabular', 'collab_nn', 'text_classifier', 'untied_lm', 'transformer', 'tied_transformer'])
def test_application_by_default(name, tmp_path):
    "Without a word on how far, half of what can be saved of the MACs goes: no error where half of them all cannot"
    learn = made(apps[name][0], tmp_path)
    least = smallest(learn.model, calibration_batches(learn, 2)[0])
    with learn.no_bar(): learn.fit_one_cycle(2, 1e-2, cbs=DecomposeCallback(1, ft_lr=1e-2))
    rec, = learn.recorder.decomposed
    # the budget is rounded up to a thousandth; what it leaves unused is less than the next rank of the largest layer
    assert rec['decomposed'] and (1+least)/2 - .15 < rec['macs_after']/rec['macs_before'] <= (1+least)/2 + 1e-3
    with learn.no_bar(): check_trains(learn)

@pytest.mark.parametrize('name', [*apps, *dense_apps])
def test_application_that_cannot_be_so_small(name, tmp_path):
    "Said before the first epoch, with what can be reached; nothing has changed"
    learn = made((apps|dense_apps)[name][0], tmp_path)
    least = smallest(learn.model, calibration_batches(learn, 2)[0], 'params')
    for budget in (Budget(params=.99*least), Budget(macs=.001)):
        before = snapshot(learn.model)
        with learn.no_bar(), pytest.raises(ValueError, match=rf'{budget.kind}: {budget.value} cannot be reached; the smallest is'): learn.fit(3, 1e-2, cbs=DecomposeCallback(2, budget))
        assert learn.recorder.lrs == [] and not any(moved(before, learn.model)) and not factored_layers(learn.model)
    if name in ('tabular', 'transformer'):                                              # what is named can be had
        learn.decompose(Budget(params=math.ceil(least*1e4)/1e4))
        assert factored_layers(learn.model)

def outputs(learn):
    learn.model.eval()
    if hasattr(learn.model, 'reset'): learn.model.reset()
    b = learn.dls.valid.one_batch()
    with torch.no_grad(): out = learn.model(*b[:getattr(learn.dls, 'n_inp', 1)])
    return (out[0] if isinstance(out, tuple) else out).as_subclass(torch.Tensor)

@pytest.mark.parametrize('name', apps)
def test_factors_of_full_rank_change_no_output(name, tmp_path):
    "Whatever the model does with its layers (skip connections, hooks of the U-Net, attention), the factors stand in for them"
    learn = made(apps[name][0], tmp_path)
    with learn.no_bar(): learn.fit(1, 1e-3)
    want = outputs(learn)
    learn.decompose([FC_Decomposer(rank=1., force=True), ConvDecomposer('spatial', rank=1., force=True)])
    assert len(factored_layers(learn.model)) >= apps[name][1]
    # float32 rounding through some ten layers, relative to the largest output
    assert_close(outputs(learn), want, rtol=0, atol=1e-4*want.abs().max().item())

def test_fine_tune_of_a_pretrained_body(tmp_path):
    "As a pretrained model is trained: frozen at first; the swap comes in the second fit, in all groups"
    learn,c = made(apps['xresnet'][0], tmp_path),DecomposeCallback(1, what, ft_lr=1e-2)
    learn.freeze()
    with learn.no_bar():
        learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=c)
        assert [h['epoch'] for h in c.history] == [1]
        check_plan(learn, 17, {})
        check_trains(learn)

@pytest.mark.slow
@pytest.mark.parametrize('name,make,n', [
    ('unet_resnet34', lambda path: unet_learner(mask_dls(path, size=64), resnet34, pretrained=False), None),
    ('convnext_atto', vision('convnext_atto'), None),
    ('vit_tiny', vision('vit_tiny_patch16_224', img_size=32, patch_size=8), None),
    ('resnet18_fine_tune', vision(resnet18), 22)])
def test_full_size(name, make, n, tmp_path):
    learn,c = made(make, tmp_path),DecomposeCallback(1, what, ft_lr=1e-3)
    with learn.no_bar():
        learn.fine_tune(2, 1e-3, freeze_epochs=1, cbs=c)
        layers = learn.model.low_rank_plan['layers']
        assert len(factored_layers(learn.model)) == (n or sum(l['status'] == 'factored' for l in layers.values())) > 20
        assert {l['reason'] for l in layers.values() if l['status'] == 'dense'} <= {depthwise}
        check_trains(learn)
