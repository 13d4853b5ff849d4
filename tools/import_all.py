"Import every module of the installed package and print its folder: `python tools/import_all.py`"
import fasterai_lr
from importlib import import_module
from pkgutil import iter_modules

names = [o.name for o in iter_modules(fasterai_lr.__path__)]
for name in names: import_module(f'fasterai_lr.{name}')
print(f'{fasterai_lr.__version__} in {fasterai_lr.__path__[0]}: {" ".join(names)}')
