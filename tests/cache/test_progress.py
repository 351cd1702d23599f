"""Progress: a bar with the time that is left on a terminal, plain lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

from cache import progress

WORK = """
import time
from cache.progress import track
with track("reading", 3) as work:
    for _ in range(3):
        time.sleep(0.05)
        work.advance(1, "now")
"""


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


def test_plain_lines_come_now_and_then_and_say_how_long(clock, capsys):
    with progress.track("reading", 10) as work:
        for _ in range(10):
            clock(4.0)
            work.advance(1, "a note")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 3/10 a note, about 28 s left",
        "reading: 6/10 a note, about 16 s left",
        "reading: 9/10 a note, about 4 s left",
        "reading: 10/10 a note",
    ]


def test_what_an_earlier_run_did_does_not_make_the_rest_look_quick(clock, capsys):
    with progress.track("train", 100, before=90) as work:
        clock(20.0)
        work.advance()
    assert capsys.readouterr().err == "train: 91/100, about 180 s left\n"


def test_on_a_terminal_there_is_a_bar():
    reading, writing = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", WORK], stderr=writing, env=env, check=False)
    os.close(writing)
    raw = b""
    while True:
        try:
            piece = os.read(reading, 65536)
        except OSError:
            break
        raw += piece
    os.close(reading)
    assert done.returncode == 0
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", raw).decode()
    assert "reading now" in shown
    assert "3/3" in shown
    assert "━" in shown
    assert re.search(r"0:00:0\d", shown)
    assert "left" not in shown
