"""Workloads of files: the jobs, failures, costs and policies of `torsion fleet`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.reports.documents import keyed, read_json, short
from pjit_train.errors import UserError
from topology import FailureRates, Job, Outage, Part, Policy, Slice
from topology.fleet.policies import (
    AnyBlocks,
    AsPublished,
    Backfill,
    Cheapest,
    ContiguousBox,
    InOrder,
    NeverReroute,
)
from topology.fleet.progress import ASSUMED_COSTS, Costs
from topology.fleet.workload import (
    DAY,
    PUBLISHED_RATES,
    SIZES,
    generate_jobs,
    generate_maintenance,
    generate_outages,
)
from topology.hardware import Pod, of_blocks
from topology.numbers import choice, number, whole

HOUR = 3600.0
POLICIES = {
    "switches": Policy(),
    "switches, never rerouting": Policy(recovery=NeverReroute()),
    "static wiring": Policy(placement=ContiguousBox()),
    "static wiring, jobs moved": Policy(placement=ContiguousBox(), defragment=True),
}
"""Those of a workload that names none."""

_WHAT = 'a JSON workload such as {"days": 365, "jobs": {"load": 0.8, "seed": 1}}'
_KEYS = ("days", "jobs", "failures", "outages", "maintenance", "costs", "policies")
_GENERATED = ("load", "mean_work_hours", "sizes", "urgent", "opt_in", "slowdown", "seed")
_JOB = ("name", "slice", "arrival_hours", "work_hours", "priority", "slowdown")
_OUTAGE = ("part", "start_hours", "end_hours", "planned")
_MAINTENANCE = ("every_days", "lasts_hours")
_RATES = ("host", "cable", "switch")
_FAILURES = (*_RATES, *(f"{name}_repair_hours" for name in _RATES), "seed")
_COSTS = tuple(field.name for field in dataclasses.fields(Costs))
_POLICY = ("name", "wiring", "wraparound", "queue", "patience_hours", "recovery", "spares")
_POLICY += ("preempt", "defragment", "checkpoint_hours")
_RECOVERIES: dict[str, type[Cheapest | AsPublished | NeverReroute]] = {
    "cheapest": Cheapest,
    "as_published": AsPublished,
    "never_reroute": NeverReroute,
}
_MOST_DAYS = 36_500
_MOST_HOURS = _MOST_DAYS * 24.0
_MOST_JOBS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A pod's jobs and outages up to a horizon, in seconds, and what its scheduler may do.

    Attributes:
      rates: what policies expect of failures.
    """

    name: str
    pod: Pod
    horizon: float
    jobs: Sequence[Job]
    outages: Sequence[Outage]
    rates: FailureRates
    costs: Costs
    policies: dict[str, Policy]


def read_workload(name: str, pod: Pod) -> Workload:
    """Reads the workload of a file.

    Raises:
      UserError: it holds no jobs, or something in it is unknown, missing or out of its range; names
        the file, the entry and the key.
    """
    said = keyed(name, read_json(name, _WHAT), _KEYS, ("jobs",))
    try:
        of_blocks(pod)
        days = number(f"{name}: days", said.get("days", 365), above=0, most=_MOST_DAYS)
        horizon = days * DAY
        jobs = _jobs(f"{name}: jobs", said["jobs"], horizon, pod)
        rates, outages = _failures(f"{name}: failures", said.get("failures", {}), horizon, pod)
        if "outages" in said:
            outages += _outages(f"{name}: outages", said["outages"], pod)
        if "maintenance" in said:
            outages += _maintenance(f"{name}: maintenance", said["maintenance"], horizon, pod)
        costs = keyed(f"{name}: costs", said.get("costs", {}), _COSTS)
        return Workload(
            name=name,
            pod=pod,
            horizon=horizon,
            jobs=jobs,
            outages=outages,
            rates=rates,
            costs=_prefixed(name, dataclasses.replace, ASSUMED_COSTS, **costs),
            policies=_policies(f"{name}: policies", said.get("policies"), pod),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _prefixed(where: str, make, *args, **options):
    """Calls a function of the library, whose message gets the place in the file before it."""
    try:
        return make(*args, **options)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _hours(
    where: str,
    said: dict[str, Any],
    key: str,
    default: float | None = None,
    above: float | None = None,
) -> float:
    """Seconds of the hours under a key, which are more than `above`, or 0 or more."""
    hours = said.get(key, default)
    name = f"{where}: {key}"
    return HOUR * number(name, hours, above=above, most=_MOST_HOURS, unit="hours")


def _bool(where: str, said: dict[str, Any], key: str) -> bool:
    value = said.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} {short(value)}: true or false")
    return value


