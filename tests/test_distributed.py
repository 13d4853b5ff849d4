"A fit in two processes, launched as users launch it: what `ddp_script.py` has seen in both"
import os, socket, subprocess, sys
from pathlib import Path

import pytest, torch
from torch import nn
from torch.testing import assert_close
from fastai.distributed import ParallelTrainer
import ddp_script
from helpers import flat, ids, moved, n_factored, snapshot
from learners import mk_learn
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learner import *

here,scripts = Path(__file__).resolve().parent,Path(sys.executable).parent
launchers = dict(accelerate=['accelerate', 'launch', '--multi_gpu', '--num_machines=1', '--num_processes=2', '--mixed_precision=no', '--dynamo_backend=no', '--main_process_port'],
                 bf16=['accelerate', 'launch', '--multi_gpu', '--num_machines=1', '--num_processes=2', '--mixed_precision=bf16', '--dynamo_backend=no', '--main_process_port'],
                 torchrun=['torchrun', '--nnodes=1', '--nproc-per-node=2', '--master-port'])
pytestmark = pytest.mark.slow # torch starts twice, and everything is fitted in two processes

fast = ['ctx', 'equal', 'budget', 'moments', 'guard', 'frozen', 'diverged', 'before', 'saved', 'plain', 'root', 'error', 'wrong_name', 'refused', 'fsdp', 'skeleton', 'sharded']

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])

def launch(launcher, folder, names):
    "What each process returned: {name: [of the first, of the second]}"
    name,*args = launchers[launcher]
    env = os.environ | dict(PYTHONPATH=f'{here.parent}', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', GLOO_SOCKET_IFNAME='lo', PYTHONWARNINGS='ignore')
    res = subprocess.run([scripts/name, *args, free_port(), here/'ddp_script.py', folder, *names], env=env, cwd=folder, timeout=300, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert res.returncode == 0, res.stdout[-4000:]
    return {n: [torch.load(folder/f'{n}_{r}.pt', weights_only=False) for r in (0,1)] for n in names}

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return launch('accelerate', tmp_path_factory.mktemp('ddp'), fast)

def identical(a, b):
    "Equal to the last bit"
    a,b = [list(o.values()) if isinstance(o, dict) else o for o in (a,b)]
    return len(a) == len(b) > 0 and all(torch.equal(p, q) and p.stride() == q.stride() for p,q in zip(a, b))

def check_both(a, b):
    "Models and gradients are equal, the optimizers have the parameters of the models, and the plan is everywhere"
    assert identical(a['state'], b['state'])
    assert len(a['grads']) > 0 and all(identical(p, q) for p,q in zip(a['grads'], b['grads'], strict=True))
    assert all(g.any() for step in a['grads'] for g in step)
    assert a['plan'] == b['plan'] and a['history'] == b['history'] and a['bound'] and b['bound']

@pytest.mark.parametrize('name,trains', [('ctx', [0,3,3]), ('equal', [0,3,3]), ('root', [0,1]), ('error', [0,3])])
def test_both_processes_have_the_same_model(runs, name, trains):
    a,b = runs[name]
    check_both(a, b)
    assert a['trains'] == b['trains'] == trains and [h['epoch'] for h in a['history']] == [1]
    assert {l['status'] for l in a['plan']['layers'].values()} == {'factored'}

def test_the_wrapper_comes_off_and_lets_the_dense_layers_go(runs):
    for o in runs['ctx']: assert o['type'] == 'Sequential' and o['freed']

def test_equals_one_process_with_the_whole_batch(runs):
    a,one = runs['equal'][0],ddp_script.one_process()
    assert a['trains'] == one['trains'] and a['history'][0]['decomposed'] == one['history'][0]['decomposed'] == 3
    # float32, means of two halves: at most 1e-7 apart in a gradient, which Adam's first steps after the swap divide by its size; weights are around 0.3, steps 1e-2
    for k,v in one['state'].items(): assert_close(a['state'][k], v, rtol=0, atol=2e-5)
    assert_close(a['losses'], one['losses'], rtol=1e-5, atol=0)

def test_a_budget_is_calibrated_on_the_items_of_all(runs):
    "All draw the same items of the whole training set and gather the moments of a part of them each; what comes of it is what one process would have come to"
    a,b = runs['budget']
    check_both(a, b)
    one = ddp_script.budget_in_one_process()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))          # those of `mk_learn`
    assert torch.equal(a['drawn'], b['drawn']) and a['drawn'].shape == one['drawn'].shape == (128, 8)   # all 64, at each of two steps
    rows = lambda *ts: sorted(map(tuple, torch.cat(ts).tolist()))
    assert rows(a['drawn'][:64]) == rows(a['drawn'][64:]) == rows(one['drawn'][:64]) == rows(x)
    for step in (slice(0, 32), slice(32, 64)): assert rows(a['shares'][step], b['shares'][step]) == rows(x)
    assert len(a['shares']) == len(b['shares']) == 64 and one['shares'] is None
    assert [(h['epoch'], h['params_after'], h['macs_after']) for h in a['history']] == [(h['epoch'], h['params_after'], h['macs_after']) for h in one['history']]
    assert {n: l['rank'] for n,l in a['plan']['layers'].items()} == {n: l['rank'] for n,l in one['plan']['layers'].items()}
    # factors may have either sign, their products are compared; float32 training as in the test above, and a solve with sums in another order
    outs = [torch.nn.functional.linear(x, o['state'].get('0.1.weight', torch.eye(1))@o['state']['0.0.weight']) for o in (a, one)]
    assert_close(*outs, rtol=0, atol=1e-3)
    assert_close(a['losses'], one['losses'], rtol=1e-3, atol=0)

