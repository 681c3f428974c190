"""`torsion compress` of a Hugging Face folder."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.commands.common import shown_progress
from pjit_train.errors import UserError


def compress_folder(args, out: Path, asked: Callable[[Any], Any]) -> int:
    """Carries the command out.

    Args:
      asked: the configuration of the model -> the `Compression` that the options ask for.
    """
    for option, given, instead in (
        ("--step", args.step is not None, "leave it out"),
        ("--finetune", args.finetune > 0, "train a run of configs/finetune.gin instead"),
        ("--export", args.export is not None, "--out is a folder already"),
    ):
        if given:
            raise UserError(f"{option} is of a run, and {args.run} is a folder; {instead}")
    file = None if args.calibration is None else Path(args.calibration)
    if file is not None and not file.is_file():
        raise UserError(f"--calibration {file}: there is no such file")

    from launch import process

    process.prepare(None)

    from pjit_train.compression import folder
    from pjit_train.huggingface.sources import folder_of
    from pjit_train.huggingface.weights import check
    from pjit_train.models.transformer import TransformerConfig

    with shown_progress("importing") as progress:
        path = folder_of(args.run, progress=progress)
    _, model = check(path)
    if not isinstance(model, TransformerConfig):
        raise UserError(f"{path}: holds a {type(model).__name__}; language models are compressed")
    compression = asked(model)
    calibration = None
    if file is not None:
        calibration = folder.Calibration(
            file=file,
            sequences=args.sequences,
            sequence=args.sequence,
            on_disk=args.calibration_in != "memory",
        )
    with shown_progress("blocks", count=True) as progress:
        done = folder.compress_folder(path, out, compression, calibration, progress=progress)
    if args.json:
        print(json.dumps({"out": str(out), **done}))
    else:
        _print(done, out)
    return 0


def _print(done: dict, out: Path) -> None:
    """Prints the certificate, the layers of a kernel together."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in done["kernels"].values():
        groups[row["kernel"], row["pattern"], row["format"]].append(row)
    kinds = ("sparsity", "quantization", "together", "output", "reconstructed")
    print(f"{'kernel':<32} pattern  zeros    violations  format       error of ", end="")
    print("  ".join(kinds))
    for (kernel, pattern, format), rows in groups.items():
        zeros = sum(row["zeros"] for row in rows) / sum(
            row["shape"][0] * row["shape"][1] for row in rows
        )
        wrong = None if rows[0]["groups"] is None else sum(row["violations"] for row in rows)
        errors = []
        for kind in kinds:
            found = [row["errors"][kind] for row in rows if kind in row["errors"]]
            mean = (sum(x * x for x in found) / len(found)) ** 0.5 if found else None
            errors.append(("-" if mean is None else f"{mean:.4f}").ljust(len(kind)))
        line = f"{kernel:<32} {pattern or '-':<8} {zeros:<8.2%} "
        line += f"{'-' if wrong is None else wrong:<11} {format or '-':<21} " + "  ".join(errors)
        print(line.rstrip())
    size = sum(file["bytes"] for file in done["files"].values())
    print(f"\n{out}: {size:,} bytes, read back; torsion.json says what is in it")
