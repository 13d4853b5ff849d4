"""Decomposing the fully connected layers of VGG-16: our `FC_Decomposer` against fasterai's, in one process.

    pip install --no-deps --target peer fasterai==0.4.1 torch-pruning
    PYTHONPATH=peer python bench/svd_speed.py

Prints the time of both and of the limit, one product `W @ W.T` of the largest layer (on a busy machine compare the processors' time, on
one thread: OMP_NUM_THREADS=1), the relative error of every layer's
weight beside that of LAPACK's exact truncated SVD (which is what fasterai computes), and the peak of memory beyond the two models.
`--trained` gives the layers weights with the spectrum that training leaves: a noise bulk under a few hundred larger singular values.
"""
import argparse, gc, threading, time
from pathlib import Path

import pandas as pd, torch
from torch import nn
from torchvision.models import vgg16_bn

from fasterai_lr.decomposer import FC_Decomposer

MB = 2**20

def model(trained):
    torch.manual_seed(0)
    m = vgg16_bn(num_classes=2)
    if trained:
        for l in m.modules():
            if isinstance(l, nn.Linear) and min(l.weight.shape)>300: add_signal(l.weight.data)
    return m.eval()

def add_signal(W, k=300, top=20.):
    "Add `k` directions, the first with `top` times the largest singular value of the noise, falling as a power to about its size"
    o,i = W.shape
    edge = W.std()*(o**.5 + i**.5)
    W.addmm_(torch.randn(o, k)/o**.5 * (edge*top*torch.arange(1, k+1)**-.5), torch.randn(k, i)/i**.5)

def timed(f, repeat=1):
    "Seconds by the clock and of the processors (the least of `repeat` runs), and the result"
    best = (float('inf'),)*2
    for _ in range(repeat):
        gc.collect()
        wall,cpu = time.perf_counter(),time.process_time()
        res = f()
        best = min(best[0], time.perf_counter()-wall),min(best[1], time.process_time()-cpu)
    return *best,res

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*4096

class Peak(threading.Thread):
    "The most memory resident while the `with` block runs, sampled a hundred times a second"
    def __enter__(self): 
        gc.collect()
        self.on,self.before,self.most = True,resident(),0
        self.start()
        return self
    def run(self):
        while self.on: 
            self.most = max(self.most, resident())
            time.sleep(.01)
    def __exit__(self, *args): 
        self.on = False
        self.join()

def n_bytes(tensors): return sum(t.numel()*t.element_size() for t in tensors)

def linears(m): return {n:l for n,l in m.named_modules() if isinstance(l, nn.Linear) and '.' in n}

@torch.no_grad()
def weight_error(W, first, last):
    "Relative Frobenius error of the product of two factors, by rows"
    energy = lambda blocks: sum(float(b.double().square().sum()) for b in blocks)
    return (energy(w - u@first for w,u in zip(W.split(512), last.split(512))) / energy(W.split(512)))**.5

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--trained', action='store_true', help='weights with a spectrum as training leaves it')
    ap.add_argument('--repeat', type=int, default=1, help='time ours this often and take the best')
    ap.add_argument('--no-peer', action='store_true', help='without fasterai')
    args = ap.parse_args()
    dense = model(args.trained)
    torch.randn(500, 500)@torch.randn(500, 500)
    largest = max((l.weight for l in linears(dense).values()), key=torch.numel).detach()

    with Peak() as peak: *ours_time,ours = timed(lambda: FC_Decomposer().decompose(dense))
    beyond = peak.most - peak.before - n_bytes(ours.state_dict().values())
    if args.repeat>1: ours_time = [min(a, b) for a,b in zip(ours_time, timed(lambda: FC_Decomposer().decompose(dense), args.repeat-1))]
    *gemm,_ = timed(lambda: largest@largest.T, 3)
    times = {'ours':ours_time, 'one W @ W.T':gemm}
    if not args.no_peer:
        from fasterai.misc.fc_decomposer import FC_Decomposer as Peer
        *times['fasterai'],peer = timed(lambda: Peer().decompose(dense))
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, ' + ('trained-like' if args.trained else 'initial') + ' weights')
    times = pd.DataFrame(times, index=['clock s','processor s']).T
    times['clock, ours=1'],times['processor, ours=1'] = times['clock s']/ours_time[0],times['processor s']/ours_time[1]
    print(times.round(2).to_string())
    print(f'Memory at the peak beyond the two models: {beyond/MB:.0f} MB; the largest layer has {n_bytes([largest])/MB:.0f} MB')
    rows = {n:dict(shape='×'.join(map(str, l.weight.shape)), rank=len(ours.get_submodule(n)[0].weight), 
        ours=weight_error(l.weight, ours.get_submodule(n)[0].weight, ours.get_submodule(n)[1].weight)) for n,l in linears(dense).items()}
    if not args.no_peer:
        for n,r in rows.items():
            l = peer.get_submodule(n)
            r['exact'] = weight_error(dense.get_submodule(n).weight, l[0].weight, l[1].weight)
            r['difference'] = r['ours'] - r['exact']
    print(pd.DataFrame(rows).T.to_string())

if __name__=='__main__': main()
