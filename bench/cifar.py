"CIFAR-10 and the ResNet-20 of He et al. (2015, section 4.2) with parameter-free shortcuts, for the benchmarks"
import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from PIL import Image
from fastai.data.external import untar_data, URLs

mean,std = torch.tensor([.485, .456, .406])[:,None,None],torch.tensor([.229, .224, .225])[:,None,None]

class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False),nn.BatchNorm2d(o)
        self.conv2,self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False),nn.BatchNorm2d(o)
        self.stride,self.pad = stride,(o-i)//2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1: x = F.pad(x[:,:,::2,::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)

class ResNet20(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False),nn.BatchNorm2d(16)
        stage = lambda i,o,s: nn.Sequential(Block(i, o, s), Block(o, o, 1), Block(o, o, 1))
        self.layer1,self.layer2,self.layer3,self.linear = stage(16, 16, 1),stage(16, 32, 2),stage(32, 64, 2),nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

def resnet20(weights):
    "The trained network, from a state dict in the file `weights`"
    model = ResNet20()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()

def pixels(split, n=None, seed=0):
    "`n` images of CIFAR-10 and their labels drawn at random, or all: uint8 [n,3,32,32], [n]"
    root = untar_data(URLs.CIFAR)/split
    files = [(f,c) for c,d in enumerate(sorted(p for p in root.iterdir() if p.is_dir())) for f in sorted(d.iterdir())]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:n].tolist() if n else range(len(files))
    x = torch.from_numpy(np.stack([np.array(Image.open(files[i][0]).convert('RGB')) for i in order])).permute(0, 3, 1, 2)
    return x, torch.tensor([files[i][1] for i in order])

def normalised(x): return (x.float()/255-mean)/std

def images(split, n=None, seed=0):
    "The same, normalised"
    x,y = pixels(split, n, seed)
    return normalised(x),y

@torch.no_grad()
def predictions(model, x, bs=250): return torch.cat([model.eval()(b).argmax(1) for b in x.split(bs)])
