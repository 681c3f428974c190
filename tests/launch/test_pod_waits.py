"""What an attempt waits for before its first step, by a clock that the tests turn."""

import os
import subprocess
import sys
import time

import pytest

from launch.pod.events import Begin, Compiled, Joined, Ready
from launch.pod.keeper import RAY_LOST
from launch.pod.waits import Waits
from launch.process import past_proxies, proxy_note

BEGIN, COMPILED = Begin(step=0), Compiled(seconds=1.0)
FIRST = "no_grpc_proxy"  # gRPC looks at it before no_proxy


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_who_is_behind_is_waited_for_and_not_for_ever(clock):
    waits = Waits(3, hang_seconds=100.0, where=" at 10.0.0.1:9")
    assert waits.behind() == ([0, 1, 2], "to start, with the tokens")
    assert waits.limit() == 1000.0
    for process in range(3):
        waits.on_event(process, Ready())
    assert waits.behind() == ([0, 1, 2], "to meet the others at 10.0.0.1:9")
    assert waits.limit() == 200.0
    for process in (0, 2):
        waits.on_event(process, Joined())
    assert waits.behind() == ([1], "to meet the others at 10.0.0.1:9")
    for process, event in ((1, Joined()), (0, BEGIN), (2, BEGIN), (0, COMPILED)):
        waits.on_event(process, event)
    assert waits.behind() == ([1], "to restore the checkpoint")
    assert waits.limit() == 500.0
    clock[0] += 499
    waits.on_event(0, COMPILED)  # said before: no sign of progress
    assert waits.seconds() == 499
    waits.on_event(1, BEGIN)
    assert waits.seconds() == 0
    assert waits.behind() == ([1, 2], "to compile the step")


def test_a_busy_machine_has_two_minutes_for_each_part(clock):
    waits = Waits(1, hang_seconds=5.0)
    for event in (Ready(), Joined(), BEGIN, COMPILED):
        assert waits.limit() == 120.0
        waits.on_event(0, event)
    assert waits.limit() == 120.0


def test_a_wait_is_told_after_10_seconds_and_then_ever_later(clock):
    waits, told = Waits(1, hang_seconds=60.0), []
    for second in range(100):
        clock[0] = 1000.0 + second
        if waits.due():
            told.append(second)
    assert told == [10, 20, 40, 80]
    waits.on_event(0, Ready())
    clock[0] += 9.9
    assert not waits.due()
    clock[0] += 0.2
    assert waits.due()


def test_own_addresses_go_past_proxies_and_others_still_do(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv(FIRST, "")
    past_proxies("127.0.0.1")
    assert os.environ["no_proxy"] == "example.org"  # there is no proxy to go past
    assert proxy_note() == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    for _ in range(2):  # once is enough
        past_proxies("127.0.0.1", "10.0.0.1", "127.0.0.1", "")
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,10.0.0.1"
    assert os.environ["NO_PROXY"] == "127.0.0.1,10.0.0.1"
    assert os.environ[FIRST] == ""  # gRPC would not look at the others
    monkeypatch.setenv(FIRST, "example.com")
    past_proxies("127.0.0.1")
    assert os.environ[FIRST] == "example.com,127.0.0.1"
    assert proxy_note() == " (HTTPS_PROXY set: own addresses go past that)"


def test_a_ray_that_never_starts_is_waited_for_until_its_limit():
    code = """
import contextlib, sys, time
from launch.pod import cluster, driver

@contextlib.contextmanager
def local(directory, *, dashboard):
  time.sleep(60)
  yield

cluster.local, driver._RAY = local, 0.2
options = {"address": None, "private": ".", "dashboard": False}
with driver._ray(options, print, sys.stderr):
  pass
"""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == RAY_LOST
    assert ended.stderr == "torsion: waited 0 s in vain for Ray to start here\n"
