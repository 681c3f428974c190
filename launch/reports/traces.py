"""`torsion trace`: a trace replayed on a slice, as data, as text and as a timeline."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.chakra import read_trace
from launch.reports.collectives import shown_time
from launch.reports.failures import lost_links, names_of
from launch.reports.sizes import shown_size
from pjit_train.errors import UserError
from pjit_train.files import write_whole
from topology import Slice
from topology.hardware import Pod
from topology.timeline import trace_text
from topology.traces.replay import TRACKS, Replay, replay

_LINKS = 5  # of a collective that are named
_DIRECTIONS = ("+x", "-x", "+y", "-y", "+z", "-z")


def report(
    files: Sequence[Path],
    shape: str,
    pod: Pod,
    *,
    groups: Path | None = None,
    failed: Sequence[str] = (),
    failed_one_way: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[dict[str, Any], Replay]:
    """The figures of a trace on a slice, as `torsion trace --json` prints them, and its replay.

    Returns:
      `seconds` of the trace and `bound_seconds`, below which no schedule is. `classes`, of ranks
      that do the same: the first `rank` of each, how many (`ranks`), seconds `computing` and
      `waiting`. `communications`, by kind and `members` of a group: `count`, `bytes`, `seconds`
      from the coming of the last who takes part to the end, `alone_seconds` with all links free,
      `waited_seconds` for the last to come, and `links`: the `seconds` for which each link held it
      up most, the most first.

    Raises:
      UserError: the trace, the slice or a part is none, or they do not fit each other.
    """
    say = (lambda text: None) if quiet else lambda text: print(text, file=sys.stderr, flush=True)
    try:
        slice = Slice.parse(shape, pod)
        links = lost_links(slice, failed, failed_one_way).links
    except ValueError as error:
        raise UserError(str(error)) from error
    trace = read_trace(files, slice, groups=groups, progress=say)
    try:
        step = replay(trace, slice, failed_links=links)
    except ValueError as error:
        raise UserError(str(error)) from error
    found = {
        "slice": str(slice),
        "pod": pod.name,
        "ranks": len(trace.ranks),
        "operations": sum(len(trace.programs[rank.program]) for rank in trace.ranks),
        "failed": list(failed),
        "failed_one_way": list(failed_one_way),
        "lost_links": len(links),
        "seconds": step.seconds,
        "bound_seconds": step.bound,
        "classes": [
            {
                "rank": int(rank),
                "ranks": int(size),
                "computing_seconds": float(computing),
                "waiting_seconds": float(waiting),
            }
            for rank, size, computing, waiting in zip(
                step.ranks, step.sizes, step.computing, step.waiting, strict=True
            )
        ],
        "communications": [
            {
                "kind": one.kind,
                "members": one.members,
                "count": one.count,
                "bytes": one.bytes,
                "seconds": one.seconds,
                "alone_seconds": one.alone,
                "waited_seconds": one.waited,
                "links": [
                    {"link": _link(slice, link), "seconds": seconds}
                    for link, seconds in sorted(one.links.items(), key=lambda item: -item[1])
                ],
            }
            for one in sorted(step.communications, key=lambda one: -one.seconds)
        ],
    }
    return found, step


def _link(slice: Slice, link: int) -> str:
    """A directed link as the chip that it leaves, and where to: 3,0,0 +x."""
    chip, direction = divmod(link, 6)
    where = slice.coordinates[chip][: len(slice.sizes)]
    return f"{','.join(map(str, where.tolist()))} {_DIRECTIONS[direction]}"


def describe(found: dict[str, Any]) -> str:
    """The figures for people."""
    ranks = f"{found['ranks']:,} ranks, {found['operations']:,} operations"
    lines = [f"trace of {ranks} on {found['slice']} of {found['pod']}"]
    if names := names_of(found):
        lines.append(f"failed    {names}: {found['lost_links']} directed links")
    over = found["seconds"] / found["bound_seconds"] if found["bound_seconds"] else 1.0
    lines += [
        "",
        f"time      {shown_time(found['seconds'])}",
        f"bound     {shown_time(found['bound_seconds'])}: no schedule takes less, and this one "
        f"{over:.3f} times as long",
        "",
        "ranks that do the same, the first of them, computing and waiting:",
    ]
    shown = found["classes"][:8]
    for one in shown:
        part = one["computing_seconds"] / found["seconds"] if found["seconds"] else 0.0
        lines.append(
            f"  rank {one['rank']:>5} and {one['ranks'] - 1:,} more: computing "
            f"{shown_time(one['computing_seconds'])} ({part:.1%}), waiting "
            f"{shown_time(one['waiting_seconds'])}"
        )
    if len(found["classes"]) > len(shown):
        lines.append(f"  and {len(found['classes']) - len(shown)} more kinds of ranks")
    if found["communications"]:
        lines += ["", "communication, one after another; alone; waiting for the last to come:"]
    for one in found["communications"]:
        lines.append(
            f"  {one['kind']} of {one['members']}: {one['count']:,} of {shown_size(one['bytes'])} "
            f"together, {shown_time(one['seconds'])}; {shown_time(one['alone_seconds'])}; "
            f"{shown_time(one['waited_seconds'])}"
        )
        for link in one["links"][:_LINKS]:
            part = link["seconds"] / one["seconds"] if one["seconds"] else 0.0
            lines.append(f"    held up by the link {link['link']} for {part:.1%} of it")
        if len(one["links"]) > _LINKS:
            lines.append(f"    and by {len(one['links']) - _LINKS} more links")
    return "\n".join(lines)


def write_timeline(file: Path, step: Replay) -> None:
    """Writes the timeline that Perfetto opens, a process a class of ranks."""
    names = {
        rank: f"rank {rank}" + (f" and {size - 1} alike" if size > 1 else "")
        for rank, size in zip(step.ranks.tolist(), step.sizes.tolist(), strict=True)
    }
    write_whole(file, trace_text(step.events, processes=names, tracks=TRACKS))
