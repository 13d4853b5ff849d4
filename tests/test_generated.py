"README.md, the modules and the notebooks are what exporting, running and cleaning make of them"
import ast, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, readme
from fastcore.nbio import does_cell_eval, mk_cell, new_nb, read_nb, write_nb

root = Path(__file__).resolve().parent.parent
scripts = Path(sys.executable).parent

# Generated files

def run(*cmd, cwd):
    "Run `cmd` outside of nbdev's test mode (in which nbdev-export does nothing)"
    env = {k:v for k,v in os.environ.items() if k != 'IN_TEST'}
    subprocess.run(cmd, cwd=cwd, env=env, check=True, stdin=subprocess.DEVNULL)

def copy_project(to):
    "The files that take part in generating, copied to the new folder `to`"
    for o in ('nbs', 'fasterai_lr'): shutil.copytree(root/o, to/o, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for o in ('pyproject.toml', 'README.md'): shutil.copy(root/o, to)
    return to

def files(project):
    "The generated files and the notebooks of `project`: {path: bytes}"
    paths = [project/'README.md', *(project/'fasterai_lr').rglob('*.py'), *(project/'nbs').rglob('*.ipynb'), *(project/'nbs/images').glob('index_*')]
    return {p.relative_to(project).as_posix(): p.read_bytes() for p in paths}

def stale(project):
    "The files of `project` that exporting, cleaning and making README.md change, add or leave without a source; `project` is changed"
    before = files(project)
    for p in project.glob('fasterai_lr/*.py'):
        if p.name != '__init__.py': p.unlink()  # `__init__.py` holds the version: nbdev updates it in place
    run(scripts/'nbdev-export', cwd=project)
    run(scripts/'nbdev-clean', cwd=project)
    for p in project.glob('nbs/images/index_*'): p.unlink()
    readme.write(project)
    after = files(project)
    return sorted(o for o in before.keys() | after.keys() if before.get(o) != after.get(o))

def test_generated_files_match_their_notebooks(tmp_path): assert stale(copy_project(tmp_path/'p')) == []

def test_stale_files_are_found(tmp_path):
    p = copy_project(tmp_path/'p')
    nb = read_nb(p/'nbs/index.ipynb')
    nb.cells.append(mk_cell('#| export\ndef added(): pass', metadata={'scrolled': True}))
    nb.cells.insert(0, mk_cell('#| default_exp added'))
    write_nb(nb, p/'nbs/added.ipynb')
    (p/'fasterai_lr/orphan.py').write_text('x = 1\n')
    with (p/'README.md').open('a') as f: f.write('By hand.\n')
    assert stale(p) == ['README.md', 'fasterai_lr/_modidx.py', 'fasterai_lr/added.py', 'fasterai_lr/orphan.py', 'nbs/added.ipynb']

# README.md

def test_readme_commands():
    text = (root/'README.md').read_text()
    assert readme.command(text, 'Run the tests').endswith('.venv/bin/python -m pytest -n 2')
    assert readme.command(text, 'Run the main job').endswith('.venv/bin/python -m fasterai_lr.digits')

@pytest.mark.parametrize('text', ['', '## Go\nprose\n```sh\na\n```', '## Go\n```sh\na\nb\n```', '## Go\n```sh\na\n```\n## Go\n```sh\na\n```'])
def test_a_command_that_is_not_clear_is_an_error(text):
    with pytest.raises(ValueError, match="heading='Go'"): readme.command(text, 'Go')

def dead_links(project):
    "The relative links of README.md that lead nowhere"
    links = re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', (project/'README.md').read_text())
    return [o for o in links if not (project/o).exists()]

def test_readme_links(tmp_path):
    assert dead_links(root) == []
    (tmp_path/'README.md').write_text('[a](README.md) [b](https://x.org) [c](nbs/gone.ipynb)')
    assert dead_links(tmp_path) == ['nbs/gone.ipynb']

def test_readme_shows_what_markdown_can(tmp_path):
    (tmp_path/'nbs').mkdir()
    pixel = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
    def shown(**data): return dict(output_type='display_data', metadata={}, data=data)
    cells = [mk_cell('# T\n[a](../LICENSE), [b](00_b.ipynb), [c](https://x.org), [d](#e)', 'markdown'), mk_cell('#| hide\nsecret'),
             mk_cell('#| eval: true\ntable', outputs=[shown(**{'text/html': '<b>', 'text/plain': 'row 1'}), shown(**{'image/png': pixel})]),
             mk_cell('fit()', outputs=[dict(output_type='stream', name='stdout', text='epoch loss\n|---|\r|---\x1b[31m|\x1b[0m\r0 0.5 \n'),
                                       dict(output_type='stream', name='stderr', text='a warning\n')]),
             mk_cell('#| echo: false\nplot()', outputs=[shown(**{'text/plain': 'a plot'})]),
             mk_cell('#| fig-alt: One dot: it is red\n#| echo: false\nplot()', outputs=[shown(**{'image/png': pixel})])]
    write_nb(new_nb(cells), tmp_path/'nbs/index.ipynb')
    made = readme.render(tmp_path)
    assert made['README.md'].decode() == ('# T\n[a](LICENSE), [b](nbs/00_b.ipynb), [c](https://x.org), [d](#e)\n\n```python\ntable\n```\n\n'
                                          '    row 1\n\n![png](nbs/images/index_1_1.png)\n\n'
                                          '```python\nfit()\n```\n\n    epoch loss\n    0 0.5\n\n    a plot\n\n![One dot: it is red](nbs/images/index_4_0.png)\n')
    assert made['nbs/images/index_1_1.png'].startswith(b'\x89PNG')

# Notebooks

def shows(cell):
    "Does this code cell, when run, show something: a bare value or a print at its end?"
    if cell.cell_type != 'code' or not does_cell_eval(cell, True) or {'hide', 'export', 'exporti'} & cell.directives.keys(): return False
    body = cell.parsed_()
    if not body or not isinstance(body[-1], ast.Expr) or cell.source.rstrip().endswith(';'): return False
    last = body[-1].value
    return not isinstance(last, (ast.Call, ast.Await)) or getattr(last.func, 'id', '') == 'print'

def not_executed(nb):
    "The sources of the cells of `nb` that should have an output and have none, or have an error"
    return [c.source for c in nb.cells if c.cell_type == 'code' and
            (any(o['output_type'] == 'error' for o in c.outputs) or shows(c) and not c.outputs)]

@pytest.mark.parametrize('path', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda o: o.name)
def test_notebooks_are_executed(path): assert not_executed(read_nb(path)) == []

def test_cells_without_output_are_found():
    out, err = dict(output_type='stream', name='stdout', text='1'), dict(output_type='error', ename='E', evalue='', traceback=[])
    cells = [mk_cell('x = 1'), mk_cell('x'), mk_cell('x', outputs=[out]), mk_cell('print(2)'), mk_cell('test_eq(1, 1)'),
             mk_cell('#| hide\nx'), mk_cell('#| eval: false\nx'), mk_cell('y = 1', outputs=[err])]
    assert not_executed(new_nb(cells)) == ['x', 'print(2)', 'y = 1']
