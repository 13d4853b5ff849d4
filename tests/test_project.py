"The metadata, the imports and the tracked files of the project are what they should be"
import ast, json, os, re, subprocess, sys, tomllib
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
import pytest, yaml
import fasterai_lr
from fastcore.nbio import mk_cell, read_nb

root = Path(__file__).resolve().parent.parent
lib = root/'fasterai_lr'
modules = sorted(p.stem for p in lib.glob('*.py') if p.stem != '__init__')
may_import_fastai = {'optimizer', 'loop', 'learned', 'callback', 'learner', 'all', 'digits'}

# Metadata

def wrong_bounds(cfg, oldest):
    "Where the requirements in `cfg` are not lower bounds alone, contradict each other or are not what the text `oldest` has pip install"
    res,lower = [],{}
    for o in (o for k in cfg if k.endswith('requirements') for o in cfg[k].split()):
        m = re.fullmatch(r'([\w-]+)>=([\d.]+)', o)
        if not m: res.append(f'bounds: {o} is not name>=version')
        elif lower.setdefault(m[1], m[2]) != m[2]: res.append(f'bounds: {o} and {m[1]}>={lower[m[1]]}')
    lines = filter(None, (o.split('#')[0].strip() for o in oldest.splitlines()))
    pins = dict(o.split('==') for o in lines)
    tested = {k: v for k,v in pins.items() if k != 'torchvision'}    # not ours to bound: each goes with one torch
    return res + [f'oldest: {k}: {lower.get(k)} and {tested.get(k)}' for k in sorted(lower.keys() | tested.keys()) if lower.get(k) != tested.get(k)]

def disagreements(ini, toml, init, workflow, oldest):
    "Where the texts of settings.ini, pyproject.toml, `__init__.py`, the workflow and the oldest versions contradict each other"
    parser = ConfigParser(delimiters=['='])
    parser.read_string(ini)
    cfg, toml = parser['DEFAULT'], tomllib.loads(toml)
    matrix = yaml.safe_load(workflow)['jobs']['test']['strategy']['matrix']
    pythons = matrix['python']
    nbdev = toml['tool']['nbdev']
    res = [f'{k}: {cfg[k]} and {nbdev[k]}' for k in nbdev if k in cfg and cfg[k] != str(nbdev[k])]
    if missing := {'lib_path', 'nbs_path'} - nbdev.keys(): res.append(f'pyproject.toml lacks {sorted(missing)}')
    if extra := (toml.keys() | {f'tool.{o}' for o in toml['tool']}) - {'build-system', 'tool', 'tool.nbdev'}: res.append(f'pyproject.toml: {sorted(extra)}')
    if f'__version__ = "{cfg["version"]}"' not in init.splitlines(): res.append(f'version: {cfg["version"]} is not in __init__.py')
    if min(pythons, key=lambda o: int(o.split('.')[1])) != cfg['min_python']: res.append(f'min_python: {cfg["min_python"]} and {pythons}')
    if matrix.get('include') != [dict(python=cfg['min_python'], versions='oldest')]: res.append(f'oldest: {matrix.get("include")} in the workflow')
    return res + wrong_bounds(cfg, oldest)

sources = ['settings.ini', 'pyproject.toml', 'fasterai_lr/__init__.py', '.github/workflows/test.yml', 'tests/oldest.txt']

def test_metadata_agrees(): assert disagreements(*((root/o).read_text() for o in sources)) == []

