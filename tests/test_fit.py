"The fit of a decomposed model to what the dense one computes: exact at full rank, better than the parts, and without a trace in the model given"
from dataclasses import replace
import copy, gc, warnings, weakref
from collections import Counter

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai_lr.calibrate import calibrate

from fasterai_lr.loss import classification, regression
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose
from fasterai_lr.distill import distill, flip_and_crop
from fasterai_lr.fit import loss_increase
from fasterai_lr.metric import ridge
from fasterai_lr.relu import followed_by_relu
from fasterai_lr.running import trace
from fasterai_lr.layers import FactoredLayer, factored_layers
from helpers import fitted, miss, same, state_of
from networks import Block, ViT, images, norms, plain_net, res_net, tokens, with_statistics

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures('seeded')

# --- what follows a layer

def test_the_order_and_the_norms_of_layers():
    net = with_statistics(plain_net(), images)
    uses = trace(net, ['10', '5', '0', '3'], (images[:2],))
    assert [(n, u.norm, u.add, u.calls) for n,u in uses.items()] == [('0', '1', None, 1), ('3', None, None, 1), ('5', '6', None, 1), ('10', None, None, 1)]
    assert uses['5'].inputs[0].shape == (2, 12, 8, 8) and uses['5'].outputs[0].is_meta

@pytest.mark.parametrize('how', ['+', 'x +', '+=', 'add_', 'torch.add'])
def test_additions_are_found_however_they_are_written(how):
    uses = trace(with_statistics(res_net(how), images), ['0', '2.conv1', '2.conv2', '3.conv1', '3.conv2', '6'], (images[:2],))
    assert {n:u.add for n,u in uses.items()} == {'0': None, '2.conv1': None, '2.conv2': 0, '3.conv1': None, '3.conv2': 1, '6': None}
    assert {n:u.norm for n,u in uses.items()} == {'0': None, '2.conv1': '2.bn1', '2.conv2': '2.bn2', '3.conv1': '3.bn1', '3.conv2': '3.bn2', '6': None}

def test_an_activation_in_between_even_in_place_is_no_addition_of_the_layer():
    uses = trace(with_statistics(res_net('+', relu=True), images), ['2.conv2', '3.conv2'], (images[:2],))
    assert [(u.norm, u.add) for u in uses.values()] == [('2.bn2', None), ('3.bn2', None)]

def test_projections_of_a_transformer_go_into_its_residual_sums():
    names = ['embed', *(f'blocks.{i}.{n}' for i in (0,1) for n in ('qkv', 'proj', 'up', 'down')), 'head']
    for n in (1, 4): # with one sample, the position embedding has the shape of the tokens; the sums are counted alike
        uses = trace(ViT(), names, (tokens[:n],))
        assert list(uses) == names
        assert [uses[f'blocks.{i}.{n}'].add for i in (0,1) for n in ('proj', 'down')] == [1, 2, 3, 4]
        assert all(uses[n].add is None for n in names if n.rpartition('.')[2] in ('qkv', 'up', 'head'))

def test_shared_modules_have_nothing_that_follows_all_of_their_calls():
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c,self.bn = (*(nn.Conv2d(3, 3, 1, bias=False) for _ in 'abc'), nn.BatchNorm2d(3))
        def forward(self, x): x = self.bn(self.a(x)).relu(); return self.bn(self.b(x)) + self.c(self.c(x))
    net = with_statistics(Shared(), images)
    assert {n:(u.calls, u.norm, u.add) for n,u in trace(net, 'abc', (images,)).items()} == {'a': (1, None, None), 'b': (1, None, None), 'c': (2, None, None)}
    assert miss(fitted(net, {n:('svd', 3) for n in 'abc'}, images), net, images) < 1e-5 # float32

def test_tracing_keeps_no_activation():
    seen,alive = [],[]
    class Spy(nn.Module):
        def forward(self, x): seen.append(weakref.ref(x)); alive.append(sum(r() is not None for r in seen)); return x*2
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(4, 4), Spy())))
    trace(net, [str(2*i) for i in range(6)], (torch.randn(2, 4),))
    assert alive == [1]*6

# --- exact at full rank

full = {'plain': lambda: (plain_net(), {'0': ('spatial', 9), '3': ('tucker', (6, 6)), '5': ('svd', 16), '10': ('svd', 5)}, images),
        'without bias': lambda: (plain_net(False), {'0': ('tucker', (12, 3)), '3': ('spatial', 18), '5': ('slice', 3), '10': ('svd', 5)}, images),
        'residual': lambda: (res_net('+='), {'0': ('svd', 8), '2.conv1': ('spatial', 24), '2.conv2': ('spatial', 24), '3.conv2': ('svd', 8), '6': ('svd', 5)}, images),
        'transformer': lambda: (ViT(), {'embed': ('svd', 8), 'blocks.0.qkv': ('svd', 12), 'blocks.0.proj': ('svd', 12), 'blocks.1.up': ('svd', 12), 'blocks.1.down': ('svd', 12)}, tokens)}

