"""The whole trainer against a bare step: tokens/s and peak memory, processes alternating.

    python tests/bench/trainer.py [--rounds 3] [--steps 24]

One side is the command `torsion train` with data, metrics and asynchronous checkpoints; its time is
all that passes from the third step to the last one, saving included. The other is the bare step of
plain.py in a process of its own, on random tokens that are made between its steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
WARM_UP = 3


def measured(command: list[str]) -> tuple[str, float]:
    """Output of a command, and its peak resident memory in MiB."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return output, usage.ru_maxrss / 1024


def bare(steps: int) -> tuple[list[float], float]:
    output, memory = measured([sys.executable, str(HERE / "plain.py"), str(steps)])
    return [float(line) for line in output.split()][WARM_UP:], memory


def trainer(steps: int) -> tuple[list[float], float]:
    torsion = str(Path(sys.executable).with_name("torsion"))
    with tempfile.TemporaryDirectory() as out:
        config = str(HERE / "trainer.gin")
        _, memory = measured([torsion, "train", config, "--steps", str(steps), "--out", out])
        rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    # A save before a step is told in the row of that step.
    seconds = [row["step_seconds"] + row.get("save_seconds", 0.0) for row in rows[WARM_UP:]]
    waited = sum(row["data_wait_seconds"] for row in rows[WARM_UP:])
    print(f"  trainer waited for data {waited / sum(seconds):.2%} of its time")
    print(f"  first step {rows[0]['first_step_seconds']:.1f} s after the command")
    return seconds, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    sides = {"bare": bare, "trainer": trainer}
    speeds, memories = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            seconds, memory = side(args.steps)
            speeds[name].append(4096 * len(seconds) / sum(seconds))
            memories[name].append(memory)
            print(f"{name:8} {speeds[name][-1]:7,.0f} tokens/s  {memory:6,.0f} MiB", flush=True)
    for what, values in (("tokens/s", speeds), ("peak memory", memories)):
        ratio = statistics.median(values["trainer"]) / statistics.median(values["bare"])
        print(f"{what}: trainer is {ratio:.2f} of the bare step (medians of {args.rounds})")


if __name__ == "__main__":
    main()
