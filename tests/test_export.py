"Files of decomposed models and learners, and what torch and ONNX make of decomposed models"
import math, os, pickle, random
from itertools import count
from pathlib import Path

import pytest, torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close
from fastai.optimizer import OptimWrapper, SGD, ranger
from fastai.vision.all import unet_learner
from applications import made, what, xresnet
from helpers import flat, gen, ids, moved, n_factored, same, snapshot
from learners import mk_learn, train_on
from networks import linear_net
from small_data import mask_dls, tiny_xresnet
from fasterai_lr import export
from fasterai_lr.all import Budget, ConvDecomposer, FC_Decomposer, decompose, factored_layers, schemes
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.export import export_onnx, load_low_rank, read_low_rank, save_low_rank
from fasterai_lr.layers import recompose, replace_layers
from fasterai_lr.plan import Plan, Record

torch.set_num_threads(1)
small = FC_Decomposer(rank={'0': 2, '3': 3})

def conv_net(bias=True):
    "Convolutions of all sorts, each with a BatchNorm behind it"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, groups=2, bias=bias), nn.BatchNorm2d(24), nn.ReLU(),
                      nn.ConvTranspose2d(24, 12, 3, stride=2, bias=bias), nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 32, bias), nn.BatchNorm1d(32), nn.Linear(32, 8))
    for b in m:
        if isinstance(b, nn.modules.batchnorm._BatchNorm):
            for t in (b.weight, b.running_var): nn.init.uniform_(t, .5, 1.5)
            for t in (b.bias, b.running_mean): nn.init.normal_(t)
    return m.eval()

def low(method, bias=True): return decompose(conv_net(bias), [FC_Decomposer(.5, force=True), ConvDecomposer(method, .5, force=True)])
def batch(n=2): return torch.randn(n, 6, 9, 9, generator=gen(n))

def out(model, x):
    with torch.no_grad(): return model(x)

# Plain PyTorch models

@pytest.mark.parametrize('method', list(schemes))
def test_every_scheme_through_a_file(method, tmp_path):
    model,given = low(method),conv_net().train()
    before,rng = snapshot(given),torch.get_rng_state()
    new = load_low_rank(given, save_low_rank(model, tmp_path/'m'))
    assert torch.equal(rng, torch.get_rng_state()) and not any(moved(before, given)) and not factored_layers(given)
    assert all(m.training for m in new.modules())
    assert torch.equal(out(new.eval(), batch()), out(model, batch()))
    assert len(factored_layers(new)) >= 4 and repr(new) == repr(model) and new.low_rank_plan['layers'] == model.low_rank_plan['layers']

def test_dtype_device_and_frozen_layers_are_those_of_the_model(tmp_path):
    file,given = save_low_rank(low('svd'), tmp_path/'m'),conv_net().double()
    given[0].weight.requires_grad_(False)
    new = load_low_rank(given, file)
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert {n: p.requires_grad for n,p in new.named_parameters() if n.startswith(('0.', '3.'))} == {
        '0.0.weight': False, '0.1.weight': False, '0.1.bias': True, '3.0.weight': True, '3.1.weight': True, '3.1.bias': True}

def on_meta(make):
    with torch.device('meta'): return make()

def all_meta(model): return all(t.is_meta for t in (*model.parameters(), *model.buffers()))

@pytest.mark.parametrize('method', list(schemes))
def test_a_skeleton_on_the_meta_device(method, tmp_path):
    "Of a dense and of a decomposed model; filled by torch's two ways, and by a file"
    model,shell = low(method),on_meta(conv_net)
    plan,state = Plan.of(model.low_rank_plan),model.state_dict()
    for given in (shell, low('svd').to('meta')):
        new = plan.skeleton(given)
        assert all_meta(new) and repr(new) == repr(model) and new.low_rank_plan['layers'] == model.low_rank_plan['layers']
    assert all_meta(shell) and not factored_layers(shell)
    emptied = plan.skeleton(shell).to_empty(device='cpu')
    emptied.load_state_dict(state)
    new.load_state_dict(state, assign=True)
    for other in (emptied, new, load_low_rank(shell, save_low_rank(model, tmp_path/'m'))): assert torch.equal(out(other, batch()), out(model, batch()))
    with pytest.raises(ValueError, match='is on the meta device'): plan.apply(shell)

