"`tools/reach.py` counts what it says, and notices each target that is missed"
import json, subprocess, sys
from pathlib import Path
import pytest, reach

root = Path(__file__).resolve().parent.parent

def project(**sources):
    "A project of modules with these texts"
    return reach.Project({f'fasterai_lr/{name}.py': text for name,text in sources.items()})

def notebook(*sources):
    "A project of one notebook with these code cells"
    cells = [{'cell_type': 'markdown', 'source': 'x'*200}]
    for source in sources: cells.append({'cell_type': 'code', 'source': source.splitlines(keepends=True)})
    return reach.Project({'nbs/00_a.ipynb': json.dumps({'cells': cells})})

# Table one

small = '''"Of a module"

import os # nothing else

def f(a, # the first
      b):
    """What
    it does"""
    # no code
    return [o for o in a if o] if b else os
'''

def test_density_is_as_counted_by_hand():
    # nodes: 3 of the module and the import, 4 of the function and its arguments, 16 of what it returns
    assert reach.density(project(a=small).modules) == {
        'lines': 4, 'nodes': 23, 'nodes/line': 5.8, 'inlined/100': 50.,
        'long lines': [], 'wide assignments': [], 'vague docstrings': [('a.py', '1'), ('a.py', '7')]}

def test_modules_are_counted_together_and_the_index_is_left_out():
    both = project(a=small, b='x = 1', _modidx='x = 1').modules
    assert [m.name for m in both] == ['a', 'b']
    figures = reach.density(both)
    assert (figures['lines'], figures['nodes'], figures['inlined/100']) == (5, 28, 40.)

wide_text = f'x = "{"a"*104}"' # of 110 columns
dense = [('nodes/line', 'f(0, 1, 2, 3, 4)', 'f(0, 1, 2, 3, 4, 5, 6)'),
         ('inlined/100', 'x = 1\n'*12 + 'f = lambda: 1', 'x = 1\n'*11 + 'f = lambda: 1'),
         ('long lines', wide_text, wide_text + ' '), ('long lines', f'# %% {"a"*120}', f'# {"a"*120}'),
         ('long lines', f'__all__ = ["a",\n{" "*120}"b"]', f'_all = ["a",\n{" "*120}"b"]'),
         ('wide assignments', 'a,b,c = d', 'a,(b,c) = d = e'), ('wide assignments', 'f(a, b, c, d)', 'a,b,self.c,x[0] = d'),
         ('vague docstrings', '"Whatever"', '"What it is"'), ('vague docstrings', 'def f(): "the same"', 'def f(): "The same"'),
         ('vague docstrings', 'x = "Those"', 'class A:\n    "Those"')]

@pytest.mark.parametrize('column, good, bad', dense)
def test_a_dense_module_is_noticed(column, good, bad):
    target = {column: reach.density_targets[column]}
    for text,holds in (good, 'yes'), (bad, 'no'): assert reach.verdict(reach.density(project(a=text).modules), target) == holds

# Table two

eight = 'def f(self, a, b, c, d, e, *f, g, h, **kwargs): pass\n'
cell = '#| export\n' + 'x = 1\n'*40
far = [('parameters named', project(a='def f(seed, *, loss=1): pass\n'*10), 20, project(a='def f(x, seed): pass\n'*21), 21),
       ('parameters named', project(a='class A:\n    seed:int\nf = lambda loss: 1'), 0, project(a='class A:\n    def f(self):\n        def g(seed): pass\n'*21), 21),
       ('functions with more', project(a=eight*2 + 'def f(a, b, c, d, e, f, g): pass'), 2, project(a=eight*3), 3),
       ('public functions with', project(a='@delegates(g)\ndef f(**kwargs): pass'), 0, project(a='def f(**kw): pass'), 1),
       ('public functions with', project(a='@takes_settings()\nasync def f(**kwargs): pass'), 0, project(a='class A:\n    def __init__(self, **kwargs): pass'), 1),
       ('public functions with', project(a='class _A:\n    def f(**kwargs): pass\ndef f():\n    def g(**kwargs): pass'), 0, project(a='@patch\ndef f(**kwargs): pass'), 1),
       ('private names imported', project(a='from .b import x, __version__\nfrom torch import _C'), 0, project(a='from .b import x, _y'), 1),
       ('private names imported', project(a='from . import b as _b'), 0, project(a='def f():\n    from fasterai_lr.b import _y as y'), 1),
       ('private names that two', project(a='_x = 1', b='from c import _x'), 0, project(a='_x = 1', b='if True:\n    def _x(): pass'), 1),
       ('private names that two', project(a='_x = 1', b='def f(): _x = 1'), 0, project(a='_x = 1', b='class _x: pass', c='_x = 2'), 1),
       ('circular imports', project(a='from .b import x', b='def f():\n    from .a import y'), 0, project(a='from .b import x', b='from .a import y'), 2),
       ('circular imports', project(a='from .b import x', b='import torch'), 0, project(a='from . import b', b='import fasterai_lr.c', c='from fasterai_lr.a import x', d='from .a import x'), 3),
       ('exported cells', notebook(cell, cell.replace('| export', ' ') + 'x'), 0, notebook(cell + 'y'), 1),
       ('lines over 88', notebook('x'*88, f'#| export\n{"x"*89}', f'#| hide\n{"x"*89}'), 0, notebook('x'*89 + '\n' + 'y'*89), 2)]

