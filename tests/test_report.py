"Tables and pictures: what is in the cells, lines and bars, not only that there are some"
import copy, pickle, re
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from torch import nn

import fasterai_lr.report as report
from fasterai_lr.cost import count_macs, count_params
from fasterai_lr.decomposer import ConvDecomposer, FC_Decomposer, decompose
from fasterai_lr.layers import factored_layers, recompose
from fasterai_lr.budget import Budget
from fasterai_lr.plan import Plan
from fasterai_lr.calibrate import gather_moments
from fasterai_lr.planner import make_plan
from fasterai_lr.report import *
from helpers import planner
from networks import rand

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('close_figures')

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 5))

halves = [FC_Decomposer(), ConvDecomposer('spatial', rank=.25)]

def images(n=32): return rand(n, 3, 12, 12)

def texts(ax): return [t.get_text() for t in ax.texts]

# The table

class Cells(HTMLParser):
    "The text of each cell, row by row"
    def __init__(self, html):
        super().__init__()
        self.rows = []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('td', 'th'): self.rows[-1].append('')
    def handle_data(self, data):
        if self.rows and self.rows[-1]: self.rows[-1][-1] += data.strip()

def test_the_table_as_text_and_as_html():
    table = summarize(decompose(net(), halves), images(1))
    rows = Cells(table._repr_html_()).rows
    assert rows[0] == ['layer', 'type', 'scheme', 'rank', 'parameters', 'MACs', 'error', 'reason']
    assert [r[0] for r in rows[1:]] == list(table.index)
    for shown,(name,r) in zip(rows[1:], table.iterrows()):
        arrow = lambda b,a: f'{b:,} → {a:,}' if a != b else f'{b:,}'
        assert shown == [name, r.type, r.scheme or r.status, str(r['rank']), arrow(r.params_before, r.params_after), arrow(r.macs_before, r.macs_after),
                         '' if np.isnan(r.error) else f'{r.error:.3f}', r.reason]
    lines = str(table).splitlines()
    assert str(table) == repr(table) == format_summary(table) and len(lines) == len(rows)
    for line,row in zip(lines, rows): assert ' '.join(line.split()) == ' '.join(filter(None, row))
    end = lambda line,row: line.index(row[4]) + len(row[4])
    assert len({end(l, r) for l,r in zip(lines, rows)}) == 1             # the numbers end below each other
    assert not any(l != l.rstrip() for l in lines) and 'nan' not in (str(table) + table._repr_html_()).lower()

def test_columns_with_nothing_in_them_are_not_shown():
    table = summarize(net())
    assert str(table).split('\n')[0].split() == ['layer', 'type', 'scheme', 'parameters', 'reason']
    assert Cells(summarize(nn.ReLU())._repr_html_()).rows[1:] == [['total', '', '', '0']]
    assert Cells(summarize(nn.ReLU(), torch.ones(1))._repr_html_()).rows[1:] == [['total', '', '', '0', '0']]

def test_names_cannot_be_markup():
    model = nn.Sequential()
    model.add_module('<b>', nn.Linear(2, 2))
    assert '<td style="text-align:left">&lt;b&gt;</td>' in summarize(model)._repr_html_()

def test_the_table_is_a_dataframe():
    table = summarize(decompose(net(), halves), images(1))
    assert isinstance(table, pd.DataFrame) and table.loc['total', 'params_after'] == table.params_after.iloc[-1]
    for part in (table[['rank', 'error']], table.head(2), table.query("status == 'factored'"), table.T, table.groupby('type').params_after.sum()):
        assert type(part) in (pd.DataFrame, pd.Series) and repr(part)
    again = pickle.loads(pickle.dumps(table))
    assert type(again) is type(table) and again.equals(table) and str(again) == str(table)
    assert pd.DataFrame(table).equals(table) and table.to_csv() == pd.DataFrame(table).to_csv()