@pytest.mark.parametrize('i, old, new, found', [
    (0, 'lib_path = fasterai_lr', 'lib_path = other', 'lib_path'), (0, 'version = ', 'version = 9', 'version'), (0, 'min_python = 3.11', 'min_python = 3.9', 'min_python'),
    (1, 'nbs_path = "nbs"', 'nbs_path = "x"', 'nbs_path'), (1, 'lib_path', '#', 'lacks'), (1, '[tool.nbdev]', '[project]\nname = "x"\n[tool.nbdev]', 'project'),
    (1, '[tool.nbdev]', '[tool.uv]\n[tool.nbdev]', 'tool.uv'), (2, '__version__', '__v__', 'version'), (3, "'3.11', ", '', 'min_python'),
    (0, ' torch>=', ' torch>=9', 'oldest: torch:'), (0, ' torch>=', ' torch==', 'bounds: torch=='), (0, ' scipy>=1', ' scipy<9,>=1', 'bounds: scipy<9'),
    (0, 'requirements = onnx>=', 'requirements = onnx>=9', 'and onnx>='), (0, ' accelerate>=1', '', 'oldest: accelerate: None'),
    (4, 'nbdev==', 'nbdev==9', 'oldest: nbdev:'), (4, 'timm==', '#', 'oldest: timm:'), (4, 'timm==', 'numpy==2\ntimm==', 'oldest: numpy: None'),
    (3, "python: '3.11'", "python: '3.12'", 'oldest: ')])
def test_metadata_that_disagrees_is_found(i, old, new, found):
    texts = [(root/o).read_text() for o in sources]
    assert old in texts[i]
    texts[i] = texts[i].replace(old, new)
    assert any(found in o for o in disagreements(*texts))

def test_installed_version():
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini')
    assert fasterai_lr.__version__ == parser['DEFAULT']['version']

# Style

def ruff(*args, **kwargs):
    "What `ruff check` prints with the settings of ruff.toml; nothing where it has no remark"
    cmd = [sys.executable, '-m', 'ruff', 'check', '--quiet', '--no-cache', '--output-format', 'concise', *args]
    res = subprocess.run(cmd, cwd=root, text=True, encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    assert res.returncode in (0, 1), res.stdout # 2: a mistake in ruff.toml
    return res.stdout

def test_ruff_has_no_remark(): assert ruff() == ''

@pytest.mark.parametrize('path, text, found', [
    ('tools/x.py', f'x = "{"a"*105}"', 'E501'), ('fasterai_lr/x.py', 'import os', 'F401'), ('fasterai_lr/learner.py', 'undefined', 'F821'),
    ('tests/test_x.py', 'def f(x=[]): return x', 'B006'), ('bench/x.py', 'print(f"")', 'F541')])
def test_ruff_remarks_on_what_it_should(path, text, found): assert found in ruff('--stdin-filename', path, '-', input=text)

def test_ruff_reads_notebooks():
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source='undefined')
    nb = json.dumps(dict(cells=[cell], metadata=dict(language_info=dict(name='python')), nbformat=4, nbformat_minor=5))
    assert 'F821' in ruff('--stdin-filename', 'nbs/x.ipynb', '-', input=nb)

# Imports

@pytest.mark.parametrize('name', modules)
def test_module_imports(name): import_module(f'fasterai_lr.{name}')

def test_all_gives_the_public_names():
    names = {}
    exec('from fasterai_lr.all import *', names)
    assert names.keys() >= {'FC_Decomposer', 'ConvDecomposer', 'decompose', 'recompose', 'project_', 'summarize', 'Energy', 'EVBMF', 'DecomposeCallback'}
    from fasterai_lr import all
    assert {o for o in vars(all) if o[0] != '_'} - {'fasterai_lr'} == set(all.__all__)  # whatever it imports is public

public = {'decompose': 'decomposer', 'FC_Decomposer': 'decomposer', 'ConvDecomposer': 'decomposer', 'Budget': 'budget', 'Plan': 'plan', 'make_plan': 'planner', 'recompose': 'layers'}

def test_the_package_gives_the_names_that_most_programs_need():
    names = {}
    exec('from fasterai_lr import *', names)
    assert names.keys() - {'__builtins__'} == set(fasterai_lr.__all__) == public.keys()
    for n,m in public.items(): assert getattr(fasterai_lr, n) is names[n] is getattr(import_module(f'fasterai_lr.{m}'), n)
    assert not public.keys() & set(modules) # `fasterai_lr.calibrate` is the module, and would be the function only until somebody imports the module
    with pytest.raises(AttributeError, match="^module 'fasterai_lr' has no attribute 'nothing'$"): _ = fasterai_lr.nothing
    with pytest.raises(ImportError, match="^cannot import name 'nothing' from 'fasterai_lr'"): exec('from fasterai_lr import nothing')

