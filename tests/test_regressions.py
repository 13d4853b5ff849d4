"What decomposing a model is known to break, one test each: geometry, sharing, attention, dtypes, copies, exports, bad input"
import copy, warnings

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision import models

from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose, project_
from fasterai_lr.layers import FactoredLayer, Geometry, factored_layers, recompose, replace_layers, replace_layers_
from fasterai_lr.schemes import schemes
from helpers import apart, n_params, records

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('seeded')
reasons = lambda m: {n: r['reason'] for n,r in records(m).items()}
every = [FC_Decomposer(.25), ConvDecomposer('svd', .25)]

# --- geometry

exact = dict(svd=24, spatial=36, tucker=(24,12), cp=108, slice=3) # of a 12→24 layer with a 3×3 kernel

@pytest.mark.parametrize('method', list(schemes))
@pytest.mark.parametrize('kw', [dict(), dict(dilation=2), dict(padding='same'), dict(padding='same', dilation=3), dict(padding=(2,1), padding_mode='reflect'),
                                dict(padding=1, padding_mode='circular', stride=2), dict(padding=2, padding_mode='replicate', dilation=2), dict(bias=False, stride=(1,2))])
def test_exact_at_full_rank(method, kw):
    layer,x = nn.Conv2d(12, 24, 3, **kw).double(),torch.randn(2, 12, 11, 9).double()
    new = ConvDecomposer(method, {'': exact[method]}, force=True).decompose(layer)
    assert new.rank == exact[method] and apart(new(x), layer(x)) <= 1e-12 # float64
    low = ConvDecomposer(method, 1).decompose(layer)
    assert low(x).shape == layer(x).shape and (low.bias is None) == (layer.bias is None)

def test_the_rank_is_not_capped_at_the_smaller_number_of_channels():
    layer,x = nn.Conv2d(4, 30, 3),torch.randn(1, 4, 8, 8)
    new = ConvDecomposer('svd', force=True).decompose(layer, percent_removed=0)
    assert new.rank == 30 and apart(new(x), layer(x)) <= 1e-5 # min(out, in) would be 4

def test_a_small_linear_layer_does_not_grow():
    for n,m in [(32,32), (8,8), (10,3), (1,5), (5,1), (64,10)]:
        for p in (.1, .3, .5, .7, .9):
            layer = nn.Linear(n, m)
            assert n_params(FC_Decomposer().decompose(layer, percent_removed=p)) <= n_params(layer)

@pytest.mark.parametrize('layer,x', [(nn.Linear(8, 8, bias=False), (3,8)), (nn.Linear(8, 6), (2,5,8)), (nn.Linear(8, 6), (8,)), (nn.Conv1d(8, 8, 3, bias=False), (2,8,9)),
                                     (nn.Conv2d(8, 8, 3, bias=False), (8,7,7)), (nn.ConvTranspose2d(8, 8, 3, bias=False), (2,8,4,4))])
@pytest.mark.parametrize('method', ['svd', 'tucker', 'cp'])
def test_root_layers_without_bias_unbatched_and_on_sequences(method, layer, x):
    dec = FC_Decomposer if isinstance(layer, nn.Linear) else lambda **kw: ConvDecomposer(method, **kw)
    new,x = dec(rank=2).decompose(layer),torch.randn(x)
    assert isinstance(new, FactoredLayer) and (new.bias is None) == (layer.bias is None)
    assert new(x).shape == layer(x).shape and apart(new(x), recompose(new)(x)) <= 1e-5

# --- sharing

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.b,self.again = self.a[0],nn.ModuleList([self.a[0], self.a])
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3))]*2) # the parent is shared, too
    def forward(self, x): return self.again[1](self.again[0](self.b(self.a(x))))

