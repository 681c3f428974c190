"""Record of what happened, and when: a line of `events.jsonl` an event; it outlives the driver."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Record:
    """Appends events to a file and tells them to listeners.

    An event has "time" (seconds since 1970), "event" (its kind), and more by its kind. Those with a
    "text" are for people.
    """

    def __init__(self, file: Path):
        self.events = read_events(file) if file.exists() else []
        if file.exists():  # without a line that a kill cut short
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._file = file.open("a", buffering=1)

    def __call__(self, event: str, **figures) -> None:
        body = {"time": time.time(), "event": event} | figures
        self._file.write(json.dumps(body) + "\n")
        self.events.append(body)
        for listener in self.listeners:
            listener(body)

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in kinds]

    def close(self) -> None:
        self._file.close()


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a file, by time; a last line that a kill cut short is left out."""
    lines = file.read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return sorted(events, key=lambda event: event["time"])