def test_editors_and_type_checkers_see_the_same_names():
    block, = [o for o in ast.parse((lib/'__init__.py').read_text()).body if isinstance(o, ast.If)]
    assert ast.unparse(block.test) == '_typing.TYPE_CHECKING' and {a.name: o.module for o in block.body for a in o.names} == public
    # they would take a `__getattr__` to mean that any name is there
    assert {o.name for o in ast.walk(ast.Module(block.orelse, [])) if isinstance(o, ast.FunctionDef)} == {'__getattr__', '__dir__'}

def loaded(code):
    "The modules that are loaded after `code` has run in a new process"
    res = subprocess.run([sys.executable, '-c', f'import sys\n{code}\nprint("\\n", *sys.modules)'], cwd=root, check=True, text=True, stdout=subprocess.PIPE)
    return set(res.stdout.splitlines()[-1].split())

def test_nothing_is_loaded_before_it_is_asked_for():
    order,own = exported(),lambda names: {o.removeprefix('fasterai_lr.') for o in names if o.startswith('fasterai_lr')}
    res = loaded('import fasterai_lr\nassert set(fasterai_lr.__all__) <= set(dir(fasterai_lr)) and not hasattr(fasterai_lr, "nothing")')
    assert own(res) == {'fasterai_lr'} and 'torch' not in res
    assert own(loaded('from fasterai_lr import recompose')) - {'fasterai_lr'} <= {*order[:order.index('layers')+1]} # no module that comes after its own

def test_plain_pytorch_modules_do_not_load_fastai():
    plain = [o for o in modules if o not in may_import_fastai]
    assert {'decomposer', 'plan', 'layers'} <= set(plain)
    assert 'fastai' not in loaded('from fasterai_lr import *\nimport ' + ', '.join(f'fasterai_lr.{o}' for o in plain))
    assert 'fastai' in loaded('import fastai.basics')

def test_setup_does_not_import_the_package():
    "`pip install` runs it where neither the package nor torch is installed"
    setuptools = 'import runpy, types; sys.modules["setuptools"] = types.SimpleNamespace(setup=lambda **kw: print(kw["name"]))'
    res = loaded(f'{setuptools}\nrunpy.run_path("setup.py")')
    assert 'configparser' in res and not {o.split('.')[0] for o in res} & {'fasterai_lr', 'torch', 'fastai'}

def imports(source):
    "What the module `source` imports, wherever in it: (module, imported name) pairs"
    for o in ast.walk(ast.parse(source)):
        if isinstance(o, ast.Import): yield from ((a.name, '') for a in o.names)
        if isinstance(o, ast.ImportFrom): yield from (('.'*o.level + (o.module or ''), a.name) for a in o.names)

def wrong_imports(order, sources):
    "Imports against the rules; `order`: the modules from first to last, `sources`: {module: its text}"
    res = []
    for name,src in sources.items():
        for mod,what in imports(src):
            own = re.fullmatch(r'(?:\.|fasterai_lr\.)(\w+)', mod) or (mod in ('.', 'fasterai_lr') and re.fullmatch(r'([a-z]\w*)', what))
            if mod in ('.', 'fasterai_lr') and what in public: res.append(f'{name}: {what} by way of the package')
            elif mod.startswith('fastai') and name not in may_import_fastai: res.append(f'{name}: {mod}')
            elif (mod, what) == ('fastai.vision.all', '*'): res.append(f'{name}: {mod}')
            elif own and own[1] in order and order.index(own[1]) >= order.index(name): res.append(f'{name}: {own[1]} comes later')
    return res

