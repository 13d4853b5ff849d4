"Cost: parameters, MACs against formulas, latency, and that measuring leaves no trace"
import copy, os, re, subprocess, sys, time, warnings
import numpy as np, pytest, torch
from torch import library, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from fasterai_lr.cost import *
from helpers import same, state_of
from networks import rand

class Block(nn.Module):
    "Hooks, BatchNorm, a shared module, dropout that is always on, mixed training flags"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.fc,self.drop = nn.Conv2d(3,6,3,padding=1),nn.BatchNorm2d(6),nn.Linear(6,6),nn.Dropout()
        self.again = self.fc
    def forward(self, x, fail=False):
        x = self.bn(self.conv(x)).mean((2,3))
        x = nn.functional.dropout(self.again(self.fc(x)), training=True)
        if fail: raise RuntimeError('no luck')
        return self.drop(x)

def net():
    torch.manual_seed(0)
    m = Block().train()
    m.bn.eval()
    m.seen = []
    m.fc.register_forward_hook(lambda *_: m.seen.append(1))
    m.conv.weight.requires_grad_(False)
    return m

x = rand(2, 3, 8, 8)

# --- nothing changes

measures = [lambda m,s: count_macs(m, s), lambda m,s: macs_per_layer(m, s), lambda m,s: measure_latency(m, s, repeats=2, min_ms=0), lambda m,s: measure_latency({'a':m,'b':m}, s, repeats=2, min_ms=0),
            lambda m,s: latency_per_layer(m, s, 0)]

@pytest.mark.parametrize('measure', measures)
@pytest.mark.parametrize('fast', [True, False])
def test_no_trace(measure, fast):
    m = net()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        before = state_of(m)
        measure(m, x)
        assert m.seen  # its own hook ran
        assert same(state_of(m), before)
        for bad in ((x,True), x[:,:2], {'x':x, 'y':1}):
            with pytest.raises((RuntimeError,TypeError)): measure(m, bad)
            assert same(state_of(m), before)
    finally: torch.backends.mha.set_fastpath_enabled(True)

def test_training_goes_on_after_a_measurement():
    a = net()
    b = copy.deepcopy(a)
    count_macs(a, x); measure_latency(a, x, repeats=1)
    for m in (a,b):
        torch.manual_seed(1)
        m.train()(x).sum().backward()
    assert torch.equal(a.fc.weight.grad, b.fc.weight.grad) and torch.equal(a.bn.running_mean, b.bn.running_mean)

def test_an_overridden_train_is_not_called():
    class Merging(nn.Linear):
        def train(self, mode=True): raise AssertionError('would merge weights')
    m = nn.Sequential(Merging(4,4))
    assert count_macs(m, torch.randn(1,4)) == 16 and m[0].training

# --- MACs

def conv_macs(c, x, out): # each output of a convolution meets in/groups*kernel weights
    n = c.weight[0].numel()
    return (x if isinstance(c, nn.ConvTranspose2d) else out).numel()*n

@pytest.mark.parametrize('conv', [nn.Conv1d(4,6,3), nn.Conv2d(4,6,(3,2),stride=2,padding=1), nn.Conv2d(4,6,3,groups=2,dilation=2), nn.Conv2d(4,4,3,groups=4,padding='same',padding_mode='reflect'),
                                  nn.Conv3d(4,6,2,bias=False), nn.ConvTranspose2d(4,6,3,stride=2), nn.ConvTranspose2d(4,6,3,groups=2)])
def test_convolutions(conv):
    x = torch.randn(2,4,*[9]*(conv.weight.ndim-2))
    assert count_macs(conv, x) == conv_macs(conv, x, conv(x))

@pytest.mark.parametrize('shape', [(4,), (3,4), (2,5,4), (1,2,3,4)])
@pytest.mark.parametrize('bias', [True, False])
def test_linear(shape, bias):
    n = int(np.prod(shape[:-1]))
    assert count_macs(nn.Linear(4,7,bias=bias), torch.randn(shape)) == n*28

@pytest.mark.parametrize('norm_first', [True, False])
def test_attention_is_not_hidden_by_the_fused_kernel(norm_first):
    b,t,d,h = 3,7,16,64
    layer = nn.TransformerEncoderLayer(d, 4, h, batch_first=True, norm_first=norm_first)
    macs = macs_per_layer(layer.eval(), torch.randn(b,t,d))
    assert macs[''] == b*t*(4*d*d + 2*t*d + 2*d*h)  # projections, scores and their use, feed-forward
    assert macs['self_attn'] == b*t*(4*d*d + 2*t*d) and macs['linear1'] == macs['linear2'] == b*t*d*h

