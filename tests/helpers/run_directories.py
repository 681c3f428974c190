"""What stands in a run directory."""

from pathlib import Path

from pjit_train.metrics import read_rows


def rows(directory):
    """Every row without the figures that tell time."""
    timed = {"step_seconds", "tokens_per_second", "data_wait_seconds", "save_seconds"}
    timed |= {"compile_seconds", "first_step_seconds"}
    found = read_rows(directory / "metrics.jsonl")
    return [{name: x for name, x in row.items() if name not in timed} for row in found]


def files(folder: Path) -> dict[str, bytes]:
    """Every file but those of the cache, which holds only what can be made again."""
    paths = [p for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}
