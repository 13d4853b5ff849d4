"""Make README.md from `nbs/index.ipynb`, and print the commands in it.

    python tools/readme.py                           # write README.md and its pictures
    python3 tools/readme.py command 'Run the tests'  # print the command below that heading

The second command needs only the standard library.
"""
import os, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
_link = re.compile(r'(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)')  # the target of a relative markdown link
_ansi = re.compile(r'\x1b\[[0-9;]*m')

def command(text, heading):
    "Return the one line of the fenced block that follows `heading` in the markdown `text`"
    found = re.findall(rf'^#+ {re.escape(heading)}\n\s*```\w*\n(.*?)\n```$', text, re.M|re.S)
    if len(found) != 1 or len(found[0].splitlines()) != 1:
        raise ValueError(f'heading={heading!r}: expected one such heading, directly above a fenced block of '
                         f'one line; found {found}')
    return found[0]

def _terminal(line):
    "Render `line` as a terminal does: without colours, and text after a carriage return overwrites"
    shown = ''
    for part in _ansi.sub('', line).split('\r'): shown = part + shown[len(part):]
    return shown.rstrip()

def _plain(out):
    "Reduce `out` to what README.md can show: text without colours, and pictures; None if nothing is left"
    if out['output_type'] == 'stream':
        if out['name'] == 'stderr': return None
        return {**out, 'text': '\n'.join(map(_terminal, out['text'].split('\n')))}
    data = {k:v for k,v in out['data'].items() if k in ('text/markdown', 'text/plain', 'image/png')}
    if data.get('text/plain', '').startswith('<IPython.core.display'): data.pop('text/plain')
    return {**out, 'data': data} if data else None

def prepare(nb):
    "Remove hidden cells, directives and outputs that markdown cannot show; make links relative to README.md"
    nb.cells = [c for c in nb.cells if 'hide' not in c.directives and c.source.strip()]
    for c in nb.cells:
        if c.directives.get('echo') == 'false':
            c.metadata['transient'] = {'remove_source': True}  # nbconvert's own mark
        if alt := c.directives.get('fig-alt'): c.metadata['alt'] = alt
        c.remove_directives()
        if c.cell_type == 'markdown':
            c.source = _link.sub(lambda m: os.path.normpath(f'nbs/{m[1]}'), c.source)
        else: c.outputs = [o for o in map(_plain, c.outputs) if o]
    return nb

def alt_texts(nb):
    "The alternative text of each picture in `nb`"
    for c in nb.cells:
        for o in c.get('outputs', []):
            if 'image/png' in o.get('data', {}): yield c.metadata.get('alt', 'png')

def render(root):
    "Make the files from the index notebook of the project at `root`: {path from the root: bytes}"
    import nbformat
    from fastcore.nbio import nb2str, read_nb
    from nbconvert import MarkdownExporter
    nb = nbformat.reads(nb2str(prepare(read_nb(Path(root)/'nbs/index.ipynb'))), as_version=4)
    nb.metadata.language_info = {'name': 'python'}  # nbdev-clean removes it; the code fences need it
    pictures = {'unique_key': 'index', 'output_files_dir': 'nbs/images'}
    text, res = MarkdownExporter().from_notebook_node(nb, pictures)
    alts = alt_texts(nb)
    text = re.sub(r'!\[png\](?=\(nbs/images/)', lambda m: f'![{next(alts)}]', text)
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip() + '\n'
    return {'README.md': text.encode(), **res['outputs']}

def write(root):
    "Write the files that `render` makes"
    for name,data in render(root).items():
        path = Path(root)/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

if __name__ == '__main__':
    match sys.argv[1:]:
        case []: write(root)
        case ['command', heading]: print(command((root/'README.md').read_text(encoding='utf-8'), heading))
        case _: sys.exit(__doc__)
