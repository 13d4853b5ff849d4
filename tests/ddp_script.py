"What `test_distributed.py` runs in two processes: `python ddp_script.py FOLDER NAME…`; each process writes what it has seen to FOLDER/NAME_RANK.pt"
from functools import partial
from pathlib import Path
import gc, sys, warnings, weakref

import torch
from torch import nn, distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader as TorchLoader, IterableDataset
from fastai.basics import *
from fastai.metrics import mae
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.distributed import *
from fasterai_lr.calibrate import calibrate
from fasterai_lr.running import Inputs
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose, project_
from fasterai_lr.distributed import shared_calibration
from fasterai_lr.export import load_low_rank, read_low_rank, save_low_rank
from fasterai_lr.layers import factored_layers, recompose
from fasterai_lr.learner import *
from fasterai_lr.budget import Budget
from fasterai_lr.plan import Plan
from fasterai_lr.planner import make_plan
from fasterai_lr.rank import Energy
import fasterai_lr.learned as module, fasterai_lr.distributed as distributed
from helpers import n_factored
from learners import Watch, mk_learn, splitter
from networks import linear_net

torch.set_num_threads(1)
warnings.filterwarnings('ignore', category=FutureWarning)

@patch
def _broadcast(self:DistributedDL, t, rank):
    "fastai's own sends the indices from GPU to GPU, and there may be none"
    t = LongTensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

what = FC_Decomposer(rank=2)

def grads(learn):
    "Copies of the gradients of `learn`"
    return [p.grad.clone() for p in learn.model.parameters() if p.requires_grad]

def watch():
    "A `Watch` of the gradients"
    return Watch(grads)

def state(m): return {k: v.clone() for k,v in get_model(m).state_dict().items()}
def seen(learn, w, c, **kw):
    same = [id(p) for pg in learn.opt.param_lists for p in pg] == [id(p) for p in learn.model.parameters()]
    return dict(state=state(learn.model), trains=w.trains, grads=w.seen, history=c.history, bound=same, plan=get_model(learn.model).low_rank_plan, **kw)

def run_ctx(path):
    "fastai's own way, with BatchNorm"
    learn,w,c = mk_learn(),watch(),DecomposeCallback(1, what, ft_lr=1e-2)
    old = weakref.ref(learn.model[0].weight)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(3, 1e-2, cbs=[w, c])
    learn.loss_grad = None
    gc.collect()
    return seen(learn, w, c, type=type(learn.model).__name__, freed=old() is None)

def run_equal(path):
    "Batches of 2x16 items, to compare with one process and batches of 32"
    learn,w,c = mk_learn(model=linear_net(nn.LayerNorm), shuffle=False),watch(),DecomposeCallback(1, what, ft_lr=1e-2)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(3, 1e-2, cbs=[c, w])
    return seen(learn, w, c, losses=[v[1] for v in learn.recorder.values])

def halves():
    "The order of items in one process that makes its batches of 32 those of two processes, whose shares are neighbours"
    return torch.arange(64).reshape(2, 2, 16).transpose(0, 1).flatten()

def one_process():
    "What `run_equal` has to come to"
    learn,w,c = mk_learn(model=linear_net(nn.LayerNorm), bs=32, order=halves(), shuffle=False),watch(),DecomposeCallback(1, what, ft_lr=1e-2)
    learn.fit_one_cycle(3, 1e-2, cbs=[c, w])
    return seen(learn, w, c, losses=[v[1] for v in learn.recorder.values])

def budget_fit(learn):
    "Budgets in a metric without random signs, and which items this process has drawn and calibrated on"
    drawn,shares,real,part = [],[],module.calibration_batches,distributed.gather_moments
    def draw(learn, n=2000):
        res = real(learn, n)
        if n > 1: drawn.extend(b[0] for b in res)
        return res
    def gather(model, data, *args, **kwargs):
        shares.extend(b[0] for b in data)
        return part(model, data, *args, **kwargs)
    w,c = watch(),DecomposeCallback({1: Budget(params=.7), 2: Budget(params=.5)}, ft_lr=1e-2, metric='activation')
    module.calibration_batches,distributed.gather_moments = draw,gather
    try: learn.fit_one_cycle(3, 1e-2, cbs=[c, w])
    finally: module.calibration_batches,distributed.gather_moments = real,part
    return seen(learn, w, c, drawn=torch.cat(drawn), shares=torch.cat(shares) if shares else None, losses=[v[1] for v in learn.recorder.values])

