"""Plans, checkpoints and exported learners that commit 278c2c6 wrote load and compute what they did then

`written_by_278c2c6/write.py` has made the files, of the models in `models.py` beside it.
"""
import json
from functools import lru_cache
from importlib import import_module

import numpy as np, pytest, torch
from fastai.learner import load_learner
from numpy.testing import assert_allclose
from written_by_278c2c6 import models
from written_by_278c2c6.models import folder, mk_learn, mlp, mlp_inputs, optimizers, outputs
from fasterai_lr.cost import count_params
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose
from fasterai_lr.export import load_low_rank, read_low_rank, save_low_rank
from fasterai_lr.layers import factored_layers, recompose
from fasterai_lr.learner import *
from fasterai_lr.plan import Plan

torch.set_num_threads(1)

@lru_cache
def outputs_then():
    with np.load(folder/'outputs.npz', allow_pickle=False) as z: return dict(z)

def same_outputs(model, xs, name, tol=1e-12):
    "In float64 weights that are the same to the bit give the same outputs, but for the order of sums: 1e-15"
    want = outputs_then()[name]
    assert_allclose(outputs(model, xs), want, rtol=0, atol=tol*abs(want).max())

def kept(old, new):
    "Does `new` have all that `old` has, whatever else it has?"
    if isinstance(old, dict): return isinstance(new, dict) and all(k in new and kept(v, new[k]) for k,v in old.items())
    return old == new

def assert_plan_is_kept(model, name, again=()): # `again`: what of a record may be computed again
    "All that the file of the plan says is in `low_rank_plan`, in the old order"
    old,new = json.loads((folder/f'{name}.json').read_text()),model.low_rank_plan
    assert list(new['layers']) == list(old['layers']) and {'budget', 'predicted', 'measured'} <= old.keys()
    for n,r in old['layers'].items():
        assert len(r) == 9 and r.keys() <= new['layers'][n].keys()
        assert kept({k:v for k,v in r.items() if k not in again}, new['layers'][n]), n
    for k in old.keys() - {'layers'}: assert kept(old[k], new[k]), k

dense = dict(kinds=models.kinds, ranks=models.ranks, dtypes=models.dtypes, nested=models.net, twice=models.net,
             fitted=models.net, plain_loop=mlp, learner_adam=mlp, learner_sgd=mlp, learner_adamw=mlp)

def inputs(make): return getattr(models, f'{make.__name__}_inputs')

# Checkpoints

def test_the_files_hold_every_scheme():
    assert {s for n in dense for s,_ in Plan.load(folder/f'{n}.json').choices.values()} == {'svd', 'spatial', 'tucker', 'cp', 'slice'}

@pytest.mark.parametrize('name', dense)
def test_a_checkpoint(name):
    given = dense[name]()
    model = load_low_rank(given, folder/name)
    same_outputs(model, inputs(dense[name]), name)
    assert_plan_is_kept(model, name)
    assert factored_layers(model).keys() == Plan.load(folder/f'{name}.json').choices.keys() and not factored_layers(given)

@pytest.mark.parametrize('name', ['nested', 'twice', 'fitted'])
def test_a_checkpoint_into_a_model_that_is_decomposed_otherwise(name):
    other = decompose(dense[name](), [FC_Decomposer(2), ConvDecomposer('tucker', .5)])
    same_outputs(load_low_rank(other, folder/name), inputs(dense[name]), name)

@pytest.mark.parametrize('name', dense)
def test_a_plan_and_a_state_dict(name):
    "What `torch.load` reads, put into the plan's skeleton by hand"
    saved = torch.load(folder/f'{name}.pth', weights_only=True)
    plan = Plan.load(folder/f'{name}.json')
    assert saved['format'] == 'fasterai_lr' and Plan.of(saved['plan']) == plan
    model = plan.skeleton(dense[name]())
    model.load_state_dict(saved['model'])
    same_outputs(model, inputs(dense[name]), name)
    assert_plan_is_kept(model, name)

