"Sphinx's configuration; `python tools/build_site.py` builds the site"
import re
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path
from pygments.formatters import HtmlFormatter
from sphinx.highlighting import PygmentsBridge

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(here.parent/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

project,author,release,copyright = cfg['lib_name'],cfg['author'],cfg['version'],cfg['author']
extensions = ['myst_nb', 'sphinx.ext.viewcode', 'sphinx_copybutton']

# Pages

nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 4

# Names

add_module_names = False
python_maximum_signature_line_length = 70
python_use_unqualified_type_names = True
toc_object_entries_show_parents = 'hide'

# Formulas: MathJax as one file beside the pages, which loads nothing more

mathjax_path = 'tex-svg.js'
mathjax3_config = {'options': {
    'enableMenu': False,
    'skipHtmlTags': ['script', 'noscript', 'style', 'textarea', 'pre', 'code', 'a']}}
myst_update_mathjax = False

# Looks

html_theme = 'pydata_sphinx_theme'
html_title = cfg['lib_name']
mathjax = distribution('sphinx-mathjax-offline')
html_static_path = ['_static', str(mathjax.locate_file('sphinx-mathjax-offline/static/mathjax/tex-svg.js'))]
html_favicon = '_static/logo.svg'
html_css_files = ['style.css']
html_show_sourcelink = False
html_copy_source = False
pygments_style = 'default'

class Lines(HtmlFormatter):
    "Marks each line, so that style.css can wrap long ones in outputs, but not the rows of a table"
    def wrap(self, source): return super().wrap(map(self.mark, source))

    def mark(self, line):
        is_line,text = line
        if not is_line: return line
        row = re.search(r'\S {2,}\S', re.sub('<[^>]+>', '', text))
        return 1,f'<span class="line{" cells" if row else ""}">{text.removesuffix(chr(10))}</span>\n'

PygmentsBridge.html_formatter = Lines
html_context = {'default_mode': 'auto'}
html_theme_options = {
    'github_url': cfg['git_url'],
    'navbar_align': 'left', 'header_links_before_dropdown': 6, 'show_nav_level': 1, 'show_toc_level': 2,
    'logo': {'image_light': '_static/logo.svg', 'image_dark': '_static/logo.svg',
             'text': cfg['lib_name'], 'alt_text': ''},
    'footer_start': ['copyright'], 'footer_end': [], 'secondary_sidebar_items': ['page-toc'],
    'pygments_light_style': 'a11y-high-contrast-light', 'pygments_dark_style': 'a11y-high-contrast-dark'}
html_sidebars = {o: [] for o in ('index', 'quickstart', 'benchmarks', 'changelog', 'contributing')}
