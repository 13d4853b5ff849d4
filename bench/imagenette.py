"""Imagenette at 128 pixels and a torchvision ResNet-18 for it, for the benchmarks.

    python bench/imagenette.py

prints the accuracy of the network. It loads the network of an earlier run, or uses torchvision's own ImageNet
weights if they are on the disk. Otherwise it trains the network, for half an hour on one core.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

from functools import lru_cache
from pathlib import Path

import numpy as np, torch, torchvision
import torch.nn.functional as F
from torch.utils.data import DataLoader
from PIL import Image
from fastai.data.external import fastai_path, untar_data, URLs

from cifar import drawn, labelled_files, normalised

classes = 0,217,482,491,497,566,569,571,574,701 # of ImageNet, in the order of the folders
# the training: peak of the learning rate, pixels and epochs of each cycle; crops enlarge the images, so
# training at 96 pixels prepares for 128
cycles = (.05, (64, 8), (96, 3)),(.03, (96, 4))

# Images

def square(file, size=144):
    "Crop the middle of an image, with its shorter side scaled to `size`: uint8 `[size,size,3]`"
    im = Image.open(file).convert('RGB')
    side = min(im.size)
    left,top = (im.width-side)//2,(im.height-side)//2
    return np.array(im.resize((size, size), Image.BICUBIC, (left, top, left+side, top+side)))

@lru_cache
def squares(split, n=None, seed=0):
    "Draw `n` images at random, or all: uint8 `[n,3,144,144]`, and their labels"
    files = drawn(labelled_files(untar_data(URLs.IMAGENETTE_160)/split), n, seed)
    x = np.stack([square(f) for f,_ in files])
    return torch.from_numpy(x).permute(0, 3, 1, 2),torch.tensor([label for _,label in files])

def images(split, n=None, seed=0):
    "Draw `n` images and their labels at random, or all: normalised `[n,3,128,128]`, `[n]`"
    x,y = squares('val' if split=='test' else split, n, seed)
    return normalised(x[...,8:-8,8:-8]),y

def crops(x, size, gen, least=.5):
    "Crop random squares from the images, flip them at random, and scale them to `size` pixels"
    scale = torch.rand(len(x), generator=gen)*(1-least) + least
    flip = 2.*(torch.rand(len(x), generator=gen) < .5) - 1
    shift = (2*torch.rand(len(x), 2, generator=gen)-1)*(1-scale)[:,None]
    across = torch.stack([scale*flip, 0*scale, shift[:,0]], 1)
    down = torch.stack([0*scale, scale, shift[:,1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, padding_mode='reflection', align_corners=False)

def resized(x, size):
    "Resize uint8 images to `size` pixels"
    def smaller(batch):
        small = F.interpolate(batch.float(), size=size, mode='bilinear', antialias=True, align_corners=False)
        return small.round().byte()
    return torch.cat([smaller(batch) for batch in x.split(256)])

# The network

@torch.no_grad()
def accuracy(model, x, y, bs=250):
    model.eval()
    guesses = torch.cat([model(b).argmax(1) for b in x.split(bs)])
    return guesses.eq(y).float().mean().item()

def train(model, lr, *stages, bs=64, seed=0):
    "Train one cycle of SGD with label smoothing in bfloat16, over `stages` (pixels, epochs)"
    x,y = squares('train')
    val = images('test', 500)
    gen = torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9, nesterov=True, weight_decay=5e-4)
    steps = sum(epochs for _,epochs in stages)*(len(x)//bs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=.2)
    for size,epochs in stages:
        small = resized(x, size*9//8)
        for epoch in range(epochs):
            model.train()
            for idx in DataLoader(range(len(x)), bs, shuffle=True, drop_last=True, generator=gen):
                batch = crops(normalised(small[idx]), size, gen).contiguous(memory_format=torch.channels_last)
                with torch.autocast('cpu', torch.bfloat16): out = model(batch)
                F.cross_entropy(out.float(), y[idx], label_smoothing=.1).backward()
                opt.step()
                opt.zero_grad()
                schedule.step()
            with torch.autocast('cpu', torch.bfloat16): share = accuracy(model, *val)
            print(f'{size} pixels, epoch {epoch}: {share:.2%} of {len(val[1])} images', flush=True)

def imagenet():
    "Reduce torchvision's trained ResNet-18 to these ten classes; `None` if its file is missing"
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    file = Path(torch.hub.get_dir())/'checkpoints'/Path(weights.url).name
    if not file.exists(): return None
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(file, weights_only=True))
    of_all = model.fc.state_dict()
    model.fc = torch.nn.Linear(512, 10)
    model.fc.load_state_dict({k: v[list(classes)] for k,v in of_all.items()})
    return model

def trained():
    "Train the network from scratch"
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10, zero_init_residual=True)
    model = model.to(memory_format=torch.channels_last)
    for cycle in cycles: train(model, *cycle)
    return model.to(memory_format=torch.contiguous_format)

def resnet18(weights=None):
    "Load the network from the file `weights` or from ImageNet weights, or train it once"
    file = Path(weights or fastai_path('model')/'resnet18_imagenette_128.pth')
    if not weights and not file.exists():
        found = imagenet()
        if found is not None: return found.eval()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trained().state_dict(), file)
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()

if __name__ == '__main__':
    import sys
    model = resnet18(*sys.argv[1:])
    print(f'{accuracy(model, *images("test")):.2%} of the validation images')
