"""The page after a run: where its time went, attempt by attempt."""

import html
import time
from collections.abc import Sequence
from pathlib import Path

from launch.pod.events import AttemptBegun, Event, Saved, text_of
from launch.pod.goodput import CAUSES, Account, Span, account, expected_goodput
from pjit_train.files import write_whole
from pjit_train.run import Run

_COLOURS = {
    "kept": "#2e8b57",
    "data": "#17838f",
    "redone": "#d98c00",
    "save": "#3f72c4",
    "start": "#a9a9a9",
    "compile": "#7b5ea7",
    "failure": "#c0392b",
    "away": "#333333",
}
_WIDTH, _ROW, _LABEL = 1000, 22, 160  # pixels


def write(events: Sequence[Event], file: Path) -> None:
    """Writes the page, whole: one HTML file that needs no other."""
    write_whole(file, page(events))


def page(events: Sequence[Event]) -> str:
    """An attempt is a row of bars beside its slice; tables have the causes' seconds, and events."""
    found = account(events)
    begin = found.spans[0].start if found.spans else 0.0
    scale = _WIDTH / max(found.total, 1e-9)
    attempts = list(dict.fromkeys(span.attempt for span in found.spans))
    slices = {e.attempt: e.slice for e in events if isinstance(e, AttemptBegun)}
    bars = [
        f'<text x="0" y="{_ROW * row + 15}">{attempt} {html.escape(slices.get(attempt, ""))}</text>'
        for row, attempt in enumerate(attempts)
    ]
    for span in _joined(found):
        x, width = (span.start - begin) * scale + _LABEL, (span.end - span.start) * scale
        what = f"attempt {span.attempt}, {CAUSES[span.cause]}: {span.end - span.start:.2f} s"
        bars.append(
            f'<rect x="{x:.2f}" y="{_ROW * attempts.index(span.attempt)}" width="{width:.2f}" '
            f'height="{_ROW - 4}" fill="{_COLOURS[span.cause]}"><title>{what}</title></rect>'
        )
    rows = [
        f'<tr><td><span style="background:{_COLOURS[cause]}"></span>{CAUSES[cause]}</td>'
        f"<td>{seconds:.1f} s</td><td>{seconds / max(found.total, 1e-9):.1%}</td></tr>"
        for cause, seconds in found.seconds.items()
    ]
    lines = [
        f"<tr><td>{event.time - begin:.1f} s</td><td>{html.escape(text)}</td></tr>"
        for event in events
        if (text := text_of(event)) is not None
    ]
    height = _ROW * max(1, len(attempts))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Timeline of a pod</title><style>
body {{ font: 14px sans-serif; margin: 2em; max-width: {_WIDTH + _LABEL + 20}px }}
td {{ padding: 2px 1em 2px 0; vertical-align: top }}
td span {{ display: inline-block; width: 1em; height: 1em; margin-right: .5em }}
</style></head><body>
<h1>Timeline</h1>
<p>{time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin))}, {found.total:.1f} s,
{len(attempts)} attempts, goodput {found.goodput:.1%}</p>
<svg width="{_WIDTH + _LABEL + 10}" height="{height}">{"".join(bars)}</svg>
<h2>Where the time went</h2><table>{"".join(rows)}</table>
<h2>Events</h2><table>{"".join(lines)}</table>
</body></html>
"""


def summary(events: Sequence[Event], run: Run) -> list[str]:
    """Lines for the end of a run: goodput, what it lost to each cause, what was to be expected."""
    found = account(events)
    lost = [
        f"{seconds / found.total:.1%} {CAUSES[cause]}"
        for cause, seconds in found.seconds.items()
        if cause != "kept" and seconds
    ]
    lines = [f"goodput {found.goodput:.1%} of {found.total:.1f} s; {', '.join(lost)}"]
    saves = sum(isinstance(event, Saved) for event in events)
    every = run.checkpoints.every_steps
    expected = every and expected_goodput(found, steps_between_saves=every, saves=saves)
    if expected:
        lines.append(
            f"{found.failures} failures; the renewal model expects {expected:.1%} of as many"
        )
    return lines


def _joined(found: Account):
    """Joins consecutive spans of one cause and attempt: a page of single steps is of no use."""
    joined: list[Span] = []
    for span in found.spans:
        before = joined[-1] if joined else None
        if before and (before.cause, before.attempt) == (span.cause, span.attempt):
            joined[-1] = type(span)(before.start, span.end, span.cause, span.attempt)
        else:
            joined.append(span)
    return joined
