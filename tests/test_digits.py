"The README's main job: its data, its network, what it prints and the picture it saves"
import matplotlib; matplotlib.use('agg')
import pytest

from fasterai_lr.digits import digits_dls, digits_vgg, report, train_digits

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
    assert [line.split()[0] for line in log.splitlines()] == ['epoch', '0', '1', 'epoch', '0', 'epoch', '1', 'accuracy:']
    assert log.splitlines()[0].split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and len({line.index(':') for line in log.splitlines() if line[0] in '01'}) == 1
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
