"What users do with a decomposed Learner: validate, predict, look at it, export it, save it, train it on"
import json, os, subprocess, sys
from pathlib import Path

import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pandas as pd, pytest, torch
from sklearn.datasets import load_wine
from torch.testing import assert_close
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.data.transforms import get_image_files
from fastai.interpret import ClassificationInterpretation, Interpretation, SegmentationInterpretation
from fastai.learner import load_learner
from fastai.optimizer import Adam, ranger
import fastai.callback.hook
from applications import apps, made, what, xresnet
from helpers import flat, ids, moved, n_factored, same, snapshot
from learners import quiet, train_on
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.learner import *

here = Path(__file__).resolve().parent
pytestmark = pytest.mark.usefixtures('close_figures')

def decomposed(path, name='xresnet'):
    "A learner of an application that the callback has decomposed; the callback is the learner's own"
    learn = made(apps[name][0], path)
    learn.add_cb(DecomposeCallback(1, what, ft_lr=1e-2))
    learn.fit_one_cycle(3, 1e-2)
    return learn

@pytest.fixture(scope='module')
def vision(tmp_path_factory):
    "Decomposed, and only looked at"
    return decomposed(tmp_path_factory.mktemp('vision'))

def valid_outputs(learn):
    "Predictions and targets of the validation set, by hand"
    learn.model.eval()
    with torch.no_grad(): res = [(learn.model(x).softmax(-1), y) for x,y in learn.dls.valid]
    return [torch.cat([o.as_subclass(torch.Tensor) for o in os]) for os in zip(*res)]

# Looking at it

def test_predictions(vision):
    want,y = valid_outputs(vision)
    preds,targs,losses = vision.get_preds(with_loss=True)
    # the same numbers in batches of another size: float32 rounding
    assert_close(preds.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-6)
    assert torch.equal(targs.as_subclass(torch.Tensor), y) and n_factored(vision.model) == 17
    loss,acc = vision.validate()
    assert_close([loss, acc], [-want.log()[range(len(y)),y].mean().item(), (want.argmax(1) == y).float().mean().item()], rtol=1e-4, atol=1e-6)
    assert_close(losses.mean().item(), loss, rtol=1e-4, atol=0)

def test_predict_one(vision):
    file = vision.dls.valid_ds.items[0]
    label,idx,probs = vision.predict(file)
    preds,_ = vision.get_preds()
    assert label == vision.dls.vocab[idx] and idx == preds[0].argmax()
    assert_close(probs.as_subclass(torch.Tensor), preds[0].as_subclass(torch.Tensor), rtol=1e-4, atol=1e-6)

def test_tta(vision):
    (aug,preds),y = vision.tta(n=2, beta=None)
    want,_ = vision.get_preds()
    assert_close(preds.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-6)
    assert aug.shape == preds.shape and torch.isfinite(aug).all()

def test_show_results(vision):
    vision.show_results(max_n=4)
    assert sum(len(ax.images) for ax in plt.gcf().axes) == 4

def test_interpretation(vision):
    interp = ClassificationInterpretation.from_learner(vision)
    preds,y = vision.get_preds()
    assert interp.confusion_matrix().sum() == len(y) and interp.confusion_matrix().trace() == (preds.argmax(1) == y).sum()
    interp.plot_confusion_matrix()
    interp.plot_top_losses(3)
    assert sum(len(ax.images) for ax in plt.gcf().axes) == 3

def test_interpretation_from_before_the_swap(tmp_path):
    learn = xresnet(tmp_path)
    learn.fit(1, 1e-2)
    interp = Interpretation.from_learner(learn)
    learn.decompose(what)
    interp.plot_top_losses(3)                     # asks the model again
    after = Interpretation.from_learner(learn)
    assert len(after.losses) == len(interp.losses) and not torch.equal(after.losses, interp.losses)

def test_segmentation_interpretation(tmp_path):
    learn = decomposed(tmp_path, 'unet')
    interp = SegmentationInterpretation.from_learner(learn)
    interp.plot_top_losses(2)
    learn.show_results(max_n=2)
    mask,_,probs = learn.predict(learn.dls.valid_ds.items[0])
    assert mask.shape == (32,32) and probs.shape == (2,32,32) and n_factored(learn.model) == 33

@pytest.mark.parametrize('name', ['xresnet', 'tabular', 'text_classifier', 'unet'])
def test_summary(name, tmp_path):
    learn = decomposed(tmp_path, name)
    with torch.no_grad(): text = str(learn.summary())
    total = next(l for l in text.splitlines() if l.startswith('Total params'))
    # fastai counts layers with a `weight`; LSTMs and the like have none
    if name in ('xresnet', 'tabular'): assert int(total.split(':')[1].replace(',', '')) == sum(p.numel() for p in learn.model.parameters())
    assert 'DecomposeCallback' in text and n_factored(learn.model) == apps[name][1]

@pytest.mark.parametrize('name', ['tabular', 'collab_nn', 'text_classifier', 'untied_lm'])
def test_other_applications(name, tmp_path, capsys):
    learn = decomposed(tmp_path, name)
    if name != 'text_classifier': learn.show_results(max_n=3)       # fastai 2.8's own fails there
    loss = learn.validate()[0]
    assert learn.get_preds(reorder=False)[0].isfinite().all() and loss == learn.validate()[0]
    if name == 'tabular': assert learn.predict(learn.dls.valid_ds.items.iloc[0])[2].shape == (3,)
    if name == 'text_classifier': assert learn.predict('bal dan gil kul')[0] in ('one','two')
    if name == 'untied_lm': assert len(learn.predict('bal dan', n_words=4).split()) >= 4

