"The decomposers on networks: figures that are known, ranks, plans, names, one decomposer after another"
import copy, inspect, json, warnings
from fnmatch import fnmatch

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from fasterai_lr.budget import Budget
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose, factorize, project_
from fasterai_lr.layers import FactoredLayer, Geometry, factored_layers, recompose
from fasterai_lr.rank import EVBMF, Energy
from fasterai_lr.schemes import schemes
from helpers import n_params, records

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('seeded')

def built(make):
    "The model that `make` makes, filled with cheap random numbers instead of by its own slow initialisation"
    with torch.device('meta'): model = make()
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.reset_parameters()
            elif hasattr(m, 'weight'): m.weight.normal_(std=m.weight[0].numel()**-.5); m.bias.zero_()
    return model

# --- figures that are known

def vgg16_bn_and_its_half():
    model = built(lambda: models.vgg16_bn(num_classes=2))
    small = FC_Decomposer().decompose(model)
    assert (n_params(model), n_params(small)) == (134_277_186, 91_281_476)
    layers = {n: [(l.in_features, l.out_features, l.bias is not None) for l in m] for n,m in factored_layers(small).items()}
    assert layers == {'classifier.0': [(25088, 2048, False), (2048, 4096, True)],
                      'classifier.3': [(4096, 2048, False), (2048, 4096, True)],
                      'classifier.6': [(4096, 1, False), (1, 2, True)]}
    assert sum(r['params_before'] - r['params_after'] for r in records(small).values()) == 134_277_186 - 91_281_476
    return model,small

class FakeSVD:
    "Zeros for factors: the shapes of a decomposition without its time"
    def __init__(self, A, name, exact=True): self.shape = A.shape
    def truncate(self, rank): return torch.zeros(self.shape[0], rank), torch.zeros(rank), torch.zeros(rank, self.shape[1])
    def error(self, rank): return 1.
    spectrum = torch.ones(1)

def test_the_linear_layers_of_vgg16_bn(monkeypatch):
    monkeypatch.setattr('fasterai_lr.schemes.SVD', FakeSVD)
    vgg16_bn_and_its_half()

@pytest.mark.slow
def test_the_linear_layers_of_vgg16_bn_with_their_weights():
    model,small = vgg16_bn_and_its_half()
    norm = lambda w: torch.linalg.vector_norm(w.detach(), dtype=torch.float64)
    for n,r in records(small).items(): # the errors are those of the weights that were made
        dense,new = model.get_submodule(n).weight,small.get_submodule(n).weight
        assert abs(norm(dense-new)/norm(dense) - r['error']) < 1e-5 # a float32 decomposition, errors summed in float64