@pytest.mark.parametrize('name', full)
@pytest.mark.parametrize('args', [{}, dict(sequential=False), dict(room=0), dict(metric='activation')], ids=['sequential', 'closed', 'no room', 'activation'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_at_full_rank_nothing_is_lost(name, args, dtype):
    net,choices,x = full[name]()
    net,x = with_statistics(net, x).to(dtype),x.to(dtype)
    res = fitted(net, choices, x, **args)
    assert set(factored_layers(res)) == set(choices)
    assert miss(res, net, x.flip(-1)) < 1e-4 # what the jitter in the solves, 10⁻⁸, does in directions that the inputs hardly have, in either precision

def test_patches_beyond_the_limit_are_fitted_through_the_outputs():
    net,x = nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 4)).double(),torch.randn(400, 40).double()
    assert miss(fitted(net, {'0': ('svd', 6)}, x, max_size=20), net, x) < 1e-6
    small,large = (fitted(net, {'0': ('svd', 3)}, x, max_size=m) for m in (20, 8192))
    assert miss(small, net, x) < 1.05*miss(large, net, x) # the ridge pulls otherwise, and the damping is another one

@pytest.mark.parametrize('sequential', [True, False])
@pytest.mark.parametrize('size', [8192, 256], ids=['patches', 'outputs'])
@pytest.mark.parametrize('spread,part', [(1e-2, .05), (1e-4, 2), (1e-6, 2)]) # what varies by less than 1e-3 of the mean is below what the moments' float32 products may lack: the mean is kept
def test_a_layer_whose_outputs_hardly_vary_is_fitted(size, spread, part, sequential):
    net = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    x = torch.randn(300) + spread*torch.randn(64, 300)
    assert miss(fitted(net, {'0': ('svd', 100)}, list(x.split(16)), max_size=size, sequential=sequential), net, x) < part*spread

# --- better than the parts

def divergence(model, dense, x): # of the predictions
    with torch.no_grad(): return float(classification.distance(model(x), dense(x), temperature=1.))

@pytest.fixture(scope='module')
def trained():
    "A small network that has learned to tell where a blob is, and data it has not seen"
    gen = torch.Generator().manual_seed(0)
    def sample(n):
        y = torch.randint(4, (n,), generator=gen)
        x = .7*torch.randn(n, 3, 10, 10, generator=gen)
        for i,c in enumerate(y): x[i,:,5*(c//2)+1:5*(c//2)+4,5*(c%2)+1:5*(c%2)+4] += 1.2*torch.rand(3, 1, 1, generator=gen)
        return x,y
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 4))
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        x,y = sample(64)
        opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    return net.eval(),sample(300)[0],sample(600)

low = {'3.conv1': ('spatial', 4), '3.conv2': ('spatial', 4), '4.conv1': ('svd', 5), '4.conv2': ('spatial', 4), '5': ('svd', 8)}

def test_each_ingredient_helps_on_data_not_seen(trained):
    net,x,(other,y) = trained
    with torch.no_grad(): assert (net(other).argmax(1) == y).float().mean() > .9 # it has learned
    svds,spatials = ({n:r for n,(s,r) in low.items() if s == k} for k in ('svd', 'spatial'))
    weights = decompose(net, [ConvDecomposer('svd', svds), ConvDecomposer('spatial', spatials)])
    assert {n:(l.scheme, l.rank) for n,l in factored_layers(weights).items()} == low
    models = [weights, fitted(net, low, x, sequential=False), fitted(net, low, x)]
    models.append(distill(models[-1], net, x, steps=60))
    errors = [divergence(m, net, other) for m in models]
    # each ingredient takes off at least a twentieth here; the whole fit more than half
    assert all(b < .95*a for a,b in zip(errors, errors[1:])), errors
    assert errors[2] < .5*errors[0], errors

def test_training_starts_where_the_fit_ends(trained):
    "In training, a BatchNorm normalises by the batch, and must not blow up a layer whose outputs vary less than before"
    net,x,(other,_) = trained
    small = fitted(net, {n: (scheme, 1) for n,(scheme,_) in low.items()}, x)
    def changed(model): return divergence(copy.deepcopy(model).train(), model, other)
    assert changed(small) < 2*changed(net) # 1.4 times as much; it was 400 times when the statistics stayed