def run_budget(path):
    "As `run_equal`"
    learn = mk_learn(model=linear_net(nn.LayerNorm), shuffle=False)
    with learn.distrib_ctx(sync_bn=False, cpu=True): return budget_fit(learn)

def budget_in_one_process(): return budget_fit(mk_learn(model=linear_net(nn.LayerNorm), bs=32, order=halves(), shuffle=False))

def run_guard(path):
    "A rank of one, undone; then a budget judged by the metric, with data in a loader that gives each process its share, and a teacher; a BatchNorm without parameters"
    model = nn.Sequential(nn.Linear(8,12,bias=False), nn.BatchNorm1d(12, affine=False), nn.ReLU(), nn.Linear(12,10), nn.ReLU(), nn.Linear(10,4))
    learn = mk_learn(model=model, splitter=trainable_params, metrics=mae)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 1e-2, cbs=(guard := DecomposeCallback(1, FC_Decomposer(rank=1), max_drop=1e-4)))
        dense = n_factored(learn.model),hasattr(get_model(learn.model), 'low_rank_plan')
        w,c = watch(),DecomposeCallback(1, Budget(max_drop=.05), data=learn.dls, ft_lr=1e-2, distill=.5)
        learn.fit(2, 1e-2, cbs=[c, w])
    return seen(learn, w, c, dense=dense, guard=guard.history)

def run_frozen(path):
    "`fine_tune`, groups with learning rates of their own, a torch optimizer, and callbacks that save"
    learn = mk_learn(path=path, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), metrics=mae)
    w,c = watch(),DecomposeCallback(1, what, ft_lr=1e-2)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fine_tune(3, 1e-2, freeze_epochs=1, cbs=[c, w, SaveModelCallback(fname='best'), GradientAccumulation(16), GradientClip()])
        metric = [v[2] for v in learn.recorder.values]
        trained = state(learn.model)
        learn.fit(1, 1e-3)
    return seen(learn, w, c, metric=metric, trained=trained)

def run_diverged(path):
    "The second process has other weights: it gets the first one's factors all the same, and leaves the computing to it"
    calls,real = [],module.factorize
    module.factorize = lambda *args, **kw: calls.append(0) or real(*args, **kw)
    class Push(Callback):
        order = 60
        def before_train(self):
            if self.epoch == 1 and rank_distrib(): get_model(self.model)[3].weight.data.mul_(-1)
        def before_batch(self):
            if not hasattr(self, 'state') and self.epoch == 1: self.state = state(self.model)
    try:
        learn,p,w,c = mk_learn(),Push(),watch(),DecomposeCallback(1, FC_Decomposer(rank=Energy(.6)))
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=[p, c, w])
    finally: module.factorize = real
    return seen(learn, w, c, calls=len(calls), at_swap=p.state)

class Two(nn.Module):
    "Two inputs"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(8,6),nn.Conv1d(2,5,3),nn.Linear(6+5*6,4)
    def forward(self, x, y): return self.c(torch.cat((self.a(x), self.b(y).flatten(1)), 1))

class Gated(nn.Module):
    "A layer that items with a negative first feature do not reach"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8,6),nn.Linear(8,6)
    def forward(self, x):
        res = self.a(x)
        return res + self.b(x) if (x[:,0] > 0).all() else res

class Stream(IterableDataset):
    "Items of unknown number"
    def __iter__(self): yield from torch.randn(50, 8, generator=torch.Generator().manual_seed(2))

def squares(out): return out.square().sum()     # without random signs