def test_a_skeleton_allocates_nothing():
    "Its dense layer would take 4 TB, its factors 32 MB"
    shell = on_meta(lambda: nn.Sequential(nn.Linear(10**6, 10**6)))
    plan = Plan({'0': Record('Linear')}).set('0', 'svd', 4)
    assert all_meta(plan.skeleton(shell)) and sum(p.numel() for p in plan.skeleton(shell).parameters()) == 9*10**6

class Tied(nn.Module):
    "Two layers with one weight, and a buffer that files leave out"
    def __init__(self, persistent=True):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(8, 8),nn.Linear(8, 8, bias=False),nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.register_buffer('scale', torch.full((8,), 2.), persistent=persistent)
    def forward(self, x): return self.c(self.b(self.a(x)*self.scale))

def test_what_a_model_on_the_meta_device_gets_from_a_file(tmp_path):
    torch.manual_seed(0)
    model,x = decompose(Tied(), FC_Decomposer(2)).eval(),torch.randn(3, 8)
    file,shell = save_low_rank(model, tmp_path/'m'),on_meta(Tied).train()
    shell.c.weight.requires_grad_(False)
    new = load_low_rank(shell.double(), file)
    assert new.b.weight is new.a.weight and new.training and all_meta(shell)
    assert {t.dtype for t in new.state_dict().values()} == {torch.float64} and {t.device.type for t in new.state_dict().values()} == {'cpu'}
    assert [n for n,p in new.named_parameters() if not p.requires_grad] == ['c.0.weight', 'c.1.weight']
    assert_close(out(new, x.double()).float(), out(model, x))

def test_a_model_of_which_a_part_is_on_the_meta_device(tmp_path):
    torch.manual_seed(0)
    model,x,mixed = decompose(Tied(False), FC_Decomposer(2)),torch.randn(3, 8),on_meta(lambda: Tied(False))
    file = save_low_rank(model, tmp_path/'m')
    with pytest.raises(ValueError, match="model: 'scale' is on the meta device, and no state dict holds it"): load_low_rank(mixed, file)
    mixed.scale = torch.full((8,), 2.)
    assert torch.equal(out(load_low_rank(mixed, file), x), out(model, x)) and mixed.a.weight.is_meta

def test_roots_shared_layers_and_layers_without_a_record(tmp_path):
    root = FC_Decomposer(.25).decompose(nn.Linear(8, 8))
    assert torch.equal(out(load_low_rank(nn.Linear(8, 8), save_low_rank(root, tmp_path/'root')), torch.eye(8)), out(root, torch.eye(8)))
    fc = nn.Linear(8, 8)
    shared = decompose(nn.Sequential(fc, nn.ReLU(), fc), FC_Decomposer(.25))
    del shared.low_rank_plan
    fc = nn.Linear(8, 8)
    new = load_low_rank(nn.Sequential(fc, nn.ReLU(), fc), save_low_rank(shared, tmp_path/'shared'))
    assert new[0] is new[2] and torch.equal(out(new, torch.eye(8)), out(shared, torch.eye(8)))
    by_parts = conv_net()
    by_parts[10] = FC_Decomposer(.5).decompose(by_parts[10])
    new = load_low_rank(low('tucker'), save_low_rank(by_parts, tmp_path/'parts'))
    assert torch.equal(out(new, batch()), out(by_parts, batch())) and list(factored_layers(new)) == ['10']
    assert new.low_rank_plan['layers']['10'] == by_parts[10].low_rank_plan['layers']['']