@pytest.mark.parametrize('in_place', [False, True])
def test_a_shared_layer_is_replaced_everywhere_by_one(in_place):
    model,x = Shared(),torch.randn(3, 16)
    new = FC_Decomposer(.25).decompose(model)
    if in_place: new = replace_layers_(model, {'b': new.b}) # any of its names
    assert isinstance(new.b, FactoredLayer) and new.a[0] is new.b and new.again[0] is new.b and new.again[1] is new.a
    assert not [m for n,m in new.named_modules() if type(m) is nn.Linear and not n.startswith('a.0.')]
    assert n_params(new) == 2*4*16 + 16 + n_params(model.blocks) and apart(new(x), recompose(new)(x)) <= 1e-5
    if in_place: return
    assert list(records(new)) == ['a.0']
    back = recompose(new)
    assert back.again[0] is back.b and type(back.b) is nn.Linear
    assert list(factored_layers(ConvDecomposer('svd', .25).decompose(model))) == ['blocks.0.0']

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.body,self.head = nn.Embedding(50, 16),nn.Linear(16, 16),nn.Linear(16, 50, bias=False)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.body(self.emb(x)))

def test_tied_weights_stay_dense_and_tied():
    new = FC_Decomposer(.25).decompose(Tied())
    assert new.head.weight is new.emb.weight and type(new.head) is nn.Linear
    assert isinstance(new.body, FactoredLayer) and 'tied' in reasons(new)['head']
    new(torch.tensor([[1, 2]])).sum().backward()
    one,other = nn.Linear(8, 8),nn.Linear(8, 8)
    other.bias = one.bias # tied by the bias alone
    assert all('tied' in r for r in reasons(FC_Decomposer(.25).decompose(nn.Sequential(one, other))).values())

# --- layers that something else reads or wraps

class Patched(nn.Linear):
    def forward(self, x): return super().forward(x) + 1

def weird():
    "{name: a 16→16 linear layer that is not just one}"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # the old weight_norm is deprecated, and still met
        make = dict(weight_norm=nn.utils.weight_norm(nn.Linear(16, 16)), spectral_norm=nn.utils.spectral_norm(nn.Linear(16, 16)))
    make |= dict(parametrized=parametrizations.weight_norm(nn.Linear(16, 16)), orthogonal=parametrizations.orthogonal(nn.Linear(16, 16)),
                 pruned=prune.l1_unstructured(nn.Linear(16, 16), 'weight', .5), subclass=Patched(16, 16))
    for hook in ('forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook'):
        make[hook] = nn.Linear(16, 16)
        getattr(make[hook], f'register_{hook}')(lambda *a: None)
    make['replaced'] = nn.Linear(16, 16)
    make['replaced'].forward = lambda x: x
    return make

@pytest.mark.parametrize('name,word', dict(weight_norm='hook', spectral_norm='hook', parametrized='parametrized', orthogonal='parametrized', pruned='hook', subclass='subclass',
    forward_hook='hooks', forward_pre_hook='hooks', full_backward_hook='hooks', full_backward_pre_hook='hooks', replaced='forward').items())
def test_a_layer_that_is_more_than_a_layer_stays_dense(name, word):
    layer = weird()[name]
    x = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 16), layer).eval()
    new = FC_Decomposer(.25).decompose(model)
    assert type(new[1]) is type(layer) and isinstance(new[0], FactoredLayer)
    assert word in reasons(new)['1'] and records(new)['1']['status'] == 'dense'
    assert apart(new[1](x), layer(x)) <= 1e-5
    before = copy.deepcopy(layer.state_dict())
    project_(model, rank=2)
    if name in ('weight_norm', 'spectral_norm', 'parametrized', 'orthogonal', 'pruned'): # nothing to project where the weight is computed
        assert all(torch.equal(v, before[k]) for k,v in layer.state_dict().items())
    x = x.requires_grad_() # as in training
    new(x).sum().backward()
    assert x.grad is not None
    if type(layer) is nn.Linear:
        with pytest.raises(ValueError, match=word): FC_Decomposer().SVD(layer)

