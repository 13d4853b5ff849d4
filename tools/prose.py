"""Check the language of pages, docstrings, comments and messages. It needs no network.

    python tools/prose.py        # print every fault and its place
    python tools/prose.py WORDS  # print the passages that contain these words

`codespell` finds misspelled words and `proselint` clumsy style. `tools/house_style.txt` lists phrases that we
do not write, each with a better one. `tools/prose_allowed.txt` lists false alarms, each with its reason.
"""
import ast, io, json, re, subprocess, sys, tokenize
from collections import namedtuple
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

root = Path(__file__).resolve().parent.parent
pages = '*.md', 'docs/*.md'
scripts = 'setup.py', 'fasterai_lr/__init__.py', 'bench/*.py', 'tools/*.py', 'docs/*.py'
tests = 'tests/*.py', # docstrings and comments are spelled right

Passage = namedtuple('Passage', 'path place text') # `place`: a line, or a cell and a line of it
Fault = namedtuple('Fault', 'checker what passage advice') # `what`: the word, the phrase or a check's name

gap = '§' # stands for code, formulas and values in a passage

# Passages of markdown

def without_code(text):
    "Replace code, formulas, HTML and targets of links in the markdown `text`, but keep its lines"
    def blank(match): return gap + '\n'*match[0].count('\n')
    text = re.sub(r'^---\n.*?^---$', blank, text, flags=re.M|re.S) if text.startswith('---\n') else text
    text = re.sub(r'^ *```.*?^ *```$', blank, text, flags=re.M|re.S)
    text = re.sub(r'(`+)[^`].*?\1', blank, text, flags=re.S)
    text = re.sub(r'\$\$.*?\$\$|\$[^$\n]+\$', blank, text, flags=re.S)
    text = re.sub(r'(?<=\])\([^)\s]*\)|<[^<>\n]+>|https?:\S+', ' ', text)
    return re.sub(r'[\[\]*]+', '', text)

def is_start(line):
    "Say whether a paragraph starts at `line`: a heading, an item, a row of a table or a quotation"
    return re.match(r'\s*(#|[-+] |\d+\. |\||>|:)', line)

def paragraphs(text):
    "Yield pairs of the first line and the text of each paragraph, table cell and heading"
    start,lines = 1,[]
    for number,line in enumerate([*without_code(text).split('\n'), ''], 1):
        if not line.strip() or is_start(line):
            if lines: yield start, ' '.join(lines)
            start,lines = number,[]
        if line.lstrip().startswith('|'): yield from ((number, cell) for cell in line.split('|'))
        elif line.strip(): lines.append(line.strip().lstrip('#->: '))

# Passages of Python

def constant_text(node):
    "Return the text of a string literal, with gaps for the values of an f-string; `None` for other nodes"
    if isinstance(node, ast.Constant): return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr): return None
    return ''.join(o.value if isinstance(o, ast.Constant) else gap for o in node.values)

def is_prose(text):
    "Say whether a string literal holds at least two words"
    if re.search(r'\\[bdsw]|\(\?|^ *#', text): return False # a regular expression, or code
    return bool(re.search(r"[a-z][a-z']*[,;:]? [a-z(`]", text, re.I))

def strings(tree):
    "Yield pairs of line and text for the docstrings and other strings of words"
    inside = {id(o) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for o in node.values}
    for node in ast.walk(tree):
        text = None if id(node) in inside else constant_text(node)
        if not text or not is_prose(text): continue
        for line,paragraph in paragraphs(text): yield node.lineno + line - 1, paragraph

def docstrings(tree):
    "Yield pairs of line and text for the docstrings"
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)): continue
        if ast.get_docstring(node): yield node.body[0].lineno, without_code(node.body[0].value.value)

def is_directive(comment):
    return comment.startswith(('#|', '#!', '# %%')) or re.match(r'# *(noqa|type:)', comment)

def comments(text):
    "Yield pairs of line and text for the comments; those on successive lines are one passage"
    start,lines,last = 0,[],0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or is_directive(token.string): continue
        number = token.start[0]
        alone = token.line.lstrip().startswith('#')
        if lines and not (alone and number == last + 1):
            yield start, without_code('\n'.join(lines))
            lines = []
        if not lines: start = number
        lines.append(token.string.lstrip('# '))
        last = number if alone else 0
    if lines: yield start, without_code('\n'.join(lines))

def of_python(text, literals=strings):
    "Yield pairs of line and text for the comments and the `literals` of Python code"
    lines = [re.sub(r'^( *)[%!].*', r'\1pass', line) for line in text.split('\n')] # commands of IPython
    text = '\n'.join(lines)
    yield from comments(text)
    yield from literals(ast.parse(text))

# Passages of the project

def of_notebook(text):
    "Yield pairs of place and text for the markdown and the code of a notebook"
    for number,cell in enumerate(json.loads(text)['cells']):
        find = of_python if cell['cell_type'] == 'code' else paragraphs
        for line,passage in find(''.join(cell['source'])): yield f'cell {number} line {line}', passage

def files(*patterns):
    "List the files of the project that match one of `patterns`, with how to read them"
    found = sorted(o for pattern in patterns for o in root.glob(pattern))
    return [o for o in found if not any(part[0] in '._' and part != '__init__.py'
                                        for part in o.relative_to(root).parts)]

