"""Where the time of a run went, by events with round numbers."""

from dataclasses import replace

import pytest

from launch.pod import events
from launch.pod.goodput import account, expected_goodput
from launch.pod.record import Record, read_events
from launch.pod.timeline import page

# Ten seconds to start, of which four compile; two steps of one second; a save of half a second; a
# step that is lost; found two seconds later; and once more to the end.
EVENTS = [
    events.AttemptBegun(time=100.0, attempt=1, slice="2x2x2", blocks=(0,), failed=(), processes=2),
    events.Joined(at=104.0, attempt=1),
    events.Begin(at=105.0, attempt=1, step=0),
    events.Compiled(at=110.0, attempt=1, seconds=4.0),
    events.Step(at=111.0, attempt=1, step=1, loss=4.5),
    events.Step(at=112.0, attempt=1, step=2, loss=4.25),
    events.Save(at=112.0, attempt=1, step=2),
    events.Saved(at=112.5, attempt=1, step=2),
    events.Step(at=113.5, attempt=1, step=3, loss=4.0),
    events.FaultMade(time=114.0, attempt=1, fault="host:0@step:3", text="made to fail"),
    events.AttemptFailed(time=115.5, attempt=1, text="found <it>"),
    events.AttemptBegun(
        time=116.0, attempt=2, slice="2x2x2", blocks=(1,), failed=("host:0,0",), processes=2
    ),
    events.Compiled(at=118.0, attempt=2, seconds=0.5),
    events.Step(at=119.0, attempt=2, step=3, loss=4.0),
    events.Step(at=120.0, attempt=2, step=4, loss=3.75),
]


def test_every_second_has_one_cause():
    found = account(EVENTS)
    assert found.seconds == pytest.approx(
        {
            "kept": 4.0,
            "data": 0.0,
            "redone": 1.0,
            "save": 0.5,
            "start": 6.0 + 1.5,
            "compile": 4.0 + 0.5,
            "failure": 2.0 + 0.5,
            "away": 0.0,
        }
    )
    assert found.total == pytest.approx(20.0)
    assert found.goodput == pytest.approx(0.2)
    assert found.failures == 1
    for before, after in zip(found.spans, found.spans[1:], strict=False):
        assert before.end == after.start


def test_a_time_without_a_driver_is_apart():
    later = [replace(event, at=event.at + 100) for event in EVENTS[12:]]
    found = [*EVENTS[:9], replace(EVENTS[11], time=213.5), *later]
    assert account(found).seconds["away"] == pytest.approx(100.0)


def test_tokenizing_is_a_cause_of_its_own():
    """8 s of tokenizing that failed, a minute without a driver, and 20 s in which it is done."""
    before = [
        events.Tokenize(time=8.0, attempt=1, text="tokenizing"),
        events.TokenizingStopped(time=16.0, attempt=1, error="no text"),
        events.Tokenize(time=76.0, attempt=1, text="tokenizing"),
        events.Tokenizing(time=90.0, attempt=1, text="tokenized 3 MB"),
        events.Tokenized(time=96.0, attempt=1, text="tokenized"),
    ]
    found, without = account([*before, *EVENTS]), account(EVENTS)
    assert found.seconds == without.seconds | {
        "data": 8.0 + 20.0,
        "away": 60.0,
        "start": without.seconds["start"] + 4.0,
    }
    assert page([*before, *EVENTS]).count("2 attempts") == 1


def test_tokenizing_that_a_killed_driver_did_counts_as_tokenizing():
    """600 s that are told of, a driver that is killed then, and 5 s later one that does it anew."""
    told = [
        events.Tokenize(time=0.0, attempt=1, text="tokenizing"),
        events.Tokenizing(time=600.0, attempt=1, text="tokenized 3 MB"),
        events.Tokenize(time=605.0, attempt=1, text="tokenizing"),
        events.Tokenized(time=1205.0, attempt=1, text="tokenized"),
    ]
    found = account(told)
    assert {cause: s for cause, s in found.seconds.items() if s} == {"data": 1200.0, "away": 5.0}


def test_what_is_said_of_parts_of_the_pod_has_no_time_of_its_own():
    """As "out of use" after a failure, and "in memory" after the begin of an attempt."""
    said = [
        events.PartChanged(time=115.75, text="out of use"),
        events.PartChanged(time=116.5, text="in memory"),
    ]
    everything = sorted([*EVENTS, *said], key=lambda event: event.moment)
    assert account(everything) == account(EVENTS)


def test_what_is_expected_of_as_many_failures():
    """One failure in 5.5 s of steps and saves: mtbf 5.5; work 2 steps of 1 s, save 0.5 (Daly)."""
    import math

    found = account(EVENTS)
    expected = 2.0 / (5.5 * (math.exp(2.5 / 5.5) - 1)) * 5.5 / 20
    measured = expected_goodput(found, steps_between_saves=2, saves=1)
    assert measured == pytest.approx(expected, rel=1e-9)
    assert expected_goodput(account(EVENTS[:9]), steps_between_saves=2, saves=1) is None


def test_the_page_says_all_and_trusts_nothing():
    text = page(EVENTS)
    assert "found &lt;it&gt;" in text
    assert text.count("<rect") == 9
    assert "goodput 20.0%" in text
    assert "<script" not in text


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    file = tmp_path / "events.jsonl"
    record = Record(file)
    record(EVENTS[0])
    record.close()
    with file.open("a") as half:
        half.write('{"time": 1, "ev')
    assert [e.attempt for e in read_events(file)] == [1]
    record = Record(file)
    record(EVENTS[11])
    record.close()
    assert [e.attempt for e in read_events(file)] == [1, 2]
