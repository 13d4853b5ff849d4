"What the fit remembers: the same factors to the last bit as without a memory, in models that make it hard, and fewer runs"
from collections import Counter
from dataclasses import dataclass

import fastai.vision.all as fv, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasterai_lr.calibrate import calibrate
from fasterai_lr.loss import regression
from helpers import fitted
from networks import with_statistics

ran = Counter()

class First(nn.Linear):
    "A layer whose runs are counted where no module holds the count"
    def forward(self, x):
        ran['first'] += 1
        return super().forward(x)

class Net(nn.Module):
    "Six layers and a head; subclasses say how data goes through them"
    def __init__(self):
        super().__init__()
        self.first = First(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers: x = x + layer(x).tanh()
        return self.head(x)

class Block(nn.Module):
    "As in torchvision: activations and sums in place"
    def __init__(self):
        super().__init__()
        self.up,self.norm,self.act,self.down = nn.Linear(8, 12),nn.BatchNorm1d(12),nn.ReLU(inplace=True),nn.Linear(12, 8)

    def forward(self, x):
        out = self.act(self.norm(self.up(x)))
        out = self.down(out)
        out += x
        return out

class Blocks(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x): return self.head(self.layers(self.first(x)))

class Unassigned(Blocks):
    "The activation's return value is not used: it has changed its input"
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        for block in self.layers:
            x = block(x)
            self.act(x)
        return self.head(x)

class InView(Blocks):
    "An output is changed through a view of it"
    def forward(self, x):
        x = self.first(x)
        for block in self.layers:
            x = block(x)
            half = x.view(-1, 2, 4)[:,0]
            half.mul_(.5)
        return self.head(x)

class Alias(Blocks):
    "An output is changed through another module's output, which is the same tensor"
    kind = nn.Identity

    def __init__(self):
        super().__init__()
        self.alias = self.kind()

    def forward(self, x):
        x = self.first(x)
        for block in self.layers:
            x = block(x)
            self.alias(x).mul_(.5)
        return self.head(x)

class Half(nn.Module):
    def forward(self, x): return x[:,::2]

class AliasOfAll(Alias): kind = nn.Flatten
class AliasOfHalf(Alias): kind = Half

class Stored(Blocks):
    "A later module reads what a hook of an earlier one has stored"
    def __init__(self):
        super().__init__()
        self.layers[0].down.register_forward_hook(self._store)

    def _store(self, module, inputs, out): self.feature = out
    def forward(self, x): return self.head(self.layers(self.first(x)) * self.feature)

class Keeps(nn.Module):
    "Keeps its input for whoever reads it later"
    def forward(self, x):
        self.last = x
        return x

class Attribute(Blocks):
    def __init__(self):
        super().__init__()
        self.layers.insert(1, nn.Sequential(nn.Linear(8, 8), Keeps()))

    def forward(self, x): return self.head(self.layers(self.first(x)) + self.layers[1][1].last)

class Cache:
    def __init__(self): self.values = []

class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, cache):
        cache.values.append(x.mean(1, keepdim=True))
        return self.fc(x)

class Cached(Net):
    "Modules write into an object that they are given"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Writes() for _ in range(4))

    def forward(self, x):
        x,cache = self.first(x),Cache()
        for layer in self.layers: x = layer(x, cache=cache).tanh()
        return self.head(x + sum(cache.values))

class Twice(Net):
    "Layers that are called again, in another order"
    def forward(self, x):
        a,b,c,d,*_ = self.layers
        x = self.first(x)
        for layer in (a, b, a, c, b, d): x = layer(x).tanh() + x
        return self.head(x)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)

    def forward(self, x, *, scale): return {'x': self.a(x)*scale, 'others': (self.b(x), None, 3)}

class Trees(Net):
    "Keywords in, and dicts of tuples out, which are changed later"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Named() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            out = layer(x, scale=torch.tensor(2.))
            y,_,n = out.pop('others')
            x = out['x'].tanh() + y/n
        return self.head(x)

@dataclass
class Result: x:torch.Tensor

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x): return Result(self.fc(x))

class OwnOutputs(Net):
    "Outputs that torch does not know as containers"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Own() for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers: x = layer(x).x.tanh()
        return self.head(x)

class Checkpointed(Blocks):
    reentrant = True
    def forward(self, x):
        x = self.first(x)
        for block in self.layers: x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)

class CheckpointedAnew(Checkpointed): reentrant = False

class Compiled(Blocks):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(torch.compile(o, backend='eager') for o in self.layers))

class Dense(Net):
    "Every layer sees the outputs of all before it"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8*(i+1), 8) for i in range(5))
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        seen = [self.first(x)]
        for layer in self.layers: seen.append(F.relu(layer(torch.cat(seen, 1))))
        return self.head(torch.cat(seen, 1))

class Branches(Net):
    "The data decides which layers are called, and how often"
    def forward(self, x):
        positive = bool(x.sum() > 0)
        x = self.first(x)
        for layer in self.layers[:4] if positive else reversed(self.layers): x = x + layer(x).tanh()
        if positive: x = self.layers[5](x)
        return self.head(x)