@pytest.mark.parametrize('kind,gates', [(nn.LSTM,4), (nn.GRU,3), (nn.RNN,1)])
@pytest.mark.parametrize('both', [False, True])
def test_recurrent(kind, gates, both):
    m,n = kind(8, 16, num_layers=2, bidirectional=both, batch_first=True),1+both
    assert count_macs(m, torch.randn(3,5,8)) == 3*5*n*gates*16*(8+16 + 16*n+16)

def test_recurrent_as_a_gpu_has_it():
    def like(*shape): return torch.empty(shape, device='meta')
    def lstm(x): # 2 layers
        weights = [like(64,8), like(64,16), like(64), like(64), like(64,16), like(64,16), like(64), like(64)]
        state = like(2,3,16)
        return torch.ops.aten._cudnn_rnn(x, weights, 4, None, state, state, 2, 16, 0, 2, False, 0., False, False, [], None)
    assert macs(Do(lstm), like(5,3,8)) == 5*3*4*16*(8+16 + 16+16)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_recurrent_on_a_gpu():
    m = nn.LSTM(8, 16, num_layers=2, bidirectional=True).cuda()
    assert count_macs(m, torch.randn(5,3,8,device='cuda')) == 5*3*2*4*16*(8+16 + 32+16)

def test_names_are_those_of_named_modules():
    m = net()
    macs = macs_per_layer(m, x)
    assert list(macs) == [n for n,_ in m.named_modules()]
    assert macs == {'': 2*6*64*27 + 2*2*36, 'conv': 2*6*64*27, 'bn': 0, 'fc': 2*2*36, 'drop': 0}  # fc is also `again`: two calls

def test_two_models_of_one_class_inside():  # names by class alone would mix them up
    m = nn.Sequential(nn.Sequential(nn.Linear(3,4)), nn.Sequential(nn.Linear(4,5)), nn.ReLU())
    assert macs_per_layer(m, torch.randn(1,3)) == {'':32, '0':12, '0.0':12, '1':20, '1.0':20, '2':0}

def test_a_root_layer(): assert macs_per_layer(nn.Linear(3,4), torch.randn(2,3)) == {'':24}

def test_a_module_that_calls_itself():
    class Loop(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(3,3)
        def forward(self, x, n=2): return self.fc(x) if n==0 else self.fc(self(x, n-1))
    assert macs_per_layer(Loop(), torch.randn(1,3))['fc'] == 27

def test_data_parallel():
    m = nn.Sequential(nn.Linear(3,4))
    assert macs_per_layer(nn.DataParallel(m), torch.randn(2,3)) == {'':24, 'module':24, 'module.0':24}

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(3,4),nn.Linear(5,4)
    def forward(self, x, y=None): return self.a(x) + (0 if y is None else self.b(y))
class Many(nn.Linear):
    def forward(self, xs): return [super(Many, self).forward(o) for o in xs]

@pytest.mark.parametrize('model,sample,want', [(Two(), torch.randn(2,3), 24), (Two(), (torch.randn(2,3),), 24), (Two(), (torch.randn(2,3), torch.randn(2,5)), 64), (Two(), dict(y=torch.randn(2,5), x=torch.randn(2,3)), 64),
                                               (Many(3,4), [torch.randn(1,3), torch.randn(2,3)], 36)])
def test_samples(model, sample, want):
    assert count_macs(model, sample) == want
    assert measure_latency(model, sample, repeats=1, min_ms=0).ms > 0

def test_known_networks():
    from torchvision import models
    img = torch.randn(1,3,224,224)
    assert count_macs(models.resnet18(weights=None), img) == 1814073344       # 1.81 G, the figure in torchvision's table of weights
    assert count_macs(models.mobilenet_v2(weights=None), img) == 300774272    # 0.30 G

def test_meta_device():  # counts shapes without computing
    m,s = nn.Conv2d(3,8,3,device='meta'),torch.randn(1,3,9,9,device='meta')
    assert count_macs(m, s) == 7*7*8*27

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtypes(dtype): assert count_macs(nn.Linear(3,4).to(dtype), torch.randn(2,3).to(dtype)) == 24

# --- nothing that multiplies matrices is left out

class Do(nn.Module):
    "A function as a model"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *args): return self.f(*args)

