"What holds for all tests: one thread for each worker, and warnings of this project are errors"
import os
from pathlib import Path

import pytest

# two workers of `pytest -n` with two threads each get into each other's way on two cores; torch reads this when it is imported, and so do the processes that tests start
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')

def pytest_configure(config):
    "Make each warning that the package raises, or causes by something deprecated, an error, where a test does not expect it"
    modules = sorted(p.stem for p in (Path(__file__).resolve().parent.parent/'fasterai_lr').glob('*.py'))
    for m in modules: config.addinivalue_line('filterwarnings', f'error:::fasterai_lr.{m}')
    # tests work with few items, so as to be fast, and many ask what stays dense; `tests/test_found_by_use.py` is about these two, which are errors again there
    # and torch's of padding seems to come from us where a mode of ours runs its functions
    for text in ('data. [0-9]+ items are too few', 'No layer was decomposed', 'Using padding='): config.addinivalue_line('filterwarnings', f'ignore:{text}')

@pytest.fixture
def seeded():
    "Torch's random numbers start at 0 in a test; `pytestmark = pytest.mark.usefixtures('seeded')` for a whole file"
    import torch # not for tests that do without it
    torch.manual_seed(0)

@pytest.fixture
def close_figures():
    "No figure is left for the next test"
    import matplotlib.pyplot as plt
    yield
    plt.close('all')
