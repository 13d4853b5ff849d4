"Small networks that several tests use, and inputs for them"
import torch
import torch.nn.functional as F
from torch import nn

def rand(*shape, seed=1):
    "Normal numbers of shape `shape`, the same for the same `seed`"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

images = rand(96, 3, 8, 8) # for `plain_net` and `res_net`
tokens = rand(97, 6, 8)    # for `ViT`; in batches of 64 and 33

def digits(n=None):
    "scikit-learn's first `n` digits as images `[n, 1, 8, 8]` between 0 and 1, and their classes"
    from sklearn.datasets import load_digits # most of these tests do without it
    pixels,classes = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)/16
    return x[:n],torch.tensor(classes)[:n]

def linear_net(norm=nn.BatchNorm1d):
    "Three linear layers from 8 features to 4, with `norm` and a LayerNorm in between"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), norm(12),
                        nn.Linear(12, 10), nn.ReLU(), nn.LayerNorm(10), nn.Linear(10, 4))
    for i in (2, 5): nn.init.normal_(net[i].bias) # Larc never moves a parameter of norm zero
    return net

def digit_net(width=8, bias=True):
    "Two convolutions, the second with a `bias`, and two linear layers for `digits`"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.Conv2d(width, 2*width, 3, stride=2, padding=1, bias=bias), nn.BatchNorm2d(2*width), nn.ReLU(),
                         nn.Flatten(), nn.Linear(32*width, 4*width), nn.ReLU(), nn.Linear(4*width, 10))

def plain_net(bias=True):
    "Convolutions of several kinds one after the other, two with a BatchNorm behind them, and a linear layer"
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
                         nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=2, bias=bias), nn.ReLU(),
                         nn.Conv2d(12, 16, 3, stride=2, padding='valid', bias=bias), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5, bias=bias))

class Block(nn.Module):
    "A residual block; `how` the branch is added"
    def __init__(self, c, how='+', relu=False):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False),nn.BatchNorm2d(c)
        self.conv2,self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False),nn.BatchNorm2d(c)
        self.how,self.relu = how,relu
    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.relu: h = F.relu(h, inplace=True)
        if self.how == '+': h = h + x
        elif self.how == 'x +': h = x + h
        elif self.how == '+=': h += x
        elif self.how == 'add_': h.add_(x)
        elif self.how == 'torch.add': h = torch.add(x, h)
        elif self.how == 'h - -x': h = h - -x # the same number, and no sum
        return F.relu(h, inplace=True)

def res_net(how='+', relu=False):
    "A convolution, two residual blocks and a linear layer"
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Block(8, how, relu), Block(8, how, relu),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

class Attention(nn.Module):
    "A transformer block with separate projections"
    def __init__(self, d=12, heads=3):
        super().__init__()
        self.n1,self.n2,self.heads = nn.LayerNorm(d),nn.LayerNorm(d),heads
        self.qkv,self.proj = nn.Linear(d, 3*d),nn.Linear(d, d)
        self.up,self.down = nn.Linear(d, 2*d),nn.Linear(2*d, d)
    def forward(self, x):
        q,k,v = self.qkv(self.n1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.n2(x))))

class ViT(nn.Module):
    "Two transformer blocks between an embedding and a head"
    def __init__(self, tokens=6, d=12):
        super().__init__()
        self.pos,self.embed = nn.Parameter(.3*torch.randn(1, tokens, d)),nn.Linear(8, d)
        self.blocks,self.head = nn.Sequential(Attention(d), Attention(d)),nn.Linear(d, 5)
    def forward(self, x): return self.head(self.blocks(self.embed(x) + self.pos).mean(1))

def norms(net):
    "{name: BatchNorm} of `net`"
    return {n:m for n,m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

def with_statistics(net, x):
    "`net` in evaluation mode with BatchNorm statistics and affine parameters of its own"
    for m in norms(net).values():
        m.momentum = None
        nn.init.uniform_(m.weight, .5, 1.5)
        nn.init.normal_(m.bias, 0, .3)
    with torch.no_grad(): net.train()(x)
    return net.eval()

def digit_cnn():
    "Two convolutions and two linear layers for `digits`, always with the same weights"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
