"""Decomposition of a vision transformer without training: accuracy against the share of the parameters of its linear layers, with unlabelled images only.

    python bench/transformer.py

The network is trained on CIFAR-10 at the first run and kept in fastai's folder of models. Every method may touch the same layers, all linear ones of the blocks, and sees the same images.
Peers are SVDs of a weight whose inputs are scaled: by nothing; by ASVD (Yuan et al. 2023); by the whitening of SVD-LLM (Wang et al. 2024). Each is given the ranks
of its paper, one share for every layer, and also ranks that minimise the summed relative error in its own metric. The network's attention is in plain matrix products and linear layers, so that all
multiply-accumulates are counted. Differences are over the same test images: `drop` is to the dense network with its standard error `se`, `behind` to fasterai_lr with its 95 % interval `low` to `high`;
`divergence` is the mean Kullback-Leibler divergence from the dense network's predictions; `seconds` are of the processor, without those of `calibrate`; latency is the shortest of 11 times for 64 images and wants an idle
machine. Shares and seeds that are in the file of results are not computed again.
"""
import argparse, time, warnings
from functools import cached_property
from pathlib import Path

import pandas as pd, torch
import torch.nn.functional as F
from torch import nn
from fastai.data.external import fastai_path

from cifar import images
from fasterai_lr.cost import count_macs, count_params, measure_latency
from fasterai_lr.distill import flip_and_crop
from fasterai_lr.fit import fit
from fasterai_lr.layers import replace_layers
from fasterai_lr.budget import Budget
from fasterai_lr.planner import Option, Planner, choose
from one_shot import mean_and_se

class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.qkv,self.proj = heads,nn.Linear(d, 3*d),nn.Linear(d, d)

    def forward(self, x):
        q,k,v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a = (q*q.shape[-1]**-.5@k.mT).softmax(-1).to(v.dtype)
        return self.proj((a@v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.norm1,self.attn,self.norm2 = nn.LayerNorm(d),Attention(d, heads),nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

def _conv(i, o): return nn.Conv2d(i, o, 3, 2, 1, bias=False),nn.BatchNorm2d(o),nn.GELU()

class ViT(nn.Module):
    "A vision transformer (Dosovitskiy et al. 2021) whose 16 tokens of 32×32 pixels come from strided convolutions (Xiao et al. 2021)"
    def __init__(self, d=128, depth=6, heads=4, classes=10):
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, d//4), *_conv(d//4, d//2), nn.Conv2d(d//2, d, 3, 2, 1))
        self.pos = nn.Parameter(.02*torch.randn(16, d))
        self.blocks,self.norm,self.head = nn.Sequential(*(Block(d, heads) for _ in range(depth))),nn.LayerNorm(d),nn.Linear(d, classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))

def train(model, epochs, bs=128, lr=1.5e-3, wd=.05):
    "AdamW on one cycle with flips and shifts, in bfloat16 where that is safe"
    x,y = images('train')
    x,model = x.contiguous(memory_format=torch.channels_last),model.to(memory_format=torch.channels_last)
    gen,steps = torch.Generator().manual_seed(0),len(x)//bs
    opt = torch.optim.AdamW(model.parameters(), weight_decay=wd, fused=True)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*steps)
    for epoch in range(epochs):
        model.train()
        start,total = time.perf_counter(),0.
        for i in torch.randperm(len(x), generator=gen)[:steps*bs].split(bs):
            with torch.autocast('cpu', torch.bfloat16): out = model(flip_and_crop(x[i], gen))
            loss = F.cross_entropy(out.float(), y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            total += loss.item()
        print(f'epoch {epoch}: loss {total/steps:.3f}, {time.perf_counter()-start:.0f} s', flush=True)
    return model.eval()

def trained(epochs):
    "The network, from fastai's folder of models, or trained and put there"
    path,model = fastai_path('model')/f'fasterai_lr_vit_cifar10_{epochs}.pth',ViT()
    if path.exists(): model.load_state_dict(torch.load(path, weights_only=True))
    else:
        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train(ViT(), epochs).state_dict(), path)
        return trained(epochs)
    return model.eval()