def test_a_residual_sum_makes_up_for_the_other_branch(trained):
    "Whatever sums are taken while looking on. A difference is no sum: what goes into one is fitted by itself"
    net,x,(other,_) = trained
    blind = copy.deepcopy(net)
    for i in (3, 4): blind[i].how = 'h - -x'
    assert torch.equal(blind(other), net(other)) and all(u.add is None for u in trace(blind, low, (x[:2],)).values())
    assert divergence(fitted(net, low, x), net, other) < .98*divergence(fitted(blind, low, x), net, other)

def test_layers_that_stay_dense_are_fitted_too(trained):
    net,x,(other,_) = trained
    first = {'3.conv1': ('spatial', 4)}
    res = fitted(net, first, x)
    only = copy.deepcopy(res)
    for n in ('3.conv2', '4.conv1', '4.conv2', '5', '9'): only.get_submodule(n).load_state_dict(net.get_submodule(n).state_dict())
    assert miss(res, net, other) < .9*miss(only, net, other)
    assert type(res[5]) is nn.Conv2d and not torch.equal(res[5].weight, net[5].weight)

def test_the_means_of_outputs_are_right_with_and_without_a_bias():
    for bias in (True, False):
        net = plain_net(bias)
        for i in (2, 7): net[i] = nn.SiLU() # before a ReLU, the mean need not be right
        net = with_statistics(net, images)
        layers = {'0': ('spatial', 3), '5': ('svd', 4)}
        res = fitted(net, layers, images, most=10**6)
        for norm in (1, 6): # at the output of the BatchNorm that follows, mean by channel
            a,b = (m[:norm+1](images).mean((0, 2, 3)).detach() for m in (net, res))
            assert (a - b).abs().max() < 2e-4*net[:norm+1](images).std() # float32 sums of 6,144 positions
        assert [hasattr(m, 'bias') and m.bias is not None for m in res if isinstance(m, (nn.Conv2d, nn.Linear, FactoredLayer))] == [bias]*4

# --- through a ReLU

@pytest.mark.parametrize('how', ['+', 'x +', '+=', 'add_', 'torch.add'])
def test_a_relu_is_found_behind_norms_and_sums(how):
    names = ['0', '2.conv1', '2.conv2', '3.conv1', '3.conv2', '6']
    net = with_statistics(res_net(how), images)
    uses = trace(net, names, (images[:2],))
    assert followed_by_relu(net, uses, (images[:2],)) == set(names[:-1])
    assert not followed_by_relu(ViT(), trace(ViT(), ['embed', 'blocks.0.up'], (tokens[:2],)), (tokens[:2],))

@pytest.mark.parametrize('seen', [
    lambda y: y.relu() + y, lambda y: (y.relu(), y), lambda y: y.relu() + y.mean(), lambda y: y.relu() + float(y.sum()),
    lambda y: (2*y).relu(), lambda y: y.detach().relu_() + 1, lambda y: y[:,:2].relu(), lambda y: torch.zeros_like(y).copy_(y).relu(),
    lambda y: torch.from_numpy(y.detach().numpy()*1).relu()])
def test_a_layer_that_something_else_sees_is_left_out(seen):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
        def forward(self, x): return seen(self.a(x))
    net,x = Net(),torch.randn(3, 4)
    assert not followed_by_relu(net, trace(net, ['a'], (x,)), (x,))

def test_a_relu_in_place_is_one_and_what_comes_after_it_does_not_matter():
    class Net(nn.Module):
        def __init__(self, relu): super().__init__(); self.a,self.relu = nn.Linear(4, 4),relu
        def forward(self, x): y = self.relu(self.a(x)); return y + y.exp(),y.shape
    for relu in (F.relu_, torch.relu_, torch.Tensor.relu_, nn.ReLU(inplace=True), nn.ReLU(), torch.relu):
        net,x = Net(relu),torch.randn(3, 4)
        assert followed_by_relu(net, trace(net, ['a'], (x,)), (x,)) == {'a'}

def test_the_fit_through_the_relu_loses_less(trained, monkeypatch):
    net,x,(other,_) = trained
    def lost(): return divergence(fitted(net, low, x, most=2**14), net, other)
    through = lost()
    monkeypatch.setattr('fasterai_lr.fit.followed_by_relu', lambda *args: set())
    assert through < .98*lost() # 0.965 here

def test_a_fit_to_few_images_is_no_worse_than_none(trained, monkeypatch):
    net,x,(other,_) = trained
    parts = [x[i:i+n] for n in (8, 16, 32) for i in (0, n)]
    def total(**kwargs): return sum(divergence(fitted(net, low, part, **kwargs), net, other) for part in parts)
    new,none = total(),total(sequential=False)
    monkeypatch.setattr('fasterai_lr.fit.ridge', lambda M, samples: ridge(M)) # as if the samples were enough
    assert new < 1.1*none and new < .8*total() # 1.03 and .72 here; one part is a tenth above or below the next

# --- leaves no trace