def test_layers_keep_their_dtypes():
    found = factored_layers(load_low_rank(models.dtypes(), folder/'dtypes'))
    want = dict(single=torch.float32, wide=torch.float64, short=torch.bfloat16, wide_conv=torch.float64, short_conv=torch.bfloat16)
    assert {n: {p.dtype for p in l.parameters()} for n,l in found.items()} == {n: {t} for n,t in want.items()}

# Plans carried out again, each weight by itself

# What SVDs leave of a weight is unique. It is rounded to float32, which is 5e-7 of it, or its factors to bfloat16, 4e-3.
# HOOI, which ends where a sweep gains less than a part of 1e-4, ends 1e-4 from where more sweeps lead.
near = dict(svd=1e-5, spatial=1e-5, slice=1e-5, tucker=2e-3)

def distance(a, b): return float((a.double() - b.double()).norm()/b.double().norm())

@pytest.mark.parametrize('name', ['kinds', 'ranks', 'dtypes', 'nested', 'twice'])
def test_a_plan_makes_the_same_factors_again(name):
    given,was = dense[name](),load_low_rank(dense[name](), folder/name)
    model = Plan.load(folder/f'{name}.json').apply(given)
    assert factored_layers(model).keys() == factored_layers(was).keys()
    assert_plan_is_kept(model, name, ['error'])
    with torch.no_grad():
        for n,l in factored_layers(model).items():
            old,w = was.get_submodule(n).weight,given.get_submodule(n).weight
            # a CP may come to another end; it is no further from the dense weight, but for what last sweeps gain
            if l.scheme == 'cp': assert distance(l.weight, w) <= 1.001*distance(old, w), n
            else: assert distance(l.weight, old) <= (2e-2 if w.dtype == torch.bfloat16 else near[l.scheme]), n

# `edited` has a Tucker, as above. `macs` has a CP: two of the same kernel, both 2 % from it, may be 4 % from each other.
plans = dict(params=1e-5, macs=5e-2, latency=1e-5, max_drop=1e-5, edited=2e-3)

@pytest.mark.parametrize('kind', plans)
def test_a_plan_of_a_budget_makes_the_same_model_again(kind):
    name,plan,make = f'plan_{kind}',Plan.load(folder/f'plan_{kind}.json'),models.large if kind == 'latency' else models.net
    model = plan.apply(make())
    same_outputs(model, inputs(make), name, plans[kind])
    # `Plan.set` left `full_rank` and `params_after` as they were
    assert_plan_is_kept(model, name, ['error', 'full_rank', 'params_after'] if kind == 'edited' else ['error'])
    for n,l in factored_layers(model).items(): assert model.low_rank_plan['layers'][n]['params_after'] == count_params(l)
    assert plan.budget.keys() == {'macs' if kind == 'edited' else kind}
    assert plan.skeleton(make()).state_dict().keys() == model.state_dict().keys()

# Training goes on

def trained(model, name):
    "A step in float32 ends 2e-8 from here on another machine; without the state of the optimizer 1e-1 from here"
    same_outputs(model, mlp_inputs, f'{name} trained', 1e-5)

def test_a_plain_training_loop_goes_on():
    for with_opt in (True, False):
        model = load_low_rank(mlp(), folder/'plain_loop').eval()
        opt = torch.optim.SGD(model.parameters(), **models.sgd)
        if with_opt: opt.load_state_dict(read_low_rank(folder/'plain_loop')['opt'])
        models.step(model, opt)
        if with_opt: trained(model, 'plain_loop')
    with pytest.raises(AssertionError): trained(model, 'plain_loop')

def fresh(learn): pass
def fitted(learn): learn.fit(1, 1e-2)
def otherwise(learn):
    learn.fit(1, 1e-2)
    learn.decompose(FC_Decomposer(4))