def test_weights_that_are_computed_in_training_do_not_stop_the_copy():
    from fastai.text.models.awdlstm import AWD_LSTM
    class Classifier(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.head = AWD_LSTM(50, 16, 32, 1),nn.Linear(16, 16)
        def forward(self, x): return self.head(self.rnn(x)[:,-1])
    model,x = Classifier(),torch.randint(2, 50, (3,7))
    model(x).sum().backward() # from here on the dropped weights are no leaves, and torch would not copy them
    new = FC_Decomposer(.25).decompose(model)
    assert list(factored_layers(new)) == ['head']
    new(x).sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    for m in (model, new): m.eval(), m.rnn.reset()
    model.head = recompose(new.head)
    assert apart(new(x), model(x)) <= 1e-5

# --- attention

def test_multihead_attention_keeps_its_projection():
    mha,x = nn.MultiheadAttention(16, 4, batch_first=True),torch.randn(2, 5, 16)
    new = decompose(nn.ModuleDict(dict(mha=mha, fc=nn.Linear(16, 16))), every)
    assert type(new.mha.out_proj) is type(mha.out_proj) and 'MultiheadAttention' in reasons(new)['mha.out_proj']
    assert isinstance(new.fc, FactoredLayer)
    for train in (True, False):
        new.train(train), mha.train(train)
        assert torch.equal(new.mha(x, x, x)[0], mha(x, x, x)[0])

def encoder(norm_first=False, batch_first=True, **kw):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=batch_first, norm_first=norm_first, **kw)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first and not kw)

@pytest.mark.parametrize('kw', [{}, dict(norm_first=True), dict(batch_first=False), dict(activation='gelu'), dict(bias=False)])
@pytest.mark.parametrize('mask', ['none', 'padding', 'causal', 'both'])
def test_transformer_encoders_compute_what_their_weights_say(kw, mask):
    model = FC_Decomposer(.25).decompose(encoder(**kw).eval())
    assert set(factored_layers(model)) == {f'layers.{i}.linear{j}' for i in (0,1) for j in (1,2)}
    dense = recompose(model) # takes the fused path
    x = torch.randn(3, 6, 16) if kw.get('batch_first', True) else torch.randn(6, 3, 16)
    pad = torch.tensor([[False]*6, [False]*4+[True]*2, [False]*3+[True]*3])
    args = dict(src_key_padding_mask=pad if mask in ('padding', 'both') else None, mask=nn.Transformer.generate_square_subsequent_mask(6) == -torch.inf if mask in ('causal', 'both') else None)
    keep = ~pad if args['src_key_padding_mask'] is not None else torch.ones(3, 6, dtype=torch.bool)
    if not kw.get('batch_first', True): keep = keep.T
    for train in (False, True):
        model.train(train), dense.train(train)
        for ctx in (torch.no_grad(), torch.enable_grad()):
            with ctx: assert apart(model(x, **args)[keep], dense(x, **args)[keep]) <= 1e-4 # two kernels for the same sums, two layers deep

def test_the_fused_path_does_not_multiply_the_product(monkeypatch):
    model = FC_Decomposer(.25).decompose(encoder().eval())
    monkeypatch.setattr(FactoredLayer, 'weight', property(lambda self: pytest.fail('read')))
    x,pad = torch.randn(2, 6, 16),torch.tensor([[False]*6, [False]*4+[True]*2])
    with torch.no_grad(): model(x), model(x, src_key_padding_mask=pad) # the second would make nested tensors

def test_a_transformer_with_decoder_and_a_vision_transformer():
    model = nn.Transformer(16, 4, 1, 1, 32, dropout=0., batch_first=True).eval()
    new,x = FC_Decomposer(.25).decompose(model),torch.randn(2, 6, 16)
    assert apart(new(x, x), recompose(new)(x, x)) <= 1e-4
    vit = models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
    with torch.no_grad(): nn.init.normal_(vit.heads.head.weight)
    new,x = decompose(vit, every),torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert apart(new(x), recompose(new)(x)) <= 1e-4
    assert {r['status'] for r in records(new).values()} == {'factored', 'dense'}

class Reader(nn.Module):
    "Code that reads `weight` and `bias` instead of calling the layer"
    def __init__(self): super().__init__(); self.fc = nn.Linear(8, 8)
    def forward(self, x): return F.linear(x, self.fc.weight, self.fc.bias)

def test_modules_that_read_the_weight_go_on_working():
    new,x = FC_Decomposer(.25).decompose(Reader()),torch.randn(3, 8)
    assert apart(new(x), new.fc(x)) <= 1e-5
    new(x).sum().backward()
    assert all(p.grad is not None for p in new.parameters())

