"""Writes the files in this folder, with the package as it was in commit 278c2c6 and no other:

    git worktree add ../at_278c2c6 278c2c6
    PYTHONPATH=../at_278c2c6 python tests/written_by_278c2c6/write.py

What is in the repository was written with torch 2.14.1, fastai 2.8.12 and Python 3.11. It is not to be
written again: the files stand for those that users have.
"""
import subprocess, sys
from pathlib import Path

import numpy as np, torch

import fasterai_lr
from fasterai_lr.all import *
from fasterai_lr.calibrate import regression
from models import *

package = Path(fasterai_lr.__file__).parent
if subprocess.run(['git', 'diff', '--quiet', '278c2c6', '--', package], cwd=package).returncode:
    sys.exit(f"{package} is not that of commit 278c2c6; the first lines of this script say how to run it")
torch.set_num_threads(1)
torch.manual_seed(0)
results = {}

def save(name, model, xs, **kwargs):
    "A checkpoint, its plan and its outputs"
    save_low_rank(model, folder/name, **kwargs)
    Plan.of(model.low_rank_plan).save(folder/f'{name}.json')
    results[name] = outputs(model, xs)

# Decomposers

wishes = {s: {f'{s}*': 2} for s in schemes} | dict(tucker={'tucker2*': (3, 2), 'tucker*': (2, 1)})
by_scheme = [ConvDecomposer(s, w, force=True) for s,w in wishes.items()]
save('kinds', decompose(kinds(), [FC_Decomposer(2), *by_scheme]), kinds_inputs)

fc = FC_Decomposer({'share': .5, 'energy': Energy(.9), 'evbmf': EVBMF(), 'noise': EVBMF(), 'small': 2, 'odd': 2,
                    'normed': 2, 'tied': 2, 'hooked': 2, 'attention*': 2})
conv = ConvDecomposer('tucker', {'ints': (3, 2), 'fractions': (.5, .25), 'evbmf_conv': EVBMF(2), '*wise': 3})
save('ranks', decompose(ranks(), [fc, conv]), ranks_inputs)
save('dtypes', decompose(dtypes(), [FC_Decomposer(3), ConvDecomposer('svd', 3)]), dtypes_inputs)

# A part of a model by itself, a model twice, one with data, one in a training loop

model = net()
model[0] = ConvDecomposer('spatial', 3).decompose(model[0])
save('nested', decompose(model, FC_Decomposer({'2': 4})), net_inputs)
save('twice', ConvDecomposer('cp', {'0.3': 3}).decompose(FC_Decomposer(.25).decompose(net())), net_inputs)
save('fitted', decompose(net(), Budget(macs=.6), net_data(), loss=regression), net_inputs)

model = FC_Decomposer(2).decompose(mlp())
opt = torch.optim.SGD(model.parameters(), **sgd)
step(model, opt)
save('plain_loop', model, mlp_inputs, opt=opt.state_dict())
step(model, opt)
results['plain_loop trained'] = outputs(model, mlp_inputs)

# Plans for budgets, and one that was edited

def likeness(model):
    want,got = (outputs(m, net_inputs) for m in (net(), model))
    return 1 - np.linalg.norm(got - want)/np.linalg.norm(want)

def plan_for(budget, make=net, batches=net_data, **kwargs):
    plan = make_plan(make(), batches(), budget, loss=regression, **kwargs)
    assert plan.choices
    return plan

plans = dict(params=plan_for(Budget(params=.5)), latency=plan_for(Budget(latency=.5), large, large_data),
             macs=plan_for(Budget(macs=.5), schemes=('svd', 'spatial', 'tucker', 'cp')),
             max_drop=plan_for(Budget(max_drop=.1), evaluate=likeness),
             edited=plan_for(Budget(macs=.5)).set('0.0', 'spatial', 2).set('0.3', 'tucker', (3, 4)).set('2').set('4', 'svd', 2))
for kind,plan in plans.items():
    plan.save(folder/f'plan_{kind}.json')
    make,xs = (large, large_inputs) if kind == 'latency' else (net, net_inputs)
    results[f'plan_{kind}'] = outputs(plan.apply(make()), xs)

# Learners: what they say, and what they say after another epoch

def fitted(opt_func, rank):
    "A Learner whose own callback has decomposed it"
    learn = mk_learn(folder, opt_func).add_cb(DecomposeCallback(1, FC_Decomposer(rank), ft_lr=1e-2))
    learn.fit(3, 1e-2)
    return learn

for opt,opt_func in optimizers().items():
    name,learn = f'learner_{opt}',fitted(opt_func, {'1': 2, '3': 3})
    learn.save_low_rank(name)
    if opt == 'adam': learn.save_low_rank('learner_without_opt', with_opt=False)
    Plan.of(learn.model.low_rank_plan).save(folder/f'{name}.json')
    results[name] = outputs(learn.model, mlp_inputs)
    learn.fit(1, 1e-2)
    results[f'{name} trained'] = outputs(learn.model, mlp_inputs)

learn = fitted(optimizers()['adam'], {'1': 2, '3': Energy(.9)})
Plan.of(learn.model.low_rank_plan).save(folder/'exported.json')
results['exported'] = outputs(learn.model, mlp_inputs)
learn.path = Path() # it is in the pickle
learn.export(folder/'exported.pkl')

np.savez_compressed(folder/'outputs.npz', **results)
