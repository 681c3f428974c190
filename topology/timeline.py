"""Timelines as Trace Event JSON, which Perfetto (ui.perfetto.dev) and Chrome open."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """A stretch of a timeline: seconds from its begin, on a track of a process."""

    name: str
    track: str
    begin: float
    seconds: float
    process: int = 0


def trace_text(
    events: Iterable[Event], *, processes: Mapping[int, str], tracks: Sequence[str]
) -> str:
    """The JSON of a timeline. Times are microseconds, as the format has them.

    Args:
      processes: names, by number.
      tracks: of each process, the first one for what comes one after another; on the others
        stretches may overlap, so each is a pair of a begin and an end there.
    """
    rows: list[dict[str, Any]] = []
    for process, name in processes.items():
        rows.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
        for number, track in enumerate(tracks):
            named = {"ph": "M", "pid": process, "tid": number, "name": "thread_name"}
            rows.append(named | {"args": {"name": track}})
    for number, event in enumerate(events):
        track = tracks.index(event.track)
        begin, lasts = event.begin * 1e6, event.seconds * 1e6
        row = {"pid": event.process, "tid": track, "name": event.name}
        if track == 0:
            rows.append(row | {"ph": "X", "ts": begin, "dur": lasts})
            continue
        row |= {"cat": event.track, "id": number}
        rows += [row | {"ph": "b", "ts": begin}, row | {"ph": "e", "ts": begin + lasts}]
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})
