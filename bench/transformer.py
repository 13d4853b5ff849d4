"""Decompose a vision transformer without training, with unlabelled images only: accuracy against the share of
parameters that its linear layers keep.

    python bench/transformer.py

The first run trains the network on CIFAR-10 and keeps it in fastai's model folder. Every method may change
the same layers, all linear ones of the blocks, and sees the same images. The peers are SVDs of a weight whose
inputs are not scaled, or scaled by ASVD (Yuan et al. 2023) or by the whitening of SVD-LLM (Wang et al. 2024).
Each uses the ranks of its paper, one share for every layer, and also ranks that minimise the summed relative
error in its own metric. The network's attention consists of plain matrix products and linear layers, so that
all multiply-accumulates are counted.

Differences are over the same test images: `drop` is the distance to the dense network, with its standard
error `se`; `behind` is the distance to fasterai_lr, with its 95 % interval `low` to `high`; `divergence` is
the mean Kullback-Leibler divergence from the dense network's predictions; `seconds` is processor time,
without `calibrate`; latency is the shortest of 11 times for 64 images, so run it on an idle machine. Shares
and seeds that are already in the results file are not computed again.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse, time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import pandas as pd, torch
import torch.nn.functional as F
from torch import nn
from fastai.data.external import fastai_path

from cifar import images
from fasterai_lr.budget import Budget
from fasterai_lr.calibrate import calibrate, calibrated
from fasterai_lr.cost import count_macs, count_params, measure_latency
from fasterai_lr.distill import flip_and_crop
from fasterai_lr.fit import fit
from fasterai_lr.layers import replace_layers
from fasterai_lr.loss import classification
from fasterai_lr.planner import Option, Options, Planner, choose, plan_within
from one_shot import mean_and_se, rounded

# The network

class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3*d)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        q,k,v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a = (q*q.shape[-1]**-.5@k.mT).softmax(-1).to(v.dtype)
        return self.proj((a@v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attn = Attention(d, heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

def conv(i, o): return nn.Conv2d(i, o, 3, 2, 1, bias=False),nn.BatchNorm2d(o),nn.GELU()

class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) whose 16 tokens of 32×32 pixels come from strided
    convolutions (Xiao et al. 2021)"""
    def __init__(self, d=128, depth=6, heads=4, classes=10):
        super().__init__()
        self.stem = nn.Sequential(*conv(3, d//4), *conv(d//4, d//2), nn.Conv2d(d//2, d, 3, 2, 1))
        self.pos = nn.Parameter(.02*torch.randn(16, d))
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))

def train(model, epochs, bs=128, lr=1.5e-3, wd=.05):
    "Train one cycle of AdamW with flips and shifts, in bfloat16 where that is safe"
    x,y = images('train')
    x = x.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    gen = torch.Generator().manual_seed(0)
    steps = len(x)//bs
    opt = torch.optim.AdamW(model.parameters(), weight_decay=wd, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*steps)
    for epoch in range(epochs):
        model.train()
        start,total = time.perf_counter(),0.
        for i in torch.randperm(len(x), generator=gen)[:steps*bs].split(bs):
            with torch.autocast('cpu', torch.bfloat16): out = model(flip_and_crop(x[i], gen))
            loss = F.cross_entropy(out.float(), y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            total += loss.item()
        print(f'epoch {epoch}: loss {total/steps:.3f}, {time.perf_counter()-start:.0f} s', flush=True)
    return model.eval()

def trained(epochs):
    "Load the network from fastai's model folder, or train it and save it there"
    path = fastai_path('model')/f'fasterai_lr_vit_cifar10_{epochs}.pth'
    if not path.exists():
        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train(ViT(), epochs).state_dict(), path)
    model = ViT()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()

