"""Peak memory and seconds of a large transformer: calibrated, planned and fitted.

    OMP_NUM_THREADS=2 python bench/large.py

The network is like Llama: RMSNorm, attention of width 2,048, SwiGLU of width 5,632, and ten blocks, which makes half
a billion parameters. Its weights are random, with a spectrum that decays, so it says nothing about accuracy. The data
are 64 sequences of 128 random tokens, in batches of 8; the budget is half of the MACs. Each step prints its seconds,
and the peak of the process's memory in GiB while it ran; `model` is the memory before the first step. `predicted` and
`measured` are the increase of the loss. `--blocks` and `--width` make it smaller, and `--room` sets the bytes for
moments, in GiB. Every run adds a row to `bench/results/large.csv`.
"""
import argparse, resource, time
from pathlib import Path
from threading import Event, Thread

import pandas as pd, torch
from torch import nn

from fasterai_lr import Budget
from fasterai_lr.calibrate import calibrate
from fasterai_lr.loss import Classification
from fasterai_lr.planner import make_plan

results = Path(__file__).resolve().parent/'results'/'large.csv'

# The network

class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x): return x*torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)*self.weight

def linear(n, o):
    "A layer without bias, whose singular values decay"
    res = nn.Linear(n, o, bias=False)
    scale = torch.arange(1, n+1)**-.5
    with torch.no_grad(): res.weight.normal_().mul_(scale[torch.randperm(n)]/scale.norm())
    return res

class Block(nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.heads = heads
        self.norm1,self.norm2 = RMSNorm(width),RMSNorm(width)
        self.q,self.k,self.v,self.o = (linear(width, width) for _ in range(4))
        self.gate,self.up,self.down = linear(width, inner),linear(width, inner),linear(inner, width)

    def forward(self, x):
        h = self.norm1(x)
        q,k,v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h))*self.up(h))

class Net(nn.Module):
    def __init__(self, width, blocks, vocabulary=1000):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 11*width//4, width//64) for _ in range(blocks)))
        self.norm,self.head = RMSNorm(width),linear(width, vocabulary)

    def forward(self, tokens): return self.head(self.norm(self.blocks(self.embedding(tokens))))

# Measurements

def memory():
    "GiB that the process holds now"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages*resource.getpagesize()/2**30

class Measured:
    "Measures the seconds and the peak of the memory of a step"
    def __init__(self, row, name): self.row,self.name = row,name

    def __enter__(self):
        self.peak,self.over = memory(),Event()
        self.thread,self.start = Thread(target=self.watch, daemon=True),time.perf_counter()
        self.thread.start()

    def watch(self):
        while not self.over.wait(.02): self.peak = max(self.peak, memory())

    def __exit__(self, *args):
        self.over.set()
        self.thread.join()
        self.row[self.name] = time.perf_counter() - self.start
        self.row[f'{self.name}_memory'] = self.peak
        print(f'{self.name}: {self.row[self.name]:.0f} s, {self.peak:.2f} GiB', flush=True)

def measure(args):
    "Decompose the network; return a row of the table"
    torch.manual_seed(0)
    model = Net(args.width, args.blocks).eval()
    data = list(torch.randint(0, 1000, (args.sequences, 128)).split(8))
    n_params = sum(p.numel() for p in model.parameters())
    row = dict(parameters=n_params/1e6, width=args.width, blocks=args.blocks, sequences=args.sequences,
               room=args.room, threads=torch.get_num_threads(), model=memory())
    print(row, flush=True)
    settings = dict(moments_room=int(args.room*2**30), progress=args.progress)
    with Measured(row, 'calibrate'): known = calibrate(model, data, Classification(axis=-1), **settings)
    with Measured(row, 'plan'): plan = make_plan(model, known, Budget(macs=.5))
    with Measured(row, 'fit'): small = plan.apply(model, known)
    measured = small.low_rank_plan['measured']
    row |= dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20,
                macs=measured['macs'], predicted=plan.predicted['loss'], measured=measured['loss'])
    return row

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--width', type=int, default=2048)
    parser.add_argument('--blocks', type=int, default=10)
    parser.add_argument('--sequences', type=int, default=64)
    parser.add_argument('--room', type=float, default=4., help='for moments, in GiB')
    parser.add_argument('--progress', action='store_true')
    row = measure(parser.parse_args())
    print(row)
    rows = pd.read_csv(results).to_dict('records') if results.exists() else []
    pd.DataFrame([*rows, row]).to_csv(results, index=False, float_format='%.4g')

if __name__ == '__main__': main()
