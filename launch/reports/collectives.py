"""`torsion collective`: the time of a collective on a slice, and bounds below it."""

from typing import Any

import numpy as np

from launch.reports.sizes import parse_size, shown_size
from pjit_train.errors import UserError
from topology import Network, Slice, collective_cost, groups_of_axes
from topology.collectives.collectives import lower_bounds
from topology.hardware import Pod


def report(kind: str, size: str, shape: str, axes: str | None, pod: Pod) -> dict[str, Any]:
    """The figures of a collective, as `torsion collective --json` prints them.

    Returns:
      `seconds` of the schedule, `latency_seconds` of its hops and `transfer_seconds` of the bytes
      on its fullest link. `bound_seconds` is the largest of `bounds`; no schedule takes less.
      `bytes_per_second` is bytes / seconds. `members` are the chips of a group.

    Raises:
      UserError: there is no such collective, slice or axis, or the size is none.
    """
    bytes = parse_size(size, "--bytes")
    try:
        slice = Slice.parse(shape, pod)
        names = "xyz"[: pod.dimensions]
        over = _axes(axes, names)
        devices = np.arange(slice.num_chips).reshape(slice.shape)
        groups = groups_of_axes(slice, devices, [names.index(name) for name in over])
        network = Network.of(pod)
        cost = collective_cost(kind, groups)
        bounds = lower_bounds(kind, groups, bytes, network)
    except ValueError as error:
        raise UserError(str(error)) from error
    seconds = cost.seconds(bytes, network)
    latency = cost.hops * network.hop_latency
    return {
        "kind": kind,
        "pod": pod.name,
        "slice": str(slice),
        "axes": over,
        "members": groups.size,
        "groups": len(groups.members),
        "bytes": bytes,
        "seconds": seconds,
        "latency_seconds": latency,
        "transfer_seconds": seconds - latency,
        "bytes_per_second": bytes / seconds if seconds else None,
        "bound_seconds": max(bounds.values()),
        "bounds": bounds,
    }


def _axes(axes: str | None, names: str) -> list[str]:
    over = list(names) if axes is None else [name.strip() for name in axes.split(",")]
    if wrong := [name for name in over if name not in names or not name]:
        raise UserError(f"--axes {axes}: no axis {wrong[0]!r}; use {', '.join(names)}")
    if len(set(over)) < len(over):
        raise UserError(f"--axes {axes}: names an axis twice; give it once")
    return over


def describe(found: dict[str, Any]) -> str:
    """The figures for people."""
    groups = "1 group" if found["groups"] == 1 else f"{found['groups']} groups"
    over = f"{groups} of {found['members']} chips along {', '.join(found['axes'])}"
    lines = [
        f"{found['kind']} of {shown_size(found['bytes'])} on {found['slice']} of {found['pod']}, "
        + over,
        "",
        f"time      {_time(found['seconds'])}: {_time(found['latency_seconds'])} of latency, "
        f"{_time(found['transfer_seconds'])} of bytes on the fullest link",
    ]
    if found["bytes_per_second"]:
        lines.append(f"rate      {found['bytes_per_second'] / 1e9:,.1f} GB/s")
    lines.append(f"bound     {_time(found['bound_seconds'])}: no schedule takes less")
    lines += [f"  {_time(seconds):>12}  {name}" for name, seconds in found["bounds"].items()]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.2f} us"