def test_moments_are_those_of_all_items(runs):
    a,b = runs['moments']
    for name,(shared,one) in a['res'].items():
        other = b['res'][name][0]
        assert list(shared) == list(other) and set(shared) == set(one) and len(one) > 0
        for n,m in shared.items():
            assert m.positions == one[n].positions
            for k,t in vars(m).items():
                want = getattr(one[n], k)
                assert (t is None) == (want is None), k
                if k == 'positions' or t is None: continue
                assert torch.equal(t, getattr(other[n], k))
                assert_close(t, want, rtol=1e-5, atol=1e-6)         # sums in float64 of products in float32 of batches in another order
    assert {len(shared) for shared,_ in a['res'].values()} == {1, 2, 3}
    assert a['res']['wide'][0][''].grads.dim() == 2 and a['undisturbed'] and b['undisturbed']

def test_what_fails_in_one_process_fails_in_all(runs):
    a,b = runs['moments']
    own,others = 'ValueError: data: batch 0 holds NaN','RuntimeError: in process {}: ValueError: data: batch 0 holds NaN'
    assert [e.startswith(w) for e,w in zip(a['errors'], (own, others.format(1)), strict=True)] == [True]*2
    assert [e.startswith(w) for e,w in zip(b['errors'], (others.format(0), own), strict=True)] == [True]*2

def test_a_guard_and_a_budget_of_accuracy(runs):
    a,b = runs['guard']
    check_both(a, b)
    for o in (a, b):
        assert o['dense'] == (0, False)
        rec, = o['guard']
        assert rec['decomposed'] == 0 and rec['metric'] == 'mae' and rec['metric_after'] > rec['metric_before'] + 1e-4
        rec, = o['history']
        assert rec['decomposed'] > 0 and o['trains'] == [0, rec['decomposed']]
    assert a['guard'] == b['guard']

def test_fine_tune_and_the_callbacks_that_save(runs):
    a,b = runs['frozen']
    check_both(a, b)
    assert identical(a['trained'], b['trained']) and not identical(a['trained'], a['state'])
    assert a['metric'] == b['metric'] and a['trains'] == [0,3,3] and [h['epoch'] for h in a['history']] == [1]

def test_a_file_in_fresh_learners(runs):
    for o in runs['saved']:
        for loaded,trained in zip(o['loaded'], o['trained'], strict=True):
            assert identical(o['saved'], loaded) and identical(o['after'], trained) and not identical(loaded, trained)
    assert all(identical(a, b) for a,b in zip(*(o['trained'] for o in runs['saved']), strict=True))

def test_the_first_process_computes_for_all(runs):
    a,b = runs['diverged']
    assert [a['calls'],b['calls']] == [1,0] and identical(a['at_swap'], b['at_swap'])
    check_both(a, b)
    assert a['history'][0]['decomposed'] == 3

def test_decompose_before_the_fit(runs):
    a,b = runs['before']
    assert identical(a['state'], b['state']) and a['trains'] == [3] and all(identical(p, q) for p,q in zip(a['grads'], b['grads'], strict=True))

def test_a_wrapper_of_the_users_own(runs):
    a,b = runs['plain']
    check_both(a, b)
    for o in (a,b): assert o['same'] and o['freed'] and o['static'] and o['trains'] == [3] and len(o['moved']) == 9 and all(o['moved'])
    assert a['history'][0]['decomposed'] == 2 and [l['status'] for l in a['plan']['layers'].values()] == ['factored']*3
    assert a['strides'] == b['strides'] and len(a['strides']) == 4 and all(s[1] == 1 for s in a['strides'])     # channels last in both

