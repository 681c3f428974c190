"""Record of what happened, and when: a line of `events.jsonl` an event; it outlives the driver."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from launch.pod import events
from launch.pod.events import Event

E = TypeVar("E", bound=Event)


class Record:
    """Appends events to a file, with the time, and tells them to listeners."""

    def __init__(self, file: Path):
        self.events = read_events(file) if file.exists() else []
        if file.exists():  # without a line that a kill cut short
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        self.listeners: list[Callable[[Event], None]] = []
        self._file = file.open("a", buffering=1)

    def __call__(self, event: Event) -> None:
        event = replace(event, time=time.time())
        self._file.write(events.write(event) + "\n")
        self.events.append(event)
        for listener in self.listeners:
            listener(event)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def close(self) -> None:
        self._file.close()


def read_events(file: Path) -> list[Event]:
    """The events of a file, by time; a last line that a kill cut short is left out."""
    lines = file.read_text().splitlines(keepends=True)
    found = [events.read(line) for line in lines if line.endswith("\n")]
    return sorted(found, key=lambda event: event.time)
