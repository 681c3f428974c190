"""A step's timeline as Trace Event JSON, which Perfetto (ui.perfetto.dev) and Chrome open."""

import json
from typing import Any

from topology.plan.replay import Replay

TRACKS = ("compute", "network", "data-centre network", "copies")


def trace(step: Replay, *, name: str = "step") -> dict[str, Any]:
    """The events of a replay: a track each for compute, networks and copies within the chip.

    The first round of a loop is drawn whole and the others as one stretch. Times are microseconds,
    as the format has them.
    """
    rows: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": name}}
    ]
    for number, track in enumerate(TRACKS):
        named = {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}
        rows.append(named)
    for event in step.events:
        rows.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": TRACKS.index(event.track),
                "name": event.name,
                "ts": event.begin * 1e6,
                "dur": event.seconds * 1e6,
            }
        )
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def trace_text(step: Replay, *, name: str = "step") -> str:
    """`trace` as text."""
    return json.dumps(trace(step, name=name))
