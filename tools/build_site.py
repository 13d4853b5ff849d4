"""Build the documentation: `python tools/build_site.py` writes a site that reads offline; open `build/html/index.html`.

nbdev's `proc_nbs` takes out of the executed notebooks what readers need not see, and marks which names to document. Here these notebooks become
pages for Sphinx, in `build/site/`: links lead to other pages, and each name gets its signature and a table of its parameters, read from the
package. No cell is run. Sphinx makes HTML of the pages; a warning is an error.
"""
import inspect, os, re, shutil, sys
from configparser import ConfigParser
from contextlib import chdir
from functools import cached_property, reduce
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import FunctionType
import yaml
from fastcore.docments import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx_build

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root)) # the package that is documented is the one beside this script
sections = 'tutorials', 'howto', 'explanation', 'api' # docs/NAME.md is what stands above the list of pages of each
menu = 'quickstart', *(f'{o}/index' for o in sections), 'Benchmarks <benchmarks>', 'changelog', 'contributing'
moved = {'nbs/24_digits.ipynb': 'tutorials/digits.ipynb', 'nbs': 'api/index.md', 'nbs/tutorials': 'tutorials/index.md', 'nbs/howto': 'howto/index.md', 'README.md': 'index.ipynb',
         'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}

# Notebooks

def shown(cell):
    "The name in a cell that is `show_doc(name)`, or None"
    found = re.search(r'^show_doc\(([\w.]+)\)$', cell.source, re.M) if cell.cell_type == 'code' else None
    return found and found[1]

class Page:
    "A notebook on its way to the site; `nb` is what `proc_nbs` has left of it"
    def __init__(self, path): # below the root
        module = next((c.directives['default_exp'] for c in read_nb(path).cells if 'default_exp' in c.directives), None)
        name = re.sub(r'^\d+[a-z]?_', '', path.name)
        self.path,self.module = path.as_posix(),module and f'fasterai_lr.{module}'
        self.to = moved.get(self.path) or (Path('api' if module else path.parent.relative_to('nbs'))/name).as_posix()
        self.nb = read_nb('_proc'/path.relative_to('nbs'))
        head = yaml.safe_load(self.nb.cells.pop(0).source.strip().strip('-'))
        self.title,self.lead = head['title'],head.get('description', '')
        self.nb.cells = [c for doc,run in groupby(self.nb.cells, lambda c: bool(shown(c))) for c in (sorted(run, key=self.line) if doc else run)]
        self.names = [o for c in self.nb.cells if (o := shown(c))]
        rest = [o for o in (import_module(self.module).__all__ if module not in (None, 'all') else ()) if o not in self.names]
        self.names += rest # assigned, so that `proc_nbs` does not see them
        self.nb.cells += [mk_cell('## Other names', 'markdown')]*bool(rest) + [mk_cell(f'show_doc({o})') for o in rest]

    @property
    def section(self): return self.to.rpartition('/')[0]
    @property
    def short(self): return self.module.partition('.')[2] if self.section == 'api' else self.title

    def symbol(self, name): return reduce(getattr, name.split('.'), import_module(self.module))
    def line(self, cell):
        "The line that defines what `cell` shows: `proc_nbs` reverses the names of one cell"
        return inspect.getsourcelines(self.symbol(shown(cell)))[1]

# Links

class Links:
    "Makes relative links lead to pages of the site, or else to the repository, and names in code to where they are documented"
    def __init__(self, pages, git_url):
        self.pages,self.git_url = {**moved, **{p.path: p.to for p in pages}},git_url
        self.names = {n: f'{p.module}.{n}' for p in pages if p.section == 'api' for n in p.names}
        self.names |= {n.replace('Learner.', 'learn.'): o for n,o in self.names.items() if n.startswith('Learner.')}
        for o in import_module('fasterai_lr.schemes').schemes: self.names.pop(o, None) # 'cp' is more often the method than the function

    def target(self, link, source):
        path,_,anchor = link.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if not os.path.exists(path): raise ValueError(f'{source}: the link {link} leads nowhere')
        if path in self.pages: return f'/{self.pages[path]}' + (anchor and f'#{anchor}')
        if path.startswith('nbs/'): return f'/{path.removeprefix("nbs/")}'
        return f'{self.git_url}/{"tree" if os.path.isdir(path) else "blob"}/main/{path}'

    def __call__(self, text, source):
        "The markdown `text` with all its links; `source` is the file that it is from"
        res = ''
        for i,part in enumerate(re.split(r'(^ *```.*?^ *```|`[^`\n]+`)', text, flags=re.M|re.S)):
            if not i%2: part = re.sub(r'(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)', lambda m: self.target(m[1], source), part)
            elif not res.endswith('[') and not res.rpartition('\n')[2].startswith('#'): part = self._code(part)
            res += part
        return res

    def _code(self, span):
        "A span of code as a link to what it names or calls"
        found = re.fullmatch(r'`([\w.]+)(\([^<>]*\))?`', span)
        return f'{{py:obj}}`{span[1:-1]} <{self.names[found[1]]}>`' if found and found[1] in self.names else span

# The documentation of names

_empty = inspect.Parameter.empty
_methods = FunctionType, classmethod, staticmethod, property, cached_property

class _Verbatim(str):
    def __repr__(self): return str(self)

def _anno(o):
    "An annotation nearly as it was written: without the names of modules"
    return o if o is _empty else _Verbatim(re.sub(r'\b(?:[a-z_]\w*\.)+(?=\w)', '', o if isinstance(o, str) else inspect.formatannotation(o)))

def _default(o): return o if o is _empty else _Verbatim(getattr(o, '__name__', None) or repr(o))

def signature(sym):
    "What a caller gives to `sym`, and what comes back"
    sig = inspect.signature(sym)
    params = [p.replace(annotation=_anno(p.annotation), default=_default(p.default)) for p in sig.parameters.values() if p.name not in ('self', 'cls')]
    return inspect.Signature(params, return_annotation=_empty if isinstance(sym, type) else _anno(sig.return_annotation))

def _returned(sym, docs):
    "What is said about the value that comes back; fastcore misses it where it has no annotation"
    said = re.search(r'^\s*\)\s*: *# *(.+)$', inspect.getsource(sym).partition('"')[0], re.M)
    return docs.get('return', {}).get('docment') or (said[1] if said else '')

def _code(o): return '' if o in (_empty, '') else f'`{o}`'
def _row(cells): return '| ' + ' | '.join(o.replace('|', r'\|') for o in cells) + ' |'

def table(rows, kind):
    "A markdown table without the columns that are empty; `rows`: its head, and the others"
    keep = [i for i in range(len(rows[0])) if any(r[i] for r in rows[1:])]
    head,*rest = [_row([r[i] for i in keep]) for r in rows]
    return '\n'.join(['```{table}', f':class: {kind}', '', head, '|---'*len(keep) + '|', *rest, '```'])

class Documenter:
    "Documents the names of one page as directives of Sphinx's Python domain"
    def __init__(self, page, links): self.page,self.links = page,links

    def text(self, o):
        "Plain text with spans of code as markdown"
        parts = re.split(r'(`[^`\n]+`)', o or '')
        return self.links(''.join(p if i%2 else re.sub(r'([*_<\[\]\\$])', r'\\\1', p) for i,p in enumerate(parts)), self.page.path)

    def parameters(self, sym):
        "The parameters of `sym` with types, defaults and docments as a table; nothing where the signature says it all"
        sig,docs = signature(sym),docments(sym, full=True)
        rows = [(f'`{p.name}`', _code(p.annotation), _code(p.default), self.text(docs.get(p.name, {}).get('docment'))) for p in sig.parameters.values()]
        said = '' if isinstance(sym, type) else _returned(sym, docs)
        if said: rows.append(('returns', _code(sig.return_annotation), '', self.text(said)))
        return table([('Parameter', 'Type', 'Default', 'Meaning'), *rows], 'parameters') if any(r[3] for r in rows) else ''

    def directive(self, kind, name, sym, *inner, option=None):
        body = [] if kind == 'property' else [self.parameters(sym)]
        sig,fence = '' if kind == 'property' else signature(sym),'`'*(6 if inner else 5)
        lines = f'{fence}{{py:{kind}}} {name}{sig}', f':module: {self.page.module}', option, '', self.text(inspect.getdoc(sym)) + '\n', *body, *inner, fence
        return '\n'.join(o for o in lines if o is not None)

    def method(self, name, raw, cls):
        if isinstance(raw, (classmethod, staticmethod)): return self.directive('method', name, getattr(cls, name), option=f':{type(raw).__name__}:')
        if inspect.isfunction(raw): return self.directive('method', name, raw)
        return self.directive('property', name, getattr(raw, 'fget', None) or raw.func)

    def data(self, name):
        "A name that stands for neither a class nor a function, with the comment beside it"
        said = re.search(rf'^{name} *=.*# *(.+)$', inspect.getsource(import_module(self.page.module)), re.M)
        return f'```{{py:data}} {name}\n:module: {self.page.module}\n\n{self.text(said[1]) if said else ""}\n```'

    def __call__(self, name):
        "Signature, docstring and parameters of `name`; for a class also those of its public methods with a docstring, unless the page shows them elsewhere"
        sym = self.page.symbol(name)
        if not callable(sym): return self.data(name)
        if not isinstance(sym, type): return self.directive('method' if '.' in name else 'function', name, sym)
        own = {k: v for k,v in vars(sym).items() if k[0] != '_' and isinstance(v, _methods) and v.__doc__}
        return self.directive('class', name, sym, *(self.method(k, v, sym) for k,v in own.items() if f'{name}.{k}' not in self.page.names))

# Writing

_callout = re.compile(r'^:::\s*\{\.callout-(\w+)[^}]*\}', re.M)
_tags = {'echo: false': 'remove-input', 'output: false': 'remove-output', 'code-fold: true': 'hide-input', 'include: false': 'remove-cell'}

def code_cell(cell):
    "Turn Quarto's directives at the top of `cell` into the tags of myst-nb"
    lines = cell.source.split('\n')
    said = [o.removeprefix('#| ') for o in lines if o.startswith('#| ')]
    cell.metadata = {'tags': [_tags[o] for o in said if o in _tags]}
    cell.source = '\n'.join(o for o in lines if not o.startswith('#| ')).strip()

def head(page, links):
    "Title, lead, the module's name and where the notebook is"
    module = f'`{page.module}` · ' if page.section == 'api' else ''
    res = [f'# {page.title}', '{.lead}\n' + links(page.lead, page.path)]
    if page.to != 'index.ipynb': res.append(f'{{.module}}\n{module}[notebook]({links.git_url}/blob/main/{page.path})')
    return '\n\n'.join(res)

def write_page(page, links, to):
    nb = page.nb
    nb.cells = [c for c in nb.cells if c.source.strip() and not c.source.startswith('<!-- WARNING: THIS FILE WAS AUTOGENERATED')]
    document = Documenter(page, links)
    for c in nb.cells:
        if name := shown(c): c.update(mk_cell(document(name), 'markdown'))
        elif c.cell_type == 'code': code_cell(c)
        else: c.source = _callout.sub(r':::{\1}', links(c.source, page.path))
    nb.cells.insert(0, mk_cell(head(page, links), 'markdown'))
    if page.to == 'index.ipynb': nb.cells.append(mk_cell(toctree(menu), 'markdown'))
    nb.metadata = {'kernelspec': dict(name='python3', display_name='python3', language='python'), 'language_info': dict(name='python', pygments_lexer='ipython3')}
    (to/page.to).parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, to/page.to)