def test_a_budget_through_a_file(tmp_path):
    "What was predicted comes back too"
    data = [torch.randn(8, 6, 9, 9, generator=gen(i)) for i in range(3)]
    model = decompose(conv_net(False), Budget(macs=.6), data)
    new = load_low_rank(conv_net(False), save_low_rank(model, tmp_path/'m'))
    assert len(factored_layers(new)) >= 2 and torch.equal(out(new, batch()), out(model, batch()))
    assert new.low_rank_plan == model.low_rank_plan and new.low_rank_plan['budget'] == {'macs': .6} and new.low_rank_plan['predicted']

def test_a_dense_model_through_a_file(tmp_path):
    model = conv_net()
    new = load_low_rank(low('spatial'), save_low_rank(model, tmp_path/'dense'))
    assert not factored_layers(new) and torch.equal(out(new, batch()), out(model, batch()))

def test_channels_last(tmp_path):
    "As the dense model is"
    new = load_low_rank(conv_net().to(memory_format=torch.channels_last), save_low_rank(low('svd'), tmp_path/'m'))
    assert new[0][0].weight.is_contiguous(memory_format=torch.channels_last) and not new[0][0].weight.is_contiguous()
    assert_close(out(new, batch()), out(low('svd'), batch()), rtol=1e-4, atol=1e-5)      # another kernel: float32 rounding

def test_suffixes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [save_low_rank(linear_net(), o).name for o in ('a', 'b.pt', Path('c.pth'), tmp_path/'d')] == ['a.pth', 'b.pt', 'c.pth', 'd.pth']
    assert sorted(os.listdir()) == ['a.pth', 'b.pt', 'c.pth', 'd.pth']        # and nothing else is left behind
    for o in ('a', 'a.pth', 'b.pt'): load_low_rank(linear_net(), o)
    with pytest.raises(FileNotFoundError, match='b.pth'): read_low_rank('b')

def test_an_older_file_stays_when_writing_fails(tmp_path):
    file = save_low_rank(linear_net(), tmp_path/'m')
    was = file.read_bytes()
    with pytest.raises(TypeError, match=r"^opt\['cb'\]: builtin_function_or_method"): save_low_rank(decompose(linear_net(), small), file, dict(cb=print))
    class Odd(nn.Linear):
        def get_extra_state(self): return {1, 2}, object()
    with pytest.raises(TypeError, match="^model: '_extra_state': object"): save_low_rank(Odd(2, 2), file)
    assert file.read_bytes() == was and os.listdir(tmp_path) == ['m.pth']

def test_the_optimizer_of_a_plain_training_loop(tmp_path):
    model = decompose(linear_net(), small)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    opt.step()
    back = torch.optim.AdamW(load_low_rank(linear_net(), save_low_rank(model, tmp_path/'m', opt.state_dict())).parameters())
    back.load_state_dict(read_low_rank(tmp_path/'m')['opt'])
    assert [torch.equal(a['exp_avg'], b['exp_avg']) for a,b in zip(opt.state.values(), back.state.values(), strict=True)] == [True]*len(opt.state)
    learn = mk_learn(path=tmp_path)
    with pytest.raises(ValueError, match='not from a fastai optimizer'): learn.load_low_rank(tmp_path/'m')
    assert learn.opt is None and learn.load_low_rank(tmp_path/'m', with_opt=False).opt is None

# Bad files: one error that names the file

class Touch:
    "Code in a pickle"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch,(self.path,)

def flipped(data, at):
    data = bytearray(data)
    data[at] ^= 64
    return bytes(data)

