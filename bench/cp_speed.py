"""Compare CP decomposition of convolution kernels with tensorly's `parafac`, and check that the factors of
whole networks are finite and bounded.

    python bench/cp_speed.py

prints errors and times, trains a ResNet-18 on Imagenette in the first run, and exits with 1 if tensorly has a
smaller error or is less than five times slower.
"""
import argparse, math, time, warnings
from functools import partial

import torch, tensorly as tl, torchvision
from tensorly.decomposition import parafac
from torch import nn

from fasterai_lr.tensor import cp, cp_to_kernel, cp_term_norms, relative_error

def decaying(*shape, power, seed=0):
    "Make a random kernel whose singular values along each axis fall like a power of the index"
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=gen)
    for n in shape:
        basis,_ = torch.linalg.qr(torch.randn(n, n, generator=gen))
        W = torch.tensordot(W, basis*torch.arange(1, n+1)**-power, dims=([0], [0]))
    return W

def trained_resnet18(epochs=1, size=64):
    "Train torchvision's ResNet-18 briefly on Imagenette, or load it from fastai's model folder"
    from fastai.vision.all import fastai_path
    model = torchvision.models.resnet18(num_classes=10)
    file = fastai_path('model')/f'fasterai_lr_resnet18_imagenette_{size}px_{epochs}.pth'
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train(epochs, size).state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model

def train(epochs, size):
    from fastai.vision.all import (URLs, untar_data, set_seed, Learner, accuracy, ImageDataLoaders, Resize,
                                   CrossEntropyLossFlat)
    set_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    dls = ImageDataLoaders.from_folder(untar_data(URLs.IMAGENETTE_160), valid='val', item_tfms=Resize(size),
                                       bs=64, num_workers=2)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    start = time.time()
    with learn.no_bar(): learn.fit_one_cycle(epochs, 3e-3)
    print(f'trained in {time.time()-start:.0f} s, accuracy {learn.final_record[-1]:.3f}')
    return model

def timed(f):
    start = time.perf_counter()
    return f(),time.perf_counter()-start

def beside_parafac(name, W, rank, sweeps=100):
    "Compare the time (median of three) and error of `cp` on one kernel with those of `parafac`"
    run = partial(timed, partial(cp, W, rank))
    (factors,first),(_,second) = run(),run()
    with tl.backend_context('pytorch', local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter('ignore') # fewer singular vectors than components on the spatial axes
        peer,slow = timed(lambda: parafac(W, rank, init='svd', n_iter_max=sweeps, tol=0, random_state=0))
        theirs = relative_error(W, tl.cp_to_tensor(peer))
    _,third = run()
    fast = sorted([first, second, third])[1]
    ours = relative_error(W, cp_to_kernel(factors))
    ok = ours <= theirs and slow >= 5*fast
    print(f'{name:28} error {ours:.4f} in {fast:6.2f} s; parafac {theirs:.4f} in {slow:6.1f} s; '
          f'{slow/fast:5.1f}x; {"ok" if ok else "MISSED"}', flush=True)
    return ok

def term_size(W, max_sweeps):
    "Return the norm of the terms at half of the full rank, relative to `W`; `None` if it is out of bounds"
    factors = cp(W, max(W.shape[:2])//2, max_sweeps=max_sweeps)
    if not all(f.isfinite().all() for f in factors): return None
    size = (cp_term_norms(factors).norm()/W.norm()).item()
    error = relative_error(W, cp_to_kernel(factors))
    return size if size**2 <= 1000*math.log(1/error**2) else None

def bounded(name, model, max_sweeps):
    "Check that CP of every kernel with spatial axes is finite, and print how large the terms become"
    start,sizes = time.time(),[]
    for m in model.modules():
        if not isinstance(m, nn.Conv2d) or m.kernel_size == (1, 1): continue
        size = term_size(m.weight, max_sweeps)
        if size is None: raise SystemExit(f'{name}: unbounded factors of a kernel {list(m.weight.shape)}')
        sizes.append(size)
    print(f"{name:28} {len(sizes)} kernels in {time.time()-start:.0f} s at {max_sweeps} sweeps: all finite; "
          f"norm of the terms at most {max(sizes):.1f} times the kernel's")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--epochs', type=int, default=1, help='epochs of training on Imagenette')
    args = parser.parse_args()
    print(f'torch {torch.__version__}, tensorly {tl.__version__}, {torch.get_num_threads()} threads; '
          'rank 128, 100 sweeps of parafac')
    ok = []
    for power in (.5, 1.):
        ok.append(beside_parafac(f'synthetic, power {power}', decaying(256, 256, 3, 3, power=power), 128))
    resnet = trained_resnet18(args.epochs)
    ok.append(beside_parafac('trained layer3.1.conv1', resnet.layer3[1].conv1.weight.detach(), 128))
    bounded('ResNet-18, trained', resnet, 30)
    torch.manual_seed(0)
    bounded('VGG-19, initialised', torchvision.models.vgg19(weights=None).features, 5)
    raise SystemExit(not all(ok))

if __name__ == '__main__': main()
