"""Build the documentation: `python tools/build_site.py` writes a site that reads offline.

Open `build/html/index.html`. nbdev's `proc_nbs` removes hidden cells from the executed notebooks and marks
which names to document. This script turns these notebooks into pages for Sphinx, in `build/site/`: links lead
to other pages, and each name gets its signature and a table of its parameters, read from the package. It runs
no cell. Sphinx turns the pages into HTML; a warning is an error.
"""
import inspect, os, re, shutil, sys
from base64 import b64decode
from configparser import ConfigParser
from contextlib import chdir
from functools import cached_property, reduce
from importlib import import_module
from io import BytesIO
from itertools import groupby
from pathlib import Path
from types import FunctionType
import yaml
from fastcore.docments import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.serve import proc_nbs
from PIL import Image
from sphinx.cmd.build import main as sphinx_build

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root)) # document the package beside this script
sections = 'tutorials', 'howto', 'explanation', 'api' # docs/NAME.md is the text above the list of pages
menu = 'quickstart', *(f'{o}/index' for o in sections), 'benchmarks', 'changelog', 'contributing'
moved = {
    'nbs': 'api/index.md',
    'nbs/tutorials': 'tutorials/index.md',
    'nbs/howto': 'howto/index.md',
    'README.md': 'index.ipynb',
    'CHANGELOG.md': 'changelog.md',
    'CONTRIBUTING.md': 'contributing.md'}

# Notebooks

def shown(cell):
    "Return the name in a cell that is `show_doc(name)`, or None"
    found = re.search(r'^show_doc\(([\w.]+)\)$', cell.source, re.M) if cell.cell_type == 'code' else None
    return found and found[1]

def module_of(path):
    "Return the name of the module that the notebook at `path` exports, or None"
    for cell in read_nb(path).cells:
        if 'default_exp' in cell.directives: return cell.directives['default_exp']

def _getter(symbol):
    "Return the function of a property, and anything else unchanged"
    return getattr(symbol, 'fget', None) or (symbol.func if isinstance(symbol, cached_property) else symbol)

class Page:
    "A page of the site; `nb` is the notebook as `proc_nbs` left it"
    def __init__(self, path): # below the root
        module = module_of(path)
        name = re.sub(r'^\d+[a-z]?_', '', path.name)
        self.path,self.module = path.as_posix(),module and f'fasterai_lr.{module}'
        folder = Path('api') if module else path.parent.relative_to('nbs')
        self.to = moved.get(self.path) or (folder/name).as_posix()
        self.nb = read_nb('_proc'/path.relative_to('nbs'))
        head = yaml.safe_load(self.nb.cells.pop(0).source.strip().strip('-'))
        self.title,self.lead = head['title'],head.get('description', '')
        self.nb.cells = [c for c in self.nb.cells if '._' not in (shown(c) or '')] # such as `__str__`
        self._sort_names()
        self.names = [o for c in self.nb.cells if (o := shown(c))]
        if module not in (None, 'all'): self._add_other_names()

    def _sort_names(self):
        "Sort names that are shown one after the other as the module defines them"
        cells = []
        for documents,run in groupby(self.nb.cells, lambda c: bool(shown(c))):
            if documents: cells += sorted(run, key=self.line)
            else: cells += run
        self.nb.cells = cells

    def _add_other_names(self):
        "Show the names that `proc_nbs` misses because they are assigned"
        others = [o for o in import_module(self.module).__all__ if o not in self.names]
        self.names += others
        if others: self.nb.cells.append(mk_cell('## Other names', 'markdown'))
        self.nb.cells += [mk_cell(f'show_doc({o})') for o in others]

    @property
    def section(self): return self.to.rpartition('/')[0]

    def symbol(self, name): return reduce(getattr, name.split('.'), import_module(self.module))
    def line(self, cell):
        "Return the line that defines what `cell` shows: `proc_nbs` reverses the names of one cell"
        return inspect.getsourcelines(_getter(self.symbol(shown(cell))))[1]

# Links

_link = re.compile(r'(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)') # the target of a relative link