def bad_files(d):
    "{name: what the error says}; the files are made in `d`"
    model = decompose(linear_net(), small)
    good = save_low_rank(model, d/'good').read_bytes()
    for name,data in dict(empty=b'', text=b'hello', half=good[:len(good)//2], end=good[:-3], weights=flipped(good, good.index(model[0][0].weight.detach().numpy().tobytes())+9)).items():
        (d/f'{name}.pth').write_bytes(data)
    data,sd = read_low_rank(d/'good'),model.state_dict()
    torch.save(sd, d/'state_dict.pth')
    torch.save(dict(data, model=Touch(d/'touched')), d/'code.pth')
    (d/'pickle.pth').write_bytes(pickle.dumps(Touch(d/'touched')))
    torch.save(dict(data, version=2), d/'newer.pth')
    torch.save(dict(data, plan={'layers': {'0': {}}}), d/'no_plan.pth')
    torch.save(dict(data, model=None), d/'no_model.pth')
    torch.save(dict(data, model={k:v for k,v in sd.items() if k != '3.1.bias'}), d/'lacks.pth')
    torch.save(dict(data, model=sd | {'0.1.weight': torch.ones(3, 4)}), d/'shape.pth')
    wide,deep = linear_net(),nn.Sequential(*linear_net(), nn.Linear(4, 4))
    wide[6] = nn.Linear(10, 5)
    save_low_rank(decompose(wide, small), d/'wide')
    save_low_rank(deep, d/'deep')
    save_low_rank(decompose(deep, FC_Decomposer(1)), d/'other_plan')
    save_low_rank(low('svd'), d/'conv')
    damaged = 'is damaged, incomplete or not from `save_low_rank`: '
    return dict(empty=damaged, text=damaged, half=damaged, end=damaged, weights=damaged+'the checksum', code=damaged, pickle=damaged, state_dict='was not written by `save_low_rank`',
                newer='has version 2 of the format', no_plan='is not a plan', no_model='holds no state dict', lacks="is of another model: it lacks '3.1.bias'",
                shape="is of another model: '0.1.weight' is [3, 4] there and [12, 2] here", wide="is of another model: '6.weight' is [5, 10] there and [4, 10] here",
                deep="is of another model: it also has '7.weight', '7.bias'", other_plan="is of another model: plan: the model has no layer '7'", conv="is of another model: plan: layer '0' ")

@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    d = tmp_path_factory.mktemp('bad')
    return d, bad_files(d)

def state(learn):
    "All that must not change: objects, values, and what the optimizer knows"
    opt = learn.opt
    return (id(learn.model), [id(m) for m in learn.model.modules()], ids(learn.model.parameters()), snapshot(learn.model), vars(learn.model).get('low_rank_plan'), id(opt),
            opt and [ids(g) for g in opt.param_lists], opt and [dict(h) for h in opt.hypers], opt and {id(p): (id(s), *map(str, s.values())) for p,s in opt.state.items()}, torch.get_rng_state())

def assert_unchanged(before, learn):
    after = state(learn)
    assert before[:3] == after[:3] and before[4:-1] == after[4:-1] and torch.equal(before[-1], after[-1])
    assert all(map(torch.equal, before[3], after[3]))

@pytest.mark.parametrize('start', ['dense', 'decomposed', 'without optimizer'])
def test_bad_files_leave_the_learner_as_it_was(start, bad):
    d,errors = bad
    learn = mk_learn(path=d)
    if start != 'without optimizer': learn.fit(1, 1e-2)
    if start == 'decomposed': learn.decompose(FC_Decomposer(1))
    before = state(learn)
    for name,text in errors.items():
        with pytest.raises(ValueError) as e: learn.load_low_rank(d/name)
        assert str(e.value).startswith(f"file: {str(d/name)+'.pth'!r} ") and text in str(e.value) and '\n' not in str(e.value), (name, str(e.value))
        assert_unchanged(before, learn)
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): learn.load_low_rank('nowhere')
    assert not (d/'touched').exists()           # no code was run
    learn.load_low_rank(d/'good', with_opt=False)
    assert len(factored_layers(learn.model)) == 2

def test_every_byte_of_the_weights_is_checked(tmp_path):
    file = save_low_rank(decompose(linear_net(), small), tmp_path/'m')
    data,g = file.read_bytes(),random.Random(0)
    want,read = read_low_rank(file),0
    for i in g.sample(range(len(data)), 100):
        file.write_bytes(flipped(data, i))
        try: got = read_low_rank(file)
        except ValueError: continue
        read += 1                               # a byte of padding, or of a field that nobody reads
        assert got['plan'] == want['plan'] and all(map(torch.equal, got['model'].values(), want['model'].values()))
    assert read < 60

# Learners

def decomposed(path, **kw):
    learn = xresnet(path, **kw)
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, what, ft_lr=1e-2))
    return learn