def exported():
    "The modules in the order of their notebooks"
    nbs = map(read_nb, sorted((root/'nbs').glob('*.ipynb')))
    return [c.directives['default_exp'] for nb in nbs for c in nb.cells if 'default_exp' in c.directives]

def test_imports_go_one_way():
    order = exported()
    assert {*order, '_modidx'} == set(modules)
    assert wrong_imports(order, {o: (lib/f'{o}.py').read_text() for o in order}) == []

def test_wrong_imports_are_found():
    order = ['linalg', 'layers', 'callback']
    for name,src in [('linalg', 'from .layers import x'), ('linalg', 'from fasterai_lr.layers import x'), ('linalg', 'def f():\n    from fasterai_lr import layers'),
                     ('callback', 'from fasterai_lr import recompose'), ('callback', 'from . import Budget'),
                     ('layers', 'import fastai.basics'), ('callback', 'from fastai.vision.all import *')]:
        assert len(wrong_imports(order, {name: src})) == 1, src
    assert wrong_imports(order, {'callback': 'from fastai.basics import *\nfrom .layers import *\nimport torch'}) == []

# What tests share

def imported_tests(sources):
    "The test files that others import from; `sources`: {name of a test file: its text}"
    res = []
    for name,source in sources.items():
        named = [part for module,what in imports(source) for part in (*module.split('.'), what)]
        res += [f'{name}: {o}' for o in named if f'{o}.py' in sources]
    return res

def test_no_test_file_imports_from_another():
    "What several need is in modules without tests, as `helpers.py`"
    assert imported_tests({p.name: p.read_text(encoding='utf-8') for p in (root/'tests').glob('test_*.py')}) == []

def test_imports_from_test_files_are_found():
    given = {'test_a.py': '', 'test_b.py': 'import helpers\nfrom networks import test_net'}
    assert imported_tests(given) == []
    for source in ('from test_a import x', 'import test_a as t', 'def f():\n    import test_a', 'from tests.test_a import x', 'from . import test_a'):
        assert imported_tests(given | {'test_c.py': source}) == ['test_c.py: test_a'], source

# Paths of a machine

machine_path = re.compile(r'(?<![\w./~-])/(?:work|root|tmp|home|Users|opt|mnt)/\w|[A-Z]:\\\\?Users|file:/{2}|index-ur[l]')

def machine_paths(texts):
    "The first path of a machine in each of `texts`, a dict {name: text}: {name: path}"
    found = {k: machine_path.search(v) for k,v in texts.items()}
    return {k: m[0] for k,m in found.items() if m}

def test_no_path_of_a_machine_is_tracked():
    if not (root/'.git').exists(): pytest.skip('not a git checkout')
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=root, check=True, text=True, stdout=subprocess.PIPE).stdout.split('\0')
    texts = {o: (root/o).read_text(errors='ignore') for o in tracked if (root/o).is_file()}
    assert 'setup.py' in texts
    assert machine_paths(texts) == {}

def test_paths_of_a_machine_are_found():
    texts = dict(a='"{}root/x.pth"', b='in {}home/me/nbs', c='file:{}{}x', d='https:/{}x.org/home/me', e='nbs{}images', f='a{}work/b')
    assert machine_paths({k: v.replace('{}', '/') for k,v in texts.items()}).keys() == {*'abc'}

# The page on what works together

def test_the_tests_named_on_the_page_exist():
    text = '\n'.join(c.source for c in read_nb(root/'nbs/howto/04_compatibility.ipynb').cells)
    named = [(file, name) for file,names in re.findall(r'`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)', text) for name in re.findall(r'`(test_\w+)`', names)]
    assert len(named) == len(re.findall(r'`test_\w+`', text)) > 50
    missing = [o for o in named if f'def {o[1]}(' not in (root/'tests'/o[0]).read_text(encoding='utf-8')]
    assert not missing