@pytest.mark.parametrize('caller', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_given_is_untouched(caller):
    net = with_statistics(res_net(), images).train()
    net[2].bn1.eval()
    net[0].weight.requires_grad_(False)
    data = DataLoader(TensorDataset(images, torch.zeros(96)), 32, shuffle=True)
    with caller(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'distill') # three steps are few
        before = state_of(net)
        res = fitted(net, {'0': ('svd', 3), '2.conv2': ('spatial', 9)}, data, distill_steps=3)
        assert same(before, state_of(net))
    assert [m.training for m in res.modules() if not list(m.children())] == [m.training for n,m in net.named_modules() for _ in range(2 if n in ('0', '2.conv2') else 1) if not list(m.children())]
    assert not any(p.requires_grad for p in res[0][0].parameters()) and res[0].bias.requires_grad # the flags of what is replaced
    assert not any(m._forward_hooks for m in res.modules()) and not any(p.is_inference() or p.grad is not None for p in res.parameters())
    res.train()(images).sum().backward()                                                          # it can be trained on
    assert res[2].conv2[0].weight.grad is not None

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('call', [5, 9, 13]) # while calibrating, tracing and fitting, distilling
def test_nor_after_an_interrupt(error, call):
    calls = []
    class Net(nn.Sequential):
        armed = False
        def forward(self, x):
            if Net.armed:
                calls.append(1)
                if len(calls) == call: raise error('now')
            return super().forward(x)
    net = with_statistics(Net(*plain_net()), images)
    Net.armed,before = True,state_of(net)
    with pytest.raises((error, ValueError), match='now'): fitted(net, {'5': ('svd', 3)}, list(images[:20].split(4)), distill_steps=20)
    assert same(before, state_of(net)) and len(calls) == call

def test_dense_layers_keep_what_they_are():
    net = with_statistics(plain_net(), images)
    net[0].note,flags = 'mine',dict(weight=False, bias=True)
    net[0].weight.requires_grad_(False)
    net[3].to(memory_format=torch.channels_last)
    res = fitted(net, {'5': ('svd', 4)}, images)
    assert res[0].note == 'mine' and {n:p.requires_grad for n,p in res[0].named_parameters()} == flags
    assert res[3].weight.stride() == net[3].weight.stride()

def test_seeds():
    net = with_statistics(plain_net(), images)
    a,b,c = (fitted(net, {'0': ('spatial', 3), '5': ('svd', 4)}, images, most=500, seed=s, distill_steps=4).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)

def spied(n):
    "A network of `n` layers, and how often each of them has been passed"
    passed = Counter()
    class Spy(nn.Module):
        def __init__(self, i): super().__init__(); self.i = i
        def forward(self, x): passed[self.i] += 1; return x.tanh()
    return nn.Sequential(*(m for i in range(n) for m in (nn.Linear(6, 6), Spy(i)))),passed

@pytest.mark.parametrize('depth', [4, 16])
def test_each_layer_has_its_own_turn_and_each_module_few_runs(depth):
    net,passed = spied(depth)
    x,bars = torch.randn(50, 6),[]
    known = calibrate(net, list(x.split(25)), regression)
    known.settings = replace(known.settings, progress=lambda it: bars.append(len(it)) or it)
    passed.clear()
    fitted(net, {'0': ('svd', 2)}, known)
    assert bars == [depth]
    # three to trace, and for each of two batches once in either network: what follows a layer is not run in its turn. The dense network's last turn goes on to its end
    assert [passed[i] for i in range(depth)] == [3 + 2*2]*(depth-1) + [3 + 2]

def test_a_turn_ends_where_it_has_seen_enough():
    net,passed = spied(4)
    known = calibrate(net, torch.randn(20, 6), room=0)
    passed.clear()
    fitted(net, {'0': ('svd', 1)}, known)
    # three to trace; without room, layer i is passed in each turn of a later layer in both networks, and in its own turn by the dense network, which goes on to the next layer
    assert [passed[i] for i in range(4)] == [3 + 2*(3-i) + 1 for i in range(4)]

def bytes_alive():
    "What the tensors take that Python knows of"
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta]
    storages = [o.untyped_storage() for o in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())                # several may share one

@pytest.mark.parametrize('room', [0, 2**21, 2**30])
def test_what_is_kept_has_room(room):
    "The outputs of the wide layers take 16 MB for all batches, in either network"
    kept = []
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8))))
    data = list(torch.randn(8192, 8).split(512))
    known = calibrate(net, data, regression, max_size=64, most=512, room=room)       # no moments of 512 numbers
    before = bytes_alive()
    def watched(layers):
        for layer in layers:
            kept.append(bytes_alive() - before)
            yield layer
    known.settings = replace(known.settings, progress=watched)
    small = fitted(net, {n: ('svd', 8) for n in known}, known)
    weights = 3*sum(p.numel()*p.element_size() for p in net.parameters())            # a few copies of them
    assert len(kept) == 6 and .5*min(room, 8192*512*4) <= max(kept) <= room + weights
    assert miss(small, net, torch.cat(data)) < 1e-3                                  # at full rank, but not if one batch is fitted to the other's outputs

