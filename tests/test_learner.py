"The methods a Learner gets"
import pytest, torch
from torch import nn
from fastai.learner import load_learner
from tiny import mk_learn, snapshot, moved, ids, flat
from fasterai_lr.learner import *
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.decomposer import FC_Decomposer
from fasterai_lr.report import summarize

what = FC_Decomposer(rank=2)

def test_decompose_between_fits():
    learn = mk_learn()
    assert learn.decompose(what) is learn and learn.opt is None
    learn = mk_learn()
    learn.fit(2, 1e-2)
    steps = learn.opt.state[learn.model[2].weight]['step']
    learn.decompose(what)
    assert learn.opt.state[learn.model[2].weight]['step'] == steps == 8
    before = snapshot(learn.model)
    learn.fit(1, 1e-2)
    assert all(moved(before, learn.model)) and ids(flat(learn.opt)) == ids(learn.model.parameters())

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