def test_a_table_that_was_cut_in_place_shows_what_is_left():
    table = summarize(decompose(net(), halves))
    del table['rank']
    assert repr(table) == repr(pd.DataFrame(table)) and table._repr_html_() == pd.DataFrame(table)._repr_html_()

# Layer by layer

def test_bars_are_the_table():
    model = decompose(net(), halves)
    table = summarize(model, images(1))
    for axes in (plot_layers(table), plot_layers(model, images(1)), plot_layers(pd.DataFrame(table))):
        assert len(axes) == 2
        for ax,kind in zip(axes, ('params', 'macs')):
            before,after = ([b.get_width() for b in c] for c in ax.containers)
            layers,total = table.iloc[:-1],table.iloc[-1]
            bn = 32 if kind == 'params' else 0
            assert before == [*layers[f'{kind}_before'], bn] and after == [*layers[f'{kind}_after'], bn] and sum(after) == total[f'{kind}_after']
            shares = [f'{100*b/total[f"{kind}_before"]:.1f}' for b in before]
            assert [t.split()[0].replace('<0.1', '0.0') for t in texts(ax)] == shares
            assert [t.get_text() for t in ax.get_legend().get_texts()] == ['before', 'after']
        assert [ax.get_xlabel().split()[0] for ax in axes] == ['parameters', 'MACs']
        assert [t.get_text() for t in axes[0].get_yticklabels()] == [*table.index[:-1], 'other layers']

def test_bars_of_a_dense_model():
    (ax,) = plot_layers(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False)))
    assert len(ax.containers) == 1 and ax.get_legend() is None and texts(ax) == ['71.4 %', '28.6 %']
    (ax,) = plot_layers(nn.Linear(4, 6))
    assert [t.get_text() for t in ax.get_yticklabels()] == ['the model']
    plot_layers(nn.Sequential(nn.ReLU(), nn.Embedding(4, 2)))

def test_bars_on_axes_of_ones_own():
    own = plt.subplots(1, 2)[1]
    assert plot_layers(net(), images(1), axes=own) == list(own)
    with pytest.raises(ValueError, match='^axes: 2 given; there are 1 panels: params'): plot_layers(net(), axes=own)

# Spectra

def unfoldings(w, scheme): # of `[o, i, *k]`
    "The matrices whose ranks the scheme's rank bounds, from the definition"
    if scheme == 'spatial': return [w.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)]
    if scheme in ('tucker', 'cp'): return [w.flatten(1), w.transpose(0, 1).flatten(1)]
    return [w.flatten(1)]

def relative(s): return (s/s[0]).numpy()

near = dict(rtol=0, atol=1e-5)  # relative to the largest singular value; the weights are float32, of at most 24*16*9 entries

@pytest.mark.parametrize('scheme', ['svd', 'spatial', 'tucker', 'cp'])
def test_spectra_of_a_convolution(scheme):
    conv = net()[3]
    small = ConvDecomposer(scheme, rank=.3, force=True).decompose(conv)
    for model,plan in ((conv, small), (small, None)):
        (ax,) = plot_spectra(model, plan=plan)
        want = [torch.linalg.svdvals(m) for m in unfoldings(model.weight.detach(), scheme)]
        ranks = small.rank if scheme == 'tucker' else (small.rank,)*len(want)
        curves,marks = ([l for l in ax.get_lines() if (l.get_linestyle() == '--') == dashed] for dashed in (False, True))
        assert len(curves) == len(want)
        for l,s in zip(curves, want):
            np.testing.assert_allclose(l.get_ydata(), relative(s), **near)
            np.testing.assert_allclose(l.get_xdata(), 100*np.arange(1, len(s)+1)/len(s))
        assert [m.get_xdata()[0] for m in marks] == [100*r/len(s) for r,s in zip(ranks, want)]
        if plan is None and scheme != 'cp':                              # nothing is left beyond the rank
            for l,r in zip(curves, ranks): assert l.get_ydata()[r-1] > 1e-2 and (l.get_ydata()[r:] < 1e-5).all()
        full = tuple(map(len, want)) if scheme == 'tucker' else len(want[0])
        energy = f', energy {want[0][:small.rank].square().sum()/want[0].square().sum():.0%}' if plan is not None and len(want) == 1 else ''
        assert ax.get_title() == f'\n{scheme}, {small.rank} of {full}{energy}'

