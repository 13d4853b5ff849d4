"""Seconds, memory and accuracy of the sequential fit, beside another version of the package.

    git worktree add ../before 278c2c6
    python bench/sweep.py depth vit resnet50 efficientnet resnet56 --beside ../before

Every measurement runs in a process of its own, with two threads, and the versions take turns. `seconds` is the
time of `decompose(model, Budget(...), data)`: calibration, plan and fit. `memory` is what the process used at
most, less what it used before. All cases but `resnet56` have random weights, which say nothing about accuracy:
their BatchNorm statistics are those of the data. `resnet56` is trained for a few epochs and cached in fastai's
folder of models. It is measured for accuracy alone, for each of `--draws` draws of 2,000 images: `drop` is its loss on
10,000 test images in points, `divergence` the mean Kullback-Leibler divergence from the dense network's predictions.
For `depth`, `exponent` is the slope of log(seconds) over log(depth). The table is added to `bench/results/sweep.csv`;
an interrupted run continues where it stopped. Measure times on an idle machine.
"""
import argparse, json, os, resource, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, torch
from torch import nn

here = Path(__file__).resolve().parent
results = here/'results'/'sweep.csv'

# Networks and data

class Net(nn.Module):
    "A ResNet of He et al. (2015, section 4.2) for CIFAR-10, of any depth 6n+2"
    def __init__(self, depth):
        import cifar
        super().__init__()
        n = (depth - 2)//6
        def stage(i, o, stride): return nn.Sequential(cifar.Block(i, o, stride), *(cifar.Block(o, o, 1) for _ in range(n - 1)))
        self.conv1,self.bn1 = cifar.conv(3, 16),nn.BatchNorm2d(16)
        self.layer1,self.layer2,self.layer3 = stage(16, 16, 1),stage(16, 32, 2),stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))

def with_statistics(model, x):
    "`model` with the BatchNorm statistics of the images `x`, in evaluation mode"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = None
    with torch.no_grad(): model.train()(x)
    return model.eval()

def trained_resnet56():
    "A ResNet-56 after five epochs of CIFAR-10, from fastai's folder of models if it is there"
    import cifar
    from fastai.data.external import fastai_path
    model,path = Net(56),fastai_path('model')/'resnet56_cifar10_5.pt'
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    model = model.to(memory_format=torch.channels_last)
    x,y = cifar.images('train')
    opt = torch.optim.SGD(model.parameters(), 1e-3, momentum=.9, weight_decay=5e-4, nesterov=True)
    epochs,bs = 5,64
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, .1, total_steps=epochs*(len(x)//bs))
    for _ in range(epochs):
        for i in torch.randperm(len(x))[:len(x)//bs*bs].split(bs):
            images = torch.where(torch.rand(bs)[:,None,None,None] < .5, x[i], x[i].flip(-1))
            opt.zero_grad()
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast('cpu', torch.bfloat16): out = model(images)
            nn.functional.cross_entropy(out.float(), y[i]).backward()
            opt.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model.to(memory_format=torch.contiguous_format)
    torch.save(model.state_dict(), path)
    return model.eval()

def small_resnet(depth, draw):
    x = torch.randn(2000, 3, 32, 32)
    return with_statistics(Net(depth), x[:128]),x,dict(macs=.5)

def vit(blocks, draw):
    import timm
    model = timm.create_model('vit_small_patch16_224', depth=blocks, img_size=112)
    return model.eval(),torch.randn(256, 3, 112, 112),dict(macs=.5)

def resnet50(draw):
    from torchvision.models import resnet50
    x = torch.randn(32, 3, 224, 224)
    return with_statistics(resnet50(), x),x,dict(macs=.5)

def efficientnet(draw):
    import timm
    x = torch.randn(512, 3, 192, 192)
    return with_statistics(timm.create_model('tf_efficientnet_lite0'), x[:64]),x,dict(macs=.8)

def resnet56(draw):
    import cifar
    return trained_resnet56(),cifar.images('train', 2000, draw)[0],dict(macs=.25)

depths = 20,32,44,56,110
cases = {
    **{f'depth {d}': partial(small_resnet, d) for d in depths},
    **{f'vit {n}': partial(vit, n) for n in (12, 24)},
    'resnet50': resnet50, 'efficientnet': efficientnet, 'resnet56': resnet56}

# One measurement

@torch.no_grad()
def log_probabilities(model, x): return torch.cat([model(batch).log_softmax(1) for batch in x.split(500)])

def accuracies(model, small):
    "Compare `small` with `model` on the test images of CIFAR-10"
    import cifar
    x,y = cifar.images('test')
    dense,low = log_probabilities(model, x),log_probabilities(small, x)
    drop = (dense.argmax(1) == y).float().mean() - (low.argmax(1) == y).float().mean()
    divergence = nn.functional.kl_div(low, dense, log_target=True, reduction='batchmean')
    return dict(drop=100*float(drop), divergence=float(divergence))

def megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def measure(case, draw, settings):
    "Measure one case in this process: {what: value}"
    from fasterai_lr.all import Budget, decompose
    torch.set_num_threads(2)
    torch.manual_seed(draw)
    model,x,budget = cases[case](draw)
    before,start = megabytes(),time.perf_counter()
    small = decompose(model, Budget(**budget), x, progress=False, seed=draw, **settings)
    if case == 'resnet56': return accuracies(model, small)
    return dict(seconds=time.perf_counter() - start, memory=megabytes() - before)

# All of them

def versions(case, beside):
    "{name: (folder of the package, settings)} for a case"
    res = {'now': (here.parent, {})}
    if not beside: return res
    if case == 'resnet56': return res | {'before, one layer a pass': (beside, dict(passes=60))}
    return res | dict(before=(beside, {}))

def run(case, draw, folder, settings):
    "Measure in a new process"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, (Path(folder).resolve(), here))))
    args = [sys.executable, __file__, '--job', json.dumps([case, draw, settings])]
    res = subprocess.run(args, env=env, text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(res.stdout.splitlines()[-1])

def exponents(table):
    "The slope of log(seconds) over log(depth), for each version"
    rows = table[table.case.str.startswith('depth')]
    for version,part in rows.groupby('version'):
        depth = part.case.str.removeprefix('depth ').astype(int)
        if len(part) > 1: yield version,np.polyfit(np.log(depth), np.log(part.seconds), 1)[0]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help=f"which cases, by their first word: {', '.join(dict.fromkeys(c.split()[0] for c in cases))}")
    parser.add_argument('--beside', help='a folder with another version of the package')
    parser.add_argument('--draws', type=int, default=1, help='of the images and all random numbers')
    parser.add_argument('--job', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job: return print(json.dumps(measure(*json.loads(args.job))))
    rows = pd.read_csv(results).to_dict('records') if results.exists() else []
    done = {(r['case'], r['draw'], r['version']) for r in rows}
    for draw in range(args.draws):
        for case in cases:
            if case.split()[0] not in args.names: continue
            for version,(folder,settings) in versions(case, args.beside).items():
                if (case, draw, version) in done: continue
                rows.append(dict(case=case, draw=draw, version=version, **run(case, draw, folder, settings)))
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(results, index=False, float_format='%.4g')
    table = pd.DataFrame(rows)
    measured = [c for c in ('seconds', 'memory', 'drop', 'divergence') if c in table]
    means = table.pivot_table(index='case', columns='version', values=measured, sort=False)
    print(means.to_string(float_format='{:.4g}'.format))
    for version,exponent in exponents(table): print(f'{version}: exponent {exponent:.2f}')

if __name__ == '__main__': main()