class Masks(Net):
    "Tensors are made beside the data"
    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            mask = torch.arange(x.shape[1], device=x.device) % 2
            x = nn.functional.dropout(layer(x), training=self.training)*mask + x.type_as(mask.float())
        return self.head(x.flatten(1))

class Table(nn.Module):
    "Moves its table to the device of its argument, which it reads no numbers of; as torchvision's anchors"
    def __init__(self):
        super().__init__()
        self.table = torch.arange(8.)

    def forward(self, x):
        self.table = self.table.to(x.device)
        return self.table[:x.shape[1]]

class Anchors(Blocks):
    def __init__(self):
        super().__init__()
        self.anchors = Table()

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers: y,x = x,layer(x)
        return self.head(x) + self.anchors(y).sum()

class Mask(Net):
    "Reads the device and a number of an early output in each run, as Hugging Face's models do to make their masks"
    def forward(self, x):
        x = self.first(x)
        y = self.layers[0](x)
        mask = torch.ones(x.shape[1]).to(y.device)
        if (y > 50).all(): mask = mask/2
        for layer in self.layers[1:]: x = x + layer(x).tanh()*mask
        return self.head(x)

class Parallel(Net):
    "Two branches that meet late"
    def forward(self, x):
        a = b = self.first(x)
        for layer in self.layers[:3]: a = layer(a).relu()
        for layer in self.layers[3:]: b = layer(b).relu()
        return self.head(a*b + self.first(x))

class Attention(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, x):
        x = self.first(x)[:,None].expand(-1, 3, -1)
        for layer in self.layers: x = layer(x)
        return self.head(x[:,0])

class ClassToken(Attention):
    "As a vision transformer: code between the modules joins their outputs with parameters and buffers"
    def __init__(self):
        super().__init__()
        self.token,self.positions = nn.Parameter(torch.randn(1, 1, 8)),nn.Parameter(torch.randn(4, 8))
        self.weight = nn.Parameter(torch.rand(8))
        self.register_buffer('kept', torch.tensor([True, False, True, True]))

    def forward(self, x):
        x = self.first(x)[:,None].expand(-1, 3, -1)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.positions
        x = torch.where(self.kept[:,None], x, self.positions)[:,self.kept]
        for layer in self.layers: x = F.linear(F.layer_norm(layer(x), (8,), self.weight), torch.diag(self.weight))
        return self.head(x[:,0])

class Written(Net):
    "Writes early outputs into a tensor of its own, which has numbers"
    def forward(self, x):
        sums = torch.zeros(len(x), 8)
        x = self.first(x)
        for i,layer in enumerate(self.layers):
            x = x + layer(x).tanh()
            sums[:,i] = x.mean(1)
        return self.head(x + sums)

kinds = Net,Blocks,Unassigned,InView,Alias,AliasOfAll,AliasOfHalf,Stored,Attribute,Cached,Twice,Trees,OwnOutputs,Checkpointed,CheckpointedAnew,Compiled,Dense,Branches,Masks,Mask,Anchors,Parallel,Attention,ClassToken,Written

data = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (40, 40, 33, 40, 7)]

def fit_of(net, data, room):
    "The state after a fit of all layers but the first and the last, and how often the first ran"
    known = calibrate(net, data, regression, room=room, progress=False)
    choices = {n: ('svd', 3) for n in list(known.uses)[1:-1]}
    ran.clear()
    return fitted(net, choices, known).state_dict(),ran['first']

def check_memory(net, data, part):
    "With little room, and with much of it, a fit is the same as without a memory; with much the first layer runs at most `part` as often"
    without,runs_without = fit_of(net, data, 0)
    for room in (4000, 2**24):
        state,runs = fit_of(net, data, room)
        assert state.keys() == without.keys()
        assert [k for k in state if not torch.equal(state[k], without[k])] == []
    assert runs < part*runs_without, (runs, runs_without)

@pytest.mark.parametrize('kind', kinds)
def test_the_same_to_the_last_bit_in_fewer_runs(kind):
    torch.manual_seed(0)
    check_memory(with_statistics(kind(), data[0]), data, .45)

class FirstConv(nn.Conv2d):
    def forward(self, x):
        ran['first'] += 1
        return super().forward(x)

def body():
    net = fv.xresnet18(n_out=4, widen=.125)
    net[0][0].__class__ = FirstConv
    return net

of_fastai = {
    'shortcuts that tensors carry along': body,
    'a decoder that reads what hooks have stored': lambda: fv.DynamicUnet(nn.Sequential(*list(body().children())[:-3]), 2, (32, 32))}

def marks_of(name): return [pytest.mark.slow]*name.startswith('a decoder') # it takes 40 seconds

@pytest.mark.parametrize('name', [pytest.param(name, marks=marks_of(name)) for name in of_fastai])
def test_networks_of_fastai(name):
    torch.manual_seed(0)
    images = list(torch.randn(10, 3, 32, 32).split(4))
    check_memory(with_statistics(of_fastai[name](), images[0]), images, .3)