def test_spectra_of_kernel_slices():
    conv = net()[3]
    small = ConvDecomposer('slice', rank=1, force=True).decompose(conv)
    (ax,) = plot_spectra(conv, plan=small)
    s = torch.linalg.svdvals(conv.weight.detach()).square().sum((0, 1)).sqrt()
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), relative(s), **near)
    assert ax.get_title() == f'\nslice, 1 of 3, energy {s[0]**2/s.square().sum():.0%}'

def test_spectra_of_a_whole_model():
    model = net()
    dense,small = plot_spectra(model),plot_spectra(decompose(model, halves))
    assert [a.get_title().split('\n')[0] for a in dense] == [a.get_title().split('\n')[0] for a in small] == ['0', '3', '8', '10']    # nothing of the depthwise one
    assert [len(a.get_lines()) for a in dense] == [1]*4 and [len(a.get_lines()) for a in small] == [2]*4
    for ax,i in zip(dense, (0, 3, 8, 10)):
        np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), relative(torch.linalg.svdvals(model[i].weight.detach().flatten(1))), **near)
    assert dense[2].get_title() == '8\ndense, full rank 40'
    fig = dense[0].figure
    assert fig.get_supxlabel() == 'index (% of the full rank)' and fig.get_supylabel() == 'singular value / the largest'
    assert len(plot_spectra(model, layers=['1*', '8'])) == 2

@pytest.mark.parametrize('layer', [nn.Conv2d(8, 12, 3, groups=2), nn.ConvTranspose2d(8, 12, 3, groups=2), nn.Conv1d(8, 12, 5, groups=2)])
def test_spectra_of_groups_are_taken_together(layer):
    w = layer.weight.detach()
    blocks = w.unflatten(0, (2, -1)).transpose(1, 2) if isinstance(layer, nn.ConvTranspose2d) else w.unflatten(0, (2, -1))
    s = torch.linalg.svdvals(blocks.flatten(2)).square().sum(0).sqrt()
    (ax,) = plot_spectra(layer)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), relative(s), **near)

def test_spectra_in_other_types_and_of_zero():
    half = nn.Linear(16, 8).to(torch.bfloat16)
    (ax,) = plot_spectra(half)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), relative(torch.linalg.svdvals(half.weight.detach().float())), **near)
    zero = nn.Linear(4, 3)
    nn.init.zeros_(zero.weight)
    assert (plot_spectra(zero)[0].get_lines()[0].get_ydata() == 0).all()
    assert list(plot_spectra(nn.Linear(5, 1))[0].get_lines()[0].get_ydata()) == [1.]

def test_spectra_in_the_metric_of_data():
    model,data = net().eval(),images()
    plans = planner(model, data)
    loss = {o.rank:o.loss for o in plans.options['8'] if o.scheme}           # of `svd`: half the energy beyond the rank
    (ax,) = plot_spectra(model, layers='8', data=data)
    energy = np.square(ax.get_lines()[0].get_ydata())
    tail = energy[::-1].cumsum()[::-1]
    for r in (3, 9, 20): assert tail[r]/tail[2] == pytest.approx(loss[r]/loss[2], rel=1e-6)      # both are float64
    plain = np.square(plot_spectra(model, layers='8')[0].get_lines()[0].get_ydata())
    assert energy[:9].sum()/energy.sum() > plain[:9].sum()/plain.sum() + .05         # another metric
    plan = make_plan(model, data, Budget(params=.6))
    axes = plot_spectra(plan.apply(model), data=data)
    assert [a.get_title().split('\n')[1].split(',')[0] for a in axes] == [r.scheme or 'dense' for n,r in plan.layers.items() if n != '5']
    unused = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    unused[1].spare = nn.Linear(4, 4)
    assert len(plot_spectra(unused)) == 2 and len(plot_spectra(unused, data=torch.randn(8, 4))) == 1