def dense(path, **kw): return xresnet(path, **kw)

def dense_and_fitted(path, **kw):
    learn = xresnet(path, **kw)
    learn.fit(1, 1e-2)
    return learn

def otherwise(path, **kw):
    "Decomposed in another way, in the middle of training"
    learn = dense_and_fitted(path, **kw)
    learn.decompose([FC_Decomposer(.3), ConvDecomposer('tucker', .4)])
    learn.fit(1, 1e-2)
    return learn

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A file in the middle of training, the predictions then, and the weights after another epoch"
    path = tmp_path_factory.mktemp('saved')
    learn = decomposed(path)
    file = learn.save_low_rank('m')
    assert file == path/'models'/'m.pth'
    preds = learn.get_preds()[0]
    return file,preds,learn.model.low_rank_plan,train_on(learn)

@pytest.mark.parametrize('start', [dense, dense_and_fitted, otherwise, decomposed])
def test_more_training_after_loading(start, saved, tmp_path):
    file,preds,plan,after = saved
    learn = start(tmp_path)
    assert learn.load_low_rank(file) is learn
    assert torch.equal(learn.get_preds()[0], preds) and n_factored(learn.model) == 17 and learn.model.low_rank_plan['layers'] == plan['layers']
    assert ids(flat(learn.opt)) == ids(p for g in learn.splitter(learn.model) for p in g)
    assert same(train_on(learn), after)         # to the last bit: structure, weights, moments and steps
    learn.load_low_rank(file, with_opt=False)
    assert not same(train_on(learn), after)     # and the moments matter

@pytest.mark.parametrize('opt_func', [SGD, ranger, lambda ps, lr: OptimWrapper(ps, torch.optim.AdamW, lr=lr)])
def test_other_optimizers(opt_func, tmp_path):
    learn = mk_learn(opt_func, path=tmp_path)
    learn.decompose(small)
    learn.fit(2, 1e-2)
    file = learn.save_low_rank('m')
    if opt_func is ranger: learn.fit(0, 1e-2)
    after = train_on(learn)
    for other in (learn, mk_learn(opt_func, path=tmp_path)):
        assert same(train_on(other.load_low_rank(file)), after)