# --- dtypes, copies, compilers

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 8)).to(dtype)
    for method in schemes:
        new = decompose(model, [FC_Decomposer(.25), ConvDecomposer(method, 1)])
        assert {p.dtype for p in new.parameters()} == {dtype} and len(factored_layers(new)) == 2
        out = new(torch.randn(2, 8, 5, 5, dtype=dtype))
        assert out.dtype == dtype and out.isfinite().all()

def small_net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10, bias=False)).eval()

def low(method): return decompose(small_net(), [FC_Decomposer(.25), ConvDecomposer(method, 1)])

@pytest.mark.parametrize('method', list(schemes))
def test_a_state_dict_goes_into_a_structure_made_from_the_plan(method):
    new,x = low(method),torch.randn(2, 3, 12, 12)
    with torch.device('meta'): shell = small_net()
    tup = lambda r: tuple(r) if isinstance(r, list) else r
    shell = replace_layers(shell, {n: schemes[r['scheme']](Geometry.of(shell.get_submodule(n))).skeleton(tup(r['rank']))
                                   for n,r in records(new).items() if r['status'] == 'factored'})
    assert repr(shell) == repr(new)
    shell.load_state_dict(new.state_dict(), assign=True)
    assert torch.equal(shell.eval()(x), new(x))

@pytest.mark.parametrize('method', list(schemes))
def test_export_and_trace_give_the_same_outputs(method):
    new,x = low(method),torch.randn(2, 3, 12, 12)
    assert apart(torch.export.export(new, (x,)).module()(x), new(x)) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # tracing is deprecated, and used
        traced = torch.jit.trace(new, x)
    assert apart(traced(x), new(x)) <= 1e-5
    assert apart(torch.fx.symbolic_trace(new)(x), new(x)) <= 1e-5
    assert apart(torch.jit.script(new)(x), new(x)) <= 1e-5

@pytest.mark.parametrize('method', list(schemes))
def test_compile_has_no_graph_breaks(method):
    new,x = low(method),torch.randn(2, 3, 12, 12)
    torch.compiler.reset()                          # what other tests have compiled counts against a limit
    assert apart(torch.compile(new, backend='eager', fullgraph=True)(x), new(x)) <= 1e-5 # the graph is what is tested; no C++ compiler needed

def test_gradients_reach_all_factors_under_autocast_and_checkpointing():
    new,x = low('tucker').train(),torch.randn(2, 3, 12, 12)
    with torch.autocast('cpu', torch.bfloat16): new(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    new.zero_grad()
    torch.utils.checkpoint.checkpoint(new, x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in new.parameters())

# --- bad input: one clear error, the model as it was

def state(model): return {n: (id(m), type(m), m.training) for n,m in model.named_modules()},[(id(p), p._version) for p in model.parameters()]

def raises(model, f, error, match):
    before = state(model)
    with pytest.raises(error, match=match): f(model)
    assert state(model) == before and not hasattr(model, 'low_rank_plan')

@pytest.mark.parametrize('method', list(schemes))
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(method, bad):
    model = small_net()
    with torch.no_grad(): model[3].weight[1,2,0,1] = bad
    raises(model, ConvDecomposer(method, 1).decompose, ValueError, "layer '3' holds 1 NaN or Inf")
    raises(model, lambda m: project_(m, 1), ValueError, "layer '3' holds 1 NaN or Inf")
    raises(model[3], ConvDecomposer(method, 1).decompose, ValueError, "the layer holds 1 NaN or Inf") # a root has no name
    assert factored_layers(ConvDecomposer(method, 1).decompose(model, layers='0'))

lazy = lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4))
def quantised(): return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, torch.qint8)

@pytest.mark.parametrize('make,match', [(lazy, "layer '[02]' is an uninitialised Lazy.*run one batch"), (quantised, "layer '0' is quantised"),
                                        (lambda: nn.Sequential(nn.Linear(8, 8, device='meta'), nn.Conv2d(8, 8, 3, device='meta')), "layer '[01]' is on the meta device")])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
def test_models_without_weights_to_decompose(make, match):
    conv = [] if make is quantised else [ConvDecomposer().decompose]
    for f in (FC_Decomposer().decompose, lambda m: project_(m, 2), *conv): raises(make(), f, ValueError, match)