def test_spectra_with_a_plan():
    model = net().eval()
    plan = make_plan(model, images(), Budget(params=.6))
    marks = lambda axes: [[list(l.get_xdata()) for l in a.get_lines()[1:]] for a in axes]
    assert marks(plot_spectra(model, plan=plan)) == marks(plot_spectra(model, plan=plan.apply(model))) == marks(plot_spectra(model, plan=Plan.of(plan.apply(model).low_rank_plan)))
    with pytest.raises(ValueError, match="^plan: the model has no layer '3'"): plot_spectra(model[:3], plan=plan)

def test_what_has_no_spectrum():
    with pytest.raises(ValueError, match='^model: no layer has a spectrum to show'): plot_spectra(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="^layers: no layer has a spectrum to show; layer '5': a depthwise convolution"): plot_spectra(net(), layers='5')
    with pytest.raises(ValueError, match="^layers: 'x' matches no layer"): plot_spectra(net(), layers='x')
    with pytest.raises(ValueError, match='^model: .*meta device'): plot_spectra(nn.Linear(3, 3, device='meta'))
    with pytest.raises(ValueError, match='^axes: 1 given; there are 4 layers'): plot_spectra(net(), axes=plt.gca())

def test_captions_of_long_names_are_cut_at_their_beginning():
    model = nn.ModuleDict({'encoder': nn.ModuleDict({'a_long_name_of_a_block_of_layers': nn.ModuleDict({'projection': nn.Linear(3, 3)})})})
    name = plot_spectra(model)[0].get_title().split('\n')[0]
    assert len(name) == 32 and name[0] == '…' and name.endswith('of_a_block_of_layers.projection')

@pytest.mark.parametrize('n', [1, 4, 5, 23])
def test_captions_do_not_overlap(n):
    axes = plot_spectra(nn.Sequential(*(nn.Linear(4, 4) for _ in range(n))))
    for a in axes: a.set_title(report._caption('features.12.conv', 'spatial', 128, [1/np.arange(1, 1537)]), fontsize=a.title.get_fontsize())
    fig = axes[0].figure
    fig.canvas.draw()
    boxes = [a.title.get_window_extent() for a in axes]
    assert len(boxes) == n and not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])
    assert all(fig.bbox.contains(b.x0, b.y0) and fig.bbox.contains(b.x1, b.y1) for b in boxes)

# Accuracy against size

def test_tradeoff():
    model,x = net().train(),images()
    state,calls = copy.deepcopy(model.state_dict()),[]
    def params_left(m):
        assert not m.training
        calls.append(m)
        return count_params(m)
    torch.manual_seed(3)
    table = tradeoff(model, x, params_left, (.5, .9))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert after == torch.rand(1)
    assert list(table.columns) == ['budget', 'params', 'macs', 'loss', 'params_left'] and list(table.budget) == [1, .9, .5] and len(calls) == 3
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items()) and all(m.training for m in model.modules()) and not factored_layers(model)
    for m,(_,r) in zip(calls, table.iterrows()):    # fractions as counted, exactly
        assert r.params_left == count_params(m) and r.params == pytest.approx(count_params(m)/count_params(model), rel=1e-12)
        assert r.macs == pytest.approx(count_macs(m, x[:1])/count_macs(model, x[:1]), rel=1e-12)
    assert table.loss[0] == 0 < table.loss[1] < table.loss[2]

def test_tradeoff_calibrates_once(monkeypatch):
    made = []
    def counted(*args):
        made.append(args)
        return gather_moments(*args)
    monkeypatch.setattr('fasterai_lr.calibrate.gather_moments', counted)
    assert len(tradeoff(net(), images(), count_params, (.9, .7, .5))) == 4 and len(made) == 1

