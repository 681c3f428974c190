"""Lookups and updates of embeddings compiled by libtpu for slices that are not there.

64 chips, a table of 4.2M x 128, 512 samples of 20 ids a chip: the plain program gathers all ids on
every chip and takes 708 MiB. Run as a script with a topology, this file compiles for it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle

SLICES = {"v4": "v4:4x4x4"}
ACCELERATORS = {"v4": "v4-128"}


@pytest.mark.parametrize("chip", SLICES)
def test_two_all_to_alls_forward_and_one_more_backward_in_little_memory(chip):
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": ACCELERATORS[chip],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, SLICES[chip]]
    environment = os.environ | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    # Ids and rows; then gradients, by the ids that the owners were asked before.
    assert forward["all-to-all"] == 2
    assert backward["all-to-all"] == 1
    for found in (forward, backward):
        assert found["all-gather"] == 0
        assert found["devices"] == 64
        # Of where the next round begins, 64 numbers; forward, of ids out of range, too.
        assert found["all-reduce"] <= 2
    assert forward["temporary"] < 2**20
    assert backward["temporary"] < 8 * 2**20  # 5 MiB of it the gradients of a chip's entries


def collectives(text: str) -> dict[str, int]:
    """How many collectives a program runs in a step with one round: not those of a branch that only
    later rounds take."""
    name, found, branches = None, {}, set()
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            name = header[1]
        if " conditional(" in line:
            branches |= set(re.findall(r"%([\w.-]+)", line.split("branch_computations=")[-1]))
            branches |= set(re.findall(r"(?:true|false)_computation=%([\w.-]+)", line))
        if match := re.search(r" (all-to-all|all-gather|all-reduce)(-start)?\(", line):
            found.setdefault(match[1], []).append(name)
    return {
        kind: sum(name not in branches for name in found.get(kind, []))
        for kind in ("all-to-all", "all-gather", "all-reduce")
    }


def compile_for(topology: str):
    """Prints what the forward and the backward program have."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.topologies import get_topology_desc
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pjit_train.embeddings.collection import Embeddings
    from pjit_train.embeddings.row_optimizers import SGD
    from pjit_train.embeddings.tables import Bags, Feature, Table

    more = {}
    if topology.startswith("v4"):
        more = {"chip_config_name": "megacore", "wrap": (True, True, True)}
    devices = get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    mesh = Mesh(np.array(devices).reshape(-1), ("data",), axis_types=(AxisType.Explicit,))
    table = Table(name="t", rows=4_194_304, width=128, optimizer=SGD(learning_rate=0.1))
    embeddings = Embeddings(
        [Feature(name="f", table=table, hotness=20)], mesh, axes=("data",), capacity=CAPACITY
    )
    batch = 512 * len(devices)

    def placed(shape, dtype):
        spec = PartitionSpec("data") if shape else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(lambda x: placed(x.shape, x.dtype), jax.eval_shape(embeddings.init))
    bags = {"f": Bags(placed((batch, 20), jnp.int32))}
    forward = jax.jit(embeddings.lookup).lower(state, bags).compile()
    _, routing = jax.eval_shape(embeddings.lookup, state, bags)
    routing = jax.tree.map(lambda x: placed(x.shape, x.dtype), routing)
    gradients = {"f": placed((batch, 128), jnp.float32)}
    update = jax.jit(lambda s, r, g: embeddings.update(s, r, g, 1), donate_argnums=0)
    backward = update.lower(state, routing, gradients).compile()
    figures = [
        collectives(program.as_text())
        | {"temporary": program.memory_analysis().temp_size_in_bytes}
        | {"devices": len(devices)}
        for program in (forward, backward)
    ]
    print(json.dumps(figures))


CAPACITY = None

if __name__ == "__main__":
    if len(sys.argv) > 2:
        CAPACITY = int(sys.argv[2])
    compile_for(sys.argv[1])