class Apart(nn.Module):
    "One linear layer with three times the outputs as three layers"
    def __init__(self, qkv):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(qkv.in_features, qkv.out_features//3) for _ in range(3))
        for p,w,b in zip(self.parts, qkv.weight.detach().chunk(3), qkv.bias.detach().chunk(3)): p.weight.data,p.bias.data = w.clone(),b.clone()
    def forward(self, x): return torch.cat([p(x) for p in self.parts], -1)

def split_qkv(model):
    "A copy of `model` with q, k and v apart"
    return replace_layers(model, {n: Apart(m) for n,m in model.named_modules() if n.endswith('qkv')}).eval()

def linears(model):
    "{name: layer} of those that may be touched"
    return {n:m for n,m in model.named_modules() if n.startswith('blocks') and isinstance(m, nn.Linear)}

def n_linear(model): return sum(p.numel() for n,p in model.named_parameters() if n.startswith('blocks') and 'norm' not in n)

def one_share(model, share):
    "{name: rank} with at most this share of the parameters of every layer"
    return {n: max(1, int((share*count_params(l) - l.out_features)/(l.in_features + l.out_features))) for n,l in linears(model).items()}

def input_sizes(model, batches):
    "{name: mean absolute value of each input}"
    sums,hooks = {n:0. for n in linears(model)},[]
    for n,l in linears(model).items():
        def hook(m, x, n=n): sums[n] = sums[n] + x[0].double().abs().flatten(0, -2).sum(0)
        hooks.append(l.register_forward_pre_hook(hook))
    for b in batches: scores(model, b)
    for h in hooks: h.remove()
    return {n: s/s.mean() for n,s in sums.items()}

def scalings(model, batches, moments):
    "{peer: {name: the matrix that scales the inputs of a layer}}"
    def whitening(A): return torch.linalg.cholesky(A + 1e-6*A.diagonal().mean()*torch.eye(len(A)).double())
    return {'plain SVD': {n: torch.eye(l.in_features).double() for n,l in linears(model).items()},
            'ASVD': {n: s.sqrt().diag() for n,s in input_sizes(model, batches).items()},
            'SVD-LLM whitening': {n: whitening(moments[n].inputs[0]) for n in linears(model)}}

def scaled_svds(model, scales): return {n: torch.linalg.svd(l.weight.detach().double()@scales[n], full_matrices=False) for n,l in linears(model).items()}

def truncated(model, scales, svds, ranks):
    "A copy of `model` with layers whose scaled weight is truncated"
    new = {}
    for n,r in ranks.items():
        layer,(U,S,Vh) = model.get_submodule(n),svds[n]
        first,last = nn.Linear(layer.in_features, r, bias=False),nn.Linear(r, layer.out_features)
        first.weight.data = torch.linalg.solve(scales[n].T, (S[:r,None].sqrt()*Vh[:r]).T).T.float()
        last.weight.data,last.bias.data = (U[:,:r]*S[:r].sqrt()).float(),layer.bias.detach().clone()
        new[n] = nn.Sequential(first, last)
    return replace_layers(model, new)

def ranks_by_error(model, svds, share):
    "{name: rank} of least summed relative error, which serves the peers better than the absolute one; a layer that is best left dense is absent"
    options = {}
    for n,l in linears(model).items():
        S2 = svds[n][1].square()
        loss = lambda r, S2=S2: float(S2[r:].sum()/S2.sum())
        size = lambda r, l=l: r*(l.in_features + l.out_features) + l.out_features
        options[n] = [Option(None, None, 0., count_params(l), 0)] + [Option('svd', r, loss(r), size(r), 0) for r in range(1, len(S2)) if size(r) < count_params(l)]
    return {n:o.rank for n,o in choose(options, share*n_linear(model), 'params').items() if o.rank}

def peers(dense, batches, moments, share):
    for name,scales in scalings(dense, batches, moments).items():
        svds = scaled_svds(dense, scales)
        yield f'{name}, one share', lambda scales=scales, svds=svds: truncated(dense, scales, svds, one_share(dense, share))
        yield f'{name}, ranks by error', lambda scales=scales, svds=svds: truncated(dense, scales, svds, ranks_by_error(dense, svds, share))

def planned(planner, share, sequential=True, ranks=None, seed=0):
    "The network by this library, with `ranks` or those of a plan"
    args = dict(moments=planner.moments, metric=planner.metric, sequential=sequential, seed=seed)
    if ranks: return fit(planner.model, {n: ('svd', r) for n,r in ranks.items()}, planner.batches, **args)
    options = {n:o for n,o in planner.all_options().items() if n in linears(planner.model)}
    return planner.plan(Budget(params=share), options, sum(o[0].params for o in options.values())).apply(planner.model, planner.batches, **args)

class Methods:
    "What is compared, on one draw of unlabelled images; everything yields (name, function that makes the model)"
    def __init__(self, dense, batches, seed):
        self.dense,self.batches,self.seed,self.fisher = dense,batches,seed,Planner(dense, batches, seed=seed)

    @cached_property
    def activation(self): return Planner(self.dense, self.batches, metric='activation', moments=self.fisher.moments)
    @cached_property
    def split(self): return Planner(split_qkv(self.dense), self.batches, seed=self.seed)

    def ingredients(self, share):
        same = one_share(self.dense, share)
        yield 'activations, ranks by budget', lambda: planned(self.activation, share, False)
        yield 'Fisher, one share', lambda: planned(self.fisher, share, False, same)
        yield 'Fisher, ranks by budget', lambda: planned(self.fisher, share, False)
        yield 'Fisher, one share, sequential fit', lambda: planned(self.fisher, share, ranks=same, seed=self.seed)
        yield 'activations, ranks by budget, sequential fit', lambda: planned(self.activation, share, seed=self.seed)
        yield 'Fisher, ranks by budget, q, k and v apart', lambda: planned(self.split, share, False)

    def beside_peers(self, share):
        yield 'fasterai_lr', lambda: planned(self.fisher, share, seed=self.seed)
        yield from peers(self.dense, self.batches, self.fisher.moments, share)

    def all(self, share):
        yield from self.beside_peers(share)
        yield from self.ingredients(share)

@torch.no_grad()
def scores(model, x, bs=250): return torch.cat([model.eval()(b) for b in x.split(bs)])

def divergence(out, want): return F.kl_div(out.log_softmax(1), want.log_softmax(1), log_target=True, reduction='batchmean').item()

def row(model, dense, x, out, want, labels):
    "What is measured of one model: its class scores `out` beside the dense network's, `want`"
    right = out.argmax(1) == labels
    drop,se = mean_and_se(want.argmax(1) == labels, right)
    return dict(linear=n_linear(model)/n_linear(dense), params=count_params(model)/count_params(dense), macs=count_macs(model, x)/count_macs(dense, x),
                accuracy=100*right.float().mean().item(), drop=drop, se=se, divergence=divergence(out, want))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--shares', type=float, nargs='+', default=[.7, .5, .35, .2])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the draw of unlabelled images; the ingredients one by one with the first alone')
    parser.add_argument('--images', type=int, default=1000, help='unlabelled training images')
    parser.add_argument('--test', type=int, default=None, help='test images; all of them by default')
    parser.add_argument('--epochs', type=int, default=10, help='of the training of the dense network')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'transformer.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    dense,(test,labels) = trained(args.epochs),images('test', args.test)
    rows = pd.read_csv(args.out).to_dict('records') if args.out.exists() else []
    want = scores(dense, test)
    print(f'dense: {(want.argmax(1) == labels).float().mean():.2%} of {len(test):,} images')
    for seed in args.seeds:
        shares = [s for s in args.shares if (s, seed) not in {(r['budget'], r['seed']) for r in rows}]
        if not shares: continue
        x,_ = images('train', args.images, seed)
        methods = Methods(dense, list(x.split(128)), seed)
        for share in shares:
            models,right,here = {'dense': dense},{},[]
            for name,make in (methods.all if seed == args.seeds[0] else methods.beside_peers)(share):
                start = time.process_time()
                models[name] = model = make()
                seconds,out = time.process_time()-start,scores(model, test)
                right[name] = out.argmax(1) == labels
                behind,se = mean_and_se(right['fasterai_lr'], right[name])
                here.append(dict(method=name, budget=share, seed=seed, **row(model, dense, x[:1], out, want, labels), behind=behind, low=behind-1.96*se, high=behind+1.96*se, seconds=seconds))
                print({k: round(v, 3) if isinstance(v, float) else v for k,v in here[-1].items()}, flush=True)
            if seed == args.seeds[0]:
                ms = measure_latency(models, x[:64], 11)
                for r in here: r['latency'] = ms[r['method']].least/ms['dense'].least
            rows += here
            args.out.parent.mkdir(exist_ok=True)
            pd.DataFrame(rows).to_csv(args.out, index=False)
    print(pd.DataFrame(rows).groupby(['method', 'budget'], sort=False)[['linear', 'macs', 'latency', 'drop', 'divergence', 'behind', 'low', 'high']].mean().round(3).to_string())

if __name__ == '__main__': main()
