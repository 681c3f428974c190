"""Every way to run attention, compiled for TPU v4 by libtpu, with no TPU there.

Run as a script, this file compiles each case and writes what came of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle

MiB = 2**20
# Of each: the way, [batch, length, heads, key-value heads, head size], and options.
CASES = {
    "flat": ("flat", (2, 1024, 4, 4, 128), {}),
    "flat, grouped heads, ragged": ("flat", (1, 1000, 4, 2, 64), {"window": 300}),
    "flat, documents": ("flat", (1, 512, 4, 4, 128), {"segments": True}),
    "flat, float32": ("flat", (1, 512, 2, 2, 64), {"dtype": "float32"}),
    "flat, 8192 of 128, 32 rows": ("flat", (1, 8192, 1, 1, 128), {"tile_rows": 32}),
    "splash": ("auto", (2, 1024, 4, 2, 128), {}),
    "splash, documents": ("auto", (1, 1024, 4, 4, 128), {"segments": True, "window": 256}),
    "splash, 16384": ("auto", (1, 16384, 1, 1, 128), {}),
    "rows": ("rows", (1, 1024, 4, 4, 128), {}),
    "rows where splash does not fit": ("auto", (1, 1000, 4, 4, 128), {}),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """Of each case: kernels in its forward pass and in its gradient, and temporary bytes."""
    path, root = tmp_path_factory.mktemp("attention") / "out.json", Path(__file__).parents[2]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, str(path)]
    environment = os.environ | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_way_compiles_to_its_kernels(compiled, case):
    assert "error" not in compiled[case], compiled[case]["error"]
    kernels = compiled[case]["forward_kernels"], compiled[case]["gradient_kernels"]
    # Splash has one kernel forward and two more backward; flat goes back by plain JAX.
    want = {"flat": (1, 1), "splash": (1, 3), "rows": (0, 0)}[case.split(",")[0].split()[0]]
    assert kernels == want


@pytest.mark.parametrize("case", CASES)
def test_no_way_holds_a_matrix_of_logits(compiled, case):
    batch, length, heads, _, _ = CASES[case][1]
    logits = 4 * batch * heads * length**2
    assert compiled[case]["forward_temporary"] < max(logits / 4, 2 * MiB)


def compile_all(path: Path):
    import functools

    import jax
    import jax.numpy as jnp
    from jax.experimental.topologies import get_topology_desc

    from pjit_train.attention import attention
    from pjit_train.sharding import MeshShape, make_mesh

    slice_ = get_topology_desc(
        platform="tpu",
        topology_name="v4:2x2x1",
        chip_config_name="megacore",
        wrap=(False, False, False),
    )
    mesh = make_mesh(MeshShape(data=1), slice_.devices[:1])
    results = {}
    for name, (way, (B, T, H, K, D), options) in CASES.items():
        options = dict(options)
        dtype = options.pop("dtype", "bfloat16")
        segmented = options.pop("segments", False)
        with jax.set_mesh(mesh):
            whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
            array = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
            q, k = array((B, T, H, D), dtype), array((B, T, K, D), dtype)
            ids = array((B, T), "int32")

            def forward(q, k, v, ids, options=options, way=way, segmented=segmented):
                segments = (ids, ids) if segmented else None
                return attention(q, k, v, causal=True, segments=segments, way=way, **options)

            def loss(*args, forward=forward):
                return jnp.sum(forward(*args).astype(jnp.float32))

            try:
                compiled = [
                    jax.jit(f).lower(q, k, k, ids).compile()
                    for f in (forward, jax.grad(loss, argnums=(0, 1, 2)))
                ]
            except Exception as error:  # of the compiler, for the test to show
                results[name] = {"error": str(error)[:2000]}
                continue
        counts = [c.as_text().count('custom_call_target="tpu_custom_call"') for c in compiled]
        results[name] = {
            "forward_kernels": counts[0],
            "gradient_kernels": counts[1],
            "forward_temporary": compiled[0].memory_analysis().temp_size_in_bytes,
        }
    path.write_text(json.dumps(results))


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
