"""Times of the interconnect's exact figures, beside their targets.

Run: python tests/bench/topology_throughput.py
Prints the median of three runs in seconds, and the peak memory of the whole process.
"""

import resource
import statistics
import time

import numpy as np

from topology.routing.loads import link_loads, lower_bounds
from topology.routing.routing import best_single_path, dimension_order
from topology.routing.throughput import all_to_all, both_ways, closed_form, switch_links
from topology.routing.wild_first import wild_first
from topology.torus.slices import Slice


def timed(label, call, target=None, runs=3):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - start)
    limit = f"  target {target} s" if target else ""
    print(f"{label:58} {statistics.median(times):8.3f} s{limit}   {value}", flush=True)


def optimum(name, failed=None, **options):
    slice = Slice.parse(name)  # anew, so that nothing is kept from the run before
    links = failed(slice) if failed else ()
    flow = all_to_all(slice, links, **options)
    kept = f", kept {closed_form(slice) / flow.max_link_load:.4f}" if failed else ""
    return f"T {flow.max_link_load:.3f}, bound {flow.lower_bound:.3f}{kept}"


def loads(name):
    slice = Slice.parse(name)
    traffic = np.random.default_rng(0).random((slice.num_chips,) * 2)
    return lambda: f"largest {link_loads(slice, dimension_order(slice), traffic).max():.2f}"


def bounds(name):
    slice = Slice.parse(name)
    traffic = np.random.default_rng(0).random((slice.num_chips,) * 2)
    return lambda: {k: round(v, 2) for k, v in lower_bounds(slice, traffic).items()}


if __name__ == "__main__":
    for name, target in [("8x16x16_twisted", 5), ("16x16x16", 10)]:
        timed(f"optimum {name}", lambda name=name: optimum(name), target)
        timed(
            f"optimum {name}, switch x,1,2 failed",
            lambda name=name: optimum(name, lambda s: switch_links(s, 0, 1, 2)),
        )
        timed(
            f"best single path {name}",
            lambda name=name: f"bound {best_single_path(Slice.parse(name))[1]}",
            runs=1,
        )
        timed(f"link loads of random traffic {name}", loads(name), 10)
        timed(f"lower bounds of random traffic {name}", bounds(name))
    for name in ("4x4x8_twisted", "4x8x8_twisted", "8x8x8", "8x8x16_twisted"):
        timed(
            f"optimum {name}, one z link failed",
            lambda name=name: optimum(name, lambda s: both_ways(s, 6 * 5 + 4)),
            runs=1,
        )
    for name in ("4x4x8", "4x4x8_twisted", "4x8x8", "4x8x8_twisted", "8x8x8"):
        for d in range(3):
            slice = Slice.parse(name)
            timed(
                f"wild-first {name}, switch {'xyz'[d]},1,2 failed: kept",
                lambda slice=slice, d=d: (
                    closed_form(slice) / wild_first(slice, d, 1, 2).max_link_load
                ),
                runs=1,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.2f} GiB, target 4")
