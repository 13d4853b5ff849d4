"""Can you trust the estimated increase of the loss? Compare predicted with measured, layer by layer and for
whole models, of three networks.

    python bench/trust.py WEIGHTS

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`. A small convolutional network is
trained on scikit-learn's digits in seconds, and the vision transformer is that of `bench/transformer.py`. The
measured quantity is the mean Kullback-Leibler divergence between the predictions of the dense network and of
the decomposed one, on images that calibration has not seen. Calibration gets images that the network was
trained on ("seen") or others. Rows of kind "layer" replace one layer. Rows of kind "model" replace all layers
that a budget chooses, each decomposed by itself ("apart") and also fitted one after the other ("fitted"). The
script prints Spearman's rank correlation, the median ratio of measured to predicted, and the factor around it
that includes nine of ten ratios. Low ranks are those up to a tenth of the ranks that make a layer smaller.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import cifar, transformer
from fasterai_lr.budget import Budget
from fasterai_lr.calibrate import calibrate, calibrated
from fasterai_lr.fit import fit
from fasterai_lr.loss import classification
from fasterai_lr.planner import Planner

# The networks: each with images that it was trained on, and others

def digits_cnn():
    "Train a small network on 900 digits"
    torch.manual_seed(0)
    data = load_digits()
    x,y = torch.tensor(data.images).float()[:,None]/16,torch.tensor(data.target)
    order = torch.randperm(len(x))
    x,other = x[order].split([900, 897])
    y = y[order][:900]
    model = nn.Sequential(*conv(1, 16, 1), *conv(16, 32, 2), *conv(32, 64, 2), nn.Flatten(),
                          nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(8):
        for i in torch.randperm(len(x)).split(50):
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            opt.step()
    return model.eval(),x,other

def conv(i, o, stride): return nn.Conv2d(i, o, 3, stride, 1, bias=False),nn.BatchNorm2d(o),nn.ReLU()

def of_cifar(model, n):
    seen,_ = cifar.images('train', n)
    other,_ = cifar.images('test', 2*n)
    return model,seen,other

def network(name, args):
    "Return the model, images that it was trained on, other images, and the kind of budget"
    if name == 'digits CNN': return *digits_cnn(),'macs'
    if name == 'ResNet-20': return *of_cifar(cifar.resnet20(args.weights), args.images),'macs'
    return *of_cifar(transformer.trained(args.epochs), args.images),'params'

# Predicted and measured

@torch.no_grad()
def outputs(model, x): return torch.cat([model(b) for b in x.split(250)]).double()

def chosen_options(options, n=4):
    "Yield `n` options of each scheme, with ranks evenly spaced on a logarithmic scale"
    by_scheme = {}
    for o in options:
        if o.scheme: by_scheme.setdefault(o.scheme, []).append(o)
    for own in by_scheme.values():
        for i in sorted({round(i)-1 for i in np.geomspace(1, len(own), n)}): yield own[i]

class Trial:
    "A model, and its outputs on images that calibration has not seen"
    def __init__(self, model, x, test):
        self.calibration = calibrate(model, list(x.split(100)))
        self.planner = Planner(self.calibration)
        self.test,self.want = test,outputs(model, test)
        settings = replace(self.calibration.settings, sequential=False)
        self.unfitted = calibrated(model, self.calibration, settings)

    def _divergence(self, calibration, choices):
        out = outputs(fit(calibration, choices).model, self.test)
        return classification.increase(self.want, out)/len(out)

    def apart(self, choices):
        "Return the divergence if each layer is decomposed by itself"
        return self._divergence(self.unfitted, choices)

    def fitted(self, choices):
        "Return the divergence if the layers are fitted one after the other"
        return self._divergence(self.calibration, choices)

    def rows(self, kind, shares): # `kind`: the kind of budget
        "Yield a dict for each replacement"
        for share in shares: yield self._of_model(share, self.planner.make(Budget(**{kind: share})))
        for layer,options in self.planner.options.items():
            for o in chosen_options(options): yield self._of_layer(layer, o, options)

    def _of_model(self, share, plan):
        return dict(kind='model', share=share, predicted=plan.predicted['loss'],
                    apart=self.apart(plan.choices), fitted=self.fitted(plan.choices))

    def _of_layer(self, layer, option, options):
        most = max(o.rank for o in options if o.scheme == option.scheme)
        apart = self.apart({layer: (option.scheme, option.rank)})
        return dict(kind='layer', layer=layer, scheme=option.scheme, rank=option.rank,
                    share=option.rank/most, predicted=option.loss, apart=apart)

# The summary

def summary(table, column='apart'):
    "Return the rank correlation, the median of measured/predicted, and the factor that includes nine of ten"
    ratio = np.log(table[column]/table.predicted)
    factor = np.exp((ratio - ratio.median()).abs().quantile(.9))
    correlation = spearmanr(table.predicted, table[column]).statistic
    median = np.exp(ratio.median())
    return pd.Series(dict(n=len(table), correlation=correlation, median=median, factor=factor))

def parts(table):
    "Return {kind of replacement: its summary}"
    layers,models = table[table.kind=='layer'],table[table.kind=='model']
    low = layers.share <= .1
    return {'one layer': summary(layers),
            'one layer, low ranks': summary(layers[low]),
            'one layer, others': summary(layers[~low]),
            'model, apart': summary(models),
            'model, fitted': summary(models, 'fitted')}

def summaries(table):
    "Return a row for each network, kind of images and kind of replacement"
    res = {}
    for key,rows in table.groupby(['network', 'calibrated'], sort=False):
        for part,numbers in parts(rows).items(): res[*key,part] = numbers
    return pd.DataFrame(res).T.astype({'n': int}).round(2)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('weights')
    parser.add_argument('--networks', nargs='+', default=['digits CNN', 'ResNet-20', 'ViT'])
    parser.add_argument('--shares', type=float, nargs='+', default=[.8, .65, .5, .37, .25])
    parser.add_argument('--images', type=int, default=300, help='images to calibrate with, and to measure with')
    parser.add_argument('--epochs', type=int, default=10, help='epochs of training of the vision transformer')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'trust.csv')
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True)
    found = []
    for name in args.networks:
        model,seen,other,kind = network(name, args)
        unseen,test = other[:len(other)//2],other[len(other)//2:]
        for label,x in dict(seen=seen[:len(unseen)], unseen=unseen).items():
            for row in Trial(model, x, test).rows(kind, args.shares):
                found.append(dict(network=name, calibrated=label, **row))
                pd.DataFrame(found).to_csv(args.out, index=False)
    print(summaries(pd.DataFrame(found)).to_string())

if __name__ == '__main__': main()