class Apart(nn.Module):
    "Three linear layers that replace the one for queries, keys and values"
    def __init__(self, qkv):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(qkv.in_features, qkv.out_features//3) for _ in range(3))
        for part,w,b in zip(self.parts, qkv.weight.detach().chunk(3), qkv.bias.detach().chunk(3)):
            part.weight.data = w.clone()
            part.bias.data = b.clone()

    def forward(self, x): return torch.cat([part(x) for part in self.parts], -1)

def split_qkv(model):
    "Copy `model`, with separate layers for q, k and v"
    apart = {n: Apart(m) for n,m in model.named_modules() if n.endswith('qkv')}
    return replace_layers(model, apart).eval()

def linears(model):
    "Return {name: layer} for the layers that may change"
    return {n:m for n,m in model.named_modules() if n.startswith('blocks') and isinstance(m, nn.Linear)}

def n_linear(model):
    "Count the parameters of the layers that may change, factored or not"
    named = model.named_parameters()
    return sum(p.numel() for n,p in named if n.startswith('blocks') and 'norm' not in n)

def factored_size(layer, rank):
    "The number of parameters of `layer` as two factors"
    return rank*(layer.in_features + layer.out_features) + layer.out_features

def one_share(model, share):
    "{name: rank} with at most this share of the parameters of every layer"
    ranks = {}
    for name,layer in linears(model).items():
        room = share*count_params(layer) - layer.out_features
        ranks[name] = max(1, int(room/(layer.in_features + layer.out_features)))
    return ranks

@torch.no_grad()
def scores(model, x, bs=250):
    model.eval()
    return torch.cat([model(b) for b in x.split(bs)])

# Peers

def input_sizes(model, batches):
    "{name: mean absolute value of each input, relative to that of all}"
    sums,hooks = {},[]
    for name,layer in linears(model).items():
        def hook(m, x, name=name): sums[name] = sums.get(name, 0.) + x[0].double().abs().flatten(0, -2).sum(0)
        hooks.append(layer.register_forward_pre_hook(hook))
    for b in batches: scores(model, b)
    for h in hooks: h.remove()
    return {n: s/s.mean() for n,s in sums.items()}

def whitening(A):
    "Return a Cholesky factor of the slightly damped moment `A` of inputs"
    damping = 1e-6*A.diagonal().mean()*torch.eye(len(A)).double()
    return torch.linalg.cholesky(A + damping)

def scalings(model, batches, calibration):
    "Return {peer: {name: the matrix that scales the inputs of a layer}}"
    layers = linears(model)
    plain = {n: torch.eye(l.in_features).double() for n,l in layers.items()}
    asvd = {n: s.sqrt().diag() for n,s in input_sizes(model, batches).items()}
    svd_llm = {n: whitening(calibration[n].inputs[0]) for n in layers}
    return {'plain SVD': plain, 'ASVD': asvd, 'SVD-LLM whitening': svd_llm}

class Peer:
    "SVDs of all weights with scaled inputs"
    def __init__(self, model, scales):
        self.model,self.scales,self.svds = model,scales,{}
        for name,layer in linears(model).items():
            scaled = layer.weight.detach().double()@scales[name]
            self.svds[name] = torch.linalg.svd(scaled, full_matrices=False)

    def truncated(self, ranks): # {name: rank}
        "Copy the model with factors of these ranks"
        return replace_layers(self.model, {n: self._factors(n, r) for n,r in ranks.items()})

    def _factors(self, name, rank):
        layer = self.model.get_submodule(name)
        U,S,Vh = self.svds[name]
        root = S[:rank].sqrt()
        first = nn.Linear(layer.in_features, rank, bias=False)
        last = nn.Linear(rank, layer.out_features)
        first.weight.data = torch.linalg.solve(self.scales[name].T, (root[:,None]*Vh[:rank]).T).T.float()
        last.weight.data = (U[:,:rank]*root).float()
        last.bias.data = layer.bias.detach().clone()
        return nn.Sequential(first, last)

    def ranks_by_error(self, share):
        """{name: rank} of least summed relative error, which serves the peers better than the absolute one; a
        layer that is best left dense is absent"""
        options = {n: self._options(n, l) for n,l in linears(self.model).items()}
        chosen = choose(options, share*n_linear(self.model), 'params')
        return {n: o.rank for n,o in chosen.items() if o.rank}

    def _options(self, name, layer):
        S2 = self.svds[name][1].square()
        dense = count_params(layer)
        options = [Option(None, None, 0., dense, 0)]
        for rank in range(1, len(S2)):
            size,loss = factored_size(layer, rank),float(S2[rank:].sum()/S2.sum())
            if size < dense: options.append(Option('svd', rank, loss, size, 0))
        return options

    def by_share(self, share): return self.truncated(one_share(self.model, share))
    def by_error(self, share): return self.truncated(self.ranks_by_error(share))

# This library

def planned(planner, share, **settings):
    "Decompose by a plan that leaves all layers outside the blocks dense"
    calibration,names = planner.calibration,linears(planner.model)
    options = {n:o for n,o in planner.options.items() if n in names}
    total = sum(o[0].params for o in options.values())
    within = Options(dict(params=total))
    within.update(options)
    plan = plan_within(planner, within, Budget(params=share))
    return plan.apply(planner.model, calibration, **settings)

def with_ranks(calibration, ranks, **settings):
    "Decompose with given ranks"
    changed = calibrated(calibration.model, calibration, replace(calibration.settings, **settings))
    return fit(changed, {n: ('svd', r) for n,r in ranks.items()}).model

class Methods:
    "The methods to compare on one draw of images; each returns {name: function that makes the model}"
    def __init__(self, dense, batches, seed):
        self.dense,self.batches,self.seed = dense,batches,seed
        self.calibration = calibrate(dense, batches, seed=seed)
        self.fisher = Planner(self.calibration)

    @cached_property
    def activation(self):
        settings = replace(self.calibration.settings, metric='activation')
        return Planner(calibrated(self.dense, self.calibration, settings))

    @cached_property
    def split(self): return Planner(calibrate(split_qkv(self.dense), self.batches, seed=self.seed))

    @cached_property
    def peers(self):
        found = scalings(self.dense, self.batches, self.calibration)
        return {name: Peer(self.dense, scales) for name,scales in found.items()}

    def beside_peers(self, share):
        makes = {'fasterai_lr': partial(planned, self.fisher, share)}
        for name,peer in self.peers.items():
            makes[f'{name}, one share'] = partial(peer.by_share, share)
            makes[f'{name}, ranks by error'] = partial(peer.by_error, share)
        return makes

    def ingredients(self, share):
        same,closed = one_share(self.dense, share),dict(sequential=False)
        return {
            'activations, ranks by budget': partial(planned, self.activation, share, **closed),
            'Fisher, one share': partial(with_ranks, self.calibration, same, **closed),
            'Fisher, ranks by budget': partial(planned, self.fisher, share, **closed),
            'Fisher, one share, sequential fit': partial(with_ranks, self.calibration, same),
            'activations, ranks by budget, sequential fit': partial(planned, self.activation, share),
            'Fisher, ranks by budget, q, k and v apart': partial(planned, self.split, share, **closed)}

    def all(self, share): return self.beside_peers(share) | self.ingredients(share)

# What is measured

class Test:
    "The test images, and the outputs of the dense network for them"
    def __init__(self, dense, n=None):
        self.dense = dense
        self.x,self.labels = images('test', n)
        self.want = scores(dense, self.x)

    def right(self, out): return out.argmax(1) == self.labels

    def measured(self, model, out): # `out`: class scores
        "Return the size and the accuracy of a model"
        drop,se = mean_and_se(self.right(self.want), self.right(out))
        x = self.x[:1]
        return dict(linear=n_linear(model)/n_linear(self.dense),
                    params=count_params(model)/count_params(self.dense),
                    macs=count_macs(model, x)/count_macs(self.dense, x),
                    accuracy=100*self.right(out).float().mean().item(), drop=drop, se=se,
                    divergence=classification.increase(self.want, out)/len(out))

def compared(methods, test, share, seed, ingredients):
    "Yield a row and the model for each method, ours first"
    makes = methods.all(share) if ingredients else methods.beside_peers(share)
    right_ours = None
    for name,make in makes.items():
        start = time.process_time()
        model = make()
        seconds = time.process_time()-start
        out = scores(model, test.x)
        right = test.right(out)
        if right_ours is None: right_ours = right
        behind,se = mean_and_se(right_ours, right)
        row = dict(method=name, budget=share, seed=seed, **test.measured(model, out), behind=behind,
                   low=behind-1.96*se, high=behind+1.96*se, seconds=seconds)
        print(rounded(row), flush=True)
        yield row,model

def add_latency(rows, models, dense, x):
    "Add the time of each model to its row, as a fraction of the dense one's"
    times = measure_latency(dict(dense=dense) | models, x, 11)
    for row in rows: row['latency'] = times[row['method']].least/times['dense'].least

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--shares', type=float, nargs='+', default=[.7, .5, .35, .2])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                        help='for the draw of unlabelled images; the first also runs the ingredients')
    parser.add_argument('--images', type=int, default=1000, help='unlabelled training images')
    parser.add_argument('--test', type=int, default=None, help='test images; all of them by default')
    parser.add_argument('--epochs', type=int, default=10, help='epochs of training of the dense network')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'transformer.csv')
    return parser.parse_args()

def main():
    args = arguments()
    dense = trained(args.epochs)
    test = Test(dense, args.test)
    rows = pd.read_csv(args.out).to_dict('records') if args.out.exists() else []
    done = {(row['budget'], row['seed']) for row in rows}
    print(f'dense: {test.right(test.want).float().mean():.2%} of {len(test.x):,} images')
    for seed in args.seeds:
        shares = [share for share in args.shares if (share, seed) not in done]
        if not shares: continue
        x,_ = images('train', args.images, seed)
        methods,first = Methods(dense, list(x.split(128)), seed),seed == args.seeds[0]
        for share in shares:
            here,models = [],{}
            for row,model in compared(methods, test, share, seed, ingredients=first):
                here.append(row)
                models[row['method']] = model
            if first: add_latency(here, models, dense, test.x[:64])
            rows += here
            args.out.parent.mkdir(exist_ok=True)
            pd.DataFrame(rows).to_csv(args.out, index=False)
    groups = pd.DataFrame(rows).groupby(['method', 'budget'], sort=False)
    columns = ['linear', 'macs', 'latency', 'drop', 'divergence', 'behind', 'low', 'high']
    print(groups[columns].mean().round(3).to_string())

if __name__ == '__main__': main()
