"""The compiler's subprocess ends as its owner does, and cleanly when it is done first."""

import subprocess
import sys

import pytest

WATCHED = """\
import threading, time
from pjit_train.compiler import child
threading.Thread(target=child._end_with_input, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize("more", ["", "time.sleep(60)\n"])
def test_it_ends_by_itself_or_with_its_input(more):
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED + more],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if more:
        process.stdin.close()
    assert process.wait(30) == (1 if more else 0)
    process.stdin.close()
    assert process.stderr.read() == ""
    process.stderr.close()