def run_moments(path):
    "Moments of the items of all, of shares of different sizes, of which one is empty, of two inputs, and of a layer that only some reach; and errors in one of the processes"
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(2)
    x,y = torch.randn(50, 8, generator=g),torch.randn(50, 2, 8, generator=g)
    two,gated,linear = Two(),Gated(),nn.Linear(8, 6)
    pairs = Inputs(zip(list(x.split(16)), list(y.split(16))))
    pairs.n_inp = 2
    halves = [x[:20].abs(), -x[20:].abs()]
    cases = dict(two=(two, pairs), one=(two, [(x, y, x)]), gated=(gated, halves), wide=(linear, x), stream=(gated, TorchLoader(Stream(), 16)),
                 many=(linear, list(torch.randn(40, 3, 8, generator=g).split(2)))) # of 20 batches, two items would be too many
    res,rng = {},torch.get_rng_state()
    for name,(model,data) in cases.items():
        kw = dict(loss=squares, max_size=4 if name == 'wide' else 8192)
        res[name] = dict(shared_calibration(DDP(model), model, data, **kw)),dict(calibrate(model, data, **kw))
    shared_calibration(DDP(gated), gated, TorchLoader(x, 16, shuffle=True), loss=squares)
    undisturbed,errors = torch.equal(rng, torch.get_rng_state()),[]
    for i in range(2):
        try: shared_calibration(DDP(gated), gated, [x[:8]/(dist.get_rank() != i), x[8:]/(dist.get_rank() != i)], loss=squares)
        except Exception as e: errors.append(f'{type(e).__name__}: {e}')
    return dict(res=res, errors=errors, undisturbed=undisturbed)

def run_before(path):
    "`learn.decompose` in all processes, then a fit"
    learn,w = mk_learn(),watch()
    learn.decompose(what)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, 1e-2, cbs=w)
    return dict(state=state(learn.model), trains=w.trains, grads=w.seen)

def run_saved(path):
    "A file that the first process has written, in fresh learners of both, and more training; the last one is wrapped all the time"
    def ctx(learn):
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, 1e-2)
        return state(learn.model)
    fresh = lambda **kw: mk_learn(path=path, shuffle=False, **kw)
    learn = fresh()
    learn.decompose(what)
    saved = ctx(learn)
    learn.save_low_rank('m')
    wrapped = fresh(model=DDP(linear_net()), loader=partial(DistributedDL, device='cpu'), splitter=lambda m: splitter(get_model(m)))
    others = [o.load_low_rank('m') for o in (fresh(), wrapped)]
    loaded = [state(o.model) for o in others]
    wrapped.fit(1, 1e-2)
    return dict(saved=saved, loaded=loaded, after=ctx(learn), trained=[ctx(others[0]), state(wrapped.model)])

def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (2,2,2)), nn.Conv2d(2,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,8,3,padding=1), nn.Flatten(),
                         nn.Linear(32,4)).to(memory_format=torch.channels_last)

def run_plain(path):
    "A wrapper that the user has made, for a model in channels last; `learn.decompose` between two fits"
    ddp = DDP(conv_net(), static_graph=True)
    old = weakref.ref(ddp.module[3].weight)
    learn = mk_learn(model=ddp, loader=partial(DistributedDL, device='cpu'), splitter=lambda m: [list(get_model(m).parameters())])
    w,c = watch(),DecomposeCallback(1, ConvDecomposer('spatial', rank=2), ft_lr=1e-2)
    learn.fit(2, 1e-2, cbs=[c, w])
    learn.decompose(what)
    before = [p.detach().clone() for p in ddp.parameters()]
    learn.fit(1, 1e-2, cbs=w)
    learn.loss_grad = None
    gc.collect()
    return seen(learn, w, c, freed=old() is None, same=learn.model is ddp, static=ddp.static_graph, moved=[not torch.equal(a,b) for a,b in zip(before, ddp.parameters())],
                strides=[m.weight.stride() for m in ddp.module.modules() if type(m) is nn.Conv2d])

