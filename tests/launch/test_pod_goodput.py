"""Where the time of a run went, by events with round numbers."""

import pytest

from launch.pod.goodput import account, expected_goodput
from launch.pod.record import Record, read_events
from launch.pod.timeline import page

# Ten seconds to start, of which four compile; two steps of one second; a save of half a second; a
# step that is lost; found two seconds later; and once more to the end.
EVENTS = [
    {"time": 100.0, "event": "attempt", "attempt": 1},
    {"time": 0.0, "at": 104.0, "event": "joined", "attempt": 1},
    {"time": 0.0, "at": 105.0, "event": "begin", "attempt": 1, "step": 0},
    {"time": 0.0, "at": 110.0, "event": "compiled", "attempt": 1, "seconds": 4.0},
    {"time": 0.0, "at": 111.0, "event": "step", "attempt": 1, "step": 1},
    {"time": 0.0, "at": 112.0, "event": "step", "attempt": 1, "step": 2},
    {"time": 0.0, "at": 112.0, "event": "save", "attempt": 1, "step": 2},
    {"time": 0.0, "at": 112.5, "event": "saved", "attempt": 1, "step": 2},
    {"time": 0.0, "at": 113.5, "event": "step", "attempt": 1, "step": 3},
    {"time": 114.0, "event": "fault", "attempt": 1, "text": "made to fail"},
    {"time": 115.5, "event": "failure", "attempt": 1, "text": "found <it>"},
    {"time": 116.0, "event": "attempt", "attempt": 2},
    {"time": 0.0, "at": 118.0, "event": "compiled", "attempt": 2, "seconds": 0.5},
    {"time": 0.0, "at": 119.0, "event": "step", "attempt": 2, "step": 3},
    {"time": 0.0, "at": 120.0, "event": "step", "attempt": 2, "step": 4},
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
    events = [*EVENTS[:9], {"time": 213.5, "event": "attempt", "attempt": 2}, *EVENTS[12:]]
    events[-3:] = [event | {"at": event["at"] + 100} for event in EVENTS[12:]]
    assert account(events).seconds["away"] == pytest.approx(100.0)


def test_tokenizing_is_a_cause_of_its_own():
    """8 s of tokenizing that failed, a minute without a driver, and 20 s in which it is done."""
    before = [
        {"time": 8.0, "event": "tokenize", "attempt": 1, "text": "tokenizing"},
        {"time": 16.0, "event": "stopped", "attempt": 1, "error": "no text"},
        {"time": 76.0, "event": "tokenize", "attempt": 1, "text": "tokenizing"},
        {"time": 90.0, "event": "tokenizing", "attempt": 1, "text": "tokenized 3 MB"},
        {"time": 96.0, "event": "tokenized", "attempt": 1, "text": "tokenized"},
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
    events = [
        {"time": 0.0, "event": "tokenize", "attempt": 1, "text": "tokenizing"},
        {"time": 600.0, "event": "tokenizing", "attempt": 1, "text": "tokenized 3 MB"},
        {"time": 605.0, "event": "tokenize", "attempt": 1, "text": "tokenizing"},
        {"time": 1205.0, "event": "tokenized", "attempt": 1, "text": "tokenized"},
    ]
    found = account(events)
    assert {cause: s for cause, s in found.seconds.items() if s} == {"data": 1200.0, "away": 5.0}


def test_what_is_said_of_parts_of_the_pod_has_no_time_of_its_own():
    """As "out of use" after a failure, and "in memory" after the begin of an attempt."""
    said = [
        {"time": 115.75, "event": "part", "text": "out of use"},
        {"time": 116.5, "event": "part", "text": "in memory"},
    ]
    events = sorted([*EVENTS, *said], key=lambda event: event.get("at", event["time"]))
    assert account(events) == account(EVENTS)


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
    record("attempt", attempt=1)
    record.close()
    with file.open("a") as half:
        half.write('{"time": 1, "ev')
    assert [e["attempt"] for e in read_events(file)] == [1]
    record = Record(file)
    record("attempt", attempt=2)
    record.close()
    assert [e["attempt"] for e in read_events(file)] == [1, 2]