def test_a_learner_on_the_meta_device(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.decompose(small)
    learn.save_low_rank('m')
    other = mk_learn(path=tmp_path, model=on_meta(linear_net))
    with pytest.raises(ValueError, match='^model: it is on the meta device and has no weights'): other.load_low_rank('m')

def test_objects_of_the_same_learner_stay(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.decompose(small)
    learn.fit(1, 1e-2)
    learn.save_low_rank('m')
    was = [id(m) for m in learn.model.modules()],ids(learn.model.parameters()),id(learn.opt)
    learn.fit(1, 1e-2)
    learn.load_low_rank('m')
    assert was == ([id(m) for m in learn.model.modules()], ids(learn.model.parameters()), id(learn.opt))

def test_frozen_layers_stay_frozen(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.decompose(small)
    learn.fit(1, 1e-2)
    learn.save_low_rank('m')
    other = mk_learn(path=tmp_path)
    other.freeze()
    other.load_low_rank('m')
    rg = [p.requires_grad for p in other.model.parameters()]
    assert other.opt.frozen_idx == 2 and rg == [False]*3 + [True]*2 + [False]*3 + [True]*4
    before = snapshot(other.model)
    other.fit(1, 1e-2)
    assert moved(before, other.model) == rg

def test_the_decomposed_root(tmp_path):
    learn = mk_learn(model=nn.Linear(8, 4), splitter=lambda m: list(m.parameters()), path=tmp_path)
    learn.decompose(FC_Decomposer(rank=2))
    learn.fit(1, 1e-2)
    learn.save_low_rank('m')
    after = train_on(learn)
    assert same(train_on(mk_learn(model=nn.Linear(8, 4), splitter=lambda m: list(m.parameters()), path=tmp_path).load_low_rank('m')), after)

def test_another_optimizer_is_refused(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.decompose(small)
    learn.fit(1, 1e-2)
    learn.save_low_rank('m')
    others = {r'its optimizer differs \(': mk_learn(SGD, path=tmp_path), 'has groups of': mk_learn(splitter=lambda m: list(m.parameters()), path=tmp_path),
              r"has '\w.*' instead of": mk_learn(splitter=lambda m: [list(m[:3].parameters())[::-1], list(m[3:5].parameters()), list(m[5:].parameters())], path=tmp_path)}
    for text,other in others.items():
        for fit in (False, True):
            if fit: other.fit(1, 1e-2)
            before = state(other)
            with pytest.raises(ValueError, match=rf"^file: '.*m.pth' does not fit: .*{text}.*; `with_opt=False` loads only the model$"): other.load_low_rank('m')
            assert_unchanged(before, other)
        assert n_factored(other.load_low_rank('m', with_opt=False).model) == 2
        other.fit(1, 1e-2)

def test_an_optimizer_that_cannot_be_re_pointed_is_refused_first(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.decompose(small)
    learn.save_low_rank('m')
    learn = mk_learn(lambda groups, lr: torch.optim.Adam([p for g in groups for p in g], lr=lr), path=tmp_path)
    learn.create_opt()
    model = ids(learn.model.modules())
    with pytest.raises(TypeError, match='OptimWrapper'): learn.load_low_rank('m', with_opt=False)
    assert ids(learn.model.modules()) == model

def test_a_file_without_optimizer_state(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.fit(1, 1e-2)
    learn.decompose(small)
    for kw in (dict(with_opt=False), {}):
        file = learn.save_low_rank(tmp_path/'sub'/'m.pt', **kw)
        assert file == tmp_path/'sub'/'m.pt' and ('opt' in read_low_rank(file)) == (not kw)
        if kw:
            with pytest.warns(UserWarning, match='holds no optimizer state'): mk_learn().load_low_rank(file)

def unet(path):
    "A learner of masks"
    return unet_learner(mask_dls(path), tiny_xresnet, pretrained=False)

def test_a_unet_with_its_hooks(tmp_path):
    "Right after training its hooks keep outputs that torch refuses to copy"
    import onnxruntime
    learn = made(unet, tmp_path/'a')
    learn.decompose(what)
    learn.fit(1, 1e-2)
    file = learn.save_low_rank(tmp_path/'u')
    other = made(unet, tmp_path/'b')
    other.fit(1, 1e-2)
    other.load_low_rank(file)
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    want = out(learn.model.eval(), x).as_subclass(torch.Tensor)
    assert n_factored(other.model) == n_factored(learn.model) == 33 and torch.equal(out(other.model.eval(), x).as_subclass(torch.Tensor), want)
    session = onnxruntime.InferenceSession(other.export_onnx(tmp_path/'u'))
    assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), want, rtol=1e-4, atol=1e-4)     # float32, through forty layers
    before = snapshot(other.model)
    other.fit(1, 1e-2)
    assert all(moved(before, other.model))

# ONNX

@pytest.mark.parametrize('method', list(schemes))
def test_onnx_of_every_scheme(method, tmp_path):
    import onnx, onnxruntime
    model = low(method).train()
    before = [b.clone() for b in model.buffers()]
    file = export_onnx(model, batch(1), tmp_path/'m')
    assert os.listdir(tmp_path) == ['m.onnx'] and all(m.training for m in model.modules()) and all(map(torch.equal, before, model.buffers()))
    session = onnxruntime.InferenceSession(file)
    for n in (1, 7):
        # float32 in another order of operations
        assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch(n).numpy()})[0]), out(model.eval(), batch(n)), rtol=1e-4, atol=1e-5)
    # the factors, not their product; the rest is a few shapes
    assert sum(math.prod(t.dims) for t in onnx.load(file).graph.initializer) <= sum(t.numel() for t in model.state_dict().values()) + 20

