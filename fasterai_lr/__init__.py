"""Make trained fastai and PyTorch networks smaller and faster by low-rank decomposition"""
__version__ = "0.1.0"

import typing as _typing

__all__ = ['decompose', 'FC_Decomposer', 'ConvDecomposer', 'Budget', 'Plan', 'make_plan', 'recompose']

if _typing.TYPE_CHECKING: # what editors and type checkers read
    from .decomposer import decompose, FC_Decomposer, ConvDecomposer
    from .budget import Budget
    from .plan import Plan
    from .planner import make_plan
    from .layers import recompose
else: # what runs: a name is imported at its first use, so that `import fasterai_lr.linalg` is fast
    _home = {'decompose': 'decomposer', 'FC_Decomposer': 'decomposer', 'ConvDecomposer': 'decomposer',
             'Budget': 'budget', 'Plan': 'plan', 'make_plan': 'planner', 'recompose': 'layers'}

    def __getattr__(name):
        if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module
        res = globals()[name] = getattr(import_module(f'.{_home[name]}', __name__), name)
        return res

    def __dir__(): return sorted({*globals(), *__all__})
