"The methods a Learner gets"
import copy, random, re
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.learner import load_learner
from helpers import flat, ids, moved, same, snapshot
from learners import mk_learn
from networks import linear_net
from fasterai_lr.learner import *
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learned import calibration_batches
from fasterai_lr.cost import count_params
from fasterai_lr.decomposer import FC_Decomposer
from fasterai_lr.layers import factored_layers, recompose
from fasterai_lr.budget import Budget
from fasterai_lr.plan import Plan
from fasterai_lr.report import plot_training, summarize

pytestmark = pytest.mark.usefixtures('close_figures')
what = FC_Decomposer(rank=2)

def distance(pred, targ): return (pred - targ).abs().mean()

def test_decompose_between_fits():
    learn = mk_learn()
    assert learn.decompose(what) is None and learn.opt is None # a cell ends with the line, not with `<Learner object …>`
    learn = mk_learn()
    learn.fit(2, 1e-2)
    steps = learn.opt.state[learn.model[2].weight]['step']
    learn.decompose(what)
    assert learn.opt.state[learn.model[2].weight]['step'] == steps == 8
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model)) and ids(flat(learn.opt)) == ids(learn.model.parameters())

def test_two_lines_of_result(capsys):
    "It says what has changed, unless the learner logs nothing"
    learn = mk_learn()
    learn.logger = print
    learn.decompose(what)
    line,sizes = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r'    326 -> 182 parameters \(0.56x\), \d+ -> \d+ MACs \(0.\d\dx\)', sizes)
    assert re.fullmatch(r'decomposed 3 of 3 layers, loss \d.\d{4} -> \d.\d{4}', line)
    assert line.endswith(f'-> {learn.validate()[0]:.4f}')
    with learn.no_logging(): learn.decompose(FC_Decomposer(rank=1))
    assert capsys.readouterr().out == ''

def test_wrong_what_changes_nothing():
    learn = mk_learn()
    learn.create_opt()
    with pytest.raises(TypeError, match='^what: '): learn.decompose('svd')
    assert isinstance(learn.model[0], nn.Linear) and ids(flat(learn.opt)) == ids(learn.model.parameters())

def test_the_callback_does_not_hide_the_method():
    learn = mk_learn(cbs=DecomposeCallback(1, what))
    learn.decompose(what)
    assert 'layers' in learn.model.low_rank_plan and not learn.decompose_cb.done

def test_summary(tmp_path):
    learn = mk_learn(path=tmp_path)
    learn.decompose(what)
    x = torch.randn(1,8)
    learn.model.train()
    got = learn.low_rank_summary()
    assert got.equals(summarize(learn.model, x)) and learn.model.training
    assert got.loc['0','macs_after'] == 8*2 + 2*12
    assert got.equals(learn.low_rank_summary(x)) and (learn.low_rank_summary(x.repeat(3,1)).macs_after == 3*got.macs_after).all()
    learn.export('e.pkl')
    back = load_learner(tmp_path/'e.pkl')           # has no data
    assert back.low_rank_summary().equals(summarize(back.model)) and back.low_rank_summary(x).equals(got)

# Pictures

def titles(axes): return [a.get_title() for a in axes]

def test_spectra():
    learn = mk_learn()
    dense = copy.deepcopy(learn.model)
    assert titles(learn.plot_spectra()) == ['0\ndense, full rank 8', '3\ndense, full rank 10', '6\ndense, full rank 4']
    learn.decompose(what)
    assert [t.split(',')[0] for t in titles(learn.plot_spectra())] == ['0\nsvd', '3\nsvd', '6\nsvd']
    assert all((a.get_lines()[0].get_ydata()[2:] < 1e-6).all() for a in learn.plot_spectra())
    own = plt.subplots(1, 2)[1]
    learn.model = dense
    assert learn.plot_spectra(['0', '3'], axes=own) == list(own)
    plain,metric = (learn.plot_spectra(data=d)[0].get_lines()[0].get_ydata() for d in (None, calibration_batches(learn)))
    assert np.abs(plain - metric).max() > .01 and titles(learn.plot_spectra(data=learn.dls)) == titles(learn.plot_spectra())

