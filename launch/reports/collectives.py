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
from topology.collectives.several import several_slices
from topology.hardware import Pod, host_of, published


def report(
    kind: str,
    size: str,
    shape: str,
    axes: str | None,
    pod: Pod,
    *,
    failed: Sequence[str] = (),
    failed_one_way: Sequence[str] = (),
    slices: int = 1,
    pieces: int | None = None,
    dcn: float | None = None,
) -> dict[str, Any]:
    """The figures of a collective, as `torsion collective --json` prints them.

    Args:
      slices: that it goes over; pieces: into which it is cut then, None: the best number.
      dcn: GB/s of a chip between slices; None: its part of its host's, as published.

    Returns:
      `seconds` of the schedule, `latency_seconds` of its hops and `transfer_seconds` of the bytes
      on its fullest link. `bound_seconds` is the largest of `bounds`; no schedule takes less.
      `bytes_per_second` is bytes / seconds. `members` are the chips of a group. With failures
      `failed` and `failed_one_way` name them, `lost_links` counts the directed links that carry
      nothing, and `whole_seconds` is the time without failures. Over several slices there are
      `slices`, `pieces` and `stages` in place of latency and transfer: `name`, `network`,
      `latency_seconds` of each piece, and `seconds` of all bytes.

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
        across = None
        if slices > 1:
            across = several_slices(
                kind,
                groups,
                slices,
                bytes,
                dcn=_dcn(pod) if dcn is None else 1e9 * dcn,
                network=network,
                pieces=pieces,
                failed_links=links,
            )
        elif pieces is not None or dcn is not None:
            raise UserError("--pieces and --dcn: they are of several slices; give --slices")
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
    if across is not None:
        del found["latency_seconds"], found["transfer_seconds"]
        found |= {
            "members": groups.size * slices,
            "seconds": across.seconds,
            "bytes_per_second": bytes / across.seconds,
            "bound_seconds": max(across.bounds.values()),
            "bounds": across.bounds,
            "slices": slices,
            "pieces": across.pieces,
            "stages": [
                {
                    "name": stage.name,
                    "network": stage.network,
                    "latency_seconds": stage.latency,
                    "seconds": stage.seconds,
                }
                for stage in across.stages
            ],
        }
    if links:
        found |= lost.said() | {"whole_seconds": healthy.seconds(bytes, network)}
    return found


def _dcn(pod: Pod) -> float:
    """Bytes/s of a chip between slices: its part of its host's network."""
    host = host_of(pod)
    name = f"pod {pod.name}: the network of its hosts"
    return published(name, host.network_bandwidth) / host.chips


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
    several = f"{found['slices']} slices " if "slices" in found else ""
    lines = [
        f"{found['kind']} of {shown_size(found['bytes'])} on {several}{found['slice']} of "
        f"{found['pod']}, {over}",
        "",
    ]
    if several:
        count = found["pieces"]
        cut = "whole" if count == 1 else f"in {count} pieces, one behind the other"
        lines.append(f"time      {shown_time(found['seconds'])}, {cut}")
        lines += [
            f"  {shown_time(stage['seconds']):>14}  {stage['name']}, and "
            f"{shown_time(stage['latency_seconds'])} of latency a piece"
            for stage in found["stages"]
        ]
    else:
        lines.append(
            f"time      {shown_time(found['seconds'])}: {shown_time(found['latency_seconds'])} of "
            f"latency, {shown_time(found['transfer_seconds'])} of bytes on the fullest link"
        )
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
