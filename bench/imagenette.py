"""Imagenette at 128 pixels and a torchvision ResNet-18 for it, for the benchmarks.

    python bench/imagenette.py

trains the network (half an hour of one core) where neither an earlier run nor torchvision's own ImageNet weights are found on the disk, and prints its accuracy.
"""
from functools import lru_cache
from pathlib import Path

import numpy as np, torch, torchvision
import torch.nn.functional as F
from torch.utils.data import DataLoader
from PIL import Image
from fastai.data.external import fastai_path, untar_data, URLs

mean,std = torch.tensor([.485, .456, .406])[:,None,None],torch.tensor([.229, .224, .225])[:,None,None]
classes = 0,217,482,491,497,566,569,571,574,701 # of ImageNet, in the order of the folders
# the training: peak of the learning rate, pixels and epochs of each cycle; crops magnify, so that 96 pixels prepare for 128
cycles = (.05, (64, 8), (96, 3)),(.03, (96, 4))

def square(file, size=144):
    "The middle of an image, its shorter side scaled to `size`: uint8 `[size,size,3]`"
    im = Image.open(file).convert('RGB')
    side = min(im.size)
    left,top = (im.width-side)//2,(im.height-side)//2
    return np.array(im.resize((size, size), Image.BICUBIC, (left, top, left+side, top+side)))

@lru_cache
def squares(split, n=None, seed=0):
    "`n` images drawn at random, or all: uint8 `[n,3,144,144]`, and their labels"
    root = untar_data(URLs.IMAGENETTE_160)/split
    files = [(f,c) for c,d in enumerate(sorted(root.iterdir())) for f in sorted(d.iterdir())]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:n].tolist() if n else range(len(files))
    return torch.from_numpy(np.stack([square(files[i][0]) for i in order])).permute(0, 3, 1, 2), torch.tensor([files[i][1] for i in order])

def normed(x): return (x.float()/255-mean)/std

def images(split, n=None, seed=0):
    "`n` images and their labels drawn at random, or all: normalised `[n,3,128,128]`, `[n]`"
    x,y = squares('val' if split=='test' else split, n, seed)
    return normed(x[...,8:-8,8:-8]),y

def crops(x, size, gen, least=.5):
    "Random squares of the images, flipped at random, of `size` pixels"
    scale = torch.rand(len(x), generator=gen)*(1-least) + least
    flip = 2.*(torch.rand(len(x), generator=gen) < .5) - 1
    shift = (2*torch.rand(len(x), 2, generator=gen)-1)*(1-scale)[:,None]
    theta = torch.stack([torch.stack([scale*flip, 0*scale, shift[:,0]], 1), torch.stack([0*scale, scale, shift[:,1]], 1)], 1)
    return F.grid_sample(x, F.affine_grid(theta, (len(x), 3, size, size), align_corners=False), padding_mode='reflection', align_corners=False)

def accuracy(model, x, y, bs=250):
    with torch.no_grad(): return torch.cat([model.eval()(b).argmax(1) for b in x.split(bs)]).eq(y).float().mean().item()

def train(model, lr, *stages, bs=64, seed=0):
    "One cycle of SGD with label smoothing in bfloat16, of `stages` (pixels, epochs)"
    x,y = squares('train')
    val,gen = images('test', 500),torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9, nesterov=True, weight_decay=5e-4)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=sum(n for _,n in stages)*(len(x)//bs), pct_start=.2)
    for size,epochs in stages:
        small = torch.cat([F.interpolate(b.float(), size=size*9//8, mode='bilinear', antialias=True, align_corners=False).round().byte() for b in x.split(256)])
        for epoch in range(epochs):
            model.train()
            for idx in DataLoader(range(len(x)), bs, shuffle=True, drop_last=True, generator=gen):
                with torch.autocast('cpu', torch.bfloat16): out = model(crops(normed(small[idx]), size, gen).contiguous(memory_format=torch.channels_last))
                F.cross_entropy(out.float(), y[idx], label_smoothing=.1).backward()
                opt.step()
                opt.zero_grad()
                sched.step()
            with torch.autocast('cpu', torch.bfloat16): print(f'{size} pixels, epoch {epoch}: {accuracy(model, *val):.2%} of {len(val[1])} images', flush=True)

def imagenet():
    "torchvision's trained ResNet-18 for these ten classes, if its file is there"
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    file = Path(torch.hub.get_dir())/'checkpoints'/Path(weights.url).name
    if not file.exists(): return
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(file, weights_only=True))
    fc,model.fc = model.fc,torch.nn.Linear(512, 10)
    model.fc.load_state_dict({k: v[list(classes)] for k,v in fc.state_dict().items()})
    return model

def resnet18(weights=None):
    "The trained network: from the state dict in the file `weights`, else from ImageNet, else trained here once"
    model,file = torchvision.models.resnet18(num_classes=10),Path(weights or fastai_path('model')/'resnet18_imagenette_128.pth')
    if not weights and not file.exists():
        if found := imagenet(): return found.eval()
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10, zero_init_residual=True).to(memory_format=torch.channels_last)
        file.parent.mkdir(parents=True, exist_ok=True)
        for c in cycles: train(model, *c)
        torch.save(model.to(memory_format=torch.contiguous_format).state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()

if __name__ == '__main__':
    import sys
    print(f'{accuracy(resnet18(*sys.argv[1:]), *images("test")):.2%} of the validation images')