class Several(nn.Module):
    "Several inputs and outputs, one of them not a tensor, and one made of integers"
    def __init__(self):
        super().__init__()
        self.emb,self.a,self.b = nn.Embedding(9, 16),nn.Linear(16, 16),nn.Linear(16, 4)
    def forward(self, words, x, scale=2.):
        h = self.a(self.emb(words) + x[:,None]).relu()
        return {'logits': self.b(h.mean(1)), 'best': (h.argmax(-1), h*scale)}

@pytest.mark.parametrize('as_dict', [False, True])
def test_onnx_of_several_inputs_and_outputs(as_dict, tmp_path):
    import onnxruntime
    torch.manual_seed(0)
    model = decompose(Several(), FC_Decomposer(.25, force=True)).eval()
    words,x = torch.randint(9, (3,5)),torch.randn(3, 16)
    file = export_onnx(model, dict(x=x, words=words) if as_dict else (words, x, 3.), tmp_path/'m.onnx')
    session = onnxruntime.InferenceSession(file)
    got = session.run(None, {'words': words[:2].numpy(), 'x': x[:2].numpy()})
    want = model(words[:2], x[:2], 2. if as_dict else 3.)
    for a,b in zip(got, [want['logits'], *want['best']], strict=True): assert_close(torch.from_numpy(a), b.detach(), rtol=1e-4, atol=1e-5)

def test_onnx_of_learners(tmp_path):
    "Compared on a batch of the validation set, in the learner's folder"
    import onnxruntime
    learn = xresnet(tmp_path)
    learn.decompose(what)
    assert learn.export_onnx('m') == tmp_path/'m.onnx'
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    x,_ = learn.dls.valid.one_batch()
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})[0])
    assert_close(got.softmax(-1), out(learn.model.eval(), x).softmax(-1).as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5)

def test_onnx_file_and_sample_as_given(tmp_path):
    learn = mk_learn()
    learn.decompose(small)
    assert learn.export_onnx(tmp_path/'a.v2', torch.ones(1, 8)) == tmp_path/'a.v2' and os.listdir(tmp_path) == ['a.v2']

def test_what_cannot_be_exported_leaves_the_learner_trainable(tmp_path):
    class Remembering(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last if x.sum() > 0 else -self.last
    learn = mk_learn(model=Remembering(8, 4), splitter=lambda m: list(m.parameters()), path=tmp_path)
    learn.fit(1, 1e-2)
    with pytest.raises(RuntimeError, match='^model: torch cannot export this Remembering'): learn.export_onnx('m')
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert type(learn.model.last) is torch.Tensor and all(moved(before, learn.model)) and not os.listdir(tmp_path)

class Branches(nn.Linear):
    "What cannot be traced"
    def forward(self, x): return super().forward(x) if x.sum() > 0 else x

class FirstFour(nn.Linear):
    "What one row is too few for"
    def forward(self, x): return super().forward(x)[torch.arange(4)]

class Remembers(nn.Linear):
    "Another result each time"
    calls = count(1)                # no attribute that changes: torch would refuse to trace that
    def forward(self, x): return super().forward(x)*next(self.calls)

class SecondIsNaN(nn.Linear):
    "NaN where the maximum of Python would not look"
    def forward(self, x): return super().forward(x),(-1 - x.square()).sqrt()

@pytest.mark.parametrize('cls, error, text', [
    (Branches, RuntimeError, '^model: torch cannot export this Branches: .'),
    (FirstFour, RuntimeError, '^model: it runs for 4 rows, but not for 1: .'),
    (Remembers, RuntimeError, '^file: for 4 rows the outputs of the ONNX model differ by .* more than 1e-4; nothing was written'),
    (SecondIsNaN, RuntimeError, '^file: for 4 rows the outputs of the ONNX model differ by nan from those of the model')])
def test_what_onnx_cannot_hold_is_refused(cls, error, text, tmp_path):
    (tmp_path/'m.onnx').write_text('older')
    with pytest.raises(error, match=text): export_onnx(cls(3, 3), torch.randn(4, 3), tmp_path/'m')
    assert os.listdir(tmp_path) == ['m.onnx'] and (tmp_path/'m.onnx').read_text() == 'older'

@pytest.mark.parametrize('sample', [torch.zeros(0, 3), (torch.zeros(2, 3), torch.zeros(3, 3)), 5.])
def test_samples_without_a_common_batch_are_refused(sample, tmp_path):
    with pytest.raises(ValueError, match='^sample: '): export_onnx(nn.Linear(3, 3), sample, tmp_path/'m')

def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, 'find_spec', lambda o: None if o != 'onnx' else o)
    with pytest.raises(ImportError, match="^export_onnx: missing onnxscript and onnxruntime; .*`pip install onnxscript onnxruntime`"): mk_learn(path=tmp_path).export_onnx('m')
    assert not os.listdir(tmp_path)

