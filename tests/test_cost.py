"Cost: parameters, MACs against formulas, latency, and that measuring leaves no trace"
import copy, os, random, subprocess, sys, time
import numpy as np, pytest, torch
from torch import nn
from fasterai_lr.cost import *
from fasterai_lr.cost import _rnn_flops

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

def trace(m):
    return dict(modes=[o.training for o in m.modules()], tensors={k:v.clone() for k,v in m.state_dict().items()}, hooks=[(list(o._forward_hooks), list(o._forward_pre_hooks)) for o in m.modules()],
                grads=[(p.requires_grad, p.grad) for p in m.parameters()], rng=torch.get_rng_state(), py=random.getstate(), np=np.random.get_state()[1].tolist(),
                fast=torch.backends.mha.get_fastpath_enabled(), grad=torch.is_grad_enabled(), globs=[len(getattr(torch.nn.modules.module, o)) for o in ('_global_forward_hooks','_global_forward_pre_hooks')])

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    return a==b

x = torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(0))

# --- nothing changes

measures = [lambda m,s: count_macs(m, s), lambda m,s: macs_per_layer(m, s), lambda m,s: measure_latency(m, s, repeats=2, min_ms=0), lambda m,s: measure_latency({'a':m,'b':m}, s, repeats=2, min_ms=0),
            lambda m,s: latency_per_layer(m, s, 0)]

@pytest.mark.parametrize('measure', measures)
@pytest.mark.parametrize('fast', [True, False])
def test_no_trace(measure, fast):
    m = net()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        before = trace(m)
        measure(m, x)
        assert m.seen  # its own hook ran
        assert same(trace(m), before)
        for bad in ((x,True), x[:,:2], {'x':x, 'y':1}):
            with pytest.raises((RuntimeError,TypeError)): measure(m, bad)
            assert same(trace(m), before)
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
    if shape==(4,) and not bias: pytest.skip("torch has no formula for a matrix times a single vector")
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

def test_formula_of_fused_recurrent_layers():
    ws = [torch.Size(o) for o in ((64,8), (64,16), (64,), (64,))]
    assert _rnn_flops(torch.Size((5,3,8)), *ws) == _rnn_flops(torch.Size((5,3,8)), ws, 4) == 2*5*3*64*24

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
    import fasterai_lr.cost as cost
    ms = iter([9,1] + [4,1,2,100])
    monkeypatch.setattr(cost, '_time', lambda *a: next(ms))
    assert measure_latency(nn.Identity(), x, repeats=4) == Latency(3., 28-1.75, 1.)  # of 1,2,4,100: median 3, quartiles 1.75 and 28

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
