"What holds on a GPU as on the CPU, the reference: where the factors are, what they compute, mixed precision. The same tests run on the CPU, where there is no GPU"
import copy

import pytest, torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.core import Callback
import fastai.callback.schedule
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose
from fasterai_lr.layers import factored_layers
from fasterai_lr.learner import *
from fasterai_lr.budget import Budget
from learners import digit_learner, quiet
from networks import digit_net, digits

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=no_gpu)])
x,y = digits()
whats = dict(svd=ConvDecomposer('svd', .3), spatial=ConvDecomposer('spatial', .25), tucker=ConvDecomposer('tucker', .4), cp=ConvDecomposer('cp', 4), slice=ConvDecomposer('slice', 1), linear=FC_Decomposer(.3))

def net(): return digit_net(16, bias=False).eval()

def where(model): return {(t.device.type, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}

class ToHost(TorchDispatchMode):
    "The largest tensor that goes from a GPU to the host"
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        src = [a for a in args if isinstance(a, torch.Tensor) and a.is_cuda]
        if src and isinstance(out, torch.Tensor) and out.device.type == 'cpu': self.most = max(self.most, out.numel())
        return out

@devices
@pytest.mark.parametrize('name', whats)
@pytest.mark.parametrize('data', [False, True])
def test_factors_are_where_the_layer_was(name, data, device):
    "And compute what those computed on the CPU do"
    args = (x[:100],) if data else ()
    kw = dict(metric='activation') if data else {}                 # without random signs
    want,model = decompose(net(), whats[name], *args, **kw),net().to(device)
    with ToHost() as host: small = decompose(model, whats[name], *args, **kw)
    assert where(small) == where(model) == {(device, torch.float32)} and factored_layers(small).keys() == factored_layers(want).keys() != set()
    assert host.most < 512*64/2                                    # nothing as large as the largest weight
    with torch.no_grad(): out,ref = small(x[100:200].to(device)).cpu(),want(x[100:200])
    # another library's eigenvectors from moments summed in another order: float32 through the layers. CP's alternating steps go on for longer
    assert_close(out, ref, rtol=0, atol=(2e-2 if name == 'cp' else 1e-3)*ref.abs().max().item())

@devices
def test_a_budget(device):
    "The same ranks, the same outputs"
    want,model = decompose(net(), Budget(macs=.5), x[:200], metric='activation'),net().to(device)
    small = decompose(model, Budget(macs=.5), x[:200].to(device), metric='activation')
    ranks = lambda m: {n: (l.scheme, l.rank) for n,l in factored_layers(m).items()}
    assert ranks(small) == ranks(want) and where(small) == {(device, torch.float32)}
    with torch.no_grad(): assert_close(small(x[:100].to(device)).cpu(), want(x[:100]), rtol=0, atol=1e-2*want(x[:100]).abs().max().item())

@devices
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_memory_format(dtype, device):
    "Computed in float32 or more, given back as the layer was"
    model = net().to(device, dtype).to(memory_format=torch.channels_last)
    small = decompose(model, [FC_Decomposer(.3), ConvDecomposer('spatial', .25)])
    assert where(small) == {(device, dtype)} and len(factored_layers(small)) == 4
    convs = [m for m in small.modules() if type(m) is nn.Conv2d]
    assert len(convs) == 4 and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    full = decompose(net().to(device), [FC_Decomposer(.3), ConvDecomposer('spatial', .25)])
    # rounded to 11 or 8 bits, before and after
    for a,b in zip(factored_layers(small).values(), factored_layers(full).values()): assert_close(a.weight.float(), b.weight, rtol=0, atol=(5e-3 if dtype == torch.float16 else 4e-2)*b.weight.abs().max().item())

class Autocast(MixedPrecision):
    "fastai's own is CUDA's alone; on the CPU it is bfloat16, and the scaler does nothing"
    device = 'cpu'
    def before_fit(self):
        super().before_fit()
        if self.device == 'cpu': self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

class Watch(Callback):
    order = 62
    def before_fit(self): self.kinds,self.scales,self.teacher = [],[],set()
    def before_step(self):
        self.kinds.append(where(self.model))
        self.scales.append(self.learn.scaler.get_scale())
    def after_pred(self):
        if self.training and self.decompose_cb.teacher is not None: self.teacher |= where(self.decompose_cb.teacher)

@devices
@pytest.mark.parametrize('amp', ['fp16', 'bf16'])
def test_mixed_precision_through_the_swap(amp, device):
    "Calibrated in float32, the scaler of gradients goes on with its scale, the teacher is on the device and leaves it, and all parameters train on"
    if device == 'cpu' and amp == 'fp16': pytest.skip('fp16 needs a GPU')
    learn = quiet(digit_learner(net().to(device), range(500), range(500, 600), device=device))
    half,w,c = Autocast(amp),Watch(),DecomposeCallback({1: Budget(macs=.7), 2: Budget(macs=.5)}, ft_lr=1e-3, distill=.5)
    half.device = device
    learn.add_cb(c)
    learn.fit_one_cycle(4, 1e-2, cbs=[half, w])
    assert [r['epoch'] for r in c.history] == [1,2] and all(r['decomposed'] and r['macs_after'] < r['macs_before'] for r in c.history)
    assert all(k == {(device, torch.float32)} for k in w.kinds) and w.teacher == {(device, torch.float32)} and c.teacher is None
    # the scaler starts at 65536, doubles after 2,000 steps and halves at an overflow; it was not made anew at the swap
    assert amp == 'bf16' or all(b in (a, a/2) for a,b in zip(w.scales, w.scales[1:]))
    before = copy.deepcopy(learn.model)
    learn.fit(1, 1e-3)
    assert all(not torch.equal(a, b) for a,b in zip(before.parameters(), learn.model.parameters())) and learn.validate()[1] > .6

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_parallel_trainer_on_two_gpus():
    dls = Datasets(range(600), [[x.__getitem__], [y.__getitem__]], splits=[range(500), range(500,600)]).dataloaders(bs=50, device='cuda:0', num_workers=0)
    learn = Learner(dls, net().cuda(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.parallel_ctx([0,1]), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2, cbs=DecomposeCallback(1, Budget(macs=.5)))
    assert factored_layers(learn.model) and learn.validate()[1] > .6
