"""Events of a pod: what trainers tell, and what stands in `events.jsonl`, a JSON object each.

An object has "time", "event" (a name of `NAMES`), and a key to each other field of the event. One
that this version does not know, or that lacks a key, is read as `Unknown`; other keys are ignored.
"""

import json
from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Event of a pod, recorded at `time` (seconds since 1970); 0 before it is recorded."""

    time: float = 0.0

    @property
    def moment(self) -> float:
        """Seconds since 1970 at which it happened."""
        return self.time


@dataclass(frozen=True, kw_only=True)
class Unknown(Event):
    """Event of another version, with all that is known of it."""

    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Waiting(Event):
    """A wait that has lasted for a while, before the first step of an attempt or elsewhere."""

    attempt: int | None = None
    text: str


@dataclass(frozen=True, kw_only=True)
class PartChanged(Event):
    """A change of the pod: what failed, is out of use, was gone around or came back."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Switched(Event):
    """Cross-connects that were broken and made to place the slice."""

    text: str


@dataclass(frozen=True, kw_only=True)
class OfAttempt(Event):
    """Event in an attempt, by its number from 1; 0 of what a trainer tells while it waits for one.

    Tokenizing is of the attempt that it comes before.
    """

    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class AttemptBegun(OfAttempt):
    """Start of an attempt on a slice: its text, its blocks, and the texts of all failed parts."""

    slice: str
    blocks: tuple[int, ...]
    failed: tuple[str, ...]
    processes: int


@dataclass(frozen=True, kw_only=True)
class AttemptFailed(OfAttempt):
    """End of an attempt that did not end the run, and why."""

    text: str


@dataclass(frozen=True, kw_only=True)
class FaultMade(OfAttempt):
    """A failure that was made, by its text, such as host:3@step:40."""

    fault: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RepairMade(OfAttempt):
    """A part that came back, by the repair's text, such as block:1@step:80."""

    repair: str
    text: str


@dataclass(frozen=True, kw_only=True)
class AttemptOutgrown(OfAttempt):
    """End of an attempt, saved, whose run goes on on a larger slice, and which."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tokenize(OfAttempt):
    """Start of tokenizing a text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tokenizing(OfAttempt):
    """Progress of tokenizing a text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tokenized(OfAttempt):
    """End of tokenizing a text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class TokenizingStopped(OfAttempt):
    """End of tokenizing by an error."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Told(OfAttempt):
    """Event that a trainer tells: its seconds since 1970, and the processor time that it has had.

    Those of process 0 are recorded.
    """

    at: float = 0.0
    cpu: float = 0.0

    @property
    def moment(self) -> float:
        return self.at


@dataclass(frozen=True, kw_only=True)
class Warm(Told):
    """All is imported, and the trainer waits for an attempt; not recorded."""


@dataclass(frozen=True, kw_only=True)
class Beat(Told):
    """Sign of life; not recorded."""


@dataclass(frozen=True, kw_only=True)
class Ready(Told):
    """The trainer has its orders and joins the others."""


@dataclass(frozen=True, kw_only=True)
class Joined(Told):
    """The trainer has met the others."""


@dataclass(frozen=True, kw_only=True)
class Begin(Told):
    """Start of training after a step, 0 of a new run."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Compiled(Told):
    """The step is compiled, which took so many seconds."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step(Told):
    """A step is computed."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Save(Told):
    """Start of saving a checkpoint."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Saved(Told):
    """A checkpoint is saved, or will be by what saves in the background."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Copied(Told):
    """A checkpoint's shards are in the memory of the host; not recorded."""

    step: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Paused(Told):
    """Training waits after a step, where something is made to fail; not recorded."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Raised(Told):
    """The trainer ends by an error; not recorded.

    `kind` is "user" (a UserError), "training" (a TrainingError), "stale" (another attempt has
    begun) or "crash".
    """

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Ended(Told):
    """The trainer is done, or was asked to stop and has saved."""


NAMES: dict[str, type[Event]] = {
    "waiting": Waiting,
    "part": PartChanged,
    "switched": Switched,
    "attempt": AttemptBegun,
    "failure": AttemptFailed,
    "fault": FaultMade,
    "repair": RepairMade,
    "outgrown": AttemptOutgrown,
    "tokenize": Tokenize,
    "tokenizing": Tokenizing,
    "tokenized": Tokenized,
    "stopped": TokenizingStopped,
    "warm": Warm,
    "beat": Beat,
    "ready": Ready,
    "joined": Joined,
    "begin": Begin,
    "compiled": Compiled,
    "step": Step,
    "save": Save,
    "saved": Saved,
    "copied": Copied,
    "paused": Paused,
    "failed": Raised,
    "ended": Ended,
}
_NAME_OF = {of: name for name, of in NAMES.items()}


def write(event: Event) -> str:
    """The line of an event, without its end; what is None has no key."""
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    body = {"time": values.pop("time"), "event": _NAME_OF[type(event)]}
    return json.dumps(body | {name: value for name, value in values.items() if value is not None})


def read(line: str) -> Event:
    """The event of a line."""
    body = json.loads(line)
    of = NAMES.get(body["event"])
    if of is not None:
        known = fields(of)
        needed = {field.name for field in known if field.default is MISSING}
        if needed <= body.keys():
            return of(**{f.name: _frozen(body[f.name]) for f in known if f.name in body})
    return Unknown(time=body["time"], body=body)


def text_of(event: Event) -> str | None:
    """The line that an event has for people; None where it has none."""
    return event.body.get("text") if isinstance(event, Unknown) else getattr(event, "text", None)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
