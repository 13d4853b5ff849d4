"What is shown while it works: in a terminal, in a notebook and in a file, outside of a fit and inside"
import os, pty, re, signal, sys, time
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Thread
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback

from fasterai_lr.budget import Budget
from fasterai_lr.callback import DecomposeCallback
from fasterai_lr.decomposer import decompose
from fasterai_lr.progress import Progress, can_show_bars, say
import fasterai_lr.learner # noqa: F401, its methods
from learners import mk_learn

# --- places to print to

def screen(text, cols=80):
    "The lines that a terminal shows after `text`"
    lines,x = [''],0
    for c in text:
        if c == '\r': x = 0
        elif c == '\n': lines,x = [*lines, ''],0
        else:
            assert c.isprintable(), repr(c)
            if x == cols: lines,x = [*lines, ''],0 # it wraps when the next character comes
            lines[-1] = lines[-1][:x].ljust(x) + c + lines[-1][x+1:]
            x += 1
    return [o.rstrip() for o in lines]

def looks(text, cols=80):
    "What the last line has looked like, one after the other, each once"
    seen = [screen(text[:i], cols)[-1] for i,c in enumerate(text+'\r') if c == '\r']
    return [o for i,o in enumerate(seen) if o and o not in seen[:i]]

class Reader(Thread):
    "Collects what comes out of a pseudo-terminal"
    def __init__(self, fd):
        super().__init__(daemon=True)
        self.fd,self.got = fd,b''
        self.start()

    def run(self):
        while True:
            try: part = os.read(self.fd, 65536)
            except OSError: return # the other end is closed
            if not part: return
            self.got += part

@contextmanager
def terminal(cols=80, encoding='utf-8'):
    "Let stdout be a pseudo-terminal; what is yielded has the text afterwards"
    ours,theirs = pty.openpty()
    reader,before,columns = Reader(ours),sys.stdout,os.environ.get('COLUMNS')
    class Text: pass
    res = Text()
    try:
        os.environ['COLUMNS'] = str(cols)
        sys.stdout = open(theirs, 'w', encoding=encoding)
        yield res
    finally:
        sys.stdout.close()
        sys.stdout = before
        if columns is None: del os.environ['COLUMNS']
        else: os.environ['COLUMNS'] = columns
        reader.join(10)
        os.close(ours)
        res.text = reader.got.decode(encoding).replace('\r\n', '\n')

@pytest.fixture
def clock(monkeypatch):
    "A clock that moves when a test sets it, instead of the one that progress is measured by"
    class Clock:
        now = 1000.
        def __call__(self): return self.now
    res = Clock()
    monkeypatch.setattr('fasterai_lr.progress.time', res)
    return res

@pytest.fixture
def at_once(monkeypatch):
    "Bars and lines at every step"
    monkeypatch.setattr(Progress, 'patience', -1.)
    monkeypatch.setattr(Progress, 'interval', -1.)

# --- in a terminal

def test_a_bar_comes_when_it_takes_long_and_leaves_nothing(clock):
    with terminal() as out:
        assert can_show_bars()
        for _ in Progress()(range(10), 'fitting layer'): clock.now += 1.1
        print('done')
    shown = looks(out.text)
    assert len(shown) == 8 # not in the first two seconds
    for i,line in enumerate(shown, 2):
        bar,text = line[1:].split('| ')
        assert text == f'fitting layer {i+1} of 10, 0:{round(1.1*i):02} so far, 0:{round(1.1*(10 - i)):02} to go'
        assert {*bar} <= {*'█-'} and bar.count('█') == len(bar)*i//10
    assert screen(out.text) == ['done', '']

def test_what_is_quick_shows_nothing(clock):
    progress = Progress()
    with terminal() as out:
        for _ in range(5):
            for _ in progress(range(100), 'fitting layer'): clock.now += .015
            clock.now += 60 # these do not belong together
    assert out.text == ''