class Links:
    """Points links to pages of the site or to files of the repository, and names in code to their
    documentation"""
    def __init__(self, pages, git_url):
        self.pages,self.git_url = {**moved, **{p.path: p.to for p in pages}},git_url
        self.names = {n: f'{p.module}.{n}' for p in pages if p.section == 'api' for n in p.names}
        methods = [n for n in self.names if n.startswith('Learner.')]
        for n in methods: self.names[n.replace('Learner.', 'learn.')] = self.names[n]
        # 'cp' usually means the method, not the function, and 'what' a parameter
        for o in ('what', *import_module('fasterai_lr.schemes').schemes): self.names.pop(o, None)

    def target(self, link, source):
        path,_,anchor = link.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if not os.path.exists(path): raise ValueError(f'{source}: the link {link} has no target')
        if path in self.pages: return f'/{self.pages[path]}' + (anchor and f'#{anchor}')
        if path.startswith('nbs/'): return f'/{path.removeprefix("nbs/")}'
        return f'{self.git_url}/{"tree" if os.path.isdir(path) else "blob"}/main/{path}'

    def __call__(self, text, source):
        "Resolve all links in the markdown `text` of the file `source`"
        res = ''
        for i,part in enumerate(re.split(r'(^ *```.*?^ *```|`[^`\n]+`)', text, flags=re.M|re.S)):
            in_link,in_heading = res.endswith('['),res.rpartition('\n')[2].startswith('#')
            if not i%2: part = _link.sub(lambda m: self.target(m[1], source), part)
            elif not in_link and not in_heading: part = self._code(part)
            res += part
        return res

    def _code(self, span):
        "Turn a span of code into a link to the name in it"
        found = re.fullmatch(r'`([\w.]+)(\([^<>]*\))?`', span)
        if not found or found[1] not in self.names: return span
        return f'{{py:obj}}`{span[1:-1]} <{self.names[found[1]]}>`'

# The documentation of names

_empty = inspect.Parameter.empty
_methods = FunctionType, classmethod, staticmethod, property, cached_property

class _Verbatim(str):
    def __repr__(self): return str(self)

def _anno(o):
    "Format an annotation as it was written, without the names of modules"
    if o is _empty: return o
    text = o if isinstance(o, str) else inspect.formatannotation(o)
    return _Verbatim(re.sub(r'\b(?:[a-z_]\w*\.)+(?=\w)', '', text))

def _default(o): return o if o is _empty else _Verbatim(getattr(o, '__name__', None) or repr(o))

def signature(sym):
    "Return the signature of `sym` as a caller sees it"
    try: sig = inspect.signature(sym)
    except ValueError: sig = inspect.Signature() # that of an exception is built in
    params = []
    for p in sig.parameters.values():
        if p.name in ('self', 'cls'): continue
        params.append(p.replace(annotation=_anno(p.annotation), default=_default(p.default)))
    returned = _empty if isinstance(sym, type) else _anno(sig.return_annotation)
    return inspect.Signature(params, return_annotation=returned)

def _returned(sym, docs):
    "Return the comment on the returned value; fastcore misses it if there is no annotation"
    said = re.search(r'^\s*\)\s*: *# *(.+)$', inspect.getsource(sym).partition('"')[0], re.M)
    return docs.get('return', {}).get('docment') or (said[1] if said else '')

def _code(o):
    "Code in a cell; where it is short it stays in one line"
    if o in (_empty, ''): return ''
    return f'`{o}`{{.short}}' if len(str(o)) < 24 else f'`{o}`'
def _row(cells): return '| ' + ' | '.join(o.replace('|', r'\|') for o in cells) + ' |'

def table(rows, kind):
    "Format `rows`, the first of them the head, as a markdown table without empty columns"
    keep = [i for i in range(len(rows[0])) if any(r[i] for r in rows[1:])]
    head,*rest = [_row([r[i] for i in keep]) for r in rows]
    return '\n'.join(['```{table}', f':class: {kind}', '', head, '|---'*len(keep) + '|', *rest, '```'])