def test_a_loader_that_draws_anew_each_time_is_read_once():
    class Loader:
        def __iter__(self): yield from torch.randn(4, 50, 6)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    small = fitted(net, {n: ('svd', r) for n,r in (('0', 5), ('2', 4), ('4', 3))}, Loader())
    assert miss(small, net, torch.randn(100, 6)) < 1e-3 # the ridge's pull; inputs of one draw with outputs of another have nothing in common

def test_no_activation_or_graph_is_kept():
    seen,alive = [],[]
    class Spy(nn.Module):
        "A graph would keep its input"
        def forward(self, x):
            alive.append(sum(r() is not None for r in seen))
            seen.append(weakref.ref(x))
            return x.tanh()*x
    net = with_statistics(nn.Sequential(nn.Linear(8, 6), Spy(), nn.Linear(6, 4)), torch.randn(9, 8))
    small = fitted(net, {'0': ('svd', 2)}, list(torch.randn(40, 8).split(4)))
    assert max(alive[1:]) <= 2 # of the batch that is in hand, in the two models
    assert all(p.is_leaf for p in small.parameters())

# --- models of all kinds

def test_layers_without_data_and_models_without_a_choice():
    class Half(nn.Module):
        def __init__(self): super().__init__(); self.a,self.never,self.b = nn.Linear(6, 6),nn.Linear(6, 6),nn.Linear(6, 3)
        def forward(self, x): return self.b(self.a(x).relu())
    net,x = Half(),torch.randn(30, 6)
    res = fitted(net, {'a': ('svd', 2)}, x)
    assert torch.equal(res.never.weight, net.never.weight) and isinstance(res.a, FactoredLayer)
    assert miss(fitted(net, {}, x), net, x) < 1e-5
    with pytest.raises(ValueError, match="choices: no data reaches 'never'"): fitted(net, {'never': ('svd', 2)}, x)
    by_weight = decompose(net, FC_Decomposer(2), x)
    assert isinstance(by_weight.never, FactoredLayer) and 'no data reaches it' in by_weight.low_rank_plan['layers']['never']['reason']

def test_shared_layers_stay_shared():
    shared = nn.Linear(8, 8)
    net,x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(8, 3)),torch.randn(200, 8)
    res = fitted(net, {'0': ('svd', 3), '2': ('svd', 5)}, x)
    assert res[2] is res[4] and isinstance(res[2], FactoredLayer)
    plain = decompose(net, [FC_Decomposer({'0': 3, '2': 5})])
    assert miss(res, net, x) < miss(plain, net, x)

@pytest.mark.parametrize('args', [dict(memory_format=torch.channels_last), dict(dtype=torch.bfloat16)], ids=['channels_last', 'bf16'])
def test_memory_format_and_dtype_are_kept(args):
    net,x = with_statistics(plain_net(), images).to(**args),images.to(**args)
    choices = {'0': ('spatial', 4), '5': ('svd', 12), '10': ('svd', 4)}
    res,usual = fitted(net, choices, x),fitted(net.float().to(memory_format=torch.contiguous_format), choices, x.float().contiguous())
    net = net.to(**args)
    assert {p.dtype for p in res.parameters()} == {p.dtype for p in net.parameters()} and {b.dtype for b in res.buffers()} == {b.dtype for b in net.buffers()}
    for m in res.modules():
        if isinstance(m, nn.Conv2d) and 'memory_format' in args: assert m.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad(): assert (res(x).float() - usual(x.float())).norm() < (.05 if 'dtype' in args else 1e-3)*usual(x.float()).norm() # a few roundings of 2⁻⁹; of 2⁻²⁴, amplified by solves

def test_a_last_batch_of_one_changes_little():
    net = ViT()
    choices = {'blocks.0.proj': ('svd', 4), 'blocks.1.down': ('svd', 5)}
    a,b = (fitted(net, choices, tokens[:n]) for n in (64, 65))
    assert abs(miss(a, net, tokens) - miss(b, net, tokens)) < .1*miss(a, net, tokens)

