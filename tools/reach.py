"""Measure how dense the code is, and how far settings, parameters and private names reach in it.

    python tools/reach.py                # two tables: one by module, one for the whole project
    python tools/reach.py --compare REV  # compare with another commit: `then → now`
    python tools/reach.py --check        # exit with 1 if a target is missed

A `!` marks a figure that misses its target; the lines below the tables list the places. The script needs only
the standard library and, to compare, git.
"""
import argparse, ast, io, json, re, subprocess, symtable, sys, tarfile, tokenize
from collections import Counter, defaultdict
from pathlib import Path

root = Path(__file__).resolve().parent.parent
package = 'fasterai_lr'

# What is measured

class Module:
    "A module of the package"
    def __init__(self, name, text):
        self.name,self.text = name,text
        self.tree = ast.parse(text)
        self.nodes = list(ast.walk(self.tree))

    def place(self, line, what=''):
        "Return a place: the file, the line and `what` is there"
        return f'{self.name}.py', f'{line} {what}'.rstrip()

class Cell:
    "A code cell of a notebook"
    def __init__(self, path, number, source):
        self.path,self.number = path,number
        self.directives,self.lines = [],[]
        for line in source.splitlines():
            if line.startswith('#|'): self.directives.append(line[2:].strip())
            else: self.lines.append(line)

    def says(self, *words):
        "Does a directive of the cell begin with one of `words`?"
        return any(o.startswith(words) for o in self.directives)

    def place(self, what=''): return self.path, f'cell {self.number} {what}'.rstrip()

class Project:
    "The modules and the code cells in `files`, a dict {path from the root: text}"
    def __init__(self, files):
        self.modules,self.cells = [],[]
        for path in sorted(files):
            name = Path(path).stem
            if path.endswith('.ipynb'): self._add_cells(path, json.loads(files[path]))
            elif name != '_modidx': self.modules.append(Module(name, files[path]))

    def _add_cells(self, path, notebook):
        for number,cell in enumerate(notebook['cells']):
            if cell['cell_type'] != 'code': continue
            self.cells.append(Cell(path, number, ''.join(cell['source'])))

def is_measured(path):
    "Is the file at `path` a module of the package, or a notebook?"
    if '/.' in path: return False # an editor's checkpoint, for example
    if path.startswith(f'{package}/'): return path.endswith('.py')
    return path.startswith('nbs/') and path.endswith('.ipynb')

def files_here():
    "Read the measured files in the working directory"
    files = {}
    for path in [*root.glob(f'{package}/*.py'), *root.glob('nbs/**/*.ipynb')]:
        name = path.relative_to(root).as_posix()
        if is_measured(name): files[name] = path.read_text(encoding='utf-8')
    return files

def files_at(rev):
    "Read the measured files of the commit `rev`"
    command = ['git', 'archive', rev, package, 'nbs']
    archive = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE).stdout
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if not is_measured(member.name): continue
            files[member.name] = tar.extractfile(member).read().decode('utf-8')
    return files

# Table one: density

no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
           tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
inlined = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda)
documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

def docstrings(module):
    "Find the docstrings of `module` and of its classes and functions, as nodes"
    found = []
    for node in module.nodes:
        if not isinstance(node, documented) or ast.get_docstring(node) is None: continue
        found.append(node.body[0].value)
    return found

def code_lines(module):
    "Count the lines that hold more than docstrings and comments"
    skipped = {(o.lineno, o.col_offset) for o in docstrings(module)}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type in no_code or token.start in skipped: continue
        lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)

def syntax_nodes(module):
    "Count the nodes of the syntax tree, without docstrings, which have two each"
    return len(module.nodes) - 2*len(docstrings(module))

def inlined_nodes(module):
    "Count the comprehensions, conditional expressions and lambdas"
    return sum(isinstance(o, inlined) for o in module.nodes)

def written_by_nbdev(module):
    "Return the numbers of the lines that assign `__all__`"
    lines = set()
    for node in module.tree.body:
        if not isinstance(node, ast.Assign) or ast.unparse(node.targets) != '__all__': continue
        lines.update(range(node.lineno, node.end_lineno + 1))
    return lines

def long_lines(module):
    generated = written_by_nbdev(module)
    for number,line in enumerate(module.text.splitlines(), 1):
        if len(line) <= 110 or number in generated or line.startswith('# %%'): continue
        yield module.place(number)

def n_targets(target):
    "Count the names, attributes and items that an assignment to `target` sets"
    if isinstance(target, (ast.Tuple, ast.List)): return sum(map(n_targets, target.elts))
    return 1

def wide_assignments(module):
    for node in module.nodes:
        if not isinstance(node, ast.Assign): continue
        if sum(map(n_targets, node.targets)) > 3: yield module.place(node.lineno)