def test_loops_that_follow_each_other_are_one_computation(clock):
    "The second one, which takes a second, is shown at once"
    progress = Progress()
    with terminal() as out:
        for label in ('statistics, batch', 'fitting layer'):
            for _ in progress(range(4), label): clock.now += 1 if label == 'fitting layer' else .7
            clock.now += .5
    assert [re.search('[a-z].* of 4', o)[0] for o in looks(out.text)] == ['statistics, batch 4 of 4', *(f'fitting layer {i} of 4' for i in range(1, 5))]
    assert screen(out.text) == ['']

def test_a_loop_in_a_loop(clock):
    "The bar and the time to go are those of the outer one, in units of work where they are known"
    progress = Progress()
    with terminal(120) as out:
        for _ in progress(range(2), 'trying budget'):
            for _ in progress('abc', 'fitting layer', [1, 8, 1]): clock.now += 30
            for _ in progress(iter('ab'), 'distilling, step'): clock.now += 5 # nobody knows how many
    assert [re.search('[a-z].*', o)[0] for o in looks(out.text, 120)] == [
        'trying budget 1 of 2, fitting layer 2 of 3, 0:30 so far, 9:30 to go', 'trying budget 1 of 2, fitting layer 3 of 3, 1:00 so far, 1:13 to go',
        'trying budget 1 of 2, distilling, step 1, 1:30 so far, 1:50 to go', 'trying budget 1 of 2, distilling, step 2, 1:35 so far, 1:56 to go',
        'trying budget 2 of 2, 1:40 so far, 1:40 to go',
        'trying budget 2 of 2, fitting layer 2 of 3, 2:10 so far, 1:46 to go', 'trying budget 2 of 2, fitting layer 3 of 3, 2:40 so far, 0:08 to go',
        'trying budget 2 of 2, distilling, step 1, 3:10 so far, 0:10 to go', 'trying budget 2 of 2, distilling, step 2, 3:15 so far, 0:10 to go']
    assert screen(out.text, 120) == [''] and not progress.loops

def test_unknown_lengths_and_little_work_give_no_time_to_go(clock, at_once):
    with terminal() as out:
        for _ in Progress()(iter(range(2)), 'statistics, batch'): clock.now += 10
        for _ in Progress()('ab', 'fitting layer', [1, 99]): clock.now += 10
        for _ in Progress()([], 'fitting layer'): pass
        for _ in Progress()(range(3)): clock.now += 10
    assert [re.sub(r'^\|[█-]+\| *', '', o) for o in looks(out.text)] == [
        'statistics, batch 1, 0:00 so far', 'statistics, batch 2, 0:10 so far', 'fitting layer 1 of 2, 0:00 so far', 'fitting layer 2 of 2, 0:10 so far',
        '1 of 3, 0:00 so far', '2 of 3, 0:10 so far, 0:20 to go', '3 of 3, 0:20 so far, 0:10 to go']

def test_steps_are_asked_for_one_by_one(at_once):
    asked = []
    def steps():
        for i in range(3):
            asked.append(i)
            yield i
    with terminal():
        for i in Progress()(steps(), 'statistics, batch'): assert asked == [*range(i+1)]

@pytest.mark.parametrize('cols', [8, 30, 56, 80, 300])
def test_one_line_in_any_width(clock, at_once, cols):
    with terminal(cols) as out:
        for _ in Progress()(range(12), 'choosing ranks, layer'): clock.now += 10
    assert '\n' not in out.text and screen(out.text, cols) == ['']
    shown = looks(out.text, cols)
    assert len(shown) == (12 if cols > 25 else 1) and max(map(len, shown)) <= cols - 3 # so that ^C does not wrap
    assert ('|' in shown[0]) == (cols > 50) and max(len(o) for o in shown) < 120
    widths = [len(o.split('|')[1]) for o in shown if '|' in o]
    assert widths == sorted(widths, reverse=True)

def test_a_terminal_that_cannot_show_blocks(clock, at_once):
    with terminal(encoding='ascii') as out:
        for _ in Progress()(range(2), 'fitting layer'): clock.now += 1
    assert re.fullmatch(r'\|#{14}-{15}\| fitting layer 2 of 2, 0:01 so far, 0:01 to go', looks(out.text)[1])