def test_there_is_a_case_for_each_target():
    assert {o[0] for o in dense} == {name for name,target in reach.density_targets.items() if target is not None}
    for name,target in reach.reach_targets.items(): assert target is None or any(name.startswith(o[0]) for o in far), name

@pytest.mark.parametrize('start, good, n_good, bad, n_bad', far)
def test_what_reaches_far_is_noticed(start, good, n_good, bad, n_bad):
    name, = [o for o in reach.reach_targets if o.startswith(start)]
    for made,n,holds in (good, n_good, 'yes'), (bad, n_bad, 'no'):
        figures = reach.reach(made)
        assert (len(figures[name]), reach.verdict(figures, {name: reach.reach_targets[name]})) == (n, holds)

def test_keywords_that_pass_settings_on_are_counted():
    figures = reach.reach(project(a='f(seed, seed=seed, loss=None, x=1)\ndef g(moments=None): return h(**kwargs)'))
    assert figures['keywords of these names in calls'] == [('a.py', '1 seed='), ('a.py', '1 loss=')]

# What is shown

def test_tables_show_values_targets_and_what_was_then():
    now,then = project(a=small, b=eight*3),project(a='x = 1')
    first,second = reach.density_rows(now, then),reach.reach_rows(now, then)
    assert first[0][:4] == ['', 'lines', 'nodes', 'nodes/line'] and first[1][3] == '≤ 11'
    assert first[2] == ['a', '1 → 4 ', '5 → 23 ', '5.0 → 5.8 ', '0.0 → 50.0!', '0 → 0 ', '0 → 0 ', '0 → 2!', 'no']
    assert [row[0] for row in first[3:]] == ['b', 'in all'] and first[3][1] == '3 '
    assert ['functions with more than 7 parameters, **kwargs not counted', '0 → 3!', '≤ 2', 'no'] in second
    assert ['keywords of these names in calls', '0 → 0 ', '', ''] in second
    assert reach.table([['', 'x'], ['ab', '1'], ['c', '10']]) == '     x\nab   1\nc   10'

def test_the_places_are_listed():
    figures = {'a': [('x.py', '1'), ('y.py', '2'), ('x.py', '3'), ('y.py', '2')], 'b': [('x.py', '4')], 'c': 5}
    assert reach.where(figures, {'a': 0, 'b': 1, 'c': 0}) == '\na:\n  x.py: 1, 3\n  y.py: 2 ×2\n'

def run(*args):
    return subprocess.run([sys.executable, 'tools/reach.py', *args], cwd=root, text=True, encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def test_the_script():
    plain,checked = run(),run('--check')
    assert plain.returncode == 0 and plain.stdout == checked.stdout
    assert checked.returncode == any(line.endswith(' no') for line in plain.stdout.splitlines())

def test_the_script_compares_with_a_commit():
    if not (root/'.git').exists(): pytest.skip('not a git checkout')
    res = run('--compare', 'HEAD')
    assert res.returncode == 0 and '→' in res.stdout
    res = run('--compare', 'no-such-commit')
    assert res.returncode == 2 and 'no package in the commit no-such-commit' in res.stderr

# The package

def test_each_module_keeps_to_table_one():
    modules = reach.Project(reach.files_here()).modules
    missed = [m.name for m in modules if reach.verdict(reach.density([m]), reach.density_targets) == 'no']
    assert len(modules) > 20 and not missed

def test_the_package_keeps_to_table_two():
    figures = reach.reach(reach.Project(reach.files_here()))
    missed = {name: figures[name] for name,target in reach.reach_targets.items() if reach.misses(figures[name], target)}
    assert not missed