def run_root(path):
    "A model that is a single layer"
    learn,w,c = mk_learn(model=nn.Linear(8,4), splitter=trainable_params),watch(),DecomposeCallback(1, what, ft_lr=1e-2)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=[c, w])
    return seen(learn, w, c)

def run_error(path):
    "An error in the first process, an interrupt, and a fit after them"
    learn,errors = mk_learn(),[]
    def fail(err): raise err
    for err in (RuntimeError('no memory'), KeyboardInterrupt()):
        real,module.factorize = module.factorize,lambda *args, err=err, **kw: fail(err)
        try:
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=DecomposeCallback(1, what))
        except BaseException as e: errors.append(f'{type(e).__name__}: {e}')
        finally: module.factorize = real
        learn.model = get_model(learn.model)    # fastai leaves the wrapper of a fit that raised; accelerate before 1.14 would put another around it
    dense = n_factored(learn.model)
    w,c = watch(),DecomposeCallback(1, what)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=[c, w])
    return seen(learn, w, c, errors=errors, dense=dense)

def run_wrong_name(path):
    "What is wrong before the first epoch is wrong in all processes"
    learn = mk_learn()
    try:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=DecomposeCallback(1, FC_Decomposer(rank={'body': 2})))
    except ValueError as e: return dict(error=str(e), lrs=learn.recorder.lrs)

class Words(nn.Module):
    "Tied weights, a BatchNorm, and a buffer of its own"
    def __init__(self):
        super().__init__()
        self.emb,self.a,self.norm,self.b,self.head = nn.Embedding(20, 24),nn.Linear(24, 48),nn.BatchNorm1d(48),nn.Linear(48, 24),nn.Linear(24, 20, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer('scale', torch.full((24,), .5))
    def forward(self, x): return self.head(self.b(self.norm(self.a(self.emb(x).mean(1)*self.scale)).relu()))

def words():
    "Tokens and targets"
    g = torch.Generator().manual_seed(1)
    return torch.randint(20, (64,5), generator=g),torch.randint(20, (64,), generator=g)

def small_words():
    "The same decomposed model in each process, in evaluation mode: the statistics of a BatchNorm would differ between the halves of a batch"
    torch.manual_seed(0)
    return decompose(Words().eval(), Budget(macs=.6), words()[0])

def train_words(model, share=slice(None)):
    "The losses in a few steps on `share` of the items"
    (x,y),opt,res = words(),torch.optim.Adam(model.parameters(), 1e-2),[]
    for _ in range(4):
        loss = F.cross_entropy(model(x[share]), y[share])
        opt.zero_grad()
        loss.backward()
        opt.step()
        res.append(loss.detach().clone())
    return torch.stack(res)

def words_in_one_process():
    "What `run_fsdp` and `run_skeleton` have to come to"
    model = small_words()
    return dict(losses=train_words(model), state=state(model))

def sharded(model, units=False):
    "Shard `model` over the two processes, with `units` each of its factored layers by itself"
    mesh = dist.init_device_mesh('cpu', (2,))
    if units:
        for layer in factored_layers(model).values(): fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

whole = StateDictOptions(full_state_dict=True)

def train_sharded(model):
    "Train on this process's half of each batch; the mean losses, the whole state, and which parameters were sharded"
    kinds = {type(p).__name__ for p in model.parameters()}
    losses = train_words(model, slice(32*dist.get_rank(), 32*dist.get_rank() + 32))
    dist.all_reduce(losses)
    return dict(losses=losses/2, state=get_model_state_dict(model, options=whole), kinds=kinds, tied=model.head.weight is model.emb.weight)

def run_fsdp(path):
    "A decomposed model, sharded as a whole and layer by layer; what is gathered, in a whole model; a file of that"
    res = {units: train_sharded(sharded(small_words(), units)) for units in (False, True)}
    model = small_words()
    model.load_state_dict(res[True]['state'])
    file = save_low_rank(model, path/f'{dist.get_rank()}')
    torch.manual_seed(1)
    return dict(res=res, loaded=state(model), saved=state(load_low_rank(Words(), file)))

def run_skeleton(path):
    "A model made on the meta device: loaded and then sharded; or sharded, given memory and loaded, from each process's own state dict or from the first one's"
    file = save_low_rank(small_words(), path/f'{dist.get_rank()}')
    with torch.device('meta'): shell = Words().eval()
    saved = read_low_rank(file)
    plan = Plan.of(saved['plan'])
    def filled(first):
        model = plan.skeleton(shell)
        devices = {t.device.type for t in model.state_dict().values()}
        sharded(model, units=True).to_empty(device='cpu')
        given = dict(saved['model']) if not first or dist.get_rank() == 0 else {}     # torch puts its shards into what it is given
        set_model_state_dict(model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=first))
        return train_sharded(model) | dict(devices=devices)
    return dict(loaded=train_sharded(sharded(load_low_rank(shell, file))), own=filled(False), first=filled(True))