class Matrices(TorchDispatchMode):
    "Collects the operators that get two matrices or more, and do not just take them element by element"
    def __init__(self): super().__init__(); self.ops = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
        matrices = [o for o in tensors if o.ndim > 1 and (o.is_floating_point() or o.is_complex())]
        if len(matrices) > 1 and not func.is_view and torch.Tag.pointwise not in func.tags:
            self.ops.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))

harmless = {f'aten.{o}' for o in ('cat', 'stack', 'copy_', 'native_layer_norm', '_weight_norm_interface')} # they copy and normalise
telling = re.compile('mm|attention|conv|linear|rnn|dist')        # names of operators that are warned of where they have no formula

def macs(model, sample):
    "`count_macs`, where each operator that gets two matrices has a formula or is known as harmless, and none is warned of"
    with warnings.catch_warnings(), Matrices() as seen:
        warnings.filterwarnings('error', 'macs_per_layer: no formula')
        n = count_macs(model, sample)
    assert {str(o) for o in seen.ops if o not in flop_registry and not telling.search(str(o))} <= harmless
    return n

def sdpa(q, k=None, v=None, mask=None, **kwargs):
    "Attention as a model, and its sample of queries, keys and values of these shapes, in any dtype"
    q = rand(*q)
    k = q if k is None else rand(*k)
    v = k if v is None else rand(*v)
    def attend(q, k, v):
        masked = {} if mask is None else {'attn_mask': mask if mask.dtype is torch.bool else mask.to(q.dtype)}
        return F.scaled_dot_product_attention(q, k, v, **masked, **kwargs)
    return Do(attend),(q,k,v)

b,h,t,s,d,e = 2,4,5,7,8,6 # batch, heads, queries, keys, width, width of values
attentions = dict(
    alone=(sdpa((b,h,t,d)), b*h*t*t*2*d),
    causal=(sdpa((b,h,t,d), is_causal=True), b*h*t*t*2*d), # what is masked counts as well
    cross=(sdpa((b,h,t,d), (b,h,s,d)), b*h*t*s*2*d),
    values=(sdpa((b,h,t,d), (b,h,s,d), (b,h,s,e)), b*h*t*s*(d+e)),
    added=(sdpa((b,h,t,d), (b,h,s,d), mask=rand(t,s)), b*h*t*s*2*d),
    masked=(sdpa((b,h,t,d), (b,h,s,d), mask=rand(b,1,t,s)>-2), b*h*t*s*2*d),
    grouped=(sdpa((b,h,t,d), (b,2,s,d), enable_gqa=True), b*h*t*s*2*d), # 2 query heads for each key head
    one=(sdpa((b,h,t,d), (b,1,t,d), is_causal=True, enable_gqa=True), b*h*t*t*2*d),
    unbatched=(sdpa((h,t,d), (h,s,d)), h*t*s*2*d))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', attentions)
def test_attention(name, dtype):
    (model,sample),want = attentions[name]
    sample = tuple(o.to(dtype) for o in sample)
    assert macs(model, sample) == want
    with sdpa_kernel(SDPBackend.MATH): assert macs(model, sample) == want # two products, which torch has always counted

kernels = dict(flash_attention=(), flash_attention_for_cpu=(), efficient_attention=(None,False), cudnn_attention=(None,True),
               fused_attention_overrideable=(), attention_math_for_mps=()) # of all devices, and what they want besides

@pytest.mark.parametrize('op', kernels)
@pytest.mark.parametrize('heads,values', [(h,d), (2,d), (h,e)])
def test_attention_of_every_device(op, heads, values):
    f = getattr(torch.ops.aten, f'_scaled_dot_product_{op}', None)
    if f is None: pytest.skip('not in this torch')
    q,k,v = (torch.empty(o, device='meta') for o in ((b,h,t,d), (b,heads,s,d), (b,heads,s,values)))
    assert macs(Do(lambda *qkv: f(*qkv, *kernels[op])), (q,k,v)) == b*h*t*s*(d+values)

def mha(*shape_kv, **kwargs):
    "`nn.MultiheadAttention` of 2 heads and 8 numbers, with keys and values of their own widths where given"
    wide = dict(zip(('kdim','vdim'), (o[-1] for o in shape_kv)))
    m,q = nn.MultiheadAttention(8, 2, batch_first=True, **wide),rand(b,t,8)
    k,v = map(rand, *zip(*shape_kv)) if shape_kv else (q,q)
    return m,dict(query=q, key=k, value=v, **kwargs)