class Documenter:
    "Documents the names of one page as directives of Sphinx's Python domain"
    def __init__(self, page, links): self.page,self.links = page,links

    def text(self, o):
        "Turn plain text with spans of code into markdown"
        parts = re.split(r'(`[^`\n]+`)', o or '')
        for i in range(0, len(parts), 2): parts[i] = re.sub(r'([*_<\[\]\\$])', r'\\\1', parts[i])
        return self.links(''.join(parts), self.page.path)

    def parameters(self, sym):
        "Tabulate the parameters of `sym` and their docments; return nothing if there are no docments"
        sig,docs = signature(sym),docments(sym, full=True)
        rows = []
        for p in sig.parameters.values():
            meaning = self.text(docs.get(p.name, {}).get('docment'))
            rows.append((f'`{p.name}`', _code(p.annotation), _code(p.default), meaning))
        said = '' if isinstance(sym, type) else _returned(sym, docs)
        if said: rows.append(('returns', _code(sig.return_annotation), '', self.text(said)))
        if not any(r[3] for r in rows): return ''
        return table([('Parameter', 'Type', 'Default', 'Meaning'), *rows], 'parameters')

    def directive(self, kind, name, sym, *inner, option=None):
        body = [] if kind == 'property' else [self.parameters(sym)]
        sig,fence = '' if kind == 'property' else signature(sym),'`'*(6 if inner else 5)
        start = [f'{fence}{{py:{kind}}} {name}{sig}', f':module: {self.page.module}']
        if option: start.append(option)
        return '\n'.join([*start, '', self.text(inspect.getdoc(sym)) + '\n', *body, *inner, fence])

    def method(self, name, raw, cls):
        if isinstance(raw, (classmethod, staticmethod)):
            return self.directive('method', name, getattr(cls, name), option=f':{type(raw).__name__}:')
        if inspect.isfunction(raw): return self.directive('method', name, raw)
        return self.directive('property', name, _getter(raw))

    def data(self, name):
        "Document a name that is neither a class nor a function by the comment beside it"
        said = re.search(rf'^{name} *=.*# *(.+)$', inspect.getsource(import_module(self.page.module)), re.M)
        text = self.text(said[1]) if said else ''
        return f'```{{py:data}} {name}\n:module: {self.page.module}\n\n{text}\n```'

    def __call__(self, name):
        """Document `name` by signature, docstring and parameters; for a class also the public methods with a
        docstring, unless the page shows them elsewhere"""
        sym = self.page.symbol(name)
        if isinstance(sym, (property, cached_property)): return self.directive('property', name, _getter(sym))
        if not isinstance(sym, type) and not inspect.isroutine(sym): return self.data(name)
        if not isinstance(sym, type):
            return self.directive('method' if '.' in name else 'function', name, sym)
        methods = []
        for k,v in vars(sym).items():
            if k.startswith('_') or not isinstance(v, _methods) or not v.__doc__: continue
            if f'{name}.{k}' not in self.page.names: methods.append(self.method(k, v, sym))
        return self.directive('class', name, sym, *methods)

# Writing

_callout = re.compile(r'^:::\s*\{\.callout-(\w+)[^}]*\}', re.M)
_tags = {'echo: false': 'remove-input', 'output: false': 'remove-output',
         'code-fold: true': 'hide-input', 'include: false': 'remove-cell'}
_by_nbdev = '<!-- WARNING: THIS FILE WAS AUTOGENERATED'
_metadata = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'},
             'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}}

def picture(cell, said):
    "Options of myst-nb for the picture of `cell`: the text of `#| fig-alt:`, and the width it was drawn with"
    res = {}
    for o in said:
        if o.startswith('fig-alt: '): res['alt'] = o.removeprefix('fig-alt: ')
    for o in cell.outputs:
        if not (png := o.get('data', {}).get('image/png')): continue
        image = Image.open(BytesIO(b64decode(''.join(png))))
        res['width'] = f"{round(100*image.width/image.info.get('dpi', [100])[0])}px"
    return res

def code_cell(cell):
    "Turn Quarto's directives at the top of `cell` into tags and options of myst-nb"
    lines = cell.source.split('\n')
    said = [o.removeprefix('#| ') for o in lines if o.startswith('#| ')]
    cell.metadata = {'tags': [_tags[o] for o in said if o in _tags], 'mystnb': {'image': picture(cell, said)}}
    cell.source = '\n'.join(o for o in lines if not o.startswith('#| ')).strip()

_style = re.compile(r'<style.*?</style>', re.S)
_table = re.compile(r'<table(?: class="\w*")?(?= id="T_|>)')

def as_page(html):
    "The HTML of an output: tables look like those of pandas, and what a progress bar leaves is gone"
    if not re.sub(r'<[^>]+>', '', _style.sub('', html)).strip(): return ''
    return _table.sub('<table class="dataframe"', html)

