"Learners that train on small data without any output, and what several tests do with them"
import random
from functools import partial

import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from fastai.imports import noop
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, RMSProp, QHAdam, RAdam, Lamb, Larc, Lookahead, OptimWrapper, ranger
from fasterai_lr.rank import Energy
from helpers import gen, n_factored, snapshot
from networks import digits, linear_net

torch.set_num_threads(1)

def quiet(learn, path=None):
    "`learn` without a log and a progress bar, and with `path` for its files where one is given"
    if path is not None: learn.path = path
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def splitter(m):
    "Parameter groups of a `linear_net`"
    return [list(m[:3].parameters()), list(m[3:5].parameters()), list(m[5:].parameters())]

def datasets(items, train, valid, n_inp=None):
    "fastai's `Datasets` of `items`, lists of inputs, of which there are `n_inp`, and of targets; `train`, `valid`: which of them"
    tfms = [[o.__getitem__] for o in items]
    return Datasets(range(len(items[0])), tfms, splits=[train, valid], n_inp=n_inp)

def dataloaders(items, train, valid, n_inp=None, **kw):
    "fastai's `DataLoaders` of these `datasets`"
    return datasets(items, train, valid, n_inp).dataloaders(**{'device': 'cpu', 'num_workers': 0, **kw})

def mk_learn(opt_func=Adam, splitter=splitter, path=None, model=None, n=64, order=None, bs=16, shuffle=True, loader=None, **kw):
    "A learner of a `linear_net` or of `model` on `n` random items, in that `order` where one is given; `loader` wraps each DataLoader"
    random.seed(0) # of the order in which fastai draws the training items
    g = gen(1)
    x,y = torch.randn(n, 8, generator=g),torch.randn(n, 4, generator=g)
    if order is not None: x,y = x[order],y[order]
    dls = dataloaders((x, y), range(n), range(n), bs=bs, shuffle=shuffle)
    if loader: dls.loaders = [loader(dl) for dl in dls.loaders]
    return quiet(Learner(dls, model or linear_net(), loss_func=nn.MSELoss(), opt_func=opt_func, splitter=splitter, path=path, **kw))

def digit_learner(model, train, valid, tfms=(), device='cpu', bs=50, **kw):
    "A learner that classifies `digits`; `train`, `valid`: which of them, `tfms`: of batches"
    random.seed(0)
    dls = dataloaders(digits(), train, valid, bs=bs, device=device, after_batch=list(tfms))
    return Learner(dls, model, **{'loss_func': CrossEntropyLossFlat(), 'metrics': accuracy, **kw})

def train_on(learn):
    "The weights after one more epoch, the same wherever it starts from the same state"
    learn.dls.train.rng = random.Random(5)
    torch.manual_seed(5)
    learn.fit(1, 1e-2)
    return snapshot(learn.model)

class Watch(Callback):
    "How many layers are factored when an epoch trains and when it validates, what `see` makes of the learner before each step, and how many steps are taken"
    order = 62
    def __init__(self, see=noop): self.see = see
    def before_fit(self): self.trains,self.valids,self.seen,self.steps = [],[],[],0
    def before_train(self): self.trains.append(n_factored(self.model))
    def before_validate(self): self.valids.append(n_factored(self.model))
    def before_step(self): self.seen.append(self.see(self.learn))
    def after_step(self): self.steps += 1

def stops_at(at, error, keep=.5):
    "A rank rule, `Energy(keep)`, that raises `error` once: at the layer number `at`"
    seen = []
    class Stops(Energy):
        def __call__(self, s, shape):
            seen.append(shape)
            if len(seen) == at+1: raise error
            return super().__call__(s, shape)
    return Stops(keep)

def wrap(cls, **kw):
    "The torch optimizer `cls` for fastai"
    return partial(OptimWrapper, opt=cls, **kw)

T = torch.optim
opt_funcs = dict(sgd=SGD, sgd_mom=partial(SGD, mom=0.9), sgd_l2=partial(SGD, mom=0.9, decouple_wd=False), rms=RMSProp, rms_mom=partial(RMSProp, mom=0.9),
    adam=Adam, radam=RAdam, qhadam=QHAdam, lamb=Lamb, larc=Larc, larc_nomom=partial(Larc, mom=0.), ranger=ranger,
    lookahead=lambda p, **kw: Lookahead(SGD(p, mom=0.9, **kw), k=2),
    t_sgd=wrap(T.SGD, momentum=0.9), t_adam=wrap(T.Adam), t_adamw=wrap(T.AdamW), t_amsgrad=wrap(T.AdamW, amsgrad=True), t_rms=wrap(T.RMSprop),
    t_adagrad=wrap(T.Adagrad), t_adadelta=wrap(T.Adadelta), t_adamax=wrap(T.Adamax), t_nadam=wrap(T.NAdam), t_radam=wrap(T.RAdam),
    t_asgd=wrap(T.ASGD), t_rprop=wrap(T.Rprop))
