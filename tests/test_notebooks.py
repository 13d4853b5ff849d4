"Every notebook in `nbs/` runs through nbdev's own runner, one case each"
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
from fastcore.basics import str2bool
from fastcore.nbio import mk_cell, nb_frontmatter, new_nb, read_nb, write_nb

root = Path(__file__).resolve().parent.parent
nbdev_test = Path(sys.executable).parent/'nbdev-test'

def notebooks(root):
    "The notebooks that nbdev sees: none in a folder or file whose name begins with `_` or `.`"
    paths = (p.relative_to(root) for p in (root/'nbs').rglob('*.ipynb'))
    return sorted(p for p in paths if not any(o[0] in '_.' for o in p.parts))

def case(path):
    "A pytest case, marked by what the notebook's first cell says: `- data: NAME` of what it loads with `untar_data`, or `- slow: true`; a page that exports no module is slow, too"
    notebook = read_nb(root/path)
    said = nb_frontmatter(notebook)
    is_page = not any(o.source.startswith('#| default_exp') for o in notebook.cells)
    slow = is_page or str2bool(said.get('slow', False))
    marks = [pytest.mark.data] if 'data' in said else [pytest.mark.slow]*slow
    return pytest.param(path, id=path.as_posix(), marks=marks)

def copy_project(to):
    "What running a notebook needs, in the folder `to`: whatever a notebook writes then stays there"
    for o in ('nbs', 'bench/results'): shutil.copytree(root/o, to/o)
    shutil.copy(root/'pyproject.toml', to)

def run_notebook(project, path):
    "Run the notebook at `path` below `project` on this checkout's package, and fail with its traceback"
    env = {**os.environ, 'PYTHONPATH': str(root), 'MPLBACKEND': 'agg'}
    res = subprocess.run([nbdev_test, project/path], cwd=project, env=env, stdin=subprocess.DEVNULL, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if res.returncode or 'Success.' not in res.stdout: pytest.fail(f'{path}:\n{res.stdout}', pytrace=False)

@pytest.mark.parametrize('path', [case(o) for o in notebooks(root)])
def test_notebook(path, tmp_path):
    copy_project(tmp_path)
    run_notebook(tmp_path, path)

def one_cell(tmp_path, source):
    "A project whose only notebook has one code cell"
    (tmp_path/'nbs').mkdir()
    shutil.copy(root/'pyproject.toml', tmp_path)
    write_nb(new_nb([mk_cell('# A title\n> and what it is', 'markdown'), mk_cell(source)]), tmp_path/'nbs/one.ipynb')
    return Path('nbs/one.ipynb')

def test_a_failing_cell_fails_the_case(tmp_path):
    path = one_cell(tmp_path, 'from fastcore.test import *\ntest_eq(6*7, 43)')
    with pytest.raises(pytest.fail.Exception, match='(?s)test_eq.*AssertionError.*42'): run_notebook(tmp_path, path)

def test_a_notebook_that_is_not_run_fails_the_case(tmp_path):
    path = one_cell(tmp_path, '1')
    with pytest.raises(pytest.fail.Exception): run_notebook(tmp_path, path.with_name('other.ipynb'))

def test_notebooks_run_on_this_checkout(tmp_path):
    run_notebook(tmp_path, one_cell(tmp_path, f'import fasterai_lr\nassert fasterai_lr.__file__.startswith({str(root)!r})'))