def test_inputs_that_are_changed_in_place_afterwards():
    class Fork(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.head = nn.Linear(6, 8),nn.Linear(6, 8),nn.Linear(8, 3)
        def forward(self, x): x = x*1; a = self.a(x); x.relu_(); return self.head(a*self.b(x))
    net,x = Fork().double(),torch.randn(300, 6).double()
    for room in (0, 2**30): assert miss(fitted(net, {'a': ('svd', 6), 'b': ('svd', 6)}, x, room=room), net, x) < 1e-5 # as above; inputs seen too late would be wrong by tenths

def test_dictionaries_in_and_out():
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.fc,self.head = nn.Linear(6, 6),nn.Linear(6, 3)
        def forward(self, pixels): return {'logits': self.head(self.fc(input=pixels).relu())}
    net,data,loss = Named(),[dict(pixels=torch.randn(40, 6), labels=torch.zeros(40))],lambda o: o['logits'].square().sum()
    assert isinstance(fitted(net, {'fc': ('svd', 2)}, data, loss=loss).fc, FactoredLayer)
    alone = nn.Sequential(net.fc, nn.ReLU(), net.head)
    for kw in ({}, dict(distill_steps=2)): # the logits are what counts
        small,by_hand = fitted(net, {'fc': ('svd', 2)}, data, **kw),fitted(alone, {'0': ('svd', 2)}, data[0]['pixels'], **kw)
        assert torch.equal(small(data[0]['pixels'])['logits'], by_hand(data[0]['pixels']))

def test_weights_that_hooks_compute_stay_as_they_are():
    with pytest.warns(FutureWarning): net = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    x = torch.randn(50, 6)
    net(x) # whose weight is now no leaf, and cannot be copied by itself
    res = fitted(net, {'2': ('svd', 2)}, x, distill_steps=30)
    assert hasattr(res[0], 'weight_g') and res(x).shape == (50, 3)

@pytest.mark.parametrize('args, match', [(dict(most=0), 'most: 0 is not'), (dict(room=2.), 'room: 2.0 is not'), (dict(metric='plain'), "metric: 'plain' is not one of"),
    (dict(choices={'0': ('qr', 3)}), "choices: layer '0': 'qr' is not one of"), (dict(choices={'0': ('spatial', 2)}), "choices: layer '0': Linear has no two spatial axes"),
    (dict(choices={'no': ('svd', 3)}), "choices: no data reaches 'no'")])
def test_what_is_wrong_is_said(args, match):
    with pytest.raises(ValueError, match=match): fitted(nn.Sequential(nn.Linear(4, 4)), **(dict(choices={'0': ('svd', 2)}, data=torch.randn(5, 4)) | args))

# --- self-distillation

def test_distillation_leaves_flags_hooks_and_modes(trained):
    net,x,_ = trained
    small = fitted(net, low, x[:64])
    small.train(); small[1].eval(); small[0].weight.requires_grad_(False)
    small[3].register_forward_hook(lambda *a: None)
    before,teacher = state_of(small),state_of(net)
    res = distill(small, net, x[:64], steps=20)
    assert same(before, state_of(small)) and same(teacher, state_of(net))
    assert [p.requires_grad for p in res.parameters()] == [p.requires_grad for p in small.parameters()]
    assert [m.training for m in res.modules()] == [m.training for m in small.modules()] and all(p.grad is None for p in res.parameters())
    assert [len(m._forward_hooks) for m in res.modules()] == [len(m._forward_hooks) for m in small.modules()]
    assert all(torch.equal(b, dict(small.named_buffers())[n]) for n,b in res.named_buffers()) # BatchNorm in evaluation mode
    assert not all(torch.equal(p, q) for p,q in zip(res.parameters(), small.parameters()))

def test_distillation_that_does_harm_is_tried_again_and_then_left():
    net,x = with_statistics(plain_net(), images),images
    small = fitted(net, {'0': ('svd', 6)}, x)
    before = loss_increase(net, small, x)
    tries = []
    def progress(it):
        tries.append(0)
        return it
    better = distill(small, net, x, 30, lr=3e-2, progress=progress)
    assert len(tries) == 2 and loss_increase(net, better, x) < before
    with pytest.warns(UserWarning, match='distill: 3 steps took the model further from its teacher, at learning rates of 1 and 0.1'): same = distill(small, net, x, 3, lr=1.)
    assert all(torch.equal(a, b) for a,b in zip(same.state_dict().values(), small.state_dict().values())) and same is not small

def test_hooks_are_gone_after_an_interrupted_distillation():
    net = with_statistics(res_net(), images)
    small = fitted(net, {'2.conv1': ('svd', 3)}, images)
    def bar(it):
        for i in it:
            if i == 2: raise KeyboardInterrupt
            yield i
    before = state_of(net)
    with pytest.raises(KeyboardInterrupt): distill(small, net, images, steps=5, progress=bar)
    assert same(before, state_of(net)) and not any(m._forward_hooks for m in small.modules())

@pytest.mark.parametrize('steps', [1, 2, 3])
def test_a_few_steps(steps):
    net = with_statistics(res_net(), images)
    small = decompose(net, [ConvDecomposer('svd', 2), FC_Decomposer(2)])              # with much left to learn
    res = distill(small, net, images, steps=steps, lr=1e-2)
    assert res(images).isfinite().all() and not torch.equal(res[2].conv1[0].weight, small[2].conv1[0].weight)
    assert loss_increase(net, res, images) < loss_increase(net, small, images) or steps == 1 # a schedule of one step takes a tiny one

def test_regression_of_one_value_with_a_last_batch_of_one():
    net,x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)),torch.randn(65, 8)
    small = fitted(net, {'0': ('svd', 3)}, x, loss=regression)
    assert miss(distill(small, net, x, steps=40, loss=regression), net, x) < miss(small, net, x)

