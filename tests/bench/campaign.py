"""What runs, files, inputs and pods survive, tried at random for hours; docs/reliability.md has it.

python tests/bench/campaign.py WHAT [--cases N] [--seed N] [--only NAME]

  crashes   SIGKILL at random moments; --only dense, sparse or packed
  disk      a full disk                          (root: it mounts file systems)
  readonly  a file system that turns read-only   (root, and e2fsprogs)
  clock     a clock that jumps back an hour      (libfaketime)
  damage    files flipped, cut, removed, swapped; --only dense, sparse or packed
  input     texts of every kind, changed; --only gin-file, ... (all in turn without)
  pods      failures of every kind, also at once

Everything is drawn from the seed, but for the moments at which processes meet it. What went wrong
is printed when it is found, and the exit code is then 1.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import campaign_crashes
import campaign_damage
import campaign_input
import campaign_pods
import campaign_runs as runs

sys.path.insert(0, str(runs.ROOT))
OF_RUNS = {
    "crashes": campaign_crashes.kills,
    "disk": campaign_crashes.full_disks,
    "readonly": campaign_crashes.read_only,
    "clock": campaign_crashes.clocks,
    "damage": campaign_damage.damages,
}
CASES = {
    "crashes": 200,
    "disk": 40,
    "readonly": 20,
    "clock": 20,
    "damage": 500,
    "input": 100_000,
    "pods": 100,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    args = parser.parse_args()
    cases = args.cases or CASES[args.what]
    report = campaign_crashes.Report()
    folder = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # short, for the sockets of pods
    began = time.monotonic()
    try:
        if args.what in OF_RUNS:
            kinds = [args.only] if args.only else list(runs.KINDS)
            runs.make_folder(folder)
            for kind in kinds:
                OF_RUNS[args.what](report, folder, kind, -(-cases // len(kinds)), args.seed)
        elif args.what == "input":
            os.environ["TORSION_CACHE"] = str(folder / "cache")
            names = [args.only] if args.only else list(campaign_input.surfaces(folder))
            for name in names:
                campaign_input.fuzz(report, name, cases, args.seed)
        else:
            campaign_pods.pods(report, folder, cases, args.seed)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the cases until then")
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{args.what}: {report.cases:,} cases, {len(report.wrong)} wrong, {minutes:.0f} min")
    for note, count in sorted(report.notes.items()):
        print(f"  {count:6,}  {note}")
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
