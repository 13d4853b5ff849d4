"Pictures can be read: on a phone, on white and on black, by the colour-blind, and by those who cannot see them"
import re
from base64 import b64decode, b64encode
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np, pytest
from fastcore.nbio import mk_cell, read_nb
from PIL import Image

from fasterai_lr.report import method_colours

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').rglob('*.ipynb'))
widest = 560 # of 100 in an inch: text of 10 points is then 9 pixels high on a phone, which shows 360 of them in a row

def pictures(cell):
    "The pictures that a code cell shows to readers"
    if 'hide' in cell.directives: return []
    pngs = [o['data']['image/png'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
    return [Image.open(BytesIO(b64decode(''.join(o)))) for o in pngs]

def unsaid(text):
    "Why `text` does not say what a picture shows, or None"
    if len(text.split()) < 6: return f'too short: {text!r}'
    if re.match(r'(an? |the )?(picture|image|plot|figure|graph|diagram)\b', text, re.I): return f'says that it is a picture: {text!r}'
    if re.search(r'[\[\]`]', text): return f'markup: {text!r}'

def texts_in(markdown):
    "The alternative texts of the pictures in `markdown`, without its code"
    plain = re.sub(r'^```.*?^```|`[^`\n]*`', '', markdown, flags=re.M|re.S)
    tags = [re.search(r'alt="([^"]*)"', o) for o in re.findall(r'<img\b[^>]*>', plain)]
    return re.findall(r'!\[([^\]]*)\]\(', plain) + [o[1] if o else '' for o in tags]

def faults(cells):
    "What is wrong with the pictures of `cells`"
    for c in cells:
        if c.cell_type == 'markdown':
            yield from filter(None, map(unsaid, texts_in(c.source)))
            continue
        if c.cell_type != 'code': continue
        shown = pictures(c)
        if len(shown) > 1: yield f'{len(shown)} pictures with one text'
        if not shown: continue
        if why := unsaid(c.directives.get('fig-alt', '')): yield why
        for o in shown:
            width = 100*o.width/o.info.get('dpi', [100])[0]
            if width > widest: yield f'{width:.0f} wide'

# tutorials of half an hour and more, last run before there was a limit; take a name out when its tutorial runs again
still_wide = {'01_fully_connected': 3, '05_callback': 2}

@pytest.mark.parametrize('path', notebooks, ids=lambda o: o.name)
def test_pictures_of_notebooks(path):
    found = [*faults(read_nb(path).cells)]
    wide = [o for o in found if o.endswith(' wide')]
    assert len(wide) == still_wide.get(path.stem, 0) and found == wide

@pytest.mark.parametrize('path', [*root.glob('*.md'), *(root/'docs').glob('*.md')], ids=lambda o: o.name)
def test_pictures_of_other_pages(path): assert [*filter(None, map(unsaid, texts_in(path.read_text(encoding='utf-8'))))] == []

def test_the_readme_has_a_picture(): assert len(texts_in((root/'README.md').read_text(encoding='utf-8'))) > 0

def test_no_text_is_used_twice():
    texts = [c.directives['fig-alt'] for o in notebooks for c in read_nb(o).cells if 'fig-alt' in c.directives]
    assert len(texts) > 30 and sorted({o for o in texts if texts.count(o) > 1}) == []

def test_faults_are_found():
    def cell(source, width=500, dpi=100, n=1):
        file = BytesIO()
        Image.new('L', (width, 5)).save(file, 'png', dpi=(dpi, dpi))
        png = b64encode(file.getvalue()).decode()
        return mk_cell(source, outputs=[dict(output_type='display_data', metadata={}, data={'image/png': png})]*n)
    alt = '#| fig-alt: Accuracy falls as the rank gets lower\nx'
    bad = [cell('x'), cell('#| fig-alt: accuracy\nx'), cell('#| fig-alt: A plot of accuracy over the rank\nx'), cell(alt, n=2), cell(alt, 900), cell(alt, 1200, 200),
           mk_cell('![png](a.png)', 'markdown'), mk_cell('<img src="a.png">', 'markdown')]
    good = [cell(alt), cell(alt, 1000, 200), cell('#| hide\nx'), mk_cell('x', outputs=[]),
            mk_cell('![Accuracy falls as the rank gets lower](a.png) `![png](b.png)`', 'markdown')]
    assert [*faults(good)] == []
    for o in bad: assert len([*faults([o])]) == 1, o

# Colours

def linear(colour):
    "Red, green and blue of a colour such as '#0072b2' as amounts of light from 0 to 1"
    c = np.array([int(colour[i:i+2], 16) for i in (1, 3, 5)])/255
    return np.where(c <= .04045, c/12.92, ((c+.055)/1.055)**2.4)

def contrast(a, b):
    "The contrast of two colours as WCAG 2 defines it"
    low,high = sorted(linear(o)@[.2126, .7152, .0722] for o in (a, b))
    return (high+.05)/(low+.05)

seen_by = { # what the colour-blind see of linear light, by Machado et al. 2009
    'everybody': np.eye(3),
    'protanopes': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    'deuteranopes': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    'tritanopes': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}

def lab(light):
    "CIELAB of linear light"
    xyz = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]])@light/[.95047, 1, 1.08883]
    x,y,z = np.where(xyz > .008856, np.cbrt(xyz), 7.787*xyz + 16/116)
    return np.array([116*y-16, 500*(x-y), 200*(y-z)])

def nearest(colours, eye):
    "The least distance of two of `colours` in CIELAB, as `eye` sees them"
    labs = [lab(np.clip(eye@linear(o), 0, 1)) for o in colours]
    return min(np.linalg.norm(a-b) for a,b in combinations(labs, 2))

@pytest.mark.parametrize('ground', ['#ffffff', '#121212'])
def test_colours_stand_out(ground):
    for name,colour in method_colours.items(): assert contrast(colour, ground) >= 3, name # WCAG 2.1, 1.4.11, of graphics

@pytest.mark.parametrize('eyes', seen_by)
def test_colours_stay_apart(eyes):
    colours = [o for name,o in method_colours.items() if name != 'dense'] # that one is a dashed line without markers
    assert nearest(colours, np.array(seen_by[eyes])) > 20 # ten times what is just noticeable

def test_colours_that_look_the_same_are_found():
    assert contrast('#ffffff', '#000000') == pytest.approx(21)
    red_and_green = ['#d40000', '#6f7700']
    assert nearest(red_and_green, np.array(seen_by['deuteranopes'])) < 20 < nearest(red_and_green, np.eye(3))