# torch's own tools

def test_torch_export_with_any_batch_size(tmp_path):
    model = low('tucker')
    torch.export.save(torch.export.export(model, (batch(),), dynamic_shapes=({0: torch.export.Dim('batch')},)), tmp_path/'m.pt2')
    back = torch.export.load(tmp_path/'m.pt2').module()
    for n in (1, 5): assert_close(back(batch(n)), model(batch(n)), rtol=1e-5, atol=1e-6)        # the same kernels

@pytest.fixture
def fresh_compiler():
    "torch counts how often `nn.Sequential.forward` was compiled in a process"
    torch.compiler.reset()
    yield
    torch.compiler.reset()

@pytest.mark.parametrize('method', list(schemes))
def test_gradients_of_a_compiled_model(method, fresh_compiler):
    model,x = low(method).train(),batch(4)
    want,got = (torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (model, torch.compile(model, backend='aot_eager', fullgraph=True)))
    for a,b in zip(want, got, strict=True): assert_close(a, b, rtol=1e-4, atol=1e-4*a.abs().max().item())     # float32, sums in another order

def folded(model):
    "Each layer that a BatchNorm follows, with that folded into it, or into its last factor"
    new = {}
    for i,bn in enumerate(model):
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm): continue
        last = model[i-1][-1]
        if isinstance(last, nn.ConvTranspose2d) and last.groups > 1: continue         # torch's function knows no groups there: the last factor of 'slice'
        fuse = fuse_linear_bn_eval if isinstance(last, nn.Linear) else fuse_conv_bn_eval
        new[f'{i-1}.{len(model[i-1])-1}'] = fuse(last, bn, *([True] if isinstance(last, nn.ConvTranspose2d) else []))
        new[str(i)] = nn.Identity()
    return replace_layers(model, new)

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('method', list(schemes))
def test_batchnorm_folds_into_the_last_factor(method, bias):
    model = low(method, bias)
    new = folded(model)
    assert [isinstance(new[i], nn.Identity) for i in (1,4,7,11)] == [True, True, method != 'slice', True] and list(factored_layers(new)) == list(factored_layers(model))
    assert_close(out(new, batch()), out(model, batch()), rtol=1e-4, atol=1e-5)           # float32: scaled before instead of after the sum
    assert_close(out(recompose(new), batch()), out(new, batch()), rtol=1e-3, atol=1e-4)  # one layer's sums instead of two's
    assert all(m.bias is not None for n,m in factored_layers(new).items() if n != '6' or method != 'slice')

def test_dynamic_int8():
    model,x = decompose(linear_net(), small).eval(),torch.randn(64, 8, generator=gen(0))
    new = pytest.importorskip('torch.ao.quantization').quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert list(factored_layers(new)) == ['0', '3'] and all('.quantized' in type(m).__module__ for l in factored_layers(new).values() for m in l)
    want,got = out(model, x),out(new, x)
    error = (got-want).norm()/want.norm()
    assert 0 < error < .05      # steps of 1/127 of the largest weight and activation, through five layers
