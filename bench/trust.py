"""Can the estimated increase of the loss be trusted? Predicted and measured side by side, layer by layer and for whole models, of three networks.

    python bench/trust.py WEIGHTS

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`; a small convolutional network is trained on scikit-learn's digits in seconds, and the vision transformer is that of
`bench/transformer.py`. Measured is the mean Kullback-Leibler divergence between the predictions of the dense network and of the other, on images that calibration has not seen. Calibration gets images
that the network was trained on ("seen") or others. In rows of kind "layer" one layer is replaced; in rows "model" all that a budget chooses, each decomposed for itself ("apart") and also fitted one
after the other ("fitted"). Prints Spearman's rank correlation, the median of measured over predicted, and the factor around it within which nine of ten lie; low ranks are those up to a tenth of the
ranks that make a layer smaller.
"""
import argparse, warnings
from pathlib import Path

import numpy as np, pandas as pd, torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import cifar, transformer
from fasterai_lr.fit import fit, output_loss
from fasterai_lr.budget import Budget
from fasterai_lr.planner import Planner

def digits_cnn():
    "A trained network, digits that it was trained on, and others"
    torch.manual_seed(0)
    data = load_digits()
    x,y = torch.tensor(data.images).float()[:,None]/16,torch.tensor(data.target)
    order = torch.randperm(len(x))
    (x,other),(y,_) = x[order].split([900, 897]),y[order].split([900, 897])
    block = lambda i,o,s: [nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    model = nn.Sequential(*block(1, 16, 1), *block(16, 32, 2), *block(32, 64, 2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(8):
        for i in torch.randperm(len(x)).split(50):
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            opt.step()
    return model.eval(),x,other

def networks(args):
    "{name: function that returns a model, images that it was trained on, others, and the kind of budget}"
    of_cifar = lambda model: (model, cifar.images('train', args.images)[0], cifar.images('test', 2*args.images)[0])
    return {'digits CNN': lambda: (*digits_cnn(), 'macs'), 'ResNet-20': lambda: (*of_cifar(cifar.resnet20(args.weights)), 'macs'),
            'ViT': lambda: (*of_cifar(transformer.trained(args.epochs)), 'params')}

@torch.no_grad()
def outputs(model, x): return torch.cat([model(b) for b in x.split(250)]).double()

def chosen_options(options, n=4):
    "Of each scheme `n` options from the lowest rank to the highest, evenly on a logarithmic scale"
    for s in dict.fromkeys(o.scheme for o in options if o.scheme):
        own = [o for o in options if o.scheme == s]
        for i in sorted({round(i)-1 for i in np.geomspace(1, len(own), n)}): yield own[i]

def rows(model, x, test, kind, shares):
    "yields a dict for each replacement"
    batches = list(x.split(100))
    planner,want = Planner(model, batches),outputs(model, test)
    def measured(choices, **kw): return output_loss(outputs(fit(model, choices, batches, planner.moments, **kw), test), want, temperature=1.).item()
    for share in shares:
        plan = planner.plan(Budget(**{kind: share}))
        yield dict(kind='model', share=share, predicted=plan.predicted['loss'], apart=measured(plan.choices, sequential=False), fitted=measured(plan.choices))
    for layer,options in planner.all_options().items():
        for o in chosen_options(options):
            most = max(p.rank for p in options if p.scheme == o.scheme)
            yield dict(kind='layer', layer=layer, scheme=o.scheme, rank=o.rank, share=o.rank/most, predicted=o.loss, apart=measured({layer: (o.scheme, o.rank)}, sequential=False))

def summary(table, column='apart'):
    "Rank correlation, median of measured over predicted, and the factor around it that holds for nine of ten"
    ratio = np.log(table[column]/table.predicted)
    return pd.Series(dict(n=len(table), correlation=spearmanr(table.predicted, table[column]).statistic, median=np.exp(ratio.median()), factor=np.exp((ratio - ratio.median()).abs().quantile(.9))))

def summaries(table):
    "One row for each network, kind of images and kind of replacement"
    def parts(t):
        layers,models = t[t.kind=='layer'],t[t.kind=='model']
        return {'one layer': summary(layers), 'one layer, low ranks': summary(layers[layers.share <= .1]), 'one layer, others': summary(layers[layers.share > .1]),
                'model, apart': summary(models), 'model, fitted': summary(models, 'fitted')}
    res = {(*k, part): s for k,t in table.groupby(['network', 'calibrated'], sort=False) for part,s in parts(t).items()}
    return pd.DataFrame(res).T.astype({'n': int}).round(2)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('weights')
    parser.add_argument('--networks', nargs='+', default=['digits CNN', 'ResNet-20', 'ViT'])
    parser.add_argument('--shares', type=float, nargs='+', default=[.8, .65, .5, .37, .25])
    parser.add_argument('--images', type=int, default=300, help='to calibrate with, and to measure with')
    parser.add_argument('--epochs', type=int, default=10, help='of the vision transformer\'s training')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'trust.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)
    args.out.parent.mkdir(exist_ok=True)
    found = []
    for name in args.networks:
        model,seen,other,kind = networks(args)[name]()
        unseen,test = other[:len(other)//2],other[len(other)//2:]
        for calibrated,x in dict(seen=seen[:len(unseen)], unseen=unseen).items():
            for r in rows(model, x, test, kind, args.shares):
                found.append(dict(network=name, calibrated=calibrated, **r))
                pd.DataFrame(found).to_csv(args.out, index=False)
    print(summaries(pd.DataFrame(found)).to_string())