def test_every_line_of_the_page_names_its_tests():
    text = '\n'.join(c.source for c in read_nb(root/'nbs/howto/04_compatibility.ipynb').cells)
    for section in text.split('\n## ')[1:]:
        lines = [re.sub(r'\[(.*?)\]\(.*?\)', r'\1', o) for o in section.split('\n')]
        tested = [o.split(' | ')[0].removeprefix('| ') for o in lines if o.startswith('| ')][1:]
        assert tested and tested == [o.split(': `test_')[0].removeprefix('- ') for o in lines if o.startswith('- ')]


# Titles in sentence case

names_in_titles = {*'Gram ReLU Learner Tucker PyTorch Python ResNet Imagenette BatchNorm'.split()}

def headings(text):
    "The headings of markdown"
    return re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```', '', text, flags=re.M|re.S), re.M)

def not_in_sentence_case(titles):
    "Those of `titles` that begin with a small letter, or have a capital one in an ordinary word"
    def right(title):
        first,*rest = re.findall(r'[A-Za-z]\w*', re.sub(r'`[^`]+`', 'X', title))
        return not first[0].islower() and not any(re.match('[A-Z][a-z]', o) and o not in names_in_titles for o in rest)
    return [o for o in titles if re.search('[A-Za-z]', o) and not right(o)]

def test_titles_are_in_sentence_case():
    texts = [(p, '\n'.join(c.source for c in read_nb(p).cells if c.cell_type == 'markdown')) for p in sorted((root/'nbs').rglob('*.ipynb')) if p.parent.name[0] not in '._']
    texts += [(p, p.read_text(encoding='utf-8')) for p in (root/'docs').glob('*.md')] + [(root/'CONTRIBUTING.md', (root/'CONTRIBUTING.md').read_text(encoding='utf-8'))]
    found = {p.name: bad for p,text in texts if (bad := not_in_sentence_case(o for o in headings(text) if o != 'fasterai_lr'))}
    assert found == {}

def test_titles_in_another_case_are_found():
    assert not_in_sentence_case(['benchmarks', 'What Is Refused', 'svd', 'What a Learner knows', '`svd`', 'The SVD']) == ['benchmarks', 'What Is Refused', 'svd']
    assert headings('# A\n```\n# b\n```\n## C') == ['A', 'C']

# what a reader copies

def unseeded(cells):
    "The hidden cells that set a seed, and the first cell that trains where none in sight has set it before"
    is_hidden = lambda c: c.source.startswith('#| hide')
    code = [c for c in cells if c.cell_type == 'code']
    found = [c.source for c in code if is_hidden(c) and re.search(r'seed\(', c.source)]
    seen = False
    for c in code:
        if is_hidden(c): continue
        seen = seen or 'set_seed(' in c.source
        if not seen and re.search(r'\.(fit|fit_one_cycle|fine_tune)\(', c.source): return [*found, c.source]
    return found

pages = ['index', 'quickstart'] + [f'{p.parent.name}/{p.stem}' for p in sorted((root/'nbs').glob('[eht]*/*.ipynb'))]

@pytest.mark.parametrize('page', pages)
def test_examples_set_their_seeds_in_sight(page): assert unseeded(read_nb(root/f'nbs/{page}.ipynb').cells) == []

def test_seeds_out_of_sight_are_found():
    cells = [mk_cell('#| hide\nset_seed(0)'), mk_cell('learn.fit(1)'), mk_cell('set_seed(0)\nlearn.fit(1)')]
    assert unseeded(cells) == [cells[0].source, cells[1].source] and unseeded(cells[2:]) == []

@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(p.stem for p in (root/'bench').glob('*.py') if 'argparse' in p.read_text()))
def test_benchmarks_do_not_begin_with_a_warning(name):
    "fastai's use of `torch.jit.script` would be the first thing that they print"
    res = subprocess.run([sys.executable, root/f'bench/{name}.py', '--help'], cwd=root, env={**os.environ, 'PYTHONPATH': str(root)}, text=True, capture_output=True)
    assert res.stderr == '' and res.stdout.startswith('usage:')
