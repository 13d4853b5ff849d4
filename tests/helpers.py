"What tests share: the package's calls that many of them make"
from torch import nn

from fasterai_lr.fit import fit
from fasterai_lr.planner import Planner

def fitted(model, choices, data, **settings)->nn.Module:
    "A copy of `model` factored as `choices` says and fitted on `data`"
    return fit(model, choices, data, **settings)

def planner(model, data, **settings)->Planner:
    "A `Planner` that knows `model` from `data`"
    return Planner(model, data, **settings)