def test_the_loss_of_class_scores_is_the_divergence_per_sample_and_position():
    a,b = torch.randn(3, 4, dtype=torch.float64),torch.randn(3, 4, dtype=torch.float64)
    p,q = (b/2).softmax(1),(a/2).softmax(1)
    want = 4*(p*(p/q).log()).sum(1).mean()                                       # the squared temperature
    assert abs(classification.distance(a, b) - want) < 1e-12
    wide = lambda t: t[:,:,None,None].expand(3, 4, 2, 5)
    assert abs(classification.distance(wide(a), wide(b)) - want) < 1e-12

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_distillation_in_half_precision(dtype, trained):
    net,x,(other,_) = trained
    small = decompose(net, ConvDecomposer('svd', {'3.*': 4, '4.*': 4}))             # with much left to learn
    want,half = distill(small, net, x, 40),copy.deepcopy(small).to(dtype)
    res = distill(half, copy.deepcopy(net).to(dtype), x.to(dtype), 40)
    assert {t.dtype for t in (*res.parameters(), *res.buffers(), *half.parameters()) if t.is_floating_point()} == {dtype}
    a,b,c = (divergence(m.float(), net, other) for m in (want, res, half))
    assert a < .5*c and b == pytest.approx(a, rel=.1)                 # trained in float32 like it, then rounded

def test_flips_and_crops():
    x,gen = torch.arange(2*3*6*6.).view(2, 3, 6, 6),torch.Generator().manual_seed(0)
    outs = [flip_and_crop(x, gen, pad=2) for _ in range(30)]
    assert all(o.shape == x.shape for o in outs)
    inside = {tuple(o[0,0,2:4,2:4].flatten().tolist()) for o in outs}
    assert len(inside) > 10                                                       # of 25 shifts and two directions

class PreActivation(nn.Module):
    "A residual block whose BatchNorm comes first, so that what makes its input goes into the sum as well"
    def __init__(self, c):
        super().__init__()
        self.bn1,self.conv1,self.bn2,self.conv2 = nn.BatchNorm2d(c),nn.Conv2d(c, c, 3, padding=1, bias=False),nn.BatchNorm2d(c),nn.Conv2d(c, c, 3, padding=1, bias=False)
    def forward(self, x): return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

def test_a_mean_is_corrected_in_a_norm_only_if_nothing_is_added_to_its_input():
    net = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), PreActivation(8), PreActivation(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), images)
    uses = trace(net, ['0', '1.conv1', '1.conv2', '2.conv1', '2.conv2'], (images[:2],))
    assert [(u.norm, u.add) for u in uses.values()] == [(None, 0), ('1.bn2', None), (None, 0), ('2.bn2', None), (None, 1)]
    res = fitted(net, {'0': ('spatial', 3)}, images)
    x = torch.randn(20, 8, 4, 4)
    assert miss(res[1].bn1, net[1].bn1, x) < 1e-5 # other statistics, but with a weight and a bias that make up for them

# --- what it does to the loss

def test_the_increase_of_the_loss_is_per_sample_and_summed_over_positions():
    dense,other = (nn.Conv2d(3, 5, 1) for _ in 'ab') # a prediction at every position
    with torch.no_grad(): p,q = (m(images).log_softmax(1) for m in (dense, other))
    for data in (images, list(images.split([50, 46]))): assert loss_increase(dense, other, data) == pytest.approx(float((p.exp()*(p-q)).sum()/96), rel=1e-5)
    with torch.no_grad(): assert loss_increase(dense, other, images, regression) == pytest.approx(float(.5*(dense(images)-other(images)).square().sum()/96), rel=1e-5)
    assert loss_increase(dense, other, images, lambda out: out.sum()) is None