def test_tradeoff_is_what_decompose_makes():
    model,x = net().eval(),images()
    table = tradeoff(model, x, lambda m: m(x[:4]).sum(), (.6,), 'params', seed=5)
    small = decompose(model, Budget(params=.6), x, seed=5)
    assert table.columns[-1] == 'value'
    assert table.value[1] == pytest.approx(float(small(x[:4]).detach().sum()), rel=1e-4)      # the same fit of float32 weights
    assert table.value[0] == float(model(x[:4]).detach().sum())

def test_tradeoff_of_a_decomposed_model_and_without_evaluate():
    model,x = net().eval(),images()
    small = decompose(model, FC_Decomposer(rank={'8': 10}))
    table = tradeoff(small, x, budgets=(.5,))
    assert list(table.columns) == ['budget', 'params', 'macs', 'loss']
    pd.testing.assert_frame_equal(table, tradeoff(recompose(small), x, budgets=(.5,)))

def test_budgets_that_cannot_be_kept_to():
    with pytest.warns(UserWarning) as w: table = tradeoff(net(), images(), budgets=(.001, .5, .002))
    assert [str(o.message) for o in w if o.category is UserWarning and 'budgets' in str(o.message)] == [str(w[-1].message)]
    assert re.match(r'budgets: 0.002, 0.001 left out; macs: 0.001 cannot be reached; the smallest is 0.\d+, mostly held by', str(w[-1].message)) and list(table.budget) == [1, .5]
    with pytest.raises(ValueError, match='^budgets: none of 0.001 is possible; params: 0.001 cannot be reached'): tradeoff(net(), images(), budgets=(.001,), kind='params')
    with pytest.raises(ValueError, match="^kind: 'size' is not one of"): tradeoff(net(), images(), kind='size')
    with pytest.raises(ValueError, match='^macs: 1.5 is not a fraction'): tradeoff(net(), images(), budgets=(1.5,))

def test_tradeoff_in_the_metric_of_activations():
    table = tradeoff(net(), images(), count_params, (.5,), metric='activation')
    assert list(table.columns) == ['budget', 'params', 'macs', 'count_params'] and table.count_params[1] < table.count_params[0]

def test_tradeoff_of_time(monkeypatch):
    monkeypatch.setattr('fasterai_lr.planner.latency_plan', lambda planner, b: setattr(p := planner.make(Budget(macs=b.value)), 'measured', {'latency': .9*b.value}) or p)
    table = tradeoff(net(), images(), budgets=(.5,), kind='latency')
    assert list(table.columns) == ['budget', 'params', 'macs', 'latency', 'loss'] and list(table.latency) == [1, .45]
    assert plot_tradeoff(table, 'latency').get_xlabel() == 'time of a forward pass, % of the dense network'

def test_plot_of_a_tradeoff():
    table = pd.DataFrame(dict(budget=[1, .5, .2], params=[1, .6, .3], macs=[1, .49, .19], loss=[0, .1, .4], error_rate=[.1, .12, .3]))
    ax = plot_tradeoff(table)
    dense,curve = ax.get_lines()
    assert list(curve.get_xdata()) == [49, 19] and list(curve.get_ydata()) == [.12, .3] and list(dense.get_ydata()) == [.1, .1]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('MACs, % of the dense network', 'error rate')
    assert plot_tradeoff(table, 'params', 'loss', ax=ax, label='estimate', color='k') is ax
    assert list(ax.get_lines()[-1].get_xdata()) == [60, 30] and ax.get_ylabel() == 'estimated increase of the loss'
    assert [t.get_text() for t in ax.get_legend().get_texts()].count('estimate') == 1
    with pytest.raises(ValueError, match="^cost: 'latency' is not a column of the table; it has 'budget'"): plot_tradeoff(table, 'latency')
    with pytest.raises(ValueError, match="^value: 'accuracy' is not"): plot_tradeoff(table, value='accuracy')
    for cost in ('budget', 'error_rate'):   # columns, but nothing that a model costs
        with pytest.raises(ValueError, match=f"^cost: '{cost}' is not one of 'params', 'macs', 'latency'$"): plot_tradeoff(table, cost)

