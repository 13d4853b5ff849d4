"Re-pointing optimizers at a model whose layers changed"
import copy, gc, weakref

import pytest, torch
from torch import nn
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.callback.schedule import *
from helpers import flat, ids, moved, snapshot
from learners import mk_learn, opt_funcs, splitter, wrap
from networks import linear_net
from fasterai_lr.optimizer import follow_params, rebind_opt, swap_layers

T = torch.optim

def factored(layer, rank=3): return nn.Sequential(nn.Linear(layer.in_features, rank, bias=False),
                                                  nn.Linear(rank, layer.out_features, bias=layer.bias is not None))

def swap(learn, names=('0','3')): swap_layers(learn, {n: factored(learn.model.get_submodule(n)) for n in names})
def states(opt):
    "{parameter: what the optimizer keeps of it}, wherever it keeps it"
    own,inner = dict(opt.state),dict(opt.opt.state) if isinstance(opt, OptimWrapper) else {}
    return {p: copy.deepcopy(own.get(p, {}) | inner.get(p, {})) for p in flat(opt)}

def same_state(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k

@pytest.mark.parametrize('name', opt_funcs)
def test_every_optimizer_moves_every_parameter_and_keeps_state(name, tmp_path):
    learn = mk_learn(opt_funcs[name], path=tmp_path)
    learn.fit(1, 1e-3)
    hypers = copy.deepcopy(list(learn.opt.hypers))
    kept = [p for n,p in learn.model.named_parameters() if n.split('.')[0] not in '03']
    old = [p for n,p in learn.model.named_parameters() if n.split('.')[0] in '03']
    state = states(learn.opt)
    swap(learn)
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())
    assert [len(g) for g in learn.opt.param_lists] == [len(g) for g in splitter(learn.model)]
    assert list(learn.opt.hypers) == hypers
    now = states(learn.opt)
    for p in kept: same_state(now[p], state[p])
    for p in old: assert p not in learn.opt.state and p not in getattr(getattr(learn.opt, 'opt', None), 'state', {})
    before = snapshot(learn.model)
    learn.fit(1, 1e-3)
    assert all(moved(before, learn.model))
    for p in kept:      # counts go on where they were: 4 batches before, 4 after
        if 'step' in states(learn.opt)[p]: assert float(states(learn.opt)[p]['step']) == 8

@pytest.mark.parametrize('name', opt_funcs)
def test_every_optimizer_through_save_load_export_and_more_training(name, tmp_path):
    learn = mk_learn(opt_funcs[name], path=tmp_path)
    learn.fit(1, 1e-3)
    swap(learn)
    learn.fit(1, 1e-3)
    learn.save('m')
    w,state = snapshot(learn.model),list(states(learn.opt).values())
    learn.fit(1, 1e-3)
    learn.load('m', weights_only=False)
    assert not any(moved(w, learn.model))
    for a,b in zip(states(learn.opt).values(), state, strict=True): same_state(a, b)
    swap(learn, ['6'])                      # the state is a plain dict after `load`
    learn.fit(1, 1e-3)
    state = list(states(learn.opt).values())
    learn.export('x.pkl')                   # makes a new optimizer and loads the state by position
    for a,b in zip(states(learn.opt).values(), state, strict=True): same_state(a, b)
    before = snapshot(learn.model)
    learn.fit(1, 1e-3)
    assert all(moved(before, learn.model)) and ids(flat(learn.opt)) == ids(learn.model.parameters())
    exported = load_learner(tmp_path/'x.pkl').model
    assert not any(moved(before, exported))

def test_ready_made_torch_optimizer(tmp_path):
    model = linear_net()
    built = T.AdamW([{'params': g, 'lr': 1e-3} for g in splitter(model)])
    learn = mk_learn(OptimWrapper(opt=built), model=model, path=tmp_path)
    learn.fit(1, 1e-3)
    swap(learn)
    assert learn.opt.opt is built
    before = snapshot(model)
    learn.fit(1, 1e-3, reset_opt=True)      # clears the state, keeps the groups
    assert all(moved(before, model)) and ids(flat(learn.opt)) == ids(model.parameters())

