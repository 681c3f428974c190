"""Signals, in processes of their own: whatever a process does, it ends by one cleanly, and once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.processes import environment

from pjit_train import signals

HANDLERS = [signal.getsignal(number) for number in signals.NUMBERS]
SAYS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
START = """
import os, pathlib, signal, sys, time
from pjit_train import signals
def ready():
    print("ready", flush=True)
with signals.taken(signals.end):
"""


def started(code: str, **options) -> subprocess.Popen:
    """A process that runs `code` with signals taken, once it has said that it is ready."""
    code = START + "".join(f"    {line}\n" for line in code.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("number", signals.NUMBERS)
@pytest.mark.parametrize(
    "doing",
    [
        "while True: pass",
        "import threading; threading.Event().wait()",
        # C code that looks at no signal, and lets other threads run.
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)",
        # What a handler raises in a callback is printed and lost.
        "class A:\n  def __del__(self):\n    for _ in range(1000): pass\nwhile True: A()",
        # An event loop in the main thread takes the signals of the system for itself.
        "import asyncio, uvloop; uvloop.run(asyncio.sleep(1000))",
        "try:\n  while True: pass\nexcept BaseException:\n  pass\nwhile True: pass",
    ],
)
def test_it_ends_at_once_whatever_it_does(doing, number):
    process = started(f"ready()\n{doing}")
    time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(number)
    assert ended(process) == (128 + number, "", f"torsion: {SAYS[number]}\n")
    assert time.monotonic() - began < 10


def test_many_signals_are_one_end(tmp_path):
    process = started("ready()\nwhile True: pass")
    for _ in range(20):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
    code, _, said = ended(process)
    assert code - 128 in signals.NUMBERS
    assert said == f"torsion: {SAYS[code - 128]}\n"


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_unfinished_is_removed_and_what_is_done_stays(tmp_path, folder):
    make = "new.mkdir(); (new / 'part').write_text('half')" if folder else "new.write_text('half')"
    code = f"""
new = pathlib.Path('new')
with signals.unfinished(new):
  {make}
  new.rename('done')
with signals.unfinished(new):
  {make}
  ready()
  while True: pass
"""
    process = started(code, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["done", "new"]
    process.terminate()
    assert ended(process)[0] == 143
    assert os.listdir(tmp_path) == ["done"]


def test_a_signal_waits_until_what_is_written_is_whole(tmp_path):
    code = """
with signals.deferred():
  with open('file', 'w') as file:
    ready()
    for _ in range(40):
      file.write('x'); file.flush(); time.sleep(0.01)
open('more', 'w')
"""
    process = started(code, cwd=tmp_path)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "torsion: interrupted\n")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "x" * 40


def test_a_signal_is_not_lost_where_the_writing_fails():
    got = []

    def write():
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert got == []
            raise OSError("full")

    with signals.taken(got.append):
        with pytest.raises(OSError, match="full"):
            write()
        assert got == [signal.SIGTERM]


def test_a_signal_is_not_lost_in_an_exec():
    code = """
signals.hold_back()
ready()
time.sleep(0.3)
code = "import time; from pjit_train import signals as s\\nwith s.taken(s.end): time.sleep(9)"
os.execv(sys.executable, [sys.executable, "-c", code])
"""
    process = started(code)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "torsion: interrupted\n")


def test_nohup_is_respected():
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = started("ready()\nwhile True: pass", preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert ended(process)[0] == 143


def test_the_innermost_takes_a_signal_once_and_handlers_are_put_back():
    outer, inner = [], []
    with signals.taken(outer.append):
        for number in signals.NUMBERS:
            os.kill(os.getpid(), number)
        with signals.taken(inner.append):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # for the thread that waits, too
    assert outer == [*signals.NUMBERS, signal.SIGTERM]
    assert inner == [signal.SIGINT] * 2
    assert [signal.getsignal(number) for number in signals.NUMBERS] == HANDLERS
    assert signal.set_wakeup_fd(-1) == -1


def test_only_another_interrupt_asks_for_the_end_at_once(monkeypatch):
    """The same one may come twice at the same time: from a terminal and from `timeout`."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    asked = signals.Asked()
    assert not asked.add(signal.SIGINT)
    assert not asked.add(signal.SIGINT)
    now[0] += 2
    assert not asked.add(signal.SIGHUP)
    assert not asked.add(signal.SIGTERM)
    assert asked.number == signal.SIGINT
    assert asked.add(signal.SIGINT)
