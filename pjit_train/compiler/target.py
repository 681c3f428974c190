"""Slices by the names of Google's compiler, and which of them it takes."""

import dataclasses
import itertools
from typing import Any

from topology.torus.slices import Slice

# It ends its process at any other name with `_twisted` (tried with libtpu 0.0.42.1).
TWISTED = {
    tuple(order)
    for shape in ((4, 4, 8), (4, 8, 8), (8, 8, 16), (8, 16, 16), (12, 12, 24), (12, 24, 24))
    for order in itertools.permutations(shape)
}
PODS = ("v4", "v5p", "v5e", "v6e")


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice by the compiler's name and keywords of `get_topology_desc`."""

    topology: str
    keywords: dict[str, Any]


def target_of(slice: Slice, num_slices: int = 1) -> Target:
    """The compiler's name of a slice, or of several alike.

    Raises:
      ValueError: the compiler does not take it; says which it takes.
    """
    pod = slice.pod
    if pod.version not in PODS:
        raise ValueError(f"slice {slice}: the compiler takes slices of {', '.join(PODS)}")
    name = "x".join(map(str, slice.sizes))
    keywords: dict[str, Any] = {}
    if slice.is_twisted:
        if not str(slice).endswith("_twisted") or slice.shape not in TWISTED:
            raise ValueError(
                f"slice {slice}: of twisted slices the compiler takes 4x4x8, 4x8x8, 8x8x16, "
                "8x16x16, 12x12x24 and 12x24x24 with the twist that ships; others abort it"
            )
        name += "_twisted"
    if pod.version == "v4":
        # One device a chip and not a core; "megacore" is the default of v5p and unknown to v5e.
        keywords["chip_config_name"] = "megacore"
        keywords["wrap"] = list(slice.wrap)
    if num_slices > 1:
        keywords["num_slices"] = num_slices
    return Target(f"{pod.version}:{name}", keywords)


def environment() -> dict[str, str]:
    """Variables that let libtpu start where there is no TPU."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