def vague_docstrings(module):
    start = re.compile(r'\s*(What|Of|Those|Whether|The same)\b')
    for doc in docstrings(module):
        if start.match(doc.value): yield module.place(doc.lineno)

density_targets = {'lines': None, 'nodes': None, 'nodes/line': 11, 'inlined/100': 8,
                   'long lines': 0, 'wide assignments': 0, 'vague docstrings': 0}
legend = '''lines: of code; nodes: of the syntax tree; both without docstrings
inlined/100: comprehensions, conditional expressions and lambdas per 100 lines
long lines: over 110 columns; wide assignments: more than three targets
vague docstrings: they start with What, Of, Those, Whether or The same'''

def all_places(find, items):
    "List the places that `find` yields for each of `items`"
    found = []
    for item in items: found += find(item)
    return found

def density(modules):
    "Return a row of table one, for `modules` together: {column: number or list of places}"
    lines = sum(map(code_lines, modules))
    nodes = sum(map(syntax_nodes, modules))
    hundreds = max(lines, 1)/100
    return {
        'lines': lines,
        'nodes': nodes,
        'nodes/line': round(nodes/hundreds/100, 1),
        'inlined/100': round(sum(map(inlined_nodes, modules))/hundreds, 1),
        'long lines': all_places(long_lines, modules),
        'wide assignments': all_places(wide_assignments, modules),
        'vague docstrings': all_places(vague_docstrings, modules)}

# Table two: reach

settings = {'metric', 'loss', 'seed', 'progress', 'max_size', 'moments'}

def definitions(node, prefix=''):
    "Yield pairs of qualified name and function for the functions below `node`"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from definitions(child, f'{prefix}{child.name}.')
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
            yield from definitions(child, f'{prefix}{child.name}.<locals>.')
        else: yield from definitions(child, prefix)

def named_parameters(function):
    "List the parameters of `function` except `*args` and `**kwargs`"
    args = function.args
    return args.posonlyargs + args.args + args.kwonlyargs

def setting_parameters(module):
    for name,function in definitions(module.tree):
        for arg in named_parameters(function):
            if arg.arg in settings: yield module.place(arg.lineno, f'{name}({arg.arg})')

def setting_keywords(module):
    for node in module.nodes:
        if not isinstance(node, ast.Call): continue
        for keyword in node.keywords:
            if keyword.arg in settings: yield module.place(keyword.lineno, f'{keyword.arg}=')

def n_parameters(function):
    "Count the parameters of `function` without `self`, `cls` and `**kwargs`"
    args = named_parameters(function)
    is_method = bool(args) and args[0].arg in ('self', 'cls')
    return len(args) - is_method + bool(function.args.vararg)

def wide_functions(module):
    for name,function in definitions(module.tree):
        n = n_parameters(function)
        if n > 7: yield module.place(function.lineno, f'{name} ({n})')

def is_private(name): return name.startswith('_') and not name.endswith('__')

def is_public(qualified_name):
    "Can a user call the function of this name?"
    parts = qualified_name.split('.')
    return '<locals>' not in parts and not any(map(is_private, parts))

def undocumented_kwargs(module):
    for name,function in definitions(module.tree):
        if not function.args.kwarg or not is_public(name): continue
        decorators = ' '.join(map(ast.unparse, function.decorator_list))
        if re.search(r'\b(delegates|takes_settings)\b', decorators): continue
        yield module.place(function.lineno, name)

def package_imports(nodes):
    "Yield a triple (statement, module, name) for each name that `nodes` import from the package"
    for node in nodes:
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        for alias in node.names:
            parts = [alias.name]
            if isinstance(node, ast.ImportFrom):
                parts = [package if node.level else '', node.module or '', alias.name]
            top,*below = '.'.join(filter(None, parts)).split('.')
            if top == package and below: yield node, below[0], below[-1]

def private_imports(module):
    for node,source,name in package_imports(module.nodes):
        if is_private(name): yield module.place(node.lineno, f'{source}.{name}')

def private_definitions(module):
    "Yield the private names that `module` defines, not those that it imports"
    for symbol in symtable.symtable(module.text, module.name, 'exec').get_symbols():
        if symbol.is_assigned() and is_private(symbol.get_name()): yield symbol.get_name()

def shared_private_names(project):
    owners = defaultdict(list)
    for module in project.modules:
        for name in private_definitions(module): owners[name].append(module.name)
    for name in sorted(owners):
        if len(owners[name]) > 1: yield name, ', '.join(owners[name])

def reachable(start, graph):
    "Return the names that can be reached from `start` in `graph`, a dict {name: the names after it}"
    seen,ahead = set(),[start]
    while ahead:
        new = graph.get(ahead.pop(), set()) - seen
        seen |= new
        ahead += new
    return seen