def _list(where: str, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {short(value)}: want a list of {what}, one at least")
    return value


def _jobs(where: str, said: Any, horizon: float, pod: Pod) -> list[Job]:
    if isinstance(said, dict):
        jobs = _generated(where, said, horizon, pod)
        if not jobs:
            raise UserError(f"{where}: none arrives; raise load or days, or lower mean_work_hours")
        return jobs
    entries = _list(where, said, "jobs, or an object such as {'load': 0.8}")
    if len(entries) > _MOST_JOBS:
        raise UserError(f"{where}: {len(entries)}; {_MOST_JOBS} at most")
    return [_job(f"{where}: entry {i}", entry, i, pod) for i, entry in enumerate(entries, start=1)]


def _job(where: str, said: Any, i: int, pod: Pod) -> Job:
    said = keyed(where, said, _JOB, ("slice", "work_hours"))
    name = said.get("name", f"job{i}")
    if not isinstance(name, str) or not name or not isinstance(said["slice"], str):
        key = "slice" if isinstance(name, str) and name else "name"
        raise UserError(f"{where}: {key} {short(said[key])}: want a text")
    priority = number(f"{where}: priority", said.get("priority", 0), least=-1e9, most=1e9)
    slowdown = said.get("slowdown")
    if slowdown is not None:
        number(f"{where}: slowdown", slowdown, most=1e6)
    return Job(
        name=name,
        slice=_prefixed(where, Slice.parse, said["slice"], pod),
        arrival=_hours(where, said, "arrival_hours", 0.0),
        work=_hours(where, said, "work_hours", above=0),
        priority=whole(f"{where}: priority", priority, least=-(10**9)),
        slowdown=slowdown,
    )


def _generated(where: str, said: dict[str, Any], horizon: float, pod: Pod) -> list[Job]:
    said = keyed(where, said, _GENERATED)
    load = number(f"{where}: load", said.get("load", 0.8), most=100)
    options: dict[str, Any] = {
        "urgent": number(f"{where}: urgent", said.get("urgent", 0.1), most=1),
        "opt_in": number(f"{where}: opt_in", said.get("opt_in", 0.95), most=1),
        "seed": whole(f"{where}: seed", said.get("seed", 0), most=2**63),
    }
    slowdown = said.get("slowdown", [0.005, 0.086])
    if not isinstance(slowdown, list) or len(slowdown) != 2:
        raise UserError(f"{where}: slowdown {short(slowdown)}: want [least, most]")
    for end in slowdown:
        number(f"{where}: slowdown", end, most=1e6)
    sizes: Any = SIZES
    if "sizes" in said:
        sizes = [
            _size(f"{where}: sizes: entry {i}", entry, pod)
            for i, entry in enumerate(
                _list(f"{where}: sizes", said["sizes"], "objects with share and slices"), start=1
            )
        ]
    return _prefixed(
        where.removesuffix(": jobs"),
        generate_jobs,
        horizon,
        load=load,
        mean_work=_hours(where, said, "mean_work_hours", 24.0, above=0),
        sizes=sizes,
        slowdown=tuple(slowdown),
        pod=pod,
        **options,
    )


def _size(where: str, said: Any, pod: Pod) -> tuple[float, list[str]]:
    said = keyed(where, said, ("share", "slices"), ("share", "slices"))
    names = _list(f"{where}: slices", said["slices"], "slices")
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{where}: slices: {short(name)}: want a text such as 4x4x8")
        _prefixed(where, Slice.parse, name, pod)
    return number(f"{where}: share", said["share"], most=1e9), names


def _failures(where: str, said: Any, horizon: float, pod: Pod) -> tuple[FailureRates, list[Outage]]:
    said = keyed(where, said, _FAILURES)
    changed = {
        name: number(f"{where}: {name}", said[name], most=1e6, unit="failures a day")
        for name in _RATES
        if name in said
    }
    repairs = {
        f"{name}_repair": _hours(where, said, f"{name}_repair_hours")
        for name in _RATES
        if f"{name}_repair_hours" in said
    }
    rates = dataclasses.replace(PUBLISHED_RATES, **changed, **repairs)
    seed = whole(f"{where}: seed", said.get("seed", 0), most=2**63)
    return rates, _prefixed(where, generate_outages, horizon, rates, seed=seed, pod=pod)


def _outages(where: str, said: Any, pod: Pod) -> list[Outage]:
    found = []
    for i, entry in enumerate(_list(where, said, "outages"), start=1):
        place = f"{where}: entry {i}"
        entry = keyed(place, entry, _OUTAGE, _OUTAGE[:3])
        if not isinstance(entry["part"], str):
            raise UserError(f"{place}: part {short(entry['part'])}: want a text such as host:3,1")
        part = _prefixed(place, Part.parse, entry["part"], pod)
        ends = [_hours(place, entry, key) for key in _OUTAGE[1:3]]
        planned = _bool(place, entry, "planned")
        found.append(_prefixed(place, Outage, *ends, part, planned))
    return found


def _maintenance(where: str, said: Any, horizon: float, pod: Pod) -> list[Outage]:
    said = keyed(where, said, _MAINTENANCE, _MAINTENANCE)
    days = number(f"{where}: every_days", said["every_days"], above=0, most=_MOST_DAYS)
    lasts = _hours(where, said, "lasts_hours", above=0)
    return _prefixed(where, generate_maintenance, horizon, every=days * DAY, lasts=lasts, pod=pod)


def _policies(where: str, said: Any, pod: Pod) -> dict[str, Policy]:
    if said is None:
        return dict(POLICIES)
    found: dict[str, Policy] = {}
    for i, entry in enumerate(_list(where, said, "policies"), start=1):
        place = f"{where}: entry {i}"
        entry = keyed(place, entry, _POLICY)
        name = entry.get("name", f"policy {i}")
        if not isinstance(name, str) or not name or name in found:
            raise UserError(f"{place}: name {short(name)}: want a text, another for each policy")
        found[name] = _policy(place, entry, pod)
    return found


def _policy(where: str, said: dict[str, Any], pod: Pod) -> Policy:
    wiring = choice(f"{where}: wiring", said.get("wiring", "switches"), ("switches", "static"))
    queue = choice(f"{where}: queue", said.get("queue", "backfill"), ("backfill", "in_order"))
    recovery = choice(f"{where}: recovery", said.get("recovery", "cheapest"), _RECOVERIES)
    wraparound = _bool(where, said, "wraparound")
    defragment = _bool(where, said, "defragment")
    if wiring == "switches" and (wraparound or defragment):
        key = "wraparound" if wraparound else "defragment"
        raise UserError(f"{where}: {key} is of wiring static: with switches any blocks will do")
    if queue == "in_order" and "patience_hours" in said:
        raise UserError(f"{where}: patience_hours is of queue backfill")
    interval = None
    if said.get("checkpoint_hours") is not None:
        interval = _hours(where, said, "checkpoint_hours", above=0)
    return Policy(
        placement=ContiguousBox(wraparound=wraparound) if wiring == "static" else AnyBlocks(),
        queue=InOrder()
        if queue == "in_order"
        else Backfill(_hours(where, said, "patience_hours", 24.0)),
        recovery=_RECOVERIES[recovery](),
        spares=whole(f"{where}: spares", said.get("spares", 0), most=of_blocks(pod).num_blocks),
        preempt=_bool(where, said, "preempt"),
        defragment=defragment,
        interval=interval,
    )