def test_the_size_of_vgg19_by_tucker_at_half_of_both_ranks():
    with torch.device('meta'): features = models.vgg19().features # a size needs no weights
    scheme = lambda m: schemes['tucker'](Geometry.of(m))
    rank_of = lambda m, wish: scheme(m).solver(m.weight).resolve(wish)
    saved = 0
    for n,m in features.named_children():
        if isinstance(m, nn.Conv2d) and n != '0':
            rank = rank_of(m, .5)
            assert rank == (m.out_channels//2, m.in_channels//2)
            saved += n_params(m) - scheme(m).n_params(rank)
    assert (n_params(features), n_params(features)-saved) == (20_024_384, 7_278_656)

@pytest.mark.slow
def test_vgg19_by_tucker_at_half_of_both_ranks():
    features = built(models.vgg19).features
    small = ConvDecomposer('tucker', rank=.5).decompose(features, exclude='0')
    assert (n_params(features), n_params(small)) == (20_024_384, 7_278_656)
    assert round(n_params(small)/n_params(features), 4) == .3635
    assert records(small)['0']['reason'] == 'left out by layers or exclude' and len(factored_layers(small)) == 15
    assert small(torch.randn(1, 3, 32, 32)).shape == (1, 512, 1, 1)

class AlexNetCIFAR(nn.Module):
    "A small network in the manner of AlexNet for images of 32×32"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(dict(conv1=nn.Conv2d(3, 64, 5, padding=2), pool=nn.MaxPool2d(2), conv2=nn.Conv2d(64, 96, 5, padding=2),
                                         fc1=nn.Linear(96*8*8, 256), fc2=nn.Linear(256, 128), fc3=nn.Linear(128, 10)))
    def forward(self, x):
        l = self.layers
        for n in ('conv1', 'conv2'): x = l.pool(F.relu(l[n](x)))
        return l.fc3(F.relu(l.fc2(F.relu(l.fc1(x.flatten(1))))))

def test_an_alexnet_slice_wise_and_by_cp_at_the_evbmf_rank():
    net,x = AlexNetCIFAR(),torch.randn(2, 3, 32, 32)
    with torch.no_grad(): # a second kernel that is a sum of 11 terms and noise
        conv2 = net.layers.conv2.weight
        conv2.copy_(torch.einsum('or,ir,hr,wr->oihw', *(torch.randn(n, 11) for n in conv2.shape))).div_(conv2.std()).add_(.3*torch.randn_like(conv2))
    sliced = ConvDecomposer('slice', rank=1).decompose(net, layers='layers.conv1')
    assert list(factored_layers(sliced)) == ['layers.conv1']
    first,shuffle,second = sliced.layers.conv1
    assert (first.kernel_size, first.groups, second.kernel_size, second.groups) == ((5,1), 3, (1,5), 64)
    assert first.out_channels == second.in_channels == 3*64 and n_params(sliced.layers.conv1) == 3*64*(5+5) + 64
    both = ConvDecomposer('cp', rank={'layers.conv2': EVBMF(multiple_of=8)}).decompose(sliced)
    assert [m.scheme for m in factored_layers(both).values()] == ['slice', 'cp']
    assert both.layers.conv2.rank == 16 # 11 terms, rounded up
    weight = both.layers.conv2.weight
    assert (weight-conv2).norm()/conv2.norm() < .35 # the noise is 0.3/√1.09 = 0.29 of the kernel
    assert both(x).shape == net(x).shape and n_params(both) < n_params(sliced) < n_params(net)
    assert {n: r['status'] for n,r in records(both).items()} == {'layers.conv1': 'factored', 'layers.conv2': 'factored'}

def test_single_convolutions():
    conv,x = nn.Conv2d(3, 64, 7, stride=2, padding=3),torch.randn(1, 3, 32, 32)
    cp = ConvDecomposer('cp', rank=16).decompose(conv)
    assert [(l.in_channels, l.out_channels, l.groups) for l in cp] == [(3,16,1), (16,16,16), (16,16,16), (16,64,1)]
    tucker = ConvDecomposer('tucker', rank=(16,16)).decompose(conv)
    assert [(l.in_channels, l.out_channels) for l in tucker] == [(3,3), (3,16), (16,64)]
    assert records(tucker)['']['rank'] == [16,3] and records(tucker)['']['reason'] == 'rank (16, 16) capped to (16, 3)'
    for new in (cp, tucker): assert isinstance(new, FactoredLayer) and new(x).shape == conv(x).shape

def test_projection_of_a_resnet():
    model,x = models.resnet18(num_classes=10).eval(),torch.randn(2, 3, 64, 64)
    shapes = {n: p.shape for n,p in model.state_dict().items()}
    rest = {n: p.clone() for n,p in model.state_dict().items() if not fnmatch(n, 'layer1.0.conv?.weight')}
    convs = [model.layer1[0].conv1, model.layer1[0].conv2]
    best = [schemes['svd'](Geometry.of(c)).solver(c.weight.detach().clone()).error(8)*c.weight.norm() for c in convs]
    before = [c.weight.detach().clone() for c in convs]
    assert project_(model, rank=8, layers=['layer1.0.conv1', 'layer1.0.conv2']) is model
    assert {n: p.shape for n,p in model.state_dict().items()} == shapes
    for n,p in rest.items(): assert torch.equal(model.state_dict()[n], p), n
    for c,w,e in zip(convs, before, best):
        s = torch.linalg.svdvals(c.weight.detach().flatten(1).double())
        assert s[7] > 1e-2*s[0] and s[8] < 1e-5*s[0] # exactly 8: what is left is float32 rounding
        assert abs((c.weight-w).norm() - e) < 1e-4*w.norm() # and it is the nearest
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    low = [c.weight.detach().clone() for c in convs]
    opt.step()
    assert all(c.weight.requires_grad and not torch.equal(c.weight, w) for c,w in zip(convs, low))
    assert torch.linalg.svdvals(convs[0].weight.detach().flatten(1))[8] > 1e-6 # training does not keep the rank

@pytest.mark.parametrize('rank, layers', [(32, None), (1., None), (16, ['1.1']), (Energy(1.), '0')])
def test_a_projection_that_changes_nothing_says_so(rank, layers):
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match='^rank: .*: every weight has this rank already; nothing was changed$'):
        assert project_(model, rank, layers) is model
    assert all(torch.equal(a, b) for a,b in zip(before, model.parameters()))

