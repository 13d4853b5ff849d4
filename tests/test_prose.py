"Pages, docstrings, comments and messages have no fault that `tools/prose.py` can find, and it finds each kind of fault"
import json
import pytest, prose
from functools import partial

# The project

@pytest.fixture(scope='module')
def faults():
    return prose.all_faults(prose.passages(), prose.passages_of_tests())

def test_the_language_has_no_fault(faults):
    left = prose.without_false_alarms(faults)
    assert not left, '\n' + '\n'.join(map(prose.line_of, left))

def test_each_allowed_false_alarm_still_occurs(faults): assert prose.needless(faults) == []

def test_all_kinds_of_files_are_read():
    paths = {o.path for o in prose.passages()}
    for o in ('nbs/index.ipynb', 'nbs/03_rank.ipynb', 'nbs/howto/03_measure.ipynb', 'CONTRIBUTING.md', 'CHANGELOG.md', 'docs/api.md',
              'bench/trust.py', 'tools/prose.py', 'fasterai_lr/__init__.py'): assert o in paths, o
    assert 'tests/test_prose.py' in {o.path for o in prose.passages_of_tests()}

# Each kind of fault

def found_in(find, text):
    "Find the faults of `text`, as pairs of checker and what it found"
    passages = [prose.Passage('x', place, ' '.join(o.split())) for place,o in find(text)]
    return [(o.checker, o.what) for o in prose.all_faults(passages)]

spelling,repeated,stiff = 'the prose has teh rank', 'the rank of of a layer', 'we utilise a rank'
three = [('codespell', 'teh'), ('proselint', 'lexical_illusions'), ('house', 'utilise')] # their faults

def notebook(kind, source):
    return json.dumps({'cells': [{'cell_type': kind, 'source': source.splitlines(keepends=True)}]})

sources = {
    'paragraph': (prose.paragraphs, '# Title\n\nHere {}.\n'),
    'broken line': (prose.paragraphs, 'A sentence, {}, and more.'),
    'heading': (prose.paragraphs, '## Here {}\n'),
    'item': (prose.paragraphs, '- one\n- here {}\n'),
    'cell of a table': (prose.paragraphs, '| a | b |\n|---|---|\n| c | here {} |\n'),
    'text of a link': (prose.paragraphs, 'See [here {}](x.ipynb).'),
    'docstring': (prose.of_python, 'def f():\n    """Here {}"""\n'),
    'comment': (prose.of_python, 'x = 1 # here {}\n'),
    'docment': (prose.of_python, 'def f(\n    a, # here {}\n): pass\n'),
    'error': (prose.of_python, 'raise ValueError("Here {}")\n'),
    'warning': (prose.of_python, 'warn(f"{{x}}: here {} for " + y)\n'),
    'printed text': (prose.of_python, 'print("a layer", "here "\n      "{}")\n'),
    'markdown cell': (prose.of_notebook, None), 'code cell': (prose.of_notebook, None)}

def text_with(kind, phrase):
    "Return how to read a text of one kind, and such a text with the phrase in it"
    find,template = sources[kind]
    if kind == 'broken line': phrase = phrase.replace(' ', '\n')
    if kind == 'markdown cell': return find,notebook('markdown', f'Here {phrase}.')
    if kind == 'code cell': return find,notebook('code', f'%time f()\n# here {phrase}\n')
    return find,template.format(phrase)

@pytest.mark.parametrize('kind', sources)
def test_each_kind_of_fault_is_found_in_each_kind_of_text(kind):
    find,text = text_with(kind, ', '.join([spelling, repeated, stiff]))
    assert found_in(find, text) == three

def test_comments_on_successive_lines_are_one_passage():
    assert found_in(prose.of_python, '# here we\n# note\n# that it is so\nx = 1\n') == [('house', 'note that')]
    assert found_in(prose.of_python, 'x = 1 # here we note\n# that it is so\n') == []

def test_a_checker_that_fails_is_an_error():
    passages = [prose.Passage('x', 1, 'a rank')]
    for command in (['no_such_checker'], ['codespell_lib', '--no-such-option'], ['proselint', 'no-such-command']):
        with pytest.raises(RuntimeError, match=command[0]): prose.run_checker(passages, *command)
    for command in (['codespell_lib'], ['proselint', 'check']): assert prose.run_checker(passages, *command) == []

@pytest.mark.parametrize('find, text', [
    (prose.paragraphs, 'Call `teh` and ``teh`` of $teh$.\n\n```python\nteh = 1\n```\n[here](teh.md) https://x.org/teh <teh>\n\n$$teh$$'),
    (prose.of_python, '#| export\nteh = f(teh=1, x="teh")\nre.compile(r"teh \\w+")\n'),
    (prose.of_python, '"A line with `teh` code"\nf"a value of {teh} layers"\n'),
    (prose.paragraphs, 'A quoted "word" and the layers\' ranks.\n\nranks. And "the" end.')])
def test_code_links_and_formulas_are_not_checked(find, text): assert found_in(find, text) == []

def test_tests_are_checked_for_spelling_alone():
    passages = [prose.Passage('tests/x.py', 1, o) for o in (spelling, stiff)]
    assert [o.what for o in prose.all_faults([], passages)] == ['teh']
    find = partial(prose.of_python, literals=prose.docstrings)
    assert [text for _,text in find(f'def f():\n    "A docstring"\n    g("{spelling}") # comment\n')] == ['comment', 'A docstring']

# Lists

def test_phrases_match_whole_words_in_any_case_and_over_gaps():
    for phrase,text in (('shall', 'You SHALL go'), ('in … currencies', 'in three other currencies,'), ('the way of a', 'The way of a change')):
        assert prose.pattern(phrase).search(text)
    for phrase,text in (('shall', 'a shallow net'), ('shall', 'un-shalled'), ('in … currencies', 'in currencies'), ('in … currencies', 'in a b c d currencies')):
        assert not prose.pattern(phrase).search(text)

def test_an_entry_excuses_only_its_own_fault():
    fault = prose.Fault('codespell', 'als', prose.Passage('x', 1, 'ALS converges'), 'also')
    for entry,excused in ((('codespell', 'als', 'ALS'), True), (('codespell', 'als', '*'), True), (('codespell', 'als', 'CP-ALS'), False),
                          (('codespell', 'ang', '*'), False), (('house', 'als', '*'), False)):
        assert prose.excuses(prose.Allowed(*entry, 'a reason'), fault) == excused

def test_an_entry_that_is_not_needed_is_found(faults):
    without = [o for o in faults if o.what != 'als']
    assert [o.what for o in prose.needless(without)] == ['als']

def test_each_line_of_a_list_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, 'root', tmp_path)
    (tmp_path/'tools').mkdir()
    for line in ('shall', 'shall | ', 'a | b | c'):
        (tmp_path/'tools/house_style.txt').write_text(f'# a comment\n\n{line}\n')
        with pytest.raises(ValueError, match='house_style.txt: expected 2 cells'): prose.house_style()