def circular_imports(project):
    graph = {}
    for module in project.modules:
        graph[module.name] = {source for _,source,_ in package_imports(module.tree.body)}
    for name in graph:
        if name in reachable(name, graph): yield f'{name}.py', 'imports itself'

def long_cells(project):
    for cell in project.cells:
        n = len(cell.lines)
        if cell.says('export') and n > 40: yield cell.place(f'({n})')

def long_shown_lines(project):
    for cell in project.cells:
        if cell.says('export', 'hide'): continue
        for line in cell.lines:
            if len(line) > 88: yield cell.place()

# lines of table two: {label: (the function that finds the places in a module, how many are allowed)}
by_module = {
    'parameters named metric, loss, seed, progress, max_size, moments': (setting_parameters, 20),
    'keywords of these names in calls': (setting_keywords, None),
    'functions with more than 7 parameters, **kwargs not counted': (wide_functions, 2),
    'public functions with **kwargs that no decorator documents': (undocumented_kwargs, 0),
    'private names imported from another module': (private_imports, 0)}
# the same for the whole project
by_project = {
    'private names that two modules define': (shared_private_names, 0),
    'circular imports': (circular_imports, 0),
    'exported cells over 40 lines': (long_cells, 0),
    'lines over 88 columns in shown cells': (long_shown_lines, 0)}
reach_targets = {name: target for name,(_,target) in (by_module | by_project).items()}

def reach(project):
    "Return table two: {label: list of places}"
    figures = {}
    for name,(find,_) in by_module.items(): figures[name] = all_places(find, project.modules)
    for name,(find,_) in by_project.items(): figures[name] = list(find(project))
    return figures

# Showing

def number(value): return len(value) if isinstance(value, list) else value

def misses(value, target): return target is not None and number(value) > target

def allowed(target): return '' if target is None else f'≤ {target}'

def shown(figures, then, name, target):
    "Format the figure `name` after its former value, with a mark if it misses the target"
    text = str(number(figures[name]))
    if name in then: text = f'{number(then[name])} → {text}'
    return text + ('!' if misses(figures[name], target) else ' ')

def verdict(figures, targets):
    "Say whether the figures meet the targets"
    for name,target in targets.items():
        if misses(figures[name], target): return 'no'
    return 'yes'

def groups(project):
    "Return the rows of table one: {name: modules}"
    rows = {m.name: [m] for m in project.modules}
    rows['in all'] = project.modules
    return rows

def density_rows(project, before=None):
    "Format table one as rows of texts; `before` is another project to compare with"
    old = groups(before) if before else {}
    rows = [['', *density_targets, 'holds'], ['target', *map(allowed, density_targets.values()), '']]
    for name,modules in groups(project).items():
        figures = density(modules)
        then = density(old[name]) if name in old else {}
        cells = [shown(figures, then, *o) for o in density_targets.items()]
        rows.append([name, *cells, verdict(figures, density_targets)])
    return rows

def reach_rows(project, before=None):
    "Format table two as rows of texts; `before` is another project to compare with"
    figures = reach(project)
    then = reach(before) if before else {}
    rows = [['', 'number', 'target', 'holds']]
    for name,target in reach_targets.items():
        holds = '' if target is None else verdict(figures, {name: target})
        rows.append([name, shown(figures, then, name, target), allowed(target), holds])
    return rows

def table(rows):
    "Format `rows` as text, with the first column aligned left and the others right"
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell,width in zip(row[1:], widths[1:]): cells.append(cell.rjust(width))
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)

def listing(places):
    "Format places as text, a line for each file"
    by_file = defaultdict(Counter)
    for file,place in places: by_file[file][place] += 1
    lines = []
    for file,counts in by_file.items():
        texts = [place if n == 1 else f'{place} ×{n}' for place,n in counts.items()]
        lines.append(f'  {file}: {", ".join(texts)}')
    return '\n'.join(lines)

def where(figures, targets):
    "Format the places where targets are missed as text"
    text = ''
    for name,target in targets.items():
        found = figures[name]
        if isinstance(found, list) and misses(found, target): text += f'\n{name}:\n{listing(found)}\n'
    return text

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--compare', metavar='REV', help='a commit to compare with')
    parser.add_argument('--check', action='store_true', help='exit with 1 if a target is missed')
    args = parser.parse_args()
    project,before = Project(files_here()),None
    if args.compare:
        try: before = Project(files_at(args.compare))
        except subprocess.CalledProcessError: parser.error(f'no package in the commit {args.compare}')
    first,second = density_rows(project, before),reach_rows(project, before)
    print(table(first), legend, table(second), sep='\n\n')
    print(where(density(project.modules), density_targets) + where(reach(project), reach_targets), end='')
    missed = 'no' in [row[-1] for row in first + second]
    return int(args.check and missed)

if __name__ == '__main__': sys.exit(main())