class Untouched(list):
    "Data that nobody may look at"
    def __iter__(self): raise AssertionError('it was read')
    __getitem__ = __len__ = __iter__

def run_sharded(path):
    "Everything that would replace or read the weights of a sharded model: {state: {what: its error}}"
    plan,data = Plan.of(small_words().low_rank_plan),Untouched()
    def learned(model): mk_learn(model=model, splitter=trainable_params).decompose(what)
    calls = dict(
        decomposers=lambda m: decompose(m, what), fitted=lambda m: decompose(m, what, data), budget=lambda m: decompose(m, Budget(macs=.5), data),
        nothing=lambda m: decompose(m, data=data), plan=lambda m: decompose(m, plan), apply=lambda m: plan.apply(m, data), skeleton=plan.skeleton,
        check=plan.check, linear=FC_Decomposer(.5).decompose, conv=ConvDecomposer().decompose, conv_data=lambda m: ConvDecomposer().decompose(m, data=data),
        calibrate=lambda m: calibrate(m, data), make_plan=lambda m: make_plan(m, data, Budget(macs=.5)), project=lambda m: project_(m, 2), recompose=recompose,
        learner=learned, load=lambda m: load_low_rank(m, file), save=lambda m: save_low_rank(m, path/'no'))
    file = save_low_rank(small_words(), path/f'{dist.get_rank()}')
    def errors(model):
        res = {}
        for name,f in calls.items():
            try: f(model)
            except RuntimeError as e: res[name] = str(e)
        return res
    dense,small = sharded(Words().eval()),sharded(small_words())
    res = dict(dense=errors(dense), small=errors(small))
    dense(words()[0])               # the root's parameters stay whole until a backward pass, so they are no `DTensor`
    return res | dict(run=errors(dense), names=list(calls), files=[f.name for f in path.iterdir()])

def run_refused(path):
    "Wrappers that cannot take new parameters, and sharded ones"
    def hooked():
        ddp = DDP(linear_net())
        ddp.register_comm_hook(None, fp16_compress_hook)
        return ddp
    makers,res = dict(hook=hooked, group=lambda: DDP(linear_net(), process_group=dist.new_group([0,1])), sharded=lambda: sharded(linear_net())),{}
    for name,f in makers.items():
        learn = mk_learn(model=f(), loader=partial(DistributedDL, device='cpu'), splitter=lambda m: [list(m.parameters())])
        try: learn.fit(2, 1e-2, cbs=DecomposeCallback(1, what))
        except RuntimeError as e: res[name] = str(e),learn.recorder.lrs
    return res

if __name__ == '__main__':
    folder,*names = sys.argv[1:]
    if not dist.is_initialized(): dist.init_process_group('gloo')
    for name in names:
        path = Path(folder)/name
        path.mkdir(exist_ok=True)
        torch.save(globals()[f'run_{name}'](path), f'{folder}/{name}_{rank_distrib()}.pt')
        dist.barrier()
    dist.destroy_process_group()