def normed(i, o): return nn.utils.parametrizations.weight_norm(nn.Linear(i, o))

@pytest.mark.parametrize('layers, rank, why', [
    (lambda: [nn.Linear(24, 32)], 'evbmf', 'EVBMF finds nothing above the noise'),
    (lambda: [normed(8, 8), normed(8, 4)], 2, 'every weight is computed from other parameters'),
    (lambda: [nn.Linear(24, 32), normed(32, 4), *[nn.Linear(4, 2) for _ in range(4)]], {'0': 'evbmf', '*': 2}, r"EVBMF finds nothing above the noise \('0'\), "
     r"its weight is computed from other parameters \('1'\), its weight has this rank already \('2', '3', '4', …\)")])
def test_a_projection_that_changes_nothing_says_why(layers, rank, why):
    model = nn.Sequential(*layers())
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=f'^rank: .*: {why}; nothing was changed$'): project_(model, rank)
    assert all(torch.equal(v, before[n]) for n,v in model.state_dict().items())

def test_a_projection_of_no_layer_says_so():
    with pytest.warns(UserWarning, match="^rank: 3: no layer was chosen; nothing was changed$"): project_(nn.Sequential(nn.ReLU()), 3)
    with pytest.warns(UserWarning, match="^rank: {'0': 3}: no layer was chosen; nothing was changed$"): project_(net(), {'0': 3}, layers='1.*')

def test_a_projection_that_changes_a_layer_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        project_(net(), 20) # 16 is the full rank of one of them

def vgg_bn():
    "VGG-16 with batch normalisation, an eighth as wide"
    layers,inp = [],3
    for out,n in ((8,2), (16,2), (32,3), (64,3), (64,3)):
        for _ in range(n): layers += [nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]; inp = out
        layers.append(nn.MaxPool2d(2))
    fc = lambda i, o: [nn.Linear(i, o), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Sequential(*fc(64*4, 512), *fc(512, 512), nn.Linear(512, 2)))

@pytest.mark.parametrize('method', list(schemes))
def test_one_decomposer_after_the_other(method, monkeypatch):
    monkeypatch.setattr(schemes['cp'], 'max_sweeps', 20) # what is compared here does not need the best factors
    model,x = vgg_bn().eval(),torch.randn(2, 3, 64, 64)
    fc,conv = FC_Decomposer(),ConvDecomposer(method)
    one,two,three = conv.decompose(fc.decompose(model)),fc.decompose(conv.decompose(model)),decompose(model, [fc, conv])
    for m in (two, three):
        assert records(m) == records(one) and list(records(m)) == list(records(one))
        assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), one.state_dict().values(), strict=True))
    names = [n for n,m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert list(records(one)) == names # every layer has its row, in the order of the model
    assert n_params(one) == n_params(model) - sum(r['params_before'] - r['params_after'] for r in records(one).values())
    assert n_params(one) < n_params(model) and one(x).shape == model(x).shape
    assert json.loads(json.dumps(one.low_rank_plan)) == one.low_rank_plan # plain data
    back = recompose(one)
    assert not factored_layers(back) and not hasattr(back, 'low_rank_plan')
    assert torch.allclose(back(x), one(x), rtol=1e-4, atol=1e-5) # float32, sixteen layers deep
    assert [repr(m) for m in back.modules()] == [repr(m) for m in model.modules()]

# --- which layers, which ranks

def net(): return nn.Sequential(nn.Conv2d(8, 32, 3), nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1)), nn.Flatten(), nn.Linear(64, 32))
def factored(m): return {n: r['rank'] for n,r in records(m).items() if r['status'] == 'factored'}