class Stop(BaseException): pass

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize('where', ['in a step', 'in the steps'])
def test_an_exception_closes_the_bar(clock, at_once, error, where):
    progress = Progress()
    def steps():
        for i in range(3):
            if i == 2 and where == 'in the steps': raise error
            yield i
    def run():
        for _ in progress(range(2), 'trying budget'):
            for i in progress(steps(), 'fitting layer'):
                clock.now += 1
                if i == 1 and where == 'in a step': raise error
    with terminal() as out:
        try: run()
        except error: print('stopped') # while the traceback is still there
        assert not progress.loops
        for _ in progress(range(2), 'timing layer'): clock.now += 1 # it can be used again
    assert screen(out.text) == ['stopped', ''] and 'timing layer 2 of 2, 0:01' in out.text

@pytest.mark.parametrize('at, label', [(2, 'statistics, batch'), (9, 'fitting layer'), (25, 'distilling, step')])
def test_a_decomposition_that_is_interrupted_leaves_no_bar(at_once, at, label):
    calls = []
    class Stops(nn.Linear):
        def forward(self, x):
            calls.append(0)
            if len(calls) == at: raise KeyboardInterrupt
            time.sleep(.06) # longer than a bar stays as it is
            return super().forward(x)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Stops(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with terminal() as out:
        try: decompose(net, Budget(params=.7), list(torch.randn(90, 8).split(30)), distill_steps=9)
        except KeyboardInterrupt: print('stopped')
    assert screen(out.text)[-2:] == ['stopped', ''] and label in looks(out.text)[-2 if looks(out.text)[-1] == 'stopped' else -1]

def test_control_c():
    # a shell may have told its background jobs, these tests among them, to ignore the signal
    code = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom time import sleep; from fasterai_lr.progress import Progress; Progress.patience = -1\nfor _ in Progress()(range(100), "fitting layer"): sleep(.1)'
    pid,fd = pty.fork()
    if not pid: os.execve(sys.executable, [sys.executable, '-c', code], os.environ | {'COLUMNS': '80'})
    reader = Reader(fd)
    for _ in range(300): # seconds in tenths
        if b'fitting layer 3 of' in reader.got: break
        time.sleep(.1)
    os.write(fd, b'\x03')
    _,status = os.waitpid(pid, 0)
    reader.join(10)
    lines = screen(reader.got.decode().replace('\r\n', '\n'))
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT
    assert lines[0].startswith('Traceback') and lines[-2] == 'KeyboardInterrupt' and lines[-1] == ''

# --- in a file

def test_a_file_gets_a_line_now_and_then(clock, capsys):
    assert not can_show_bars()
    progress = Progress()
    for label in ('statistics, batch', 'fitting layer'):
        for _ in progress(range(8), label): clock.now += 8
    assert capsys.readouterr().out.splitlines() == ['statistics, batch 5 of 8, 0:32 so far, 0:32 to go', 'fitting layer 1 of 8, 0:00 so far', 'fitting layer 5 of 8, 0:32 so far, 0:32 to go']
    clock.now += 3600 # something else
    for _ in progress(range(3), 'timing layer'): clock.now += 10
    assert capsys.readouterr().out == ''

def test_lines_of_loops_in_loops(clock, capsys, monkeypatch):
    monkeypatch.setattr(Progress, 'interval', 15.)
    progress = Progress()
    for _ in progress(range(2), 'trying budget'):
        for _ in progress(range(5), 'fitting layer'): clock.now += 4
    assert capsys.readouterr().out.splitlines() == [
        'trying budget 1 of 2, fitting layer 5 of 5, 0:16 so far, 0:24 to go', 'trying budget 2 of 2, fitting layer 4 of 5, 0:32 so far, 0:08 to go']

def test_lines_in_a_file_start_below_the_bar_of_an_epoch(clock, capsys, monkeypatch):
    monkeypatch.setattr(Progress, 'interval', 15.)
    progress = Progress(master=object())
    for _ in range(2): # two decompositions in one fit
        print('Epoch 1/2 : |-----|', end='')
        for _ in progress(range(6), 'fitting layer'): clock.now += 8
        clock.now += 3600
    times = 'fitting layer 3 of 6, 0:16 so far, 0:32 to go', 'fitting layer 5 of 6, 0:32 so far, 0:16 to go'
    assert capsys.readouterr().out.splitlines() == ['Epoch 1/2 : |-----|', *times]*2

def test_stdout_may_be_missing(monkeypatch, at_once):
    "As in a program without a console"
    monkeypatch.setattr(sys, 'stdout', None)
    assert not can_show_bars() and list(Progress()(range(3), 'fitting layer')) == [0, 1, 2]

def test_a_line_behind_a_bar(capsys):
    say('one')
    say('two', after_bar=True)
    assert capsys.readouterr().out == 'one\n\ntwo\n' # a file keeps the bar, in a line above
    with terminal() as out:
        print('Epoch 1/2 : |-----|', end='')
        say('two', after_bar=True)
    assert screen(out.text) == ['two', '']

# --- with a learner

silence = {'': [], 'no bar': ['no_bar'], 'no logging': ['no_logging'], 'neither': ['no_bar', 'no_logging']}

@pytest.mark.parametrize('place', [terminal, 'file'])
@pytest.mark.parametrize('without', silence)
def test_learner_decompose(at_once, capsys, place, without):
    learn = mk_learn()
    learn.add_cb(ProgressCallback())
    learn.logger = print
    with ExitStack() as stack:
        for name in silence[without]: stack.enter_context(getattr(learn, name)())
        out = stack.enter_context(terminal(200) if place is terminal else nullcontext())
        assert learn.decompose(Budget(params=.6)) is None
    text = out.text if out else capsys.readouterr().out
    bars,lines = place is terminal and 'no_bar' not in silence[without], 'no_logging' not in silence[without]
    assert ('\r' in text) == bars and ('| statistics, batch 1 of 4, ' in text) == bars
    *others,result,sizes,end = ['']*3 + (screen(text, 200) if text else [])
    assert end == '' and ((result == '') != lines) and result.startswith('decomposed ' if lines else '') and ('MACs' in sizes) == lines
    assert any('statistics, batch 2 of 4' in o for o in others) == (lines and not bars)

def test_other_processes_are_silent(at_once, capsys, monkeypatch):
    learn = mk_learn()
    learn.logger = print
    monkeypatch.setenv('RANK', '1')
    learn.decompose(Budget(params=.6))
    assert capsys.readouterr().out == ''

class Looks(Callback):
    "Notes when the bars of a fit have begun, before a decomposition and after it"
    def __init__(self, order): self.order,self.seen = order,[]
    def before_train(self):
        assert self.progress.mbar.child is self.progress.pbar
        self.seen.append((self.progress.mbar.main_bar.start_t, self.progress.pbar.start_t))

def test_a_fit_in_a_terminal(at_once, monkeypatch):
    "The table is whole, and the time of the decomposition does not count for the time to go"
    times = iter([0., 1000.])
    monkeypatch.setattr('fasterai_lr.callback.time', lambda: next(times))
    learn,before,after = mk_learn(),Looks(60.5),Looks(62)
    learn.add_cb(ProgressCallback())
    learn.logger = print
    with terminal(160) as out: learn.fit(3, 1e-2, cbs=[before, DecomposeCallback(1, Budget(params=.6)), after])
    table = screen(out.text, 160)
    rows = ['epoch +train_loss +valid_loss +time', r'0 +\d.*:\d\d', 'epoch 1: decomposed . of 3 layers, .*', '    .* MACs .*', r'1 +\d.*:\d\d', r'2 +\d.*:\d\d', 'loss: .* before the decomposition, .* after it, .* at the end', '']
    assert len(table) == len(rows) and all(re.fullmatch(*o) for o in zip(rows, table)), table
    assert {'statistics, batch', 'choosing ranks, layer', 'fitting layer'} <= {m[0] for m in re.finditer('[a-z][a-z, ]+(?= 1 of)', out.text)}
    moved = [[b-a for a,b in zip(x, y)] for x,y in zip(before.seen, after.seen)]
    assert moved == [[0, 0], pytest.approx([1000, 1000], abs=1e-6), [0, 0]] # differences of seconds since 1970

@pytest.mark.parametrize('without', ['no_bar', 'no_logging'])
def test_a_fit_without(at_once, without):
    learn = mk_learn()
    learn.add_cb(ProgressCallback())
    learn.logger = print
    with getattr(learn, without)(), terminal(160) as out: learn.fit(2, 1e-2, cbs=DecomposeCallback(1, Budget(params=.6)))
    if without == 'no_bar': assert '\r' not in out.text and 'statistics, batch 1 of 4' in out.text and 'epoch 1: decomposed' in out.text
    else: assert '| statistics, batch 1 of 4' in out.text and 'decomposed' not in out.text and len(screen(out.text, 160)) == 1

# --- in a notebook

@pytest.fixture
def notebook(monkeypatch):
    "A notebook's cell: its outputs in their places, as they are and as they were"
    pytest.importorskip('IPython')
    from IPython.core.interactiveshell import InteractiveShell
    import fastprogress.fastprogress as bars, fastai.callback.progress as fastai_bars
    class Outputs:
        def __init__(self): self.now,self.seen = {},[]
        def publish(self, data, transient=None, update=False, **kwargs):
            place = (transient or {}).get('display_id', len(self.now))
            assert update == (place in self.now)
            text = re.sub(' +', ' ', re.sub('<[^>]*>', ' ', data.get('text/html', data['text/plain']))).strip()
            self.now[place] = text
            self.seen.append(text)
        is_publishing = False
    shell = InteractiveShell.instance()
    shell.display_pub = outputs = Outputs()
    monkeypatch.setattr('fasterai_lr.progress.IN_NOTEBOOK', True)
    monkeypatch.setattr(bars, 'show_styles', lambda: None)
    monkeypatch.setattr(fastai_bars, 'master_bar', bars.NBMasterBar)
    monkeypatch.setattr(fastai_bars, 'progress_bar', bars.NBProgressBar)
    yield outputs
    InteractiveShell.clear_instance()

def test_a_bar_in_a_notebook(notebook, clock, capsys):
    "Loops of one computation share a place, which is empty in the end; the next cell has its own"
    from IPython import get_ipython
    progress = Progress()
    for label in ('statistics, batch', 'fitting layer'):
        for _ in progress(range(4), label): clock.now += 1
    assert notebook.seen == ['', 'statistics, batch 4 of 4, 0:03 so far, 0:01 to go', '', *(f'fitting layer {i} of 4, 0:0{i-1} so far' + f', 0:0{5-i} to go'*(i > 1) for i in range(1, 5)), '']
    assert list(notebook.now.values()) == ['']
    get_ipython().execution_count += 1
    with pytest.raises(KeyboardInterrupt):
        for _ in progress(range(4), 'timing layer'): raise KeyboardInterrupt
    assert list(notebook.now.values()) == ['', ''] and notebook.seen[-2] == 'timing layer 1 of 4, 0:00 so far'
    assert capsys.readouterr().out == ''

def test_a_fit_in_a_notebook(notebook, at_once, capsys):
    learn = mk_learn()
    learn.add_cb(ProgressCallback())
    learn.logger = print
    after = Looks(62)
    learn.fit(2, 1e-2, cbs=[DecomposeCallback(1, Budget(params=.6)), after])
    place, = notebook.now.values()
    assert re.fullmatch(r'epoch train_loss valid_loss time (\d [\d.]+ [\d.]+ \d\d:\d\d ?){2}', place) # the bars are gone
    during = [o for o in notebook.seen if 'fitting layer' in o]
    assert re.fullmatch(r'50.00% \[1/2 \d\d:\d\d&lt;\d\d:\d\d\] epoch train_loss valid_loss time 0 [\d.]+ [\d.]+ \d\d:\d\d fitting layer 1 of \d, 0:00 so far', during[0])
    assert len(after.seen) == 2 # the epoch's bar is in its place again
    assert [o.split()[0] for o in capsys.readouterr().out.splitlines()] == ['epoch', '326', 'loss:']
