"The site is built, and read in a browser as people do: at a desk, and on a phone"
import shutil, subprocess, sys
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urljoin, urlsplit
import pytest

pytestmark = pytest.mark.slow
root = Path(__file__).resolve().parent.parent
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
sizes = {'desk': (1280, 900), 'phone': (390, 844)}

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the site, built by the one command in a copy of the project"
    for o in ('sphinx', 'myst_nb', 'pydata_sphinx_theme'): pytest.importorskip(o, reason="building the site needs `pip install -e '.[docs]'`")
    project = tmp_path_factory.mktemp('site')
    for o in ('nbs', 'docs', 'tools', 'fasterai_lr'): shutil.copytree(root/o, project/o, ignore=shutil.ignore_patterns('__pycache__'))
    for o in root.iterdir():
        if o.is_file(): shutil.copy(o, project)
    for o in ('bench', '.github'): (project/o).mkdir()  # the prose links to them
    res = subprocess.run([sys.executable, 'tools/build_site.py'], cwd=project, stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if res.returncode: pytest.fail(res.stdout, pytrace=False)
    return project/'build/html'

def pages(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if '_static' not in p.parts)

def test_pages_are_there(site):
    assert {'index.html', 'quickstart.html', 'tutorials/fully_connected.html', 'howto/index.html', 'explanation/index.html', 'api/index.html', 'benchmarks.html',
            'changelog.html', 'contributing.html', 'search.html'} <= {*pages(site)}
    assert {f'api/{p.stem}.html' for p in (root/'fasterai_lr').glob('*.py') if p.stem[0] != '_'} <= {*pages(site)}

# Links

class _Parser(HTMLParser):
    "The ids of a page, and what it links to or shows"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links = set(),[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k in ('id', 'name'): self.ids.add(v)
            if k in ('href', 'src') and v: self.links.append(v)

def dead_links(site):
    "The links inside of `site` that lead to no file or anchor: {page: [links]}"
    found = {o: _Parser((site/o).read_text(encoding='utf-8')) for o in pages(site)}
    def dead(page, link):
        url = urlsplit(urljoin(f'/{page}', link))
        to = unquote(url.path)[1:]
        return not url.scheme and not url.netloc and (not (site/to).is_file() or bool(url.fragment) and to in found and unquote(url.fragment) not in found[to].ids)
    return {o: bad for o,p in found.items() if (bad := sorted({k for k in p.links if k != '#' and dead(o, k)}))}

def test_links(site): assert dead_links(site) == {}

def test_links_of_notebooks(site, monkeypatch):
    import build_site
    monkeypatch.chdir(root)
    page = SimpleNamespace(path='nbs/03_rank.ipynb', to='api/rank.ipynb', section='api', module='fasterai_lr.rank', names=['Energy'])
    links = build_site.Links([page], 'https://x.org/y')
    assert links('[a](../03_rank.ipynb#b) [c](../../LICENSE) [d](#e) [`Energy`](https://z.org)', 'nbs/howto/x.ipynb') == (
        '[a](/api/rank.ipynb#b) [c](https://x.org/y/blob/main/LICENSE) [d](#e) [`Energy`](https://z.org)')
    assert links('# `Energy`\n`Energy(.9)`, `[f](g)`\n```\n`Energy`\n```', 'CHANGELOG.md') == (
        '# `Energy`\n{py:obj}`Energy(.9) <fasterai_lr.rank.Energy>`, `[f](g)`\n```\n`Energy`\n```')
    with pytest.raises(ValueError, match='nbs/x.ipynb: the link gone.ipynb has no target'): links('[a](gone.ipynb)', 'nbs/x.ipynb')

def test_dead_links_are_found(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.html').write_text('<a id="x" href="#x">1</a><a href="#y">2</a><a href="sub/b.html#z">3</a><a href="https://x.org/#q">4</a><img src="no.png">')
    (tmp_path/'sub/b.html').write_text('<a id="z" href="../a.html#x">1</a><a href="../a.html#w">2</a><a href="c.html">3</a>')
    assert dead_links(tmp_path) == {'a.html': ['#y', 'no.png'], 'sub/b.html': ['../a.html#w', 'c.html']}

def test_every_public_name_is_documented(site):
    from importlib import import_module
    index = (site/'genindex.html').read_text(encoding='utf-8')
    modules = [p.stem for p in (root/'fasterai_lr').glob('*.py') if p.stem[0] != '_' and p.stem != 'all']
    names = {m: import_module(f'fasterai_lr.{m}').__all__ for m in modules}
    assert sum(map(len, names.values())) > 50
    assert [f'{m}.{n}' for m,ns in names.items() for n in ns if f'#fasterai_lr.{m}.{n}"' not in index] == []

# Outputs

def test_outputs_for_a_page():
    from build_site import as_page
    rest = '<style>progress { background: #e0e0e0; }</style>'
    table = '<tr><td>1</td></tr></table>'
    assert as_page(rest) == '' and as_page('\n<div>\n</div>') == ''
    for start in ('<table class="fastprogress">', '<table>', '<table class="dataframe">'): assert as_page(start + table) == '<table class="dataframe">' + table
    assert as_page(rest + '<table id="T_1a">' + table) == rest + '<table class="dataframe" id="T_1a">' + table

def test_what_a_bar_leaves_is_not_shown():
    from build_site import outputs
    from fastcore.xtras import dict2obj
    stream = lambda text: dict(output_type='stream', text=text)
    left = dict2obj(dict(outputs=[stream(['|--| 0%\r|##| 100%\r   \r']), stream(['|--|\r   \rdone\n', 'and more']), dict(output_type='display_data', data={'text/html': ['<div></div>']}),
        dict(output_type='display_data', data={'image/png': 'x'})]))
    shown = list(outputs(left))
    assert [o.get('text') for o in shown] == ['done\nand more', None] and 'image/png' in shown[1].data

# In a browser

class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def served(folder):
    "The address at which `folder` is served"
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(_Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try: yield f'http://127.0.0.1:{server.server_port}/'
        finally: server.shutdown()

@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason="reading the site needs `pip install -e '.[docs]'`")
    if not chromium: pytest.skip('reading the site needs Chromium: `apt-get install chromium`')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield browser
        browser.close()

# What a page shows wrongly: pictures without content or without a text that says what they show, formulas still in TeX or in red, and what sticks out at the right (of what scrolls by itself, only the frame counts)
look = """() => {
    const res = [], wide = document.documentElement.clientWidth, main = document.querySelector('article, body');
    for (const o of document.images) { o.loading = 'eager'; if (o.complete && !o.naturalWidth) res.push('picture: ' + o.src.slice(0, 80));
        if (!o.closest('.navbar-brand') && o.alt.split(' ').length < 6) res.push('alternative text: ' + o.alt); }
    for (const o of document.querySelectorAll('.math')) if (!o.querySelector('mjx-container svg')) res.push('formula: ' + o.textContent.slice(0, 80));
    for (const o of document.querySelectorAll('mjx-merror, [data-mjx-error]')) res.push('formula: ' + o.textContent.slice(0, 80));
    if (document.documentElement.scrollWidth > wide) res.push(`page: ${document.documentElement.scrollWidth} of ${wide} px`);
    const scrolls = o => o && o !== main && (['auto', 'scroll'].includes(getComputedStyle(o).overflowX) || scrolls(o.parentElement));
    for (const o of main.querySelectorAll('*')) {
        const box = o.getBoundingClientRect();
        if (box.width && box.right > wide + 1 && getComputedStyle(o).visibility !== 'hidden' && !scrolls(o.parentElement)) res.push(`${o.tagName}: right at ${box.right}`);
    }
    return res;
}"""

# Text that is too faint, in both modes. WCAG's level AA asks for a contrast of 4.5, which makes up for the contrast that eyesight of 20/40 loses; large letters, of 24 px or
# bold ones of 18.66 px, need 3. What stands behind a text is the first opaque colour under it, with all that is half transparent laid over.
faint = """() => {
    for (const o of document.querySelectorAll('details')) o.open = true;
    document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important; }</style>');
    const numbers = css => { const v = (css.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number); return v.length < 4 ? [...v, 1] : v; };
    const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1 - a[3])).concat(1);
    const opacity = o => o ? getComputedStyle(o).opacity*opacity(o.parentElement) : 1;
    const light = c => { const [r, g, b] = c.map(v => v/255).map(v => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
    const texts = new Set(document.querySelectorAll('mjx-container svg'));
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) if (walker.currentNode.data.trim()) texts.add(walker.currentNode.parentElement);
    const seen = [...texts].filter(o => { const box = o.getBoundingClientRect();
        return box.width > 1 && box.height > 1 && o.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}); });
    const res = {};
    for (const mode of ['light', 'dark']) {
        document.documentElement.dataset.theme = mode;
        const known = new Map([[null, [255, 255, 255, 1]]]);
        const behind = o => {
            if (!known.has(o)) { const c = numbers(getComputedStyle(o).backgroundColor); known.set(o, c[3] === 1 ? c : over(c, behind(o.parentElement))); }
            return known.get(o); };
        for (const o of seen) {
            const css = getComputedStyle(o), back = behind(o), color = numbers(css.color), size = parseFloat(css.fontSize);
            color[3] *= opacity(o);
            const [x, y] = [light(over(color, back)), light(back)].sort((a, b) => b - a), ratio = (x + .05)/(y + .05);
            const least = size >= 24 || size >= 18.66 && css.fontWeight >= 700 ? 3 : 4.5;
            if (ratio < least) res[`${mode}: contrast ${ratio.toFixed(2)} of ${css.color} on ${back.slice(0, 3).map(Math.round)}, ${o.tagName} ${o.className}`] ??= o.textContent.trim().slice(0, 40);
        }
    }
    return Object.entries(res).map(o => o.join(': '));
}"""

# Code, printed text, tables and menus of which a part shows only after scrolling; on a phone that cannot be helped
cut = """() => {
    const res = [];
    for (const o of document.querySelectorAll('article :is(pre, table)')) for (let p = o; p.tagName !== 'ARTICLE'; p = p.parentElement)
        if (p.clientWidth && p.scrollWidth > p.clientWidth + 1 && getComputedStyle(p).overflowX !== 'visible') {
            res.push(`cut: ${p.scrollWidth} of ${p.clientWidth} px: ${o.textContent.trim().slice(0, 60)}`);
            break; }
    for (const o of document.querySelectorAll('[class^=bd-sidebar]')) if (o.scrollWidth > o.clientWidth + 1) res.push(`cut: menu of ${o.scrollWidth} in ${o.clientWidth} px`);
    return res;
}"""
checks = {'desk': (look, faint, cut), 'phone': (look,)}  # colours do not depend on the size

def problems(browser, address, names, kind):
    "What is wrong with the pages `names` in a window of a `kind`: {page: [what]}"
    context = browser.new_context(viewport=dict(zip(('width', 'height'), sizes[kind])))
    page,found = context.new_page(),[]
    page.on('console', lambda m: m.type in ('error', 'warning') and found.append(f'{m.type}: {m.text}'))
    page.on('pageerror', lambda e: found.append(f'error: {e}'))
    page.on('requestfailed', lambda r: r.failure == 'net::ERR_ABORTED' or found.append(f'failed: {r.url}'))  # aborted: by going to the next page
    page.on('response', lambda r: r.status >= 400 and found.append(f'{r.status}: {r.url}'))
    page.on('request', lambda r: r.url.startswith((address, 'data:')) or found.append(f'another host: {r.url}'))
    res = {}
    for o in names:
        page.goto(address+o, wait_until='load')
        page.evaluate('() => window.MathJax?.startup?.promise')
        for check in checks[kind]: found += page.evaluate(check)
        if found: res[o] = found[:]
        found.clear()
    context.close()
    return res

@pytest.mark.parametrize('kind', sizes)
def test_pages_in_a_browser(site, browser, kind):
    with served(site) as address: assert problems(browser, address, pages(site), kind) == {}

def test_formulas_and_pictures_are_there_to_see(site):
    text = {o: (site/o).read_text(encoding='utf-8') for o in pages(site)}
    assert 'class="math' in text['api/tensor.html'] and '<img' in text['api/rank.html']

# One page for each kind of problem that is looked for, and pages without any
everywhere = {
    'error': '<script>throw new Error("x")</script>', 'missing': '<link rel="stylesheet" href="no.css">', 'host': '<img src="http://localhost:9/x.png">',
    'picture': '<img src="empty.png" alt="a text that says what is seen">',
    'no text': '<img src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7" alt="dot.gif">', 'formula': '<span class="math">\\(x\\)</span>', 'wide': '<div style="width:1500px">x</div>',
    'hidden': '<div style="overflow:hidden"><pre style="width:1500px">x</pre></div>'}
at_a_desk = {
    'faint': '<p style="color:#888">x</p>', 'see-through': '<p style="opacity:.5">x</p>', 'bold': '<b style="color:#888; font-size:18px">x</b>',
    'dark': '<style>[data-theme=dark] i { background:#292f3d }</style><p><i>x</i></p>', 'folded': '<details>x<p style="color:#888">y</p></details>',
    'formula-faint': '<span class="math"><mjx-container style="color:#888"><svg width="9" height="9"></svg></mjx-container></span>',
    'cut': '<article><pre style="overflow-x:auto"><span style="padding-right:1500px">x</span></pre></article>',
    'cut-table': '<article><div style="overflow-x:auto"><table><td style="min-width:1500px">x</table></div></article>',
    'cut-menu': '<div class="bd-sidebar-x" style="overflow:auto; width:99px"><p style="width:120px">x</p></div>'}
good = {'scrolls': '<div style="overflow-x:auto"><pre style="width:1500px">x</pre></div>', 'large': '<p style="color:#888; font-size:24px">x</p>',
    'bold-large': '<b style="color:#888; font-size:19px">x</b>', 'unseen': '<p style="color:#eee; visibility:hidden">x</p>',
    'half': '<div style="background:rgb(0,0,0,.5)"><p style="background:rgb(0,0,0,.9); color:#fff">x</p></div>'}

@pytest.mark.parametrize('kind,bad', [('desk', everywhere | at_a_desk), ('phone', everywhere)])
def test_problems_are_found(browser, tmp_path, kind, bad):
    (tmp_path/'empty.png').write_bytes(b'')
    pieces = bad | good
    for k,v in pieces.items(): (tmp_path/f'{k}.html').write_text(f'<!doctype html><link rel="icon" href="data:,"><body>{v}</body>')
    with served(tmp_path) as address: found = problems(browser, address, [f'{k}.html' for k in pieces], kind)
    assert found.keys() == {f'{k}.html' for k in bad}

def test_search(site, browser):
    with served(site) as address:
        page = browser.new_page()
        page.goto(f'{address}search.html?q=truncated_svd')
        page.wait_for_selector('#search-results a[href*="api/linalg.html"]', timeout=20000)
        page.close()
