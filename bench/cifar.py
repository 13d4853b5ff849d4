"""CIFAR-10 for the benchmarks, and the ResNet-20 of He et al. (2015, section 4.2) with parameter-free
shortcuts"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from PIL import Image
from fastai.data.external import untar_data, URLs

mean = torch.tensor([.485, .456, .406])[:,None,None]
std = torch.tensor([.229, .224, .225])[:,None,None]

def conv(i, o, stride=1): return nn.Conv2d(i, o, 3, stride, 1, bias=False)

class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1,self.bn1 = conv(i, o, stride),nn.BatchNorm2d(o)
        self.conv2,self.bn2 = conv(o, o),nn.BatchNorm2d(o)
        self.stride,self.pad = stride,(o-i)//2

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1: x = F.pad(x[:,:,::2,::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)

def stage(i, o, stride): return nn.Sequential(Block(i, o, stride), Block(o, o, 1), Block(o, o, 1))

class ResNet20(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1,self.bn1 = conv(3, 16),nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

def resnet20(weights):
    "Load the trained network from a state dict in the file `weights`"
    model = ResNet20()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()

def labelled_files(root):
    "List the files in the folders of `root`, one for each class, with their class numbers"
    classes = sorted(p for p in root.iterdir() if p.is_dir())
    return [(f,i) for i,folder in enumerate(classes) for f in sorted(folder.iterdir())]

def drawn(files, n, seed):
    "Draw `n` of the files at random, or return all"
    if not n: return files
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:n]
    return [files[i] for i in order]

def pixels(split, n=None, seed=0):
    "Draw `n` images of CIFAR-10 and their labels at random, or all: uint8 [n,3,32,32], [n]"
    files = drawn(labelled_files(untar_data(URLs.CIFAR)/split), n, seed)
    x = np.stack([np.array(Image.open(f).convert('RGB')) for f,_ in files])
    return torch.from_numpy(x).permute(0, 3, 1, 2),torch.tensor([label for _,label in files])

def normalised(x): return (x.float()/255-mean)/std

def images(split, n=None, seed=0):
    "Draw images as `pixels` does, and normalise them"
    x,y = pixels(split, n, seed)
    return normalised(x),y
