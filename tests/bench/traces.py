"""Traces of many ranks in Chakra's format: seconds and memory to read and replay them.

Each rank gathers along z, computes, sends to the next rank and receives from the one before, over
and over. The files differ in whom they name, so that none is read for another.

    python tests/bench/traces.py [--ranks 1024] [--operations 10000]
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

from chakra import ALL_GATHER, COMPUTE, RECEIVE, SEND, collective, node, write

from launch.chakra import read_trace
from topology import Slice
from topology.traces.replay import replay

SLICES = {64: "4x4x4", 512: "8x8x8", 1024: "8x8x16", 4096: "16x16x16"}


def nodes(rank: int, ranks: int, operations: int) -> list[bytes]:
    made = []
    for i in range(0, operations, 4):
        before = [i - 1, i - 3] if i else []
        z = [False, False, True]
        made += [
            collective(i, ALL_GATHER, 4096, before, involved_dim=z),
            node(i + 1, COMPUTE, [i], micros=50),
            node(i + 2, SEND, [i + 1], comm_dst=(rank + 1) % ranks, comm_size=4096),
            node(i + 3, RECEIVE, [i + 1], comm_src=(rank - 1) % ranks, comm_size=4096),
        ]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, choices=SLICES, default=1024)
    parser.add_argument("--operations", type=int, default=10_000)
    args = parser.parse_args()
    slice = Slice.parse(SLICES[args.ranks])
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(args.ranks):
            write(Path(folder, f"t.{rank}.et"), *nodes(rank, args.ranks, args.operations))
        began = time.process_time()
        trace = read_trace([Path(folder)], slice)
        read = time.process_time()
        found = replay(trace, slice)
        done = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.ranks:,} ranks of {args.operations:,} operations on {slice}")
    print(f"read {read - began:.1f} s, replayed {done - read:.1f} s, at most {memory:.2f} GiB")
    print(f"{found.seconds:.6f} s, bound {found.bound:.6f} s, {len(found.ranks)} kinds of ranks")


if __name__ == "__main__":
    main()