def state(learn):
    "Everything of a learner and of the random generators that a look at it could change"
    opt = [learn.opt.hypers, [p.detach().clone() for p in flat(learn.opt)], [{k: v for k,v in learn.opt.state[p].items()} for p in flat(learn.opt)]]
    return [copy.deepcopy(o) for o in (dict(learn.model.state_dict()), opt, learn.recorder.values, learn.recorder.losses, [m.training for m in learn.model.modules()],
                                      torch.get_rng_state(), random.getstate(), np.random.get_state())] + [list(learn.cbs), ids(learn.model.modules())]

def test_tradeoff_looks_and_does_not_touch():
    learn = mk_learn(metrics=distance)
    learn.fit(2, 1e-2)
    learn.model.train()
    before = state(learn)
    table = learn.tradeoff((.9, .7), 'params')
    assert same(before, state(learn))
    assert list(table.columns) == ['budget', 'params', 'macs', 'loss', 'distance'] and list(table.budget) == [1, .9, .7]
    value = learn.validate()[1]
    assert table.distance[0] == pytest.approx(value, rel=1e-5)      # a mean of float32 numbers, in other batches
    for _,r in table[1:].iterrows():
        other = mk_learn(model=copy.deepcopy(learn.model), metrics=distance)
        other.decompose(Budget(params=r.budget))
        assert other.validate()[1] == pytest.approx(r.distance, rel=1e-4) and count_params(other.model)/count_params(learn.model) == pytest.approx(r.params, rel=1e-12)

def wrong(inp, targ): return (inp - targ).abs().mean()
wrong.__name__ = 'error_rate' # a metric of which less is better

def test_models_side_by_side():
    learn = mk_learn(metrics=wrong)
    learn.fit(1, 1e-2)
    dense = copy.deepcopy(learn.model)
    learn.decompose(Budget(params=.8))
    before = state(learn)
    table = learn.compare({'dense': dense, 'decomposed': learn.model}, repeats=1)
    assert same(before, state(learn))
    assert list(table.columns) == ['parameters', 'MACs', 'MB', 'ms', 'error_rate'] and list(table.index) == ['dense', 'decomposed']
    total = learn.low_rank_summary().loc['total']
    assert list(table.parameters) == [total.params_before, total.params_after] and list(table.MACs) == [total.macs_before, total.macs_after]
    assert table.error_rate['decomposed'] == pytest.approx(learn.validate()[1], rel=1e-5)   # a mean of float32 numbers, in other batches
    assert (table.ms > 0).all() and table.error_rate['dense'] > 0
    assert learn.tradeoff((.8,)).error_rate[0] > 0      # as it is, although less of it is better

def test_tradeoff_without_a_metric_is_the_loss():
    learn = mk_learn()
    table = learn.tradeoff((.8,))
    assert table.columns[-1] == 'valid_loss' and table.valid_loss[0] == pytest.approx(learn.validate()[0], rel=1e-5)     # float32

