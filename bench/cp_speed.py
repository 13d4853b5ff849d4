"CP decomposition of convolution kernels beside tensorly's `parafac`, and whether the factors of whole networks are finite and bounded"
import argparse, math, time, warnings
import torch, tensorly as tl, torchvision
from tensorly.decomposition import parafac
from torch import nn
from fasterai_lr.tensor import cp, cp_to_kernel, cp_term_norms, relative_error

def decaying(*shape, power, seed=0):
    "A random kernel whose mode spectra fall like a power of the index"
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=gen)
    for n in shape: W = torch.tensordot(W, torch.linalg.qr(torch.randn(n, n, generator=gen))[0]*torch.arange(1, n+1)**-power, dims=([0],[0]))
    return W

def trained_resnet18(epochs=1, size=64):
    "torchvision's ResNet-18 after a short training on Imagenette, kept in fastai's model folder"
    from fastai.vision.all import URLs, untar_data, fastai_path, set_seed, Learner, accuracy, ImageDataLoaders, Resize, CrossEntropyLossFlat
    model = torchvision.models.resnet18(num_classes=10)
    file = fastai_path('model')/f'fasterai_lr_resnet18_imagenette_{size}px_{epochs}.pth'
    if not file.exists():
        set_seed(0)
        model = torchvision.models.resnet18(num_classes=10)
        dls = ImageDataLoaders.from_folder(untar_data(URLs.IMAGENETTE_160), valid='val', item_tfms=Resize(size), bs=64, num_workers=2)
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        start = time.time()
        with learn.no_bar(): learn.fit_one_cycle(epochs, 3e-3)
        print(f'trained in {time.time()-start:.0f} s, accuracy {learn.final_record[-1]:.3f}')
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model

def timed(f):
    start = time.perf_counter()
    return f(), time.perf_counter()-start

def beside_parafac(name, W, rank, sweeps=100):
    "Time and error of `cp` (median of three) and of `parafac` on one kernel"
    runs = [timed(lambda: cp(W, rank)) for _ in range(2)]
    with tl.backend_context('pytorch', local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter('ignore') # fewer singular vectors than components on the spatial axes
        theirs,slow = timed(lambda: parafac(W, rank, init='svd', n_iter_max=sweeps, tol=0, random_state=0))
        theirs = relative_error(W, tl.cp_to_tensor(theirs))
    runs.append(timed(lambda: cp(W, rank)))
    ours,fast = relative_error(W, cp_to_kernel(runs[0][0])),sorted(t for _,t in runs)[1]
    ok = ours<=theirs and slow>=5*fast
    print(f'{name:28} error {ours:.4f} in {fast:6.2f} s; parafac {theirs:.4f} in {slow:6.1f} s; {slow/fast:5.1f}x; {"ok" if ok else "MISSED"}', flush=True)
    return ok

def bounded(name, model, max_sweeps):
    "CP at half of the full rank of every kernel with spatial axes: all finite, and how large the terms become"
    worst,n,start = 0,0,time.time()
    for m in model.modules():
        if not isinstance(m, nn.Conv2d) or m.kernel_size==(1,1): continue
        W,n = m.weight,n+1
        fs = cp(W, max(W.shape[:2])//2, max_sweeps=max_sweeps)
        size,err = (cp_term_norms(fs).norm()/W.norm()).item(),relative_error(W, cp_to_kernel(fs))
        if not all(f.isfinite().all() for f in fs) or size**2>1000*math.log(1/err**2): raise SystemExit(f'{name}: unbounded factors of a kernel {list(W.shape)}')
        worst = max(worst, size)
    print(f"{name:28} {n} kernels in {time.time()-start:.0f} s at {max_sweeps} sweeps: all finite; norm of the terms at most {worst:.1f} times the kernel's")

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--epochs', type=int, default=1, help='of the training on Imagenette')
    args = parser.parse_args()
    print(f'torch {torch.__version__}, tensorly {tl.__version__}, {torch.get_num_threads()} threads; rank 128, 100 sweeps of parafac')
    ok = [beside_parafac(f'synthetic, power {p}', decaying(256, 256, 3, 3, power=p), 128) for p in (.5, 1.)]
    resnet = trained_resnet18(args.epochs)
    ok.append(beside_parafac('trained layer3.1.conv1', resnet.layer3[1].conv1.weight.detach(), 128))
    bounded('ResNet-18, trained', resnet, 30)
    torch.manual_seed(0)
    bounded('VGG-19, initialised', torchvision.models.vgg19(weights=None).features, 5)
    raise SystemExit(not all(ok))