def test_layers_and_exclude_by_name_and_glob():
    conv = lambda **kw: list(factored(ConvDecomposer('svd', rank=.25).decompose(net(), **kw)))
    assert conv() == ['0', '1.0', '1.1']
    assert conv(layers='1.*') == ['1.0', '1.1'] and conv(layers=['0', '*.1']) == ['0', '1.1']
    assert conv(exclude='1.0') == ['0', '1.1'] and conv(layers='1.*', exclude=['1.1']) == ['1.0']
    rows = records(ConvDecomposer('svd', rank=.25).decompose(net(), exclude=['1.*']))
    assert [r['reason'] for r in rows.values()] == ['', *['left out by layers or exclude']*2]

def test_ranks_by_name():
    ranks = {'1.0': 4, '1.*': 3, '0': Energy(.5)}
    new = ConvDecomposer('svd', rank=ranks).decompose(net())
    assert factored(new).items() >= {'1.0': 4, '1.1': 3}.items() # an exact name goes before a glob
    new = ConvDecomposer('tucker', rank={'1.0': (6, .25)}).decompose(net())
    assert factored(new) == {'1.0': [6, 8]} and records(new)['0']['reason'] == 'not named in rank'

def test_ratios_are_fractions_of_the_full_rank():
    fc = lambda **kw: factored(FC_Decomposer(rank=7).decompose(nn.Linear(100, 50), **kw)).get('')
    assert fc() == 7 and fc(rank_ratio=.2) == 10 and fc(percent_removed=.8) == 10 # 0.2·50 in floating point is 10 or just below
    assert fc(percent_removed=.9) == 5 and fc(rank_ratio=.001) == 1
    assert FC_Decomposer().SVD(nn.Linear(100, 50), percent_removed=0).rank == 50

def test_same_size_is_replaced_only_by_a_fraction_of_a_linear_layer():
    linear,conv = nn.Linear(32, 32),nn.Conv2d(32, 32, 1)
    assert factored(FC_Decomposer(.5).decompose(linear)) == {'': 16}
    assert n_params(FC_Decomposer(.5).decompose(linear)) == n_params(linear)
    assert not factored(FC_Decomposer(16).decompose(linear)) and not factored(ConvDecomposer('svd', .5).decompose(conv))
    assert not factored(FC_Decomposer(.6).decompose(linear))

def test_noise_stays_dense_by_evbmf():
    noise,signal = nn.Linear(200, 100),nn.Linear(200, 100)
    with torch.no_grad():
        noise.weight.normal_()
        signal.weight.normal_().add_(3*torch.randn(100, 5)@torch.randn(5, 200))
    new = FC_Decomposer('evbmf').decompose(nn.Sequential(noise, signal))
    assert factored(new) == {'1': 5} and records(new)['0']['reason'] == 'EVBMF finds nothing above the noise'

def test_an_integer_above_the_full_rank_leaves_a_layer_dense_unless_it_is_named():
    new = ConvDecomposer('tucker', rank=16).decompose(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)))
    assert factored(new) == {'1': [16,16]} and 'above its full rank' in records(new)['0']['reason']
    for rank in ({'0': 16}, {'0': (16,16)}):
        make = lambda rank=rank: ConvDecomposer('tucker', rank=rank).decompose(nn.Sequential(nn.Conv2d(3, 64, 3)))
        if isinstance(rank['0'], tuple): assert factored(make()) == {'0': [16,3]} # pairs are capped
        else:
            with pytest.raises(ValueError, match=r"rank: '0': rank \(16, 16\) is above its full rank \(27, 3\)"): make()
    assert factored(ConvDecomposer('tucker', rank={'*': 16}).decompose(nn.Sequential(nn.Conv2d(3, 64, 3)))) == {} # a glob names none

