"""Every classification, segmentation and detection model of torchvision, through `FC_Decomposer` and through `ConvDecomposer` by every method.

What is tested is structure: nothing raises, outputs have the shapes and types of the dense model's and are finite, no model grows, each layer is
factored or listed with a reason. The weights are therefore random, and two things save most of the time: CP stops after five sweeps, and
layers of one shape get the same weights everywhere, so that each is decomposed once (`Once` compares the weights before it answers). Models of
more than 250 million parameters (vit_h_14, vit_l_16, vit_l_32, regnet_y_128gf) get factors of zeros, which have the right shapes
but say nothing of the numerics.

With ZOO_CSV set, the slow test also writes the table bench/results/zoo.csv: a row for each model and decomposer.
"""
import csv, os, warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest, torch
from torch import nn
from torchvision import models

from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer
from fasterai_lr.layers import factored_layers, find_layers
from fasterai_lr.linalg import SVD
from fasterai_lr.schemes import schemes
from fasterai_lr.tensor import cp, tucker2
from helpers import n_params

torch.set_num_threads(1)
zoo = sorted(models.list_models(module=models)), models.list_models(module=models.segmentation), models.list_models(module=models.detection)
sample = ['mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small', 'resnet18', 'shufflenet_v2_x0_5', 'squeezenet1_1', 'efficientnet_b0',
          'densenet121', 'swin_t', 'vit_b_32', 'lraspp_mobilenet_v3_large', 'fasterrcnn_mobilenet_v3_large_320_fpn', 'ssdlite320_mobilenet_v3_large']
decomposers = dict(fc=FC_Decomposer, **{m: partial(ConvDecomposer, m) for m in schemes})
huge = 250e6

# --- models, cheaply

def fill_(model):
    "Normal weights of the usual scale, the same for all of one shape"
    made = {}
    for m in model.modules():
        for n,p in m.named_parameters(recurse=False):
            if p.dim() < 2: nn.init.constant_(p, float(n == 'weight')); continue
            if p.shape not in made:
                gen = torch.Generator().manual_seed(sum(s*31**k for k,s in enumerate(p.shape)) % 2**31)
                made[p.shape] = p.data.normal_(std=p[0].numel()**-.5, generator=gen)
            else: p.data.copy_(made[p.shape])

def make(name):
    "The model `name`, in eval mode, and a small input for it"
    kw = dict(weights=None)
    if name not in zoo[0]: kw['weights_backbone'] = None
    if name in zoo[2] and not name.startswith('ssd'): kw |= dict(min_size=96, max_size=96)
    if 'rcnn' in name: kw |= dict(rpn_post_nms_top_n_test=20, box_detections_per_img=5)
    if name in ('googlenet', 'inception_v3'): kw['init_weights'] = False # by scipy, minutes
    side = 224 if name == 'maxvit_t' else 56 if name == 'vit_h_14' else 96
    if name.startswith('vit'): kw['image_size'] = side
    with pytest.MonkeyPatch.context() as mp: # torch's and torchvision's own initialisations take longer than all else here
        for f in ('kaiming_uniform_', 'kaiming_normal_', 'xavier_uniform_', 'xavier_normal_', 'trunc_normal_', 'normal_', 'uniform_', 'orthogonal_'):
            mp.setattr(nn.init, f, lambda t, *a, **k: t)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model = models.get_model(name, **kw).eval()
    fill_(model)
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return model, list(x) if name in zoo[2] else x

# --- decompositions, once for each weight

class Once:
    "A function of a tensor and other things that is called once for the same ones, while they are among the last `keep` bytes"
    def __init__(self, f, keep=1.5e9): self.f,self.keep,self.known = f,keep,OrderedDict()
    def __call__(self, A, *args, **kw):
        key = A.shape, A.dtype, *(a for a in args if isinstance(a, (int, tuple))), *kw.items()
        hit = self.known.pop(key, None)
        if hit is None or not torch.equal(hit[0], A): hit = A,self.f(A, *args, **kw)
        self.known[key] = hit
        while sum(a.numel()*4 for a,_ in self.known.values()) > self.keep: self.known.popitem(last=False)
        return hit[1]