def test_tradeoff_in_a_picture():
    learn = mk_learn(metrics=distance)
    ax = learn.plot_tradeoff((.9, .7), 'params')
    table = learn.tradeoff((.9, .7), 'params')
    dense,curve = ax.get_lines()
    assert list(curve.get_xdata()) == list(100*table.params[1:]) and list(curve.get_ydata()) == list(table.distance[1:]) and dense.get_ydata()[0] == table.distance[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('parameters, % of the dense network', 'distance')
    ax = learn.plot_tradeoff((.9, .7), evaluate=False, ax=plt.gca())
    assert ax is plt.gca() and ax.get_ylabel() == 'estimated increase of the loss'
    assert learn.plot_tradeoff((.9,), evaluate=lambda m: 3.).get_ylabel() == 'value'

def test_tradeoff_of_a_decomposed_learner():
    learn = mk_learn(metrics=distance, cbs=DecomposeCallback(1, what))
    learn.fit(2, 1e-2)
    assert len(factored_layers(learn.model)) == 3
    table = learn.tradeoff((.8,))
    assert len(factored_layers(learn.model)) == 3
    assert table.equals(mk_learn(metrics=distance, model=recompose(learn.model)).tradeoff((.8,)))

def test_pictures_without_a_validation_set(tmp_path):
    learn = mk_learn(metrics=distance, path=tmp_path)
    learn.export('e.pkl')
    back = load_learner(tmp_path/'e.pkl')
    assert len(back.plot_spectra()) == 3
    with pytest.raises(ValueError, match='^dls: the learner has no validation set.*evaluate=False'): back.plot_tradeoff()
    data = torch.randn(32, 8)
    assert list(back.tradeoff((.8,), data=data, evaluate=False).columns) == ['budget', 'params', 'macs', 'loss']
    learn.dls.loaders = learn.dls.loaders[:1]
    with pytest.raises(ValueError, match='^dls: the learner has no validation set'): learn.tradeoff()
    assert learn.tradeoff((.8,), data=data, evaluate=count_params).columns[-1] == 'count_params'

def test_one_loader_alone(tmp_path):
    "Without a validation set nothing can go by the metric, and an export is of a training batch"
    learn = mk_learn(metrics=distance, path=tmp_path)
    learn.dls.loaders = learn.dls.loaders[:1]
    for call in (lambda: learn.decompose(Budget(max_drop=.1)), lambda: learn.compare({'dense': learn.model})):
        with pytest.raises(ValueError, match='^dls: .* no validation set'): call()
    with pytest.raises(ValueError, match='to evaluate on$'): learn.compare({'dense': learn.model}) # it takes no `evaluate`
    learn.decompose(Budget(macs=.5))
    assert factored_layers(learn.model) and learn.export_onnx('small').exists()

class Named(nn.Module):
    "Returns its output under a name, behind another"
    def __init__(self): super().__init__(); self.net = linear_net()
    def forward(self, x): return dict(half=self.net(x)/2, out=self.net(x))

class Unwraps(Callback):
    def after_pred(self): self.learn.pred = self.pred['out']

def test_a_saved_plan_is_applied_where_callbacks_read_outputs(tmp_path):
    "The file says that callbacks have read them; in a Learner that has such callbacks they do, elsewhere they are asked for before an epoch is trained"
    def learner(*cbs): return mk_learn(model=Named(), splitter=lambda m: [list(m.parameters())], cbs=list(cbs))
    learn = learner(Unwraps())
    learn.decompose(Budget(macs=.5))
    Plan.of(learn.model.low_rank_plan).save(tmp_path/'plan.json')
    plan = Plan.load(tmp_path/'plan.json')
    again,fitted = learner(Unwraps()),learner(Unwraps())
    again.decompose(plan)
    fitted.fit(1, cbs=DecomposeCallback(0, plan))
    assert same(list(again.model.parameters()), list(learn.model.parameters())) and factored_layers(fitted.model).keys() == factored_layers(learn.model).keys()
    for call in (lambda: learner().decompose(plan), lambda: learner().fit(2, cbs=DecomposeCallback(1, plan)), lambda: plan.apply(Named(), torch.randn(64, 8))):
        with pytest.raises(ValueError, match="output: the plan was made with a function 'after_pred', .* give it again, as output=…"): call()

def test_training_curves_of_fits():
    def curve(*cbs, n=3, metrics=distance):
        learn = mk_learn(metrics=metrics)
        learn.fit(n, 1e-2, cbs=cbs)
        return learn,plot_training(learn.recorder)
    marks = lambda axes: [[l.get_xdata()[0] for l in a.get_lines() if l.get_linestyle() == ':'] for a in axes]
    learn,axes = curve(DecomposeCallback({1: FC_Decomposer(rank=3), 2: FC_Decomposer(rank=1)}))
    assert marks(axes) == [[4, 8]]*3 and list(axes[0].get_lines()[1].get_xdata()) == [4, 8, 12]
    np.testing.assert_allclose(axes[1].get_lines()[0].get_ydata(), [v[2] for v in learn.recorder.values])
    np.testing.assert_allclose(axes[2].get_lines()[0].get_ydata(), learn.recorder.lrs)
    assert len(axes[0].get_lines()[0].get_xdata()) == 12
    learn,axes = curve(DecomposeCallback(1, what, max_drop=0.), metrics=lambda p,t: -distance(p, t))
    assert [t.get_text() for t in axes[0].get_legend().get_texts()][2:] == ['decomposed and undone']
    learn,axes = curve(n=1, metrics=None)
    assert marks(axes) == [[]]*2 and len(axes[0].get_lines()[1].get_xdata()) == 1
    learn.validate()
    with pytest.raises(ValueError, match='^recorder: it holds no epoch'): plot_training(learn.recorder)