def outputs(cell):
    "The outputs of `cell` that show something"
    for o in cell.outputs:
        shows,html = True,o.get('data', {}).get('text/html')
        if o.output_type == 'stream':
            shows = o.text = re.sub(r'[^\n]*\r', '', ''.join(o.text)) # a bar was written over
        elif html is not None: shows = o.data['text/html'] = as_page(''.join(html))
        if shows: yield o

def head(page, links):
    "Return the title, the lead, the module's name and a link to the notebook"
    module = f'`{page.module}` · ' if page.section == 'api' else ''
    res = [f'# {page.title}', '{.lead}\n' + links(page.lead, page.path)]
    source = f'{links.git_url}/blob/main/{page.path}'
    if page.to != 'index.ipynb': res.append(f'{{.module}}\n{module}[notebook]({source})')
    return '\n\n'.join(res)

def write_page(page, links, to):
    nb = page.nb
    nb.cells = [c for c in nb.cells if c.source.strip() and not c.source.startswith(_by_nbdev)]
    document = Documenter(page, links)
    for c in nb.cells:
        if name := shown(c): c.update(mk_cell(document(name), 'markdown'))
        elif c.cell_type == 'code':
            code_cell(c)
            c.outputs = list(outputs(c))
        else: c.source = _callout.sub(r':::{\1}', links(c.source, page.path))
    nb.cells.insert(0, mk_cell(head(page, links), 'markdown'))
    if page.to == 'index.ipynb': nb.cells.append(mk_cell(toctree(menu), 'markdown'))
    nb.metadata = _metadata
    (to/page.to).parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, to/page.to)

def toctree(names): return '\n'.join(['```{toctree}', ':hidden:', '', *names, '```'])

def listing(page, links):
    "Return the entry of a page in its section; for a module, with a table of its names"
    if page.section != 'api': return f'[{page.title}](/{page.to})\n: {page.lead}\n'
    text = Documenter(page, links).text
    rows = []
    for name in page.names:
        sym = page.symbol(name)
        said = inspect.getdoc(sym) if callable(sym) else None
        rows.append((f'{{py:obj}}`{name} <{page.module}.{name}>`', text((said or '').partition('\n')[0])))
    names = table([('Name', 'What it is'), *rows], 'names') if rows else ''
    return '\n\n'.join([f'## [{page.title}](/{page.to})', f'`{page.module}`: {page.lead}', names])

def write_section(section, pages, links, to):
    mine = [p for p in pages if p.section == section]
    entries = [f'{p.title} <{Path(p.to).stem}>' for p in mine]
    above = links(Path(f'docs/{section}.md').read_text(encoding='utf-8'), f'docs/{section}.md')
    text = '\n\n'.join([above, *(listing(p, links) for p in mine), toctree(entries)])
    (to/section).mkdir(parents=True, exist_ok=True)
    (to/section/'index.md').write_text(text, encoding='utf-8')

def not_copied(folder, names): return [o for o in names if o[0] in '._' or o.endswith('.ipynb')]

def write_pages(to):
    "Write all pages for Sphinx into the new folder `to`"
    parser = ConfigParser(delimiters=['='])
    parser.read('settings.ini', encoding='utf-8')
    pages = [Page(o) for o in sorted(Path('nbs').rglob('*.ipynb')) if not any(p[0] in '._' for p in o.parts)]
    links = Links(pages, parser['DEFAULT']['git_url'])
    shutil.copytree('nbs', to, ignore=not_copied)
    for p in pages: write_page(p, links, to)
    for o in sections: write_section(o, pages, links, to)
    for o in ('CHANGELOG.md', 'CONTRIBUTING.md'):
        text = links(Path(o).read_text(encoding='utf-8'), o)
        (to/moved[o]).write_text(text, encoding='utf-8')

def build():
    "Build the site and return Sphinx's exit code"
    with chdir(root):
        for o in ('site', 'doctrees', 'html'): shutil.rmtree(f'build/{o}', ignore_errors=True)
        proc_nbs('nbs', force=True, n_workers=0)
        write_pages(Path('build/site'))
        options = ['-q', '-W', '--keep-going', '-b', 'html', '-c', 'docs', '-d', 'build/doctrees']
        return sphinx_build([*options, 'build/site', 'build/html'])

if __name__ == '__main__': sys.exit(build())
