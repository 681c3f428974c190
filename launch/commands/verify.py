"""`torsion verify`: a compressed folder against its certificate."""

import json
from pathlib import Path

from launch.commands.common import add_command
from pjit_train.errors import UserError


def add(commands) -> None:
    verify = add_command(
        commands,
        run,
        "verify",
        "check a folder that torsion compress wrote against its certificate",
        "Digests of every file and tensor are compared, and patterns and zeros counted again. "
        "Where a byte is not what was written, it says what is wrong, and exits with 2.",
    )
    verify.add_argument("folder", metavar="FOLDER", help="with a torsion.json")
    verify.add_argument("--json", action="store_true", help="print one JSON object")


def run(args, began: float) -> int:
    from pjit_train.compression.certificate import verify

    folder = Path(args.folder)
    try:
        document, wrong = verify(folder)
    except UserError as error:
        if not args.json or not (folder / "torsion.json").is_file():
            raise
        document, wrong = {"kernels": {}, "files": {}, "tensors": {}}, [str(error)]
    counts = {part: len(document[part]) for part in ("files", "tensors", "kernels")}
    if args.json:
        print(json.dumps({"folder": str(folder), "whole": not wrong, "wrong": wrong, **counts}))
        return 2 if wrong else 0
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{folder}: {wrong[0]}{more}; compress the model again, or put back a copy")
    print(f"{folder}: whole: " + ", ".join(f"{n:,} {part}" for part, n in counts.items()))
    return 0
