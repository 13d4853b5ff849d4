"""What the sequential fit brings when data is little: a ResNet-20, a vision transformer and a text encoder.

    python bench/little_data.py resnet20 vit text --weights WEIGHTS --encoder FOLDER
    PYTHONPATH=../before python bench/little_data.py resnet20 --weights WEIGHTS --version before

WEIGHTS is a state dict with the keys of `bench/cifar.py`'s `ResNet20`; the vision transformer is that of
`bench/transformer.py` after `--epochs` epochs; FOLDER holds a pretrained text encoder and its tokenizer, as Hugging
Face's `save_pretrained` writes them (`pip install transformers`). Its sentences come from the docstrings of Python's
standard library. Each network is decomposed to one budget with few images or sentences, without the sequential fit
("none") and with it. The second command measures another version of the package, from its folder.

`kept` is the accuracy on 4,000 test images less that of the dense network, in points; or the percentage of the ten
nearest neighbours among 600 other sentences that the embeddings keep. `distance` is the mean Kullback-Leibler
divergence from the dense network's predictions; or one less the mean cosine to its embeddings. The rows go to
`bench/results/little_data.csv`; rows that are there already are not measured again.
"""
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

import argparse, ast, sysconfig
from pathlib import Path

import pandas as pd, torch
import torch.nn.functional as F
from torch import nn

import cifar, transformer
from fasterai_lr.all import Budget, classification, decompose, regression

results = Path(__file__).resolve().parent/'results'/'little_data.csv'

@torch.no_grad()
def outputs(model, batches):
    return torch.cat([model(**batch) if isinstance(batch, dict) else model(batch) for batch in batches])

class Images:
    "An image network, and how much of its accuracy a smaller one keeps"
    sizes,loss = (64, 250, 2000),classification

    def __init__(self, model, share):
        self.model,self.budget = model,Budget(macs=share)
        x,self.y = cifar.images('test', 4000)
        self.test = x.split(500)
        self.dense = outputs(model, self.test)

    def data(self, n, draw): return list(cifar.images('train', n, draw)[0].split(128))

    def accuracy(self, out): return 100*float((out.argmax(1) == self.y).float().mean())

    def measure(self, small):
        out = outputs(small, self.test)
        distance = F.kl_div(out.log_softmax(1), self.dense.log_softmax(1), log_target=True, reduction='batchmean')
        return dict(kept=self.accuracy(out) - self.accuracy(self.dense), distance=float(distance))

def sentences():
    "List sentences from the docstrings of the standard library, in a random order"
    found = set()
    for path in sorted(Path(sysconfig.get_path('stdlib')).glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)): continue
            text = ' '.join((ast.get_docstring(node) or '').split())
            found.update(o for o in text.split('. ') if 5 <= o.count(' ') <= 40)
    found = sorted(found)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order]

class Encoder(nn.Module):
    "The mean of an encoder's outputs over the tokens"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[...,None].to(out)
        return (out*mask).sum(1)/mask.sum(1)

class Text:
    "A text encoder, and how many of the ten nearest neighbours a smaller one keeps"
    sizes,loss = (128, 384, 1500),regression

    def __init__(self, folder, share):
        from transformers import AutoModel, AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model,self.budget = Encoder(AutoModel.from_pretrained(folder)).eval(),Budget(macs=share)
        found = sentences()
        held,self.train = found[:600],found[600:]
        self.test = self.tokens(sorted(held, key=len), 50)
        self.dense = F.normalize(outputs(self.model, self.test), dim=1)

    def tokens(self, texts, bs):
        args = dict(padding=True, truncation=True, max_length=48, return_tensors='pt')
        names = 'input_ids','attention_mask'
        batches = [self.tokenizer(texts[i:i+bs], **args) for i in range(0, len(texts), bs)]
        return [{name: batch[name] for name in names} for batch in batches]

    def data(self, n, draw):
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(draw))
        return self.tokens([self.train[i] for i in order[:n]], 32)

    def neighbours(self, embeddings): return (embeddings@embeddings.T).fill_diagonal_(-2).topk(10).indices

    def measure(self, small):
        out = F.normalize(outputs(small, self.test), dim=1)
        same = self.neighbours(out)[:,:,None] == self.neighbours(self.dense)[:,None]
        return dict(kept=100*float(same.any(2).float().mean()), distance=1 - float((out*self.dense).sum(1).mean()))

networks = dict(
    resnet20=lambda args: Images(cifar.resnet20(args.weights), .25),
    vit=lambda args: Images(transformer.trained(args.epochs), .37),
    text=lambda args: Text(args.encoder, .6))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('names', nargs='+', choices=networks)
    parser.add_argument('--weights')
    parser.add_argument('--encoder')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--draws', type=int, default=3)
    parser.add_argument('--version', default='now', help='name of the measured version of the package')
    args = parser.parse_args()
    rows = pd.read_csv(results, keep_default_na=False).to_dict('records') if results.exists() else []
    done = {(r['network'], r['items'], r['draw'], r['fit']) for r in rows}
    for name in args.names:
        network = networks[name](args)
        for n in network.sizes:
            for draw in range(args.draws):
                fits = {args.version: True} # is the sequential fit on?
                if args.version == 'now': fits['none'] = False
                for fit,sequential in fits.items():
                    if (name, n, draw, fit) in done: continue
                    small = decompose(network.model, network.budget, network.data(n, draw), loss=network.loss,
                                      sequential=sequential, seed=draw, progress=False)
                    rows.append(dict(network=name, items=n, draw=draw, fit=fit, **network.measure(small)))
                    print(rows[-1], flush=True)
                    pd.DataFrame(rows).to_csv(results, index=False, float_format='%.5g')
    table = pd.DataFrame(rows)
    print(table.pivot_table(index=['network', 'items'], columns='fit', values=['kept', 'distance'], sort=False).round(4).to_string())

if __name__ == '__main__': main()