@pytest.mark.parametrize('opt_func', [Adam, ranger, wrap(T.AdamW)])
def test_frozen_groups(opt_func):
    learn = mk_learn(opt_func)
    learn.freeze()
    learn.fit(1, 1e-3)
    swap(learn)
    # two factors and a bias; BatchNorm trains though frozen (`train_bn`); three parameters; LayerNorm and the head
    rg = [False]*3 + [True]*2 + [False]*3 + [True]*4
    assert learn.opt.frozen_idx == 2 and [p.requires_grad for p in learn.model.parameters()] == rg
    before = snapshot(learn.model)
    learn.fit(1, 1e-3)
    assert moved(before, learn.model) == rg
    learn.unfreeze()
    before = snapshot(learn.model)
    learn.fit(1, 1e-3)
    assert all(moved(before, learn.model))
    learn.freeze()
    assert [p.requires_grad for p in learn.model.parameters()] == rg

def test_a_layer_frozen_by_hand_stays_frozen():
    learn = mk_learn(splitter=lambda m: list(m.parameters()))
    learn.model[3].requires_grad_(False)
    learn.create_opt()
    swap(learn)
    assert [n for n,p in learn.model.named_parameters() if not p.requires_grad] == ['3.0.weight', '3.1.weight', '3.1.bias']

def test_parameters_the_optimizer_never_had_stay_out():
    learn = mk_learn(splitter=lambda m: list(m[3:].parameters()))
    learn.create_opt()
    swap(learn)
    assert ids(flat(learn.opt)) == ids(learn.model[3:].parameters())
    assert set(learn.opt.state) <= set(flat(learn.opt))

@pytest.mark.parametrize('wd_bn_bias', [False, True])
@pytest.mark.parametrize('train_bn', [False, True])
def test_marks_are_those_of_a_new_optimizer(wd_bn_bias, train_bn):
    learn = mk_learn(wd_bn_bias=wd_bn_bias, train_bn=train_bn)
    learn.fit(1, 1e-3)
    swap(learn)
    got = [{k:v for k,v in learn.opt.state[p].items() if k in ('do_wd','force_train')} for p in learn.model.parameters()]
    learn.create_opt()
    want = [learn.opt.state[p] for p in learn.model.parameters()]
    assert got == want
    assert any(want) == (train_bn or not wd_bn_bias)

def test_decay_reaches_factors_and_spares_their_biases():
    # lr·wd = 0.05 and gradients of zero: a decayed weight shrinks to 0.95, anything else stays
    learn = mk_learn(SGD, wd=0.5)
    learn.create_opt()
    learn.opt.set_hypers(lr=0.1, wd=0.5)
    swap(learn)
    before = snapshot(learn.model)
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    for b,(n,p) in zip(before, learn.model.named_parameters()):
        no_decay = n.endswith('bias') or n.split('.')[0] in '25'
        torch.testing.assert_close(p.detach(), b if no_decay else b*0.95)   # float32 rounding: the default tolerance

def test_other_orders_and_splits_keep_their_shape():
    "Groups that are not in the order of the model (head first; weights apart from biases)"
    for split in [lambda m: [list(m[5:].parameters()), list(m[:5].parameters())],
                  lambda m: [[p for n,p in m.named_parameters() if n.endswith('weight')], [p for n,p in m.named_parameters() if n.endswith('bias')]]]:
        learn = mk_learn(splitter=split)
        learn.fit(1, 1e-3)
        swap(learn)
        assert [ids(g) for g in learn.opt.param_lists] == [ids(g) for g in split(learn.model)]

def test_parameters_outside_the_model_stay():
    "A loss with a parameter of its own"
    extra = nn.Parameter(torch.ones(1))
    learn = mk_learn(splitter=lambda m: [*m.parameters(), extra])
    learn.fit(1, 1e-3)
    swap(learn)
    assert ids(flat(learn.opt)) == [*ids(learn.model.parameters()), id(extra)]

def test_discriminative_lrs_and_decay_survive():
    learn = mk_learn()
    learn.fit(1, slice(1e-4,1e-2), wd=0.1)
    swap(learn)
    torch.testing.assert_close([h['lr'] for h in learn.opt.hypers], [1e-4,1e-3,1e-2], rtol=1e-12, atol=0)
    assert [h['wd'] for h in learn.opt.hypers] == [0.1]*3