def test_a_loss_function_may_say_which_axis_is_that_of_the_classes():
    class Last(nn.Module): # class scores on the last axis, and a state, as language models have it
        def __init__(self): super().__init__(); self.l = nn.Linear(8, 5)
        def forward(self, x): return self.l(x),x
    dense,other = Last(),Last()
    def own(out): return None
    own.axis = -1
    with torch.no_grad(): a,b = (m(tokens)[0] for m in (dense, other))
    assert loss_increase(dense, other, tokens, own) == pytest.approx(float(F.kl_div(b.log_softmax(2), a.log_softmax(2), log_target=True, reduction='sum'))/97, rel=1e-5)
    own.axis = None
    assert loss_increase(dense, other, tokens, own) == pytest.approx(float(.5*(a-b).square().sum())/97, rel=1e-5)

def test_measuring_the_loss_leaves_everything_as_it_was():
    net = res_net().train() # its BatchNorm would change its statistics
    before,state = {k:v.clone() for k,v in net.state_dict().items()},torch.get_rng_state()
    loader = DataLoader(TensorDataset(images, images), 32, shuffle=True)
    assert loss_increase(net, net, loader) == 0
    assert net.training and torch.equal(state, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    want,half = loss_increase(res_net(), net, images),loss_increase(res_net().bfloat16(), net.bfloat16(), images.bfloat16())
    assert half == half and type(half) is type(want) is float

# --- BatchNorm

def test_statistics_are_fitted_where_layers_do_not_make_up_for_each_other(trained):
    net,x,(other,_) = trained
    small = {n: ('spatial' if n != '5' else 'svd', 2) for n in low}
    with_norms = fitted(net, small, x, sequential=False)
    without = copy.deepcopy(with_norms)
    for n,m in norms(without).items(): m.load_state_dict(net.get_submodule(n).state_dict())
    assert divergence(with_norms, net, other) < .85*divergence(without, net, other)
    for n,m in norms(with_norms).items():
        old = net.get_submodule(n)
        assert m.training == old.training and m.momentum == old.momentum and m.num_batches_tracked == old.num_batches_tracked and torch.equal(m.weight, old.weight)
    assert not torch.equal(with_norms[4].bn2.running_var, net[4].bn2.running_var)

def test_statistics_are_those_of_the_changed_network():
    net = with_statistics(plain_net(bias=False), images)
    res = fitted(net, {'0': ('svd', 4), '5': ('svd', 3)}, images, sequential=False)
    assert min(res[i].running_var.div(net[i].running_var).min() for i in (1, 6)) > .0999 # what hardly varies any more is not blown up
    def both(m): # its second BatchNorm gets what the first has normalised by the batch
        h = m[0](images)
        h = F.batch_norm(h, None, None, m[1].weight, m[1].bias, True)
        return m[0](images),m[5](m[4](m[3](F.relu(h))))
    with torch.no_grad(): was,now = both(net),both(res)
    for i,(a,b) in zip(('1', '6'), zip(was, now)):
        want = net.get_submodule(i).running_mean + b.mean((0, 2, 3)) - a.mean((0, 2, 3)),net.get_submodule(i).running_var*(b.var((0, 2, 3))/a.var((0, 2, 3))).clamp(.1, 10)
        for got,w in zip((res.get_submodule(i).running_mean, res.get_submodule(i).running_var), want): torch.testing.assert_close(got, w, rtol=.05 if i == '6' else 1e-4, atol=1e-4) # two batches normalised apart are nearly one

def test_norms_that_are_not_reached_see_one_value_or_keep_no_statistics_stay():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a,self.n,self.b,self.free,self.never = nn.Linear(6, 6),nn.BatchNorm1d(6),nn.Linear(6, 3),nn.BatchNorm1d(3, track_running_stats=False, affine=False),nn.BatchNorm1d(4)
        def forward(self, x): x = self.b(self.n(self.a(x)).relu()); return self.free(x) if len(x) > 1 else x
    net = with_statistics_of(Net())
    res = fitted(net, {'a': ('svd', 2)}, torch.randn(65, 6), sequential=False)     # the last batch holds one sample
    assert torch.equal(res.never.running_var, net.never.running_var) and res.free.running_mean is None
    assert res.n.running_var.isfinite().all() and not torch.equal(res.n.running_var, net.n.running_var)
    assert not any(m._forward_hooks for m in (*net.modules(), *res.modules()))

def with_statistics_of(net):
    for m in norms(net).values():
        if m.running_mean is not None: nn.init.normal_(m.running_mean); nn.init.uniform_(m.running_var, .5, 2)
    return net.eval()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision(dtype):
    net = with_statistics(plain_net(), images)
    choices = {'0': ('svd', 4), '5': ('svd', 8)}
    want,got = fitted(net, choices, images, sequential=False),fitted(copy.deepcopy(net).to(dtype), choices, images.to(dtype), sequential=False)
    for n,m in norms(got).items():
        assert m.running_var.dtype == dtype
        torch.testing.assert_close(m.running_var.float(), want.get_submodule(n).running_var, rtol=.05, atol=.01) # sums of a hundred products, each rounded to 2⁻⁹
