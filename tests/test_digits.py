"The README's main job: its data, its network, what it prints and the picture it saves"
import subprocess, sys
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import pytest
from fastai.learner import Learner
from torch import nn

from fasterai_lr.decomposer import FC_Decomposer
from fasterai_lr.learned import decompose_learner
from fasterai_lr.digits import digits_dls, digits_vgg, report, train_digits

root = Path(__file__).resolve().parent.parent

def test_folds_share_out_all_images():
    valid = [set(digits_dls(k).valid_ds.items) for k in range(5)]
    assert sum(map(len, valid)) == len(set.union(*valid)) == 1797

def test_batches_are_images_and_targets():
    x,y = digits_dls(0, bs=16).one_batch()
    assert x.shape == (16, 1, 8, 8) and 0 <= x.min() and x.max() <= 1 and y.max() <= 9
    assert digits_vgg()(x).shape == (16, 10)

@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_report_of_a_short_run(tmp_path, capsys):
    r = train_digits(epochs=2, at_epoch=1)
    log = capsys.readouterr().out # as in a file
    assert '\r' not in log and '█' not in log
    assert [line.split()[0] for line in log.splitlines()] == ['The', 'epoch', '0', '1', 'The', 'epoch', '0', 'epoch', '790k', '1', 'accuracy:']
    assert log.splitlines()[1].split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and len({line.index(':') for line in log.splitlines() if line[0] in '01'}) == 1
    report(r, tmp_path/'curve.png')
    out = capsys.readouterr().out
    assert (tmp_path/'curve.png').read_bytes()[1:4] == b'PNG'
    for text in ('789,834 →    202,570', 'spatial   56', 'latency of 64 images', f'dense {r.dense_accuracy:.2%}', f'right after the decomposition {r.swap_accuracy:.2%}',
                 f'fine-tuned {r.accuracy:.2%}', 'rank 48 is above its full rank 10'): assert text in out, text
    assert [d['epoch'] for d in r.small.recorder.decomposed] == [1]

def test_a_run_is_the_same_every_time():
    "Loaders draw a seed of their own where they are made"
    a,b = (train_digits(epochs=2, at_epoch=1, seed=3) for _ in range(2))
    assert a.small.recorder.losses == b.small.recorder.losses and a.dense.recorder.losses == b.dense.recorder.losses and len(a.small.recorder.losses) > 20
    assert a.accuracy == b.accuracy

def test_images_can_be_enlarged():
    assert digits_dls(bs=4, size=24).one_batch()[0].shape == (4, 1, 24, 24)

predict = """import sys, warnings
warnings.simplefilter('ignore')
from fastai.learner import load_learner
from sklearn.datasets import load_digits
learn = load_learner(sys.argv[1])
image = (load_digits().images[5]*255/16).astype('uint8')
with learn.no_bar(): print(learn.predict(image)[0], learn.predict(5)[0])"""

@pytest.mark.parametrize('is_decomposed', [False, True])
def test_an_exported_learner_predicts_in_another_process(is_decomposed, tmp_path):
    "An image of its own, or one of those that it comes with by number; what it says is what the learner here says"
    learn = Learner(digits_dls(), nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10)), path=tmp_path)
    if is_decomposed: decompose_learner(learn, FC_Decomposer({'1': 4}))
    learn.export()
    with learn.no_bar(): expected = learn.predict(5)[0]
    res = subprocess.run([sys.executable, '-c', predict, tmp_path/'export.pkl'], cwd=root, text=True, stdout=subprocess.PIPE)
    assert res.stdout.split() == [expected]*2

def test_the_main_job_says_nothing_of_torch_jit_script():
    "fastai uses it at its import, which would be the first thing that a reader sees"
    cut = 'import runpy, sys, sklearn.datasets as d\ndef stop(*a, **kw): sys.exit("enough")\nd.load_digits = stop\n'
    res = subprocess.run([sys.executable, '-c', cut + 'runpy.run_module("fasterai_lr.digits", run_name="__main__")'], cwd=root,
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert res.stderr == 'enough\n'