encoder = b*t*(4*d*d + 2*t*d + 2*d*16)
decoder = encoder + b*t*2*d*d + b*s*2*d*d + b*t*2*s*d # queries and output of the cross attention, its keys and values, itself
def layer(kind): return kind(d, 2, 16, batch_first=True)
def lstm_macs(n, out): return b*t*(4*n*(d+out) + n*out)

models = dict(
    mlp=(nn.Sequential(nn.Linear(4,6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6,3)), rand(2,4), 2*(24+18)),
    depthwise=(nn.Sequential(nn.Conv1d(4,4,3,groups=4), nn.Conv1d(4,6,1)), rand(2,4,9), 2*7*(4*3+4*6)),
    transposed=(nn.ConvTranspose1d(4,6,3,stride=2), rand(2,4,9), 2*9*4*6*3),
    transposed3=(nn.ConvTranspose3d(4,6,2,groups=2), rand(2,4,3,3,3), 2*27*4*3*8),
    channels_last=(nn.Conv2d(4,6,3).to(memory_format=torch.channels_last), rand(2,4,9,9), 2*49*4*6*9),
    conv_bf16=(nn.Conv2d(4,6,3).bfloat16(), rand(2,4,9,9).bfloat16(), 2*49*4*6*9),
    one_image=(nn.Conv2d(4,6,3), rand(4,9,9), 49*4*6*9),
    u_net=(nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode='bilinear')),
           rand(2,3,8,8), 2*64*3*4*9),
    lstm=(nn.LSTM(d, 16), rand(t,b,d), b*t*4*16*(d+16)),
    lstm_bf16=(nn.LSTM(d, 16).bfloat16(), rand(t,b,d).bfloat16(), b*t*4*16*(d+16)),
    projected=(nn.LSTM(d, 16, proj_size=3), rand(t,b,d), lstm_macs(16, 3)),
    both_ways=(nn.LSTM(d, 16, proj_size=3, bidirectional=True), rand(t,b,d), 2*lstm_macs(16, 3)),
    gru=(nn.GRU(d, 16), rand(t,b,d), b*t*3*16*(d+16)),
    rnn=(nn.RNN(d, 16), rand(t,b,d), b*t*16*(d+16)),
    packed=(Do(lambda x: nn.LSTM(d, 16)(nn.utils.rnn.pack_padded_sequence(x, [5,3]))), rand(t,b,d), (5+3)*4*16*(d+16)),
    lstm_cell=(nn.LSTMCell(d, 16), rand(b,d), b*4*16*(d+16)),
    gru_cell=(nn.GRUCell(d, 16), rand(b,d), b*3*16*(d+16)),
    rnn_cell=(nn.RNNCell(d, 16), rand(b,d), b*16*(d+16)),
    mha=(*mha(), b*t*(4*d*d + 2*t*d)),
    mha_without_weights=(*mha(need_weights=False), b*t*(4*d*d + 2*t*d)),
    mha_masked=(*mha(need_weights=False, attn_mask=rand(t,t)), b*t*(4*d*d + 2*t*d)),
    mha_padded=(*mha(need_weights=False, key_padding_mask=torch.arange(t)[None].repeat(b,1)>3), b*t*(4*d*d + 2*t*d)),
    mha_cross=(*mha((b,s,3), (b,s,6), need_weights=False), b*(2*t*d*d + s*d*(3+6) + 2*t*s*d)),
    encoder=(nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2), rand(b,t,d), 2*encoder),
    encoder_bf16=(layer(nn.TransformerEncoderLayer).bfloat16(), rand(b,t,d).bfloat16(), encoder),
    decoder=(nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2), (rand(b,t,d), rand(b,s,d)), 2*decoder),
    transformer=(nn.Transformer(d, 2, 1, 1, 16, batch_first=True), (rand(b,s,d), rand(b,t,d)),
                 b*s*(4*d*d + 2*s*d + 2*d*16) + decoder),
    bilinear=(nn.Bilinear(3,4,5), (rand(2,3), rand(2,4)), 2*5*(3*4+4)), # one input meets the weight, what comes out the other
    bilinear3=(nn.Bilinear(3,4,5,bias=False), (rand(2,6,3), rand(2,6,4)), 12*5*(3*4+4)),
    einsum=(Do(lambda x,y: torch.einsum('bij,bjk->bik', x, y)), (rand(2,3,4), rand(2,4,5)), 2*3*4*5),
    einsum_three=(Do(lambda x,y,z: torch.einsum('bi,ij,bj->b', x, y, z)), (rand(2,3), rand(3,4), rand(2,4)), 2*(3*4+4)),
    tensordot=(Do(lambda x,y: torch.tensordot(x, y, 2)), (rand(2,3,4), rand(3,4,5)), 2*12*5),
    vectors=(Do(torch.dot), (rand(4), rand(4)), 4),
    vectors_conjugate=(Do(torch.vdot), (rand(4), rand(4)), 4),
    vector=(Do(torch.mv), (rand(3,4), rand(4)), 12),
    vector_added=(Do(torch.addmv), (rand(3), rand(3,4), rand(4)), 12),
    vector_added_in_place=(Do(torch.Tensor.addmv_), (rand(3), rand(3,4), rand(4)), 12),
    added_in_place=(Do(torch.Tensor.addmm_), (rand(3,5), rand(3,4), rand(4,5)), 60),
    added_batches=(Do(torch.addbmm), (rand(3,5), rand(2,3,4), rand(2,4,5)), 2*60),
    added_batches_in_place=(Do(torch.Tensor.addbmm_), (rand(3,5), rand(2,3,4), rand(2,4,5)), 2*60),
    added_to_batches_in_place=(Do(torch.Tensor.baddbmm_), (rand(2,3,5), rand(2,3,4), rand(2,4,5)), 2*60),
    distances=(Do(torch.cdist), (rand(3,4), rand(5,4)), 60),
    many_distances=(Do(torch.cdist), (rand(30,4), rand(50,4)), 30*50*4), # torch takes a matrix product from 25 rows on
    own_distances=(Do(F.pdist), rand(5,4), 5*4//2*4),
    conv_tbc=(Do(torch.conv_tbc), (rand(7,2,4), rand(3,4,6), rand(6)), 5*2*3*4*6),
    sparse=(Do(lambda x,y: torch.sparse.mm(x.to_sparse(), y)), (rand(3,4), rand(4,5)), 60),
    weight_norm=(nn.utils.parametrizations.weight_norm(nn.Linear(3,4)), rand(2,3), 24),
    embedding=(nn.Embedding(10,3), torch.arange(6), 0),
    bag=(nn.EmbeddingBag(10,3), torch.arange(6).view(2,3), 0),
    normalisation=(nn.Sequential(nn.GroupNorm(2,4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.LayerNorm((9,9)), nn.AvgPool2d(2),
                                 nn.Upsample(scale_factor=2, mode='bilinear')), rand(2,4,9,9), 0))

@pytest.mark.parametrize('name', models)
def test_models_of_every_kind(name):
    model,sample,want = models[name]
    assert macs(model, sample) == want

def grouped_mm(x, w): return torch.ops.aten._grouped_mm(x, w, torch.tensor([2,4], dtype=torch.int32))
def packed4(x, w):
    pack,mm = torch.ops.aten._convert_weight_to_int4pack_for_cpu,torch.ops.aten._weight_int4pack_mm_for_cpu
    return mm(x, pack(w, 2), 32, torch.ones(2,32,2,dtype=x.dtype))
def meta(*shape, dtype=torch.float8_e4m3fn): return torch.empty(shape, dtype=dtype, device='meta')
def scales(*shape): return meta(*shape, dtype=torch.float32)
def scaled_mm_v2(x, w): return torch.ops.aten._scaled_mm_v2(x, w.mT, [scales(1)], [0], [0], [scales(1)], [0], [0], None, torch.bfloat16)
def scaled_grouped_mm(x, w):
    return torch.ops.aten._scaled_grouped_mm(x, w.mT, scales(32), scales(2,48), meta(2, dtype=torch.int32), None, None, torch.bfloat16)
def scaled_grouped_mm_v2(x, w):
    return torch.ops.aten._scaled_grouped_mm_v2(x, w.mT, [scales(32)], [1], [0], [scales(2,48)], [1], [0], meta(2, dtype=torch.int32), None,
                                                torch.bfloat16)
low_precision = dict(
    _scaled_mm_v2=(scaled_mm_v2, (meta(32,16), meta(48,16)), 32*16*48),
    _scaled_grouped_mm=(scaled_grouped_mm, (meta(32,16), meta(2,48,16)), 32*16*48),
    _scaled_grouped_mm_v2=(scaled_grouped_mm_v2, (meta(32,16), meta(2,48,16)), 32*16*48),
    _int_mm=(lambda x,w: torch._int_mm(x, w), (torch.ones(32,16).char(), torch.ones(16,24).char()), 32*16*24),
    _weight_int8pack_mm=(lambda x,w: torch._weight_int8pack_mm(x, w, torch.ones(32).bfloat16()),
                         (rand(3,64).bfloat16(), torch.ones(32,64).char()), 3*64*32),
    _weight_int4pack_mm_for_cpu=(packed4, (rand(3,64).bfloat16(), torch.ones(32,64).int()), 3*64*32),
    _grouped_mm=(grouped_mm, (rand(4,16).bfloat16(), rand(2,16,32).bfloat16()), 4*16*32), # 2 experts, each for 2 rows
    mkldnn_linear=(lambda x,w: torch._C._nn.mkldnn_linear(x.to_mkldnn(), w.to_mkldnn()).to_dense(), (rand(3,4), rand(5,4)), 60),
    mkldnn_convolution=(lambda x,w: torch.mkldnn_convolution(x.to_mkldnn(), w.to_mkldnn(), None, [0,0], [1,1], [1,1], 2).to_dense(),
                        (rand(2,4,9,9), rand(6,2,3,3)), 2*49*6*2*9))

@pytest.mark.parametrize('op', low_precision)
def test_matrices_that_were_packed(op):
    f,sample,want = low_precision[op]
    if not hasattr(torch.ops.aten, op): pytest.skip('not in this torch')
    if 'mkldnn' in op and not torch.backends.mkldnn.is_available(): pytest.skip('needs mkldnn')
    assert macs(Do(f), sample) == want

def test_deformable_convolution():
    from torchvision.ops import deform_conv2d
    assert macs(Do(lambda x,w: deform_conv2d(x, torch.zeros(2,18,7,7), w)), (rand(2,4,9,9), rand(6,4,3,3))) == 2*49*4*6*9

def by_hand(model, x):
    "MACs of the linear layers and convolutions of `model`, from their weights and what they give"
    total = []
    def add(m, x, out): total.append(out.numel()*m.weight[0].numel())
    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Linear,nn.Conv1d,nn.Conv2d))]
    with torch.no_grad(): model.eval()(x)
    for o in hooks: o.remove()
    return sum(total)

