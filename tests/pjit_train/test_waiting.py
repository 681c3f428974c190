"""Waits that are told, and those that have an end."""

import threading
import time

import pytest

from pjit_train import waiting


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(waiting, "_SAY", 0.05)


def test_a_wait_is_told_ever_later_until_it_is_over():
    lines = []
    with waiting.told("the mail", say=lines.append):
        time.sleep(0.35)
    assert 2 <= len(lines) <= 3  # after 0.05, 0.1 and 0.2 s
    assert set(lines) == {"waiting for the mail, 0 s so far"}
    told = len(lines)
    time.sleep(0.1)
    assert len(lines) == told


def test_a_wait_with_a_limit_ends_in_vain():
    ended, lines = threading.Event(), []
    with waiting.told("the mail", say=lines.append, limit=0.12, in_vain=ended.set):
        assert ended.wait(5)
    assert lines == ["waiting for the mail, 0 s of 0 s at most"] * 2


def test_a_wait_that_is_over_in_time_is_not_in_vain():
    called = []
    with waiting.told("the mail", say=called.append, limit=0.04, in_vain=lambda: called.append(1)):
        pass
    time.sleep(0.1)
    assert called == []