class Zeros:
    "An SVD of zeros"
    spectrum = torch.ones(1)
    def __init__(self, A, name, exact=True): self.shape = A.shape
    def truncate(self, rank):
        *b,m,n = self.shape
        return torch.zeros(*b, m, rank), torch.zeros(*b, rank), torch.zeros(*b, rank, n)
    def error(self, rank): return 1.

def zeros_tucker2(W, ranks, init=None): return torch.zeros(*ranks, *W.shape[2:]), torch.zeros(len(W), ranks[0]), torch.zeros(W.shape[1], ranks[1])
def zeros_cp(W, rank, init=None, max_sweeps=None): return [torch.zeros(n, rank) for n in W.shape]

once,zeros = dict(SVD=Once(SVD), tucker2=Once(tucker2), cp=Once(cp)),dict(SVD=Zeros, tucker2=zeros_tucker2, cp=zeros_cp)

# --- the test

def shape_of(out):
    "Types and shapes of what a model gives; the number of detections in an image is not part of it"
    if isinstance(out, torch.Tensor):
        assert out.isfinite().all()
        return tuple(out.shape), out.dtype
    if isinstance(out, dict): return type(out), {k: shape_of(v) for k,v in out.items()}
    return [shape_of({k: v[:1].sum(0) for k,v in o.items()}) for o in out]

def check(name, model, x, kind, dec):
    "Decompose `model` by `dec` and see that all is as it should be; a row of the table"
    types,before = (dec.types, n_params(model))
    layers = find_layers(model, types)
    versions = [(id(p), p._version) for p in model.parameters()]
    new = dec.decompose(model)
    plan,fac = new.low_rank_plan['layers'],factored_layers(new)
    assert list(plan) == [f.name for f in layers] # one row for each layer
    assert {n for n,r in plan.items() if r['status'] == 'factored'} == set(fac)
    for n,r in plan.items():
        assert (n in fac and r['params_after'] <= r['params_before']) or (r['status'] == 'dense' and r['reason']), (n, r)
        if n in fac: assert (fac[n].scheme, r['params_after']) == (r['scheme'], n_params(fac[n])) and 0 <= r['error'] <= 1+1e-6
    assert n_params(new) == before - sum(r['params_before'] - r['params_after'] for r in plan.values()) <= before
    assert [(id(p), p._version) for p in model.parameters()] == versions
    return new,dict(model=name, decomposer=kind, factored=len(fac), dense=len(plan)-len(fac), params_before=before, params_after=n_params(new))

def through_all(name, monkeypatch):
    model,x = make(name)
    for n,f in (zeros if n_params(model) > huge else once).items(): monkeypatch.setattr(f'fasterai_lr.schemes.{n}', f)
    monkeypatch.setattr(schemes['cp'], 'max_sweeps', 5)
    with torch.no_grad(): expect = shape_of(model(x))
    rows = []
    for kind,dec in decomposers.items():
        new,row = check(name, model, x, kind, dec())
        if row['factored']: # otherwise it is a copy
            with torch.no_grad(): assert shape_of(new(x)) == expect, kind
        rows.append(row)
    assert any(r['factored'] for r in rows)
    return rows

@pytest.mark.parametrize('name', sample)
def test_a_sample_of_the_zoo(name, monkeypatch): through_all(name, monkeypatch)

@pytest.fixture(scope='module')
def table():
    "Rows of the table, written when all models are through"
    rows = []
    yield rows
    if not os.environ.get('ZOO_CSV') or not rows: return
    path = Path(__file__).resolve().parent.parent/'bench/results/zoo.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)

@pytest.mark.slow
@pytest.mark.parametrize('name', [n for names in zoo for n in names])
def test_the_zoo(name, monkeypatch, table): table += through_all(name, monkeypatch)
