"What tests share: the package's calls that many of them make"
from torch import nn

from fasterai_lr.calibrate import Calibration, calibrate
from fasterai_lr.fit import fit
from fasterai_lr.planner import Planner

def fitted(model, choices, data, **settings)->nn.Module:
    "A copy of `model` factored as `choices` says and fitted on `data`"
    known = isinstance(data, Calibration)
    return fit(data if known else calibrate(model, data, **settings), choices).model

def planner(model, data, sample=None, **settings)->Planner:
    "A `Planner` that knows `model` from `data`"
    known = isinstance(data, Calibration)
    return Planner(data if known else calibrate(model, data, **settings), sample)