# The training curve

def recorder(n_epochs=3, names=('train_loss', 'valid_loss', 'accuracy', 'time'), rows=None, **kw):
    rows = rows or [(1/e, .9/e, 1-.3/e)[:len(names)-1] for e in range(1, n_epochs+1)]
    n = 10*n_epochs
    return SimpleNamespace(losses=[2/k for k in range(1, n+1)], iters=[10*e for e in range(1, n_epochs+1)], values=rows, lrs=[.1]*n, metric_names=['epoch', *names], **kw)

def test_training_curve():
    loss,metric,rate = plot_training(recorder())
    train,valid = loss.get_lines()
    assert list(train.get_xdata()) == list(range(1, 31)) and list(train.get_ydata()) == [2/k for k in range(1, 31)]
    assert list(valid.get_xdata()) == [10, 20, 30] and list(valid.get_ydata()) == [.9, .45, .9/3]
    assert list(metric.get_lines()[0].get_ydata()) == [.7, .85, .9] and metric.get_ylabel() == 'accuracy'
    assert list(rate.get_lines()[0].get_ydata()) == [.1]*30 and (rate.get_xlabel(), rate.get_ylabel()) == ('step', 'learning\nrate')
    assert loss.get_yscale() == 'log' and loss.get_ylabel() == 'loss'

def test_swaps_in_the_training_curve():
    axes = plot_training(recorder(decomposed=[dict(step=10, decomposed=3), dict(step=15, decomposed=0), dict(step=20, decomposed=0, metric=(.9, .5)), dict(step=25, decomposed=2)]))
    for ax in axes: assert [l.get_xdata()[0] for l in ax.get_lines() if l.get_linestyle() == ':'] == [10, 20, 25]
    assert [t.get_text() for t in axes[0].get_legend().get_texts()][2:] == ['decomposed', 'decomposed and undone']

@pytest.mark.parametrize('names,rows,panels,metrics', [
    (('train_loss', 'valid_loss', 'time'), [(1., .9), (.5, .4)], 2, []),
    (('train_loss', 'valid_loss'), [(1., .9)], 2, []),
    (('train_loss',), [(1.,), (.5,)], 2, []),
    (('train_loss', 'valid_loss', 'accuracy'), [(1., None, None)], 2, []),                  # nothing to validate on
    (('train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy'), [(1., .5, .9, .6), (.5, .7, .6, .8)], 3, [[.5, .7], [.6, .8]]),
    (('train_loss', 'valid_loss', 'accuracy', 'note'), [(1., .9, .6, 'a'), (.5, .4, .8, 'b')], 3, [[.6, .8]]),
    (('train_loss', 'valid_loss', 'accuracy'), [(1., .9, .6), (.5,)], 3, [[.6, np.nan]])])  # an epoch whose validation was cancelled
def test_other_things_that_are_logged(names, rows, panels, metrics):
    axes = plot_training(recorder(len(rows), names, rows))
    assert len(axes) == panels
    if metrics: np.testing.assert_array_equal([l.get_ydata() for l in axes[1].get_lines()], metrics)
    if len(metrics) > 1: assert [t.get_text() for t in axes[1].get_legend().get_texts()] == ['train_accuracy', 'valid_accuracy']

def test_training_curve_errors_and_negative_losses():
    r = recorder()
    r.losses[3] = -1.
    assert plot_training(r)[0].get_yscale() == 'linear'
    with pytest.raises(ValueError, match='^recorder: it holds no epoch'): plot_training(SimpleNamespace(losses=[], values=[(.5, .4)]))
    with pytest.raises(ValueError, match='^axes: 2 given; there are 3 panels: losses, metrics, learning rate'): plot_training(recorder(), axes=plt.subplots(2)[1])