# Export

def new_items(name, learn):
    "A few items as a user would have them, without targets"
    if name == 'xresnet': return [str(f) for f in learn.dls.valid_ds.items[:5]]
    if name == 'collab_nn': return [dict(user=u, item=i) for u,i in [(1,2), (3,4), (5,6)]]
    df = load_wine(as_frame=True).frame.iloc[[0,60,120]].drop(columns='target')
    return df.assign(tone=['a','b','c']).to_dict('records')

new_process = '''
import json, sys, warnings
warnings.simplefilter('ignore')
import pandas as pd, torch
torch.set_num_threads(1)
from fastai.learner import load_learner
res = {}
for name,file,items in json.loads(sys.stdin.read()):
    learn = load_learner(file)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    dl = learn.dls.test_dl(items if name == 'xresnet' else pd.DataFrame(items), num_workers=0)
    preds = learn.get_preds(dl=dl)[0]
    res[name] = preds.tolist(), [type(m).__name__ for m in learn.model.modules()].count('FactoredLayer'), len(learn.decompose_cb.history)
print(json.dumps(res))
'''

def test_export_to_a_new_process(tmp_path):
    given,want = [],{}
    for name in ('xresnet', 'tabular', 'collab_nn'):
        learn = decomposed(tmp_path/name, name)
        learn.export('x.pkl')
        items = new_items(name, learn)
        want[name] = learn.get_preds(dl=learn.dls.test_dl(items if name == 'xresnet' else pd.DataFrame(items)))[0]
        given.append([name, str(tmp_path/name/'x.pkl'), items])
    env = os.environ | dict(PYTHONPATH=f'{here.parent}{os.pathsep}{here}', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    res = subprocess.run([sys.executable, '-c', new_process], input=json.dumps(given), env=env, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    got = json.loads(res.stdout.splitlines()[-1])
    for name,w in want.items():
        preds,n,done = got[name]
        # the same operations on the same machine in another process: float32 rounding at most
        assert_close(torch.tensor(preds), w.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
        assert n == apps[name][1] and done == 1

@pytest.mark.parametrize('cb', [None, ChannelsLast, MixedPrecision])
def test_export_keeps_the_learner_and_trains_on(cb, tmp_path):
    "`export` puts a new optimizer in, with the state of the old one"
    learn = xresnet(tmp_path, cbs=[DecomposeCallback(1, what, ft_lr=1e-2), *([cb()] if cb else [])])
    learn.fit_one_cycle(2, 1e-2)
    with torch.no_grad(): want = learn.get_preds()[0]
    steps = [learn.opt.state[p]['step'] for p in learn.model.parameters()]
    learn.export('x.pkl')
    assert [learn.opt.state[p]['step'] for p in learn.model.parameters()] == steps and ids(flat(learn.opt)) == ids(learn.model.parameters())
    back = load_learner(tmp_path/'x.pkl')
    for l in (learn, back):
        l.dls = learn.dls
        assert_close(l.get_preds()[0].as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-6)    # another memory format rounds differently
        before = snapshot(l.model)
        l.fit(1, 1e-2)
        assert all(moved(before, l.model)) and n_factored(l.model) == 17

def test_export_before_the_swap(tmp_path):
    "A callback that has not had its epoch yet has it in the learner that was read back"
    learn = xresnet(tmp_path, cbs=DecomposeCallback(1, what, ft_lr=1e-2))
    learn.export('x.pkl')
    back = load_learner(tmp_path/'x.pkl')
    back.dls = learn.dls
    back.fit(2, 1e-2)
    assert n_factored(back.model) == 17 and n_factored(learn.model) == 0 and [h['epoch'] for h in back.decompose_cb.history] == [1]

# Save and load

@pytest.mark.parametrize('opt_func', [Adam, ranger])
def test_save_and_load_into_the_same(opt_func, tmp_path):
    learn = xresnet(tmp_path, opt_func=opt_func)
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, what, ft_lr=1e-2))
    learn.save('m')
    if opt_func is ranger: learn.load('m')        # its slow weights are not part of what is saved: both start from a loaded state
    a = train_on(learn)
    learn.load('m')
    assert not same(a, snapshot(learn.model))
    assert same(a, train_on(learn))               # to the last bit: moments and steps were loaded
    learn.load('m', with_opt=False)
    assert not same(a, train_on(learn))           # and they matter

def test_load_into_a_learner_decomposed_in_the_same_way(tmp_path):
    learn = xresnet(tmp_path)
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, what, ft_lr=1e-2))
    learn.save('m')
    a = train_on(learn)
    other = xresnet(tmp_path)
    other.decompose(what)
    other.load('m')
    assert same(a, train_on(other))

def test_load_into_a_dense_learner_is_an_error(tmp_path):
    learn = xresnet(tmp_path)
    learn.fit(2, 1e-2, cbs=DecomposeCallback(1, what, ft_lr=1e-2))
    learn.save('m')
    with pytest.raises(RuntimeError, match='Missing key'): xresnet(tmp_path).load('m')

def test_decompose_what_load_learner_gives(tmp_path):
    "An exported dense learner, decomposed for inference"
    learn = xresnet(tmp_path)
    learn.fit(1, 1e-2)
    learn.export('x.pkl')
    back = load_learner(tmp_path/'x.pkl')
    back.decompose(what)
    preds,_ = quiet(back, tmp_path).get_preds(dl=back.dls.test_dl(get_image_files(tmp_path/'digits')[:6], num_workers=0))
    assert n_factored(back.model) == 17 and preds.shape == (6,4) and torch.isfinite(preds).all()