def test_factors_are_replaced_again_and_made_dense_again():
    learn = mk_learn()
    learn.fit(1, 1e-3)
    swap(learn, ['3'])
    swap_layers(learn, {'3': nn.Sequential(nn.Linear(12,2,bias=False), nn.Linear(2,2,bias=False), nn.Linear(2,10))})
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())
    swap_layers(learn, {'3': nn.Linear(12,10)})
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())
    assert [len(g) for g in learn.opt.param_lists] == [4,2,4]
    before = snapshot(learn.model)
    learn.fit(1, 1e-3)
    assert all(moved(before, learn.model))

def test_a_block_with_the_same_names():
    "Its parts stay in their groups, and in the order of the model"
    block = lambda: nn.Sequential(nn.Linear(8,6), nn.ReLU(), nn.Linear(6,8))
    split = lambda m: [list(m[0][0].parameters()), [*m[0][2].parameters(), *m[1].parameters()]]
    learn = mk_learn(model=nn.Sequential(block(), nn.Linear(8,4)), splitter=split)
    learn.fit(1, 1e-3)
    swap_layers(learn, {'0': block()})
    assert [ids(g) for g in learn.opt.param_lists] == [ids(g) for g in split(learn.model)]

def test_a_kept_parameter_keeps_its_state():
    "A replacement that goes on using the old bias"
    learn = mk_learn()
    learn.fit(1, 1e-3)
    bias = learn.model[0].bias
    state = copy.deepcopy(learn.opt.state[bias])
    new = factored(learn.model[0])
    new[1].bias = bias
    swap_layers(learn, {'0': new})
    same_state(learn.opt.state[bias], state)
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())

def test_a_shared_module_is_followed_once():
    torch.manual_seed(0)
    lin = nn.Linear(8,8)
    learn = mk_learn(model=nn.Sequential(lin, nn.ReLU(), lin, nn.Linear(8,4)), splitter=lambda m: list(m.parameters()))
    learn.fit(1, 1e-3)
    swap_layers(learn, {'0': factored(lin)})
    assert learn.model[0] is learn.model[2]
    assert ids(flat(learn.opt)) == ids(learn.model.parameters())

def test_root_layer_and_no_optimizer():
    learn = mk_learn(model=nn.Linear(8,4), splitter=lambda m: list(m.parameters()))
    swap_layers(learn, {'': factored(learn.model)})
    assert learn.opt is None and isinstance(learn.model, nn.Sequential)
    learn.fit(1, 1e-3)
    swap_layers(learn, {'': nn.Linear(8,4)})
    before = snapshot(learn.model)
    learn.fit(1, 1e-3)
    assert isinstance(learn.model, nn.Linear) and moved(before, learn.model) == [True,True]

def test_inside_data_parallel():
    learn = mk_learn()
    learn.fit(1, 1e-3)
    model = learn.model
    learn.model = nn.DataParallel(model)
    swap_layers(learn, {'0': factored(model[0])})
    assert learn.model.module is model and ids(flat(learn.opt)) == ids(model.parameters())
    learn.model = nn.DataParallel(model[6])
    swap_layers(learn, {'': factored(model[6])})
    assert isinstance(learn.model.module, nn.Sequential)

@pytest.mark.parametrize('opt_func', [Adam, ranger, wrap(T.AdamW), wrap(T.Adagrad)])
def test_dense_parameters_are_freed(opt_func):
    learn = mk_learn(opt_func)
    learn.fit(1, 1e-3)
    old = [weakref.ref(p) for p in learn.model[0].parameters()]
    learn.model.zero_grad()
    learn.loss_grad = None                  # the last batch's graph
    swap(learn)
    gc.collect()
    assert [r() for r in old] == [None,None]

def test_lr_find_after_the_swap(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.fit(1, 1e-3)
    swap(learn, ['0'])
    learn.lr_find(num_it=8, show_plot=False)
    swap(learn, ['3'])                      # the state is a plain dict after `lr_find`
    before = snapshot(learn.model)
    learn.fit_one_cycle(1, 1e-3)
    assert all(moved(before, learn.model))

def test_errors_come_before_any_change():
    model = linear_net()
    opt = T.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match='OptimWrapper'): rebind_opt(opt, follow_params(model, {'0': factored(model[0])}))
    learn = mk_learn()
    learn.create_opt()
    before = ids(flat(learn.opt))
    with pytest.raises(ValueError, match="layer '1' has no parameters"): swap_layers(learn, {'0': factored(learn.model[0]), '1': nn.PReLU()})
    assert ids(flat(learn.opt)) == before and isinstance(learn.model[0], nn.Linear)