def passages_of(path, find):
    "List the passages that `find` yields in the file at `path`, in one line each"
    name = path.relative_to(root).as_posix()
    found = find(path.read_text(encoding='utf-8'))
    found = [Passage(name, str(place), ' '.join(text.split())) for place,text in found]
    return [o for o in found if re.search('[A-Za-z]{2}', o.text)]

def passages():
    "List the passages of the pages and of the code; README.md and the modules repeat notebooks"
    found = []
    for path in files('nbs/**/*.ipynb'): found += passages_of(path, of_notebook)
    for path in files(*pages):
        if path.name != 'README.md': found += passages_of(path, paragraphs)
    for path in files(*scripts): found += passages_of(path, of_python)
    return found

def passages_of_tests():
    "List the comments and docstrings of the tests"
    find = partial(of_python, literals=docstrings)
    return [o for path in files(*tests) for o in passages_of(path, find)]

# Checkers

def run_checker(passages, *command):
    "Return the lines that a checker prints about a file with one passage in each line"
    with TemporaryDirectory() as folder:
        # Remove quotation marks: proselint skips the text between two of them, even across lines.
        # Mark the ends: two passages that repeat a word are no fault.
        lines = [re.sub(r'\B[\'"]|[\'"]\B', '', o.text) + ' ¶\n' for o in passages]
        (Path(folder)/'passages.txt').write_text(''.join(lines), encoding='utf-8')
        (Path(folder)/'config.json').write_text('{"max_errors": 1000000}')
        made = subprocess.run([sys.executable, '-m', *command, 'passages.txt'], cwd=folder, text=True,
                              encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # faults have an exit code too, but they are printed
    if made.returncode and not made.stdout: raise RuntimeError(f'{command[0]}: {made.stderr}')
    return made.stdout.splitlines()

def misspelled(passages):
    "Yield a fault for each word that `codespell` knows as misspelled"
    for line in run_checker(passages, 'codespell_lib', '--builtin', 'clear,rare,informal,names'):
        number,word,better = re.fullmatch(r'.*?:(\d+): (\S+) ==> (.*)', line).groups()
        yield Fault('codespell', word.lower(), passages[int(number)-1], better)

def clumsy(passages):
    "Yield a fault for each remark of `proselint`"
    for line in run_checker(passages, 'proselint', '--config', 'config.json', 'check'):
        number,check,message = re.fullmatch(r'.*?:(\d+):\d+: ([\w.]+): (.*)', line).groups()
        yield Fault('proselint', check, passages[int(number)-1], message)

def pattern(phrase):
    "Compile a phrase of the house style; `…` stands for one to three words"
    words = [r'\S+(?:\s\S+){0,2}' if o == '…' else re.escape(o) for o in phrase.split()]
    return re.compile(r'(?<!\w)' + r'\s'.join(words) + r'(?!\w)', re.I)

def unlike_us(passages, phrases):
    "Yield a fault for each of `phrases`, a dict {phrase: a better one}, in a passage"
    patterns = {o: pattern(o) for o in phrases}
    for passage in passages:
        for phrase,better in phrases.items():
            if patterns[phrase].search(passage.text): yield Fault('house', phrase, passage, better)

# Lists

def rows(name, columns):
    "Read a list: lines of `columns` cells with bars between them, and comments"
    found = []
    for line in (root/'tools'/name).read_text(encoding='utf-8').splitlines():
        if not line.strip() or line.startswith('#'): continue
        cells = [o.strip() for o in line.split('|')]
        if len(cells) != columns or '' in cells: raise ValueError(f'{name}: expected {columns} cells: {line}')
        found.append(cells)
    return found

def house_style(): return dict(rows('house_style.txt', 2))

Allowed = namedtuple('Allowed', 'checker what words reason') # `words`: of the passage; `*`: any

def allowed(): return [Allowed(*o) for o in rows('prose_allowed.txt', 4)]

def excuses(entry, fault):
    "Say whether an allowed entry excuses the fault"
    if (entry.checker, entry.what) != (fault.checker, fault.what): return False
    return entry.words == '*' or entry.words in fault.passage.text

# All together

def all_faults(passages, of_tests=()):
    "List the faults of the passages, including false alarms; those of tests are checked only for spelling"
    found = list(misspelled([*passages, *of_tests]))
    found += clumsy(passages)
    found += unlike_us(passages, house_style())
    return found

def without_false_alarms(faults):
    "List the faults that no entry excuses"
    entries = allowed()
    return [o for o in faults if not any(excuses(entry, o) for entry in entries)]

def needless(faults):
    "List the allowed entries that excuse none of the faults"
    return [o for o in allowed() if not any(excuses(o, fault) for fault in faults)]

def line_of(fault):
    "Format a fault with its place and its passage"
    path,place,text = fault.passage
    return f'{path}, {place}: {fault.what} -> {fault.advice} ({fault.checker})\n    {text}'

def main():
    found = passages()
    if sys.argv[1:]:
        phrase = ' '.join(sys.argv[1:])
        for hit in unlike_us(found, {phrase: 'found'}): print(line_of(hit))
        return 0
    faults = without_false_alarms(all_faults(found, passages_of_tests()))
    for fault in faults: print(line_of(fault))
    return int(bool(faults))

if __name__ == '__main__': sys.exit(main())
