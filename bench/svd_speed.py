"""Decompose the fully connected layers of VGG-16: our `FC_Decomposer` beside fasterai's, in one process.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning
    PYTHONPATH=peer python bench/svd_speed.py

prints the time of both and of the limit, one product `W @ W.T` of the largest layer. It also prints the
relative error of every layer's weight beside that of LAPACK's exact truncated SVD (which fasterai computes),
and the peak of memory beyond the two models. On a busy machine, compare the processor time on one thread
(OMP_NUM_THREADS=1). `--trained` gives the layers weights with the spectrum of trained ones: a bulk of noise
under a few hundred larger singular values.
"""
import argparse, gc, threading, time
from pathlib import Path

import pandas as pd, torch
from torch import nn
from torchvision.models import vgg16_bn

from fasterai_lr.decomposer import FC_Decomposer

MB = 2**20

# The model

def build(trained):
    torch.manual_seed(0)
    model = vgg16_bn(num_classes=2)
    if trained:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and min(layer.weight.shape) > 300: add_signal(layer.weight.data)
    return model.eval()

def add_signal(W, k=300, top=20.):
    """Add `k` directions, the first with `top` times the largest singular value of the noise, falling as a
    power to about its size"""
    o,i = W.shape
    edge = W.std()*(o**.5 + i**.5)
    sizes = edge*top*torch.arange(1, k+1)**-.5
    W.addmm_(torch.randn(o, k)/o**.5 * sizes, torch.randn(k, i)/i**.5)

def linears(model):
    return {n:l for n,l in model.named_modules() if isinstance(l, nn.Linear) and '.' in n}

def n_bytes(tensors): return sum(t.numel()*t.element_size() for t in tensors)

# What is measured

def timed(f, repeat=1):
    "Return wall-clock and processor seconds (the least of `repeat` runs), and the result"
    walls,cpus = [],[]
    for _ in range(repeat):
        gc.collect()
        wall,cpu = time.perf_counter(),time.process_time()
        res = f()
        walls.append(time.perf_counter()-wall)
        cpus.append(time.process_time()-cpu)
    return min(walls),min(cpus),res

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*4096

class Peak(threading.Thread):
    "Record the most memory resident while the `with` block runs, a hundred times a second"
    def __enter__(self):
        gc.collect()
        self.on = True
        self.before = self.most = resident()
        self.start()
        return self

    def run(self):
        while self.on:
            self.most = max(self.most, resident())
            time.sleep(.01)

    def __exit__(self, *args):
        self.on = False
        self.join()

def energy(blocks): return sum(float(b.double().square().sum()) for b in blocks)

@torch.no_grad()
def weight_error(W, factors):
    "Return the relative Frobenius error of the product of two factors, computed by rows"
    first,last = factors[0].weight,factors[1].weight
    errors = (w - u@first for w,u in zip(W.split(512), last.split(512)))
    return (energy(errors)/energy(W.split(512)))**.5

def compared(dense, ours, peer=None):
    "Return a row for each layer: shape, rank and errors"
    rows = {}
    for name,layer in linears(dense).items():
        factors = ours.get_submodule(name)
        row = dict(shape='×'.join(map(str, layer.weight.shape)), rank=len(factors[0].weight),
                   ours=weight_error(layer.weight, factors))
        if peer is not None:
            row['exact'] = weight_error(layer.weight, peer.get_submodule(name))
            row['difference'] = row['ours'] - row['exact']
        rows[name] = row
    return pd.DataFrame(rows).T

def time_table(times): # {name: (wall-clock seconds, processor seconds)}
    table = pd.DataFrame(times, index=['clock s', 'processor s']).T
    for kind in ('clock', 'processor'):
        seconds = table[f'{kind} s']
        table[f'{kind}, ours=1'] = seconds/seconds['ours']
    return table.round(2)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--trained', action='store_true', help='use weights with a trained spectrum')
    parser.add_argument('--repeat', type=int, default=1, help='time ours this often and take the best')
    parser.add_argument('--no-peer', action='store_true', help='run without fasterai')
    args = parser.parse_args()
    dense = build(args.trained)
    torch.randn(500, 500)@torch.randn(500, 500) # the first product takes longer
    largest = max((l.weight.detach() for l in linears(dense).values()), key=torch.numel)

    def decomposed(): return FC_Decomposer().decompose(dense)
    with Peak() as peak: wall,cpu,ours = timed(decomposed)
    beyond = peak.most - peak.before - n_bytes(ours.state_dict().values())
    if args.repeat > 1:
        more_wall,more_cpu,_ = timed(decomposed, args.repeat-1)
        wall,cpu = min(wall, more_wall),min(cpu, more_cpu)
    times = {'ours': (wall, cpu)}
    *times['one W @ W.T'],_ = timed(lambda: largest@largest.T, 3)
    peer = None
    if not args.no_peer:
        from fasterai.misc.fc_decomposer import FC_Decomposer as Peer
        *times['fasterai'],peer = timed(lambda: Peer().decompose(dense))
    weights = 'trained-like' if args.trained else 'initial'
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {weights} weights')
    print(time_table(times).to_string())
    print(f'peak memory beyond the two models: {beyond/MB:.0f} MB; '
          f'the largest layer has {n_bytes([largest])/MB:.0f} MB')
    print(compared(dense, ours, peer).to_string())

if __name__ == '__main__': main()