def test_layers_that_nobody_asked_for_may_lack_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    assert list(factored_layers(FC_Decomposer(2).decompose(model, layers='0'))) == ['0']
    assert not factored_layers(ConvDecomposer().decompose(quantised()))

def test_after_one_batch_a_lazy_model_is_an_ordinary_one():
    model = lazy()
    model(torch.randn(1, 3, 8, 8))
    assert len(factored_layers(decompose(model, [FC_Decomposer(1), ConvDecomposer('svd', 1)]))) == 2

@pytest.mark.parametrize('make,error,match', [
    (lambda: ConvDecomposer('tuker'), ValueError, "method: 'tuker' is not one of 'svd', 'spatial', 'tucker', 'cp', 'slice'"),
    *[(lambda m=m: ConvDecomposer(m, (2,3)), ValueError, r'rank: \(2, 3\) is a pair') for m in ('svd', 'spatial', 'cp', 'slice')],
    *[(lambda m=m: ConvDecomposer(m, {'0': .5, '1': (2,3)}), ValueError, r'rank: \(2, 3\) is a pair') for m in ('svd', 'cp')],
    (lambda: FC_Decomposer((2,3)), ValueError, r'rank: \(2, 3\) is a pair'),
    *[(lambda v=v: FC_Decomposer(v), ValueError, f'rank={v!r}') for v in (0, 0., -1, 1.5, 'half')],
    *[(lambda v=v: ConvDecomposer('svd', v), TypeError, 'rank=') for v in (None, True, [1, 2, 3])],
    (lambda: ConvDecomposer('svd', {'0': 0}), ValueError, r"rank\['0'\]=0")])
def test_decomposers_that_make_no_sense(make, error, match):
    with pytest.raises(error, match=match): make()

@pytest.mark.parametrize('f,error,match', [
    (lambda m: FC_Decomposer().decompose(m, percent_removed=.5, rank_ratio=.5), ValueError, 'percent_removed=0.5 and rank_ratio=0.5'),
    *[(lambda m, v=v: FC_Decomposer().decompose(m, percent_removed=v), ValueError, 'percent_removed: ') for v in (1, -.1, 50, 'half', True)],
    *[(lambda m, v=v: ConvDecomposer().decompose(m, rank_ratio=v), ValueError, 'rank_ratio: ') for v in (0, 1.1, float('nan'), '1')],
    (lambda m: FC_Decomposer().decompose(m, layers='fc'), ValueError, "layers: 'fc' matches no layer"),
    (lambda m: FC_Decomposer().decompose(m, layers=['6', '0']), ValueError, "layers: '0' matches no layer"), # a convolution
    (lambda m: ConvDecomposer().decompose(m, exclude=['layer?.*']), ValueError, r"exclude: 'layer\?\.\*' matches no layer"),
    (lambda m: ConvDecomposer('svd', {'0': 2, 'x': 3}).decompose(m), ValueError, "rank: 'x' matches no layer"),
    (lambda m: ConvDecomposer('svd', {'0': 2, '3': 99}).decompose(m), ValueError, "rank: '3': rank 99 is above its full rank 8"),
    (lambda m: project_(m, {'0': 99}), ValueError, "rank: '0': rank 99 is above its full rank 16"),
    (lambda m: project_(m, 2, layers='x'), ValueError, "layers: 'x' matches no layer"),
    (lambda m: project_(m, (2,2)), ValueError, 'is a pair'),
    (lambda m: decompose(m, [FC_Decomposer(), 'cp']), TypeError, "what: 'cp' is not a decomposer")])
def test_ranks_that_make_no_sense(f, error, match): raises(small_net(), f, error, match)

def test_what_is_no_model():
    for f in (FC_Decomposer().decompose, ConvDecomposer().decompose, decompose, lambda m: project_(m, 2)):
        with pytest.raises(TypeError, match='model: Tensor is not an nn.Module'): f(torch.randn(3, 3))
    with pytest.raises(TypeError, match='layer: Conv2d is not an nn.Linear'): FC_Decomposer().SVD(nn.Conv2d(3, 3, 1))