def toctree(names): return '\n'.join(['```{toctree}', ':hidden:', '', *names, '```'])

def listing(page, links):
    "The entry of a page in its section; for a module, with a table of its names"
    if page.section != 'api': return f'[{page.title}](/{page.to})\n: {page.lead}\n'
    text = Documenter(page, links).text
    rows = [(f'{{py:obj}}`{n} <{page.module}.{n}>`', text((inspect.getdoc(s) or '').partition('\n')[0]) if callable(s) else '') for n,s in ((n, page.symbol(n)) for n in page.names)]
    return '\n\n'.join([f'## [{page.short}](/{page.to})', page.lead, table([('Name', 'What it is'), *rows], 'names') if rows else ''])

def write_section(section, pages, links, to):
    mine = [p for p in pages if p.section == section]
    entries = [f'{p.short} <{Path(p.to).stem}>' for p in mine]
    text = '\n\n'.join([Path(f'docs/{section}.md').read_text(encoding='utf-8'), *(listing(p, links) for p in mine), toctree(entries)])
    (to/section).mkdir(parents=True, exist_ok=True)
    (to/section/'index.md').write_text(text, encoding='utf-8')

def write_pages(to):
    "All pages for Sphinx, in the new folder `to`"
    parser = ConfigParser(delimiters=['='])
    parser.read('settings.ini', encoding='utf-8')
    pages = [Page(o) for o in sorted(Path('nbs').rglob('*.ipynb')) if not any(p[0] in '._' for p in o.parts)]
    links = Links(pages, parser['DEFAULT']['git_url'])
    shutil.copytree('nbs', to, ignore=lambda d, names: [o for o in names if o[0] in '._' or o.endswith('.ipynb')])
    for p in pages: write_page(p, links, to)
    for o in sections: write_section(o, pages, links, to)
    for o in ('CHANGELOG.md', 'CONTRIBUTING.md'): (to/moved[o]).write_text(links(Path(o).read_text(encoding='utf-8'), o), encoding='utf-8')

def build():
    "Build the site; returns Sphinx's exit code"
    with chdir(root):
        for o in ('site', 'doctrees', 'html'): shutil.rmtree(f'build/{o}', ignore_errors=True)
        proc_nbs('nbs', force=True, n_workers=0)
        write_pages(Path('build/site'))
        return sphinx_build(['-q', '-W', '--keep-going', '-b', 'html', '-c', 'docs', '-d', 'build/doctrees', 'build/site', 'build/html'])

if __name__ == '__main__': sys.exit(build())
