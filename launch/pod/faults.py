"""Faults to inject: named failures at named steps, random ones by a seed, and repairs."""

import re
from dataclasses import asdict, dataclass

import numpy as np

from pjit_train.errors import UserError
from topology import TPU_V4, Part
from topology.hardware import Pod, block_of, switch_of

# What each kind takes after its colon; "" for those that there is one of.
KINDS = {
    "process": "a process",
    "host": "a host of the slice",
    "node": "a process, whose Ray node it is",
    "hang": "a process",
    "sigterm": "a process",
    "block": "a block of the slice",
    "ocs": "an optical switch",
    "manager": "",
    "driver": "",
}
EXAMPLES = "process:1@step:40, host:3@step:40, block:0@step:9, ocs:x,0,0@step:9 or manager@step:40"
_REPAIRED = ("block", "host", "ocs")
CHAOS = ("process", "host", "hang", "sigterm", "block", "ocs", "manager")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failure after a step: `what` is a number, or a switch as "x,0,0"; "" where there is one."""

    kind: str
    what: str
    step: int

    def __str__(self) -> str:
        return f"{self.kind}{':' if self.what else ''}{self.what}@step:{self.step}"

    @classmethod
    def parse(cls, text: str, pod: Pod = TPU_V4) -> "Fault":
        """The failure that a text such as host:3@step:40 names. UserError with the kinds."""
        match = re.fullmatch(r"(\w+)(?::([^@]+))?@step:([0-9]{1,9})", text.strip())
        kind, what, step = match.groups() if match else ("", "", "0")
        wants = KINDS.get(kind)
        if wants is None or bool(wants) != bool(what) or int(step) < 1:
            raise UserError(f"--fail {text}: want KIND:WHICH@step:N, such as {EXAMPLES}")
        if kind == "ocs":
            try:
                Part.parse(f"ocs:{what}", pod)
            except ValueError as error:
                raise UserError(f"--fail {text}: {error}") from error
        elif wants and not re.fullmatch(r"[0-9]{1,9}", what):
            raise UserError(f"--fail {text}: {what!r} is no number of {wants}, from 0")
        return cls(kind=kind, what=what or "", step=int(step))

    def check(self, *, processes: int, hosts: int, blocks: int) -> None:
        """UserError where a run has no such process, host or block."""
        there = {"process": processes, "node": processes, "hang": processes, "sigterm": processes}
        there |= {"host": hosts, "block": blocks}
        most = there.get(self.kind)
        if most is not None and int(self.what) >= most:
            raise UserError(f"--fail {self}: {KINDS[self.kind]} is one of 0 .. {most - 1}")

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A part of the pod that is back after a step, or a block that comes new to it.

    A host or a block of the pod counts as the pod does, not as the slice does that lies on it.
    """

    part: Part
    step: int

    def __str__(self) -> str:
        return f"{self.part}@step:{self.step}"

    @classmethod
    def parse(cls, text: str, pod: Pod = TPU_V4) -> "Repair":
        """The repair that a text such as block:1@step:80 names. UserError with the kinds."""
        what, _, step = text.strip().partition("@step:")
        if not re.fullmatch(r"[0-9]{1,9}", step) or int(step) < 1:
            raise UserError(f"--repair {text}: want PART@step:N, such as block:1@step:80")
        try:
            part = Part.parse(what, pod)
        except ValueError as error:
            raise UserError(f"--repair {text}: {error}") from error
        if part.kind not in _REPAIRED:
            raise UserError(f"--repair {text}: want one of {', '.join(_REPAIRED)}, which fail here")
        return cls(part=part, step=int(step))


def parse_chaos(text: str, pod: Pod = TPU_V4) -> dict[str, float]:
    """{kind: failures a step} of a text such as process=0.02,host=0.01."""
    rates = {}
    for part in text.split(","):
        kind, _, rate = part.partition("=")
        if kind in rates:
            raise UserError(f"--chaos {text}: {kind} is given twice; give it one rate")
        digits = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", rate)
        rates[kind] = float(rate) if digits else -1.0
        if kind not in CHAOS or not 0 <= rates[kind] <= 1:
            raise UserError(
                f"--chaos {text}: {part!r} is no KIND=RATE, failures a step from 0 to 1, such as "
                f"host=0.01; kinds are {', '.join(CHAOS)}"
            )
    if "ocs" in rates:
        try:
            switch_of(pod)
        except ValueError as error:
            raise UserError(f"--chaos {text}: ocs: {error}") from error
    return rates


def chaos(
    rates: dict[str, float],
    *,
    steps: int,
    processes: int,
    hosts: int,
    blocks: int,
    seed: int,
    pod: Pod = TPU_V4,
) -> list[Fault]:
    """Random failures, by step: after each step one of each kind with its rate as chance.

    They depend on the arguments alone.
    """
    found, places = [], block_of(pod).side
    for kind, rate in sorted(rates.items()):
        rng = np.random.default_rng([seed, CHAOS.index(kind)])
        hit, which = rng.random(steps) < rate, rng.integers(2**31, size=steps)
        switch = rng.integers(places, size=(steps, 2))
        for step in range(1, steps):
            if not hit[step - 1]:
                continue
            n = int(which[step - 1])
            what = {
                "process": str(n % processes),
                "hang": str(n % processes),
                "sigterm": str(n % processes),
                "host": str(n % hosts),
                "block": str(n % blocks),
                "ocs": f"{'xyz'[n % 3]},{switch[step - 1][0]},{switch[step - 1][1]}",
                "manager": "",
            }[kind]
            found.append(Fault(kind=kind, what=what, step=step))
    return sorted(found, key=lambda fault: fault.step)