def test_an_error_in_the_first_process_is_one_in_all(runs):
    a,b = runs['error']
    assert [o['dense'] for o in (a,b)] == [0,0]
    assert 'RuntimeError' in a['errors'][0] and 'no memory' in a['errors'][0] and a['errors'][1].startswith('KeyboardInterrupt')
    assert 'in the first process: RuntimeError: no memory' in b['errors'][0] and 'in the first process: KeyboardInterrupt' in b['errors'][1]

def test_a_wrong_name_is_found_before_the_first_epoch(runs):
    for o in runs['wrong_name']: assert "'body' matches no layer" in o['error'] and o['lrs'] == []

def test_what_cannot_be_wrapped_again_is_refused(runs):
    for o in runs['refused']:
        assert all(lrs == [] for _,lrs in o.values())
        texts = {k: t for k,(t,_) in o.items()}
        assert 'communication hook' in texts['hook'] and 'process group' in texts['group'] and 'sharded' in texts['sharded']

def equal_training(o, one):
    "The losses and weights of one process with whole batches, all parameters sharded, and tied weights tied"
    assert o['kinds'] == {'DTensor'} and o['tied']
    # float32, means of two halves, as in `test_equals_one_process_with_the_whole_batch`
    assert_close(o['losses'], one['losses'], rtol=1e-5, atol=0)
    assert o['losses'][-1] < o['losses'][0] - .05
    assert list(o['state']) == list(one['state'])
    for k,v in one['state'].items(): assert_close(o['state'][k], v, rtol=0, atol=2e-5)

def test_a_decomposed_model_is_sharded(runs):
    one = ddp_script.words_in_one_process()
    for o in runs['fsdp']:
        for units in (False, True): equal_training(o['res'][units], one)
        assert identical(o['loaded'], o['res'][True]['state']) and identical(o['saved'], o['loaded'])
    assert identical(*(o['loaded'] for o in runs['fsdp']))

def test_a_skeleton_on_the_meta_device_is_sharded(runs):
    one = ddp_script.words_in_one_process()
    for o in runs['skeleton']:
        assert list(o) == ['loaded', 'own', 'first'] and o['own']['devices'] == o['first']['devices'] == {'meta'}
        for way in o.values(): equal_training(way, one)

def test_a_sharded_model_is_refused(runs):
    for o in runs['sharded']:
        for state in ('dense', 'small', 'run'):
            assert list(o[state]) == o['names']
            save = o[state].pop('save')
            assert len(set(o[state].values())) == 1 and 'get_model_state_dict' in save
            why = o[state].popitem()[1]
            assert ("its parameter 'emb.weight' is sharded" if state != 'run' else "its root is sharded") in why
            assert 'decompose it, or make it with Plan.skeleton, before fully_shard' in why
        assert sorted(o['files']) == ['0.pth', '1.pth']

@pytest.mark.parametrize('launcher', ['torchrun', 'bf16'])
def test_other_launchers(launcher, tmp_path):
    "torchrun, and accelerate with its own autocast"
    for runs in launch(launcher, tmp_path, ['ctx', 'frozen', 'plain']).values(): check_both(*runs)

# In one process

def test_a_group_of_one():
    dist = torch.distributed
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        learn = mk_learn(splitter=lambda m: [list(m.parameters())])
        learn.model = ddp = nn.parallel.DistributedDataParallel(learn.model)
        learn.fit(2, 1e-2, cbs=DecomposeCallback(1, ddp_script.what))
        assert learn.model is ddp and n_factored(ddp.module) == 3 and ids(flat(learn.opt)) == ids(ddp.parameters())
        before = snapshot(ddp)
        learn.fit(1, 1e-2)
        assert all(moved(before, ddp)) and 'layers' in ddp.module.low_rank_plan
        assert list(learn.low_rank_summary().status[:3]) == ['factored']*3
        del ddp
        learn.model = learn.model.module
    finally: dist.destroy_process_group()

@pytest.mark.parametrize('first', [True, False])
def test_parallel_trainer(first):
    learn,c = mk_learn(),DecomposeCallback(1, ddp_script.what)
    cbs = [ParallelTrainer(None), c]
    learn.fit(2, 1e-2, cbs=cbs if first else cbs[::-1])
    assert n_factored(learn.model) == 3 and isinstance(learn.model, nn.Sequential) and 'layers' in learn.model.low_rank_plan
    before = snapshot(learn.model)
    with learn.parallel_ctx(): learn.fit(1, 1e-2)
    assert all(moved(before, learn.model)) and ids(flat(learn.opt)) == ids(learn.model.parameters())
