"""Events and orders of pods: lines as they stand on disk, of this version and of others."""

import json
import math

from launch.pod import events
from launch.pod.goodput import account
from launch.pod.orders import Orders, RunningOrder, StandingOrders
from launch.pod.record import Record, read_events
from launch.pod.timeline import page

# A line of each kind that pods record, with all of its keys in their order.
LINES = """\
{"time": 1700000000.25, "event": "tokenize", "attempt": 1, "text": "tokenizing the train text"}
{"time": 1700000000.5, "event": "tokenizing", "attempt": 1, "text": "tokenized 3 MB"}
{"time": 1700000001.0, "event": "tokenized", "attempt": 1, "text": "tokenized it"}
{"time": 1700000001.5, "event": "switched", "text": "slice 4x4x4 on blocks 0: 0 cross-connects"}
{"time": 1700000002.0, "event": "attempt", "attempt": 1, "slice": "4x4x4", "blocks": [0], \
"failed": ["host:1,3"], "processes": 4}
{"time": 1700000003.5, "event": "waiting", "attempt": 1, "text": "waiting for process 1"}
{"time": 1700000003.75, "event": "waiting", "text": "waiting for Ray"}
{"time": 1700000003.875, "event": "ready", "attempt": 1, "at": 1700000003.5, "cpu": 2.25}
{"time": 1700000004.0, "event": "joined", "attempt": 1, "at": 1700000003.875, "cpu": 2.5}
{"time": 1700000004.5, "event": "begin", "attempt": 1, "at": 1700000004.25, "cpu": 2.75, "step": 0}
{"time": 1700000006.5, "event": "compiled", "attempt": 1, "at": 1700000006.25, "cpu": 4.5, \
"seconds": 1.5}
{"time": 1700000007.5, "event": "step", "attempt": 1, "at": 1700000007.25, "cpu": 5.5, "step": 1, \
"loss": 5.5}
{"time": 1700000008.5, "event": "step", "attempt": 1, "at": 1700000008.25, "cpu": 6.5, "step": 2, \
"loss": NaN}
{"time": 1700000009.0, "event": "save", "attempt": 1, "at": 1700000008.25, "cpu": 6.5, "step": 2}
{"time": 1700000009.25, "event": "saved", "attempt": 1, "at": 1700000009.0, "cpu": 6.75, "step": 2}
{"time": 1700000009.5, "event": "fault", "attempt": 1, "fault": "host:0@step:2", \
"text": "made to fail: host:0@step:2"}
{"time": 1700000010.0, "event": "failure", "attempt": 1, "text": "lost process 0 (host 0)"}
{"time": 1700000010.25, "event": "part", "text": "out of use: host:0,0; 62 blocks are free"}
{"time": 1700000011.0, "event": "ended", "attempt": 2, "at": 1700000010.75, "cpu": 7.0}
{"time": 1700000012.0, "event": "stopped", "attempt": 3, "error": "no text"}
{"time": 1700000013.0, "event": "repair", "attempt": 3, "repair": "block:1@step:8", \
"text": "block:1 is back: 1 blocks are free"}
{"time": 1700000014.0, "event": "outgrown", "attempt": 3, "text": "room for 4x4x8"}
""".splitlines()
OF_A_NEWER_VERSION = """\
{"time": 1700000010.5, "event": "comet", "text": "a <comet> hit the pod", "size": {"km": [3]}}
{"time": 1700000010.625, "event": "step", "attempt": 1, "at": 1700000010.5, "number": 3}
{"time": 1700000010.75, "event": "comet"}
{"time": 1700000012.5, "event": "part", "text": "out of use", "why": "a comet"}
""".splitlines()


def test_a_line_is_read_and_written_to_the_letter():
    for line in LINES:
        event = events.read(line)
        assert not isinstance(event, events.Unknown)
        assert events.write(event) == line
    unrecorded = {"warm", "beat", "copied", "paused", "failed"}
    assert {json.loads(line)["event"] for line in LINES} == events.NAMES.keys() - unrecorded


def test_a_line_says_what_its_event_has():
    found = [events.read(line) for line in LINES]
    attempt, step, bad = found[4], found[11], found[12]
    assert attempt == events.AttemptBegun(
        time=1700000002.0,
        attempt=1,
        slice="4x4x4",
        blocks=(0,),
        failed=("host:1,3",),
        processes=4,
    )
    assert step == events.Step(
        time=1700000007.5, at=1700000007.25, cpu=5.5, attempt=1, step=1, loss=5.5
    )
    assert math.isnan(bad.loss)
    assert (step.moment, attempt.moment) == (1700000007.25, 1700000002.0)


def test_what_a_newer_version_recorded_is_kept_shown_and_not_accounted(tmp_path):
    file = tmp_path / "events.jsonl"
    text = "".join(f"{line}\n" for line in [*LINES, *OF_A_NEWER_VERSION])
    file.write_text(text)
    record = Record(file)
    unknown = record.of(events.Unknown)
    assert [events.text_of(event) for event in unknown] == ["a <comet> hit the pod", None, None]
    assert record.of(events.PartChanged)[-1] == events.PartChanged(
        time=1700000012.5, text="out of use"
    )
    assert account(record.events) == account([events.read(line) for line in LINES])
    assert "a &lt;comet&gt; hit the pod" in page(record.events)
    record(events.PartChanged(text="repaired"))
    record.close()
    assert file.read_text().startswith(text)
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last.pop("event"), last.pop("text")) == ("part", "repaired")
    assert last.keys() == {"time"}
    assert len(read_events(file)) == len(LINES) + len(OF_A_NEWER_VERSION) + 1


def test_orders_reach_a_trainer_as_they_are():
    orders = Orders(
        attempt=3,
        coordinator="127.0.0.1:9",
        process=1,
        processes=2,
        devices=None,
        axes=["data", "fsdp"],
        order=[[0, 2], [1, 3]],
        coordinates=[[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]],
        pauses=[4, 9],
        steps_before=None,
        slow=0.125,
        memory=8,
    )
    standing = StandingOrders(
        config="a\nb.gin", directory="d", devices=4, log="d/{}", cwd="/", env={"A": "é"}
    )
    for order in (orders, standing, RunningOrder(go_on=True), RunningOrder(slow=0.5)):
        assert "\n" not in order.write()
        assert type(order).read(order.write()) == order