@pytest.mark.parametrize('start', [fresh, fitted, otherwise])
@pytest.mark.parametrize('opt', optimizers())
def test_a_learner_goes_on(opt, start, tmp_path):
    name = f'learner_{opt}'
    for with_opt in (True, False):
        learn = mk_learn(tmp_path, optimizers()[opt])
        start(learn)
        learn.load_low_rank(folder/name, with_opt=with_opt)
        same_outputs(learn.model, mlp_inputs, name)
        assert_plan_is_kept(learn.model, name)
        learn.fit(1, 1e-2)
        if with_opt: trained(learn.model, name)
    with pytest.raises(AssertionError): trained(learn.model, name)

def test_a_learner_without_its_optimizer(tmp_path):
    learn = mk_learn(tmp_path, optimizers()['adam'])
    with pytest.warns(UserWarning, match='holds no optimizer state'): learn.load_low_rank(folder/'learner_without_opt')
    same_outputs(learn.model, mlp_inputs, 'learner_adam')

# A pickle

@pytest.mark.filterwarnings('ignore:load_learner. uses Python:UserWarning')
def test_an_exported_learner(tmp_path):
    """It loads and predicts

    `learn.export` pickles: the file names classes by their modules and holds their attributes. So `FactoredLayer`, `Geometry`,
    `DecomposeCallback`, `FC_Decomposer`, `Energy` and, in the recorder, `callback._Records` stay where they are, and do without
    attributes that they did not have. Most names are fastai's own: a fastai that does not load what its version 2.8.12 has
    exported fails here, and no change of ours can mend that.
    """
    learn = load_learner(folder/'exported.pkl')
    rec, = learn.recorder.decomposed
    assert (rec['epoch'], rec['decomposed'], learn.decompose_cb.done) == (1, 2, True)
    same_outputs(learn.model, mlp_inputs, 'exported')
    preds,_ = learn.get_preds(dl=learn.dls.test_dl([(x, x) for x in mlp_inputs[0]]))
    assert_allclose(preds, outputs_then()['exported'], rtol=0, atol=1e-5)      # float32
    same_outputs(recompose(learn.model), mlp_inputs, 'exported', 1e-5)         # products are rounded to float32
    same_outputs(load_low_rank(mlp(), save_low_rank(learn.model, tmp_path/'m')), mlp_inputs, 'exported')
    learn.model.low_rank_plan |= dict(budget=None, predicted={}, measured={})  # not there without a budget
    assert_plan_is_kept(learn.model, 'exported')

# --- names

where_they_were = dict(
    layers=['run_model', 'evaluating', 'devices_of'], calibrate=['classification', 'regression', 'Batches', 'Inputs', 'n_items', 'Moments', 'Metric', 'make_metric'],
    fit=['distill', 'flip_and_crop', 'mix', 'flip_crop_and_mix', 'trace', 'loss_increase'], plan=['Budget', 'Plan', 'make_plan', 'Planner', 'Option', 'choose', 'layer_types'],
    decomposer=['smallest', 'half_saved', 'decompose', 'project_'], callback=['calibration_batches', 'decompose_learner', 'measure_metric', 'metric_value', 'output_kind', 'DecomposeCallback'])

@pytest.mark.parametrize('module, name', [(m, n) for m,ns in where_they_were.items() for n in ns])
def test_names_are_found_where_they_were(module, name):
    assert getattr(import_module(f'fasterai_lr.{module}'), name) is not None

@pytest.mark.parametrize('module, name, instead', [('calibrate', 'OwnLoss', r'Classification\(axis=…\)'), ('fit', 'output_loss', '`distance` of a Loss'), ('plan', 'chain_macs', '`macs` of a Scheme'),
                                                   ('decomposer', 'changed_modules', '`modules` of the Change'), ('distributed', 'shared_moments', 'shared_calibration')])
def test_names_that_are_gone_say_what_to_take_instead(module, name, instead):
    with pytest.raises(ImportError, match=f'fasterai_lr.{module}.{name} was removed; use .*{instead}'): exec(f'from fasterai_lr.{module} import {name}')
    with pytest.raises(AttributeError, match='has no attribute'): _ = import_module(f'fasterai_lr.{module}').no_such_name