def timm(name, **kw):
    import timm
    return timm.create_model(name, pretrained=False, num_classes=5, **kw)

def tv(name, *args, **kw):
    from torchvision import models
    return getattr(models, name)(*args, **kw)

tokens = 4*4+1
networks = dict( # model, size of the image, what attention takes; None where only the kernel of two products is there to compare
    resnet=(lambda: tv('resnet18', weights=None), 64, 0),
    convnext=(lambda: timm('convnext_atto', depths=(1,1,1,1), dims=(8,16,32,64)), 64, 0),
    mixer=(lambda: timm('mixer_s32_224', img_size=64), 64, 0),
    vit=(lambda: timm('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2), 32, 2*2*tokens*tokens*192),
    deit=(lambda: timm('deit_tiny_patch16_224', img_size=32, patch_size=8, depth=2), 32, 2*2*tokens*tokens*192),
    cait=(lambda: timm('cait_xxs24_224', img_size=32, depth=1), 32, None), # gives a parameter to its modules
    swin=(lambda: timm('swin_tiny_patch4_window7_224', depths=(1,1), embed_dim=24, num_heads=(2,4), img_size=56), 56, None),
    vision_transformer=(lambda: tv('VisionTransformer', 32, 8, 2, 4, 16, 32), 32, None),
    swin_v1=(lambda: tv('SwinTransformer', [4,4], 24, [2,2], [2,4], [4,4]), 64, None))

@pytest.mark.parametrize('name', networks)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_networks(name, dtype):
    if name in ('convnext','mixer','vit','deit','cait','swin'): pytest.importorskip('timm')
    make,size,attention = networks[name]
    model,x = make().to(dtype),rand(2,3,size,size).to(dtype)
    n = macs(model, x)
    with sdpa_kernel(SDPBackend.MATH): assert macs(model, x) == n
    if attention is not None: assert n == by_hand(model, x) + 2*attention

def test_every_module_has_its_share_of_attention():
    class Attend(nn.Module):
        def forward(self, q): return F.scaled_dot_product_attention(q, q, q)
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.qkv,self.attend,self.mlp = nn.Linear(8,8),Attend(),nn.Linear(8,8)
        def forward(self, x): return self.mlp(self.attend(self.qkv(x)[:,None])[:,0])
    each = {'qkv': b*t*64, 'attend': b*t*t*16, 'mlp': b*t*64}
    whole = sum(each.values())
    got = macs_per_layer(nn.Sequential(Block(), Block()), rand(b,t,8))
    assert got == {'': 2*whole} | {k:v for i in '01' for k,v in {i: whole, **{f'{i}.{n}': o for n,o in each.items()}}.items()}

# --- what is not known is told

def told(model, sample):
    "The MACs, and the warnings"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        n = count_macs(model, sample)
    return n,[str(o.message) for o in w]

def own(name, f):
    "`f` as an operator of a library of its own"
    return library.custom_op(f'fasterai_lr_test::{name}', f, mutates_args=())

def two(x:torch.Tensor, y:torch.Tensor)->torch.Tensor: return x@y
def one(x:torch.Tensor, scale:torch.Tensor)->torch.Tensor: return x*scale

def test_an_operator_of_ones_own_is_warned_of_until_it_has_a_formula():
    op,packet = own('fused', two),lambda: torch.ops.fasterai_lr_test.fused
    model,sample = Do(lambda x,y: op(x, y)@y),(rand(3,4), rand(4,4))
    n,warned = told(model, sample)
    assert n == 3*4*4 and len(warned)==1 and 'no formula for fasterai_lr_test.fused,' in warned[0] and 'register_flop_formula' in warned[0]
    register_flop_formula(packet())(lambda x, y, **kwargs: 2*x[0]*x[1]*y[1])
    try: assert told(model, sample) == (2*3*4*4, [])
    finally: del flop_registry[packet()]

def test_a_harmless_operator_of_ones_own_is_not():
    op = own('scale', one)
    assert told(Do(lambda x,y: op(x, y)@x.T), (rand(3,4), rand(4))) == (3*4*3, [])

def test_a_registered_formula_is_kept(monkeypatch): # torch's, or of those who count a causal attention by half
    monkeypatch.setitem(flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, lambda *args, **kwargs: 14)
    (model,sample),_ = attentions['causal']
    assert count_macs(model, sample) == 7

multiply = {'linear_dynamic', 'conv2d_relu', 'quantized_lstm', '_foreach_mm', '_native_multi_head_attention', '_transformer_encoder_layer_fwd', 'efficient_attention_forward',
            '_flash_attn_varlen_forward', 'gemv_4bit', 'batched_matmul', 'conv'} | {str(o).rpartition('.')[2] for o in flop_registry}
harmless_names = {'upsample_bilinear2d', '_upsample_bilinear2d_aa', 'upsample_linear1d', 'native_layer_norm', 'cummax', 'lgamma', '_to_copy', '_thnn_fused_lstm_cell',
                  '_fused_sdp_choice', '_convert_indices_from_coo_to_csr', 'mkldnn_reorder_conv2d_weight', 'convert_element_type', '_cudnn_rnn_flatten_weight', 'conv2d_prepack', 'dist'}

def test_operators_of_ones_own_are_judged_by_their_names():
    "With one matrix, which says nothing; `multiply` has the names of all that torch has a formula for"
    assert len(multiply) > 30
    for name in sorted(multiply | harmless_names):
        op = own(name, one)
        _,warned = told(Do(lambda x,y,op=op: op(x, y)), (rand(3,4), rand(4)))
        assert len(warned) == (name in multiply), name

# --- parameters and bytes

def test_params_count_once():
    m = nn.ModuleDict({'emb': nn.Embedding(10,4), 'out': nn.Linear(4,10)})
    m['out'].weight = m['emb'].weight
    m['out'].bias.requires_grad_(False)
    assert count_params(m) == 50

def test_size_on_disk_is_that_of_the_file(tmp_path):
    m = net()
    torch.save(m.state_dict(), tmp_path/'m.pt')
    assert abs(size_on_disk(m) - os.path.getsize(tmp_path/'m.pt')) < 1024  # the archive stores the file's name beside each tensor
    a,b = nn.Linear(500,500),nn.Linear(500,500).half()
    assert abs(size_on_disk(a)-size_on_disk(b) - 250500*2) < 1024  # tensors are padded to 64 bytes

def test_size_on_disk_counts_the_whole_storage_of_a_view():  # as torch.save does
    m = nn.Linear(100,1,bias=False)
    m.weight = nn.Parameter(torch.randn(100,100)[:1])
    assert size_on_disk(m) > 40000

# --- latency

class Count(nn.Module):
    def __init__(self, name, log): super().__init__(); self.name,self.log = name,log
    def forward(self, x): self.log.append((self.name, self.training, torch.is_grad_enabled())); return x

def test_models_take_turns():
    log = []
    res = measure_latency({k:Count(k, log) for k in 'ab'}, x, repeats=4, warmup=2, min_ms=0)
    assert [o[0] for o in log] == list('ab' 'ab') + list('abba'*2)  # one call to warm up and one that shows how fast each is, then there and back
    assert {o[1:] for o in log} == {(False,False)}
    assert list(res)==['a','b'] and all(o.ms>0 and o.spread>=0 for o in res.values())

def test_without_warm_up_each_call_is_measured():
    log = []
    measure_latency({k:Count(k, log) for k in 'ab'}, x, repeats=3, warmup=0)
    assert [o[0] for o in log] == list('ab' 'ba' 'ab')

def test_fast_models_are_called_more_often():
    log = []
    measure_latency(Count('a', log), x, repeats=1, min_ms=1)
    assert len(log) > 3+1  # at a few microseconds a call: about a hundred

def test_latency_follows_its_argument():
    a,b = nn.Linear(3,4),nn.Linear(3,4)
    s = torch.randn(2,3)
    one,lst,dct = (measure_latency(o, s, repeats=1, min_ms=0) for o in (a, [a,b], {'x':a,'y':b}))
    assert isinstance(one, Latency) and len(lst)==2 and isinstance(lst[0], Latency) and list(dct)==['x','y']

def test_median_and_spread(monkeypatch):
    seconds,now = iter([.009, .009, .009, .004, .001, .002, .1]),[0.]              # three to warm up, four that count
    class Takes(nn.Module):
        def forward(self, x): now[0] += next(seconds)
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    assert measure_latency(Takes(), x, repeats=4) == pytest.approx(Latency(3., 28-1.75, 1.))  # of 1,2,4,100: median 3, quartiles 1.75 and 28

# --- latency of layers

class Nap(nn.Module):
    def __init__(self, ms, log): super().__init__(); self.ms,self.log = ms,log
    def forward(self, x): time.sleep(self.ms/1e3); self.log.append(self.ms); return x

def test_time_of_each_module():
    log = []
    twice = Nap(2, log)
    m = nn.Sequential(Nap(8, log), nn.Sequential(twice, Nap(4, log)), twice)
    ms = latency_per_layer(m, x, 0)
    assert list(ms) == ['', '0', '1', '1.0', '1.1'] and log == [8,2,4,2]*2         # at least two calls
    assert ms['0'] >= 8 and ms['1.1'] >= 4 and ms['1.0'] >= 2*2                    # a sleep may be longer, but never shorter; one module naps twice
    assert ms['1'] >= 4 + 2 and ms[''] >= ms['0'] + ms['1']                        # medians of two calls are means, so that sums stay sums

def test_time_of_layers_that_a_fused_kernel_leaves_out():
    enc = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert latency_per_layer(enc, torch.randn(3,5,16))['linear1'] > 0

def test_layers_of_a_compiled_model():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    for measure in (macs_per_layer, latency_per_layer):
        plain,compiled = measure(net, torch.randn(3,4)),measure(torch.compile(net, backend='eager'), torch.randn(3,4))
        assert [n.removeprefix('_orig_mod').removeprefix('.') for n in compiled] == ['', *plain] and compiled['_orig_mod.0'] > 0

def test_calls_to_time_layers():
    log = []
    latency_per_layer(Nap(0, log), x)
    assert len(log) == 15                                                          # seconds are left, but more would tell no more
    log.clear()
    latency_per_layer(Nap(30, log), x, .1)
    assert 2 <= len(log) <= 4

@pytest.mark.parametrize('n', [0, -1])
def test_bad_repeats(n):
    with pytest.raises(ValueError, match=f'repeats={n}'): measure_latency(nn.Identity(), x, repeats=n)

# --- imports

def test_no_fastai(): subprocess.run([sys.executable, '-c', "import sys, fasterai_lr.cost, fasterai_lr.rank; assert 'fastai' not in sys.modules"], check=True)