def test_depthwise_and_other_hopeless_layers_are_listed():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv1d(16, 16, 3), nn.Conv2d(64, 128, 3))
    reasons = lambda method: [r['reason'] for r in records(ConvDecomposer(method).decompose(model)).values()]
    assert reasons('spatial')[:2] == ['a depthwise convolution has nothing to factor', 'Conv1d has no two spatial axes to separate']
    assert reasons('slice')[2] == 'it would need 8,192 channels in between, more than 4,096'
    assert reasons('svd')[1:] == ['', '']

# --- the interface

def test_the_model_is_read_only():
    model = vgg_bn()
    before,ids = {n: p.clone() for n,p in model.state_dict().items()},[id(m) for m in model.modules()]
    what = [FC_Decomposer(), ConvDecomposer('spatial', .25)]
    rows = factorize(model, what).plan.plain()
    new = decompose(model, what)
    assert [id(m) for m in model.modules()] == ids and not hasattr(model, 'low_rank_plan') and model.training
    assert all(torch.equal(p, before[n]) for n,p in model.state_dict().items())
    assert new.low_rank_plan == rows
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()} # and nothing is shared with it

def test_factors_can_be_had_without_a_new_model():
    model,seen = net(),[]
    change = factorize(model, [FC_Decomposer(.25), ConvDecomposer('svd', .25)], progress=lambda o: (seen.append(f.name) or f for f in o))
    assert list(change.modules) == ['3', '0', '1.0', '1.1'] == seen
    assert list(change.plan.layers) == ['0', '1.0', '1.1', '3'] and all(isinstance(m, FactoredLayer) for m in change.modules.values())

def test_the_first_decomposer_that_factors_a_layer_has_it():
    what = [ConvDecomposer('cp', rank={'0': 4}), ConvDecomposer('slice', rank=1), ConvDecomposer('svd', rank=.25)]
    new = decompose(net(), what)
    assert {n: r['scheme'] for n,r in records(new).items()} == {'0': 'cp', '1.0': 'slice', '1.1': 'svd'}

@pytest.mark.parametrize('what', ['svd', FC_Decomposer, [FC_Decomposer(), .5], 3])
def test_what_is_no_decomposer(what):
    with pytest.raises(TypeError, match='what: '): decompose(net(), what)

@pytest.mark.parametrize('call, message', [
    (lambda: FC_Decomposer(rnk=.5), r"^rnk=0.5: Decomposer has no argument of this name; did you mean 'rank'\?$"),
    (lambda: ConvDecomposer('svd', rnk=.5), r"^rnk=0.5: ConvDecomposer has no argument of this name; did you mean 'rank'\?$"),
    (lambda: ConvDecomposer(scheme='svd'), "^scheme='svd': ConvDecomposer has no argument of this name; it takes method, rank, force$"),
    (lambda: Budget(mac=.5), r"^mac=0.5: Budget has no argument of this name; did you mean 'macs'\?$"),
    (lambda: Budget(flops=.5), '^flops=0.5: Budget has no argument of this name; it takes params, macs, latency, max_drop$')])
def test_a_wrong_keyword_names_the_right_one(call, message):
    with pytest.raises(TypeError, match=message): call()

def test_no_signature_hides_its_arguments_in_kwargs():
    assert list(inspect.signature(FC_Decomposer).parameters) == ['rank', 'force']
    assert list(inspect.signature(ConvDecomposer).parameters) == ['method', 'rank', 'force']
    assert list(inspect.signature(Budget).parameters) == ['params', 'macs', 'latency', 'max_drop']
