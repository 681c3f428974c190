"""`torsion collective`: the time of a collective on a slice, and bounds below it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.reports.failures import lost_links, names_of
from launch.reports.sizes import parse_size, shown_size
from pjit_train.errors import UserError
from topology import Network, Slice, collective_cost, groups_of_axes
from topology.collectives.collectives import lower_bounds
from topology.collectives.degraded import degraded_cost
from topology.hardware import Pod


def report(
    kind: str,
    size: str,
    shape: str,
    axes: str | None,
    pod: Pod,
    *,
    failed: Sequence[str] = (),
    failed_one_way: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures of a collective, as `torsion collective --json` prints them.

    Returns:
      `seconds` of the schedule, `latency_seconds` of its hops and `transfer_seconds` of the bytes
      on its fullest link. `bound_seconds` is the largest of `bounds`; no schedule takes less.
      `bytes_per_second` is bytes / seconds. `members` are the chips of a group. With failures
      `failed` and `failed_one_way` name them, `lost_links` counts the directed links that carry
      nothing, and `whole_seconds` is the time without failures.

    Raises:
      UserError: there is no such collective, slice, axis or part, the size is none, or the failures
        take chips or cut the slice in two.
    """
    bytes = parse_size(size, "--bytes")
    try:
        slice = Slice.parse(shape, pod)
        names = "xyz"[: pod.dimensions]
        over = _axes(axes, names)
        devices = np.arange(slice.num_chips).reshape(slice.shape)
        groups = groups_of_axes(slice, devices, [names.index(name) for name in over])
        network = Network.of(pod)
        lost = lost_links(slice, failed, failed_one_way)
        links = lost.links
        cost = healthy = collective_cost(kind, groups)
        if links:
            longer = (2,) if kind == "all_to_all" else (0, 2)  # of which one round takes little
            around = [degraded_cost(kind, groups, links, longer=hops) for hops in longer]
            cost = min(around, key=lambda one: one.seconds(bytes, network))
        bounds = lower_bounds(kind, groups, bytes, network, failed_links=links)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    seconds = cost.seconds(bytes, network)
    latency = cost.hops * network.hop_latency
    found = {
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
    if links:
        found |= lost.said() | {"whole_seconds": healthy.seconds(bytes, network)}
    return found


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
        f"time      {shown_time(found['seconds'])}: {shown_time(found['latency_seconds'])} of "
        f"latency, {shown_time(found['transfer_seconds'])} of bytes on the fullest link",
    ]
    if found["bytes_per_second"]:
        lines.append(f"rate      {found['bytes_per_second'] / 1e9:,.1f} GB/s")
    if "failed" in found:
        lines.append(
            f"failed    {names_of(found)}: {found['lost_links']} directed links; whole "
            f"{shown_time(found['whole_seconds'])}"
        )
    lines.append(f"bound     {shown_time(found['bound_seconds'])}: no schedule takes less")
    lines += [f"  {shown_time(seconds):>12}  {name}" for name, seconds in found["bounds"].items()]
    return "\n".join(lines)


def shown_time(seconds: float) -> str:
    """Seconds as microseconds."""
    return f"{seconds * 1e6:,.2f} us"
