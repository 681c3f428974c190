"""The memory that a pod is said to take, against XLA's own analysis of what it compiles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from launch.configure import build_run
from launch.pod.attempt import patience, slowdown
from launch.pod.events import Save, Saved, Step
from launch.pod.plan import GiB, Plan, default_hosts_per_process
from pjit_train.errors import UserError
from pjit_train.program import Program
from pjit_train.sharding import make_mesh
from topology import Slice
from topology.routing.throughput import switch_links

SMALL = ["max_len = 128", "d_model = 64", "num_layers = 2", "num_heads = 2", "d_ff = 192"]
SMALL = [f"transformer.TransformerConfig.{binding}" for binding in SMALL]


def plan(*bindings: str, slice: str = "2x2x1") -> Plan:
    run, _ = build_run(["configs/quickstart.gin"], bindings)
    slice = Slice.parse(slice)
    return Plan(
        run=run,
        config=Path("run.gin"),
        directory=Path("run"),
        slice=slice,
        hosts_per_process=default_hosts_per_process(slice),
        elastic=False,
        blocks=64,
        hang_seconds=60.0,
        faults=(),
        repairs=(),
        emulate=True,
    )


def compiled_bytes(run) -> int:
    """What XLA:CPU takes for a step on one device, beside the state."""
    program = Program(run, make_mesh(run.mesh))
    shape = run.data.batch_size, run.data.seq_len
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "targets")}
    return program.compile_step(batch).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "remat", "accumulate"),
    [("unroll", "full", 4), ("scan", "full", 1)],
)
def test_what_a_large_batch_takes_is_what_the_compiler_says(layers, remat, accumulate):
    """512 rows of 128 tokens, beside which the 100,000 parameters count for little."""
    config = [f"transformer.TransformerConfig.layers = '{layers}'"]
    config += [f"transformer.TransformerConfig.remat = '{remat}'"]
    config += [f"run.Run.accumulate = {accumulate}", "run.Run.eval_every = 0"]
    config += ["text.TextData.seq_len = 128", *SMALL]
    said = plan(*config, "text.TextData.batch_size = 512").memory()
    said -= plan(*config, "text.TextData.batch_size = 16").memory()
    config += ["text.TextData.batch_size = 512", "sharding.MeshShape.data = 1"]
    measured = compiled_bytes(build_run(["configs/quickstart.gin"], config)[0])
    assert 0.7 < said / measured < 1.4


def test_a_head_of_its_own_takes_as_much_as_the_embedding():
    """Parameters, gradients and two moments on each of 4 devices, and the parameters in use."""
    sizes = ["run.Run.eval_every = 0", "sharding.MeshShape.data = 4"]
    tied, own = (
        plan(*sizes, *SMALL, f"transformer.TransformerConfig.tie_head = {tie}")
        for tie in (True, False)
    )
    table = 4 * own.run.model.vocab_size * 64
    assert own.memory() - tied.memory() == 4 * (4 + 1) * table


def test_a_pod_that_takes_the_batch_in_parts_fits_where_the_whole_does_not():
    """1024 rows of 256 through 4 layers of 192: 30 * 4 * 192 floats a token are 22.5 GiB."""
    large = ["text.TextData.batch_size = 1024"]
    whole, parts = plan(*large), plan(*large, "run.Run.accumulate = 16")
    assert 22.5 * GiB < whole.memory() < 28 * GiB
    assert parts.memory() < 6 * GiB
    with pytest.raises(UserError, match=r"25\.\d GiB and 8\.0 GiB are free.*accumulate"):
        whole.check_memory(8 * GiB)
    parts.check_memory(8 * GiB)
    # A validation's batch is whole: one layer's work of it, 16 * 192 floats a token, is 3 GiB.
    quiet = plan(*large, "run.Run.accumulate = 16", "run.Run.eval_every = 0")
    assert 1 * GiB < parts.memory() - quiet.memory() < 3.5 * GiB


def test_a_validation_has_the_time_of_one():
    config = ["run.Run.steps = 100", "run.Run.eval_every = 30"]

    def steps(*numbers):
        return [Step(step=number, loss=0.0) for number in numbers]

    times = [patience(plan(*config), step) for step in steps(29, 30, 31, 99, 100)]
    assert times == [60.0, 300.0, 60.0, 60.0, 300.0]
    for last in (Save(step=99), Saved(step=100), None):
        assert patience(plan(*config), last) == 300.0
    never = plan("run.Run.steps = 100", "run.Run.eval_every = 0")
    assert [patience(never, step) for step in steps(30, 100)] == [60.0, 60.0]


def test_around_a_failed_switch_steps_take_as_much_longer_as_their_collectives():
    """All of it is gathers and scatters over all chips: six links' bytes go by five."""
    mesh = ["sharding.MeshShape.data = 1", "sharding.MeshShape.fsdp = -1"]
    whole = plan(*mesh, "text.TextData.batch_size = 512", slice="8x8x8")
    links = switch_links(whole.slice, 2, 0, 0).tolist()
    assert slowdown(whole, whole.slice, []) == 0.0
    bytes = 3 * 4 * whole.run.model.num_params  # two gathers and a scatter, in float32
    least = bytes * 511 / 512 / (6 * whole.slice.pod.chip.usable_link_bandwidth)
    computing = whole.run.flops_per_step / (512 * whole.slice.pod.chip.peak_bf16)
    waits = 3 * 12 * 1e-6  # hops of a microsecond from end to end
    longer = 0.2 * least / (least + waits + computing)
    assert longer < slowdown(whole, whole.slice, links)  # and the detours' latency
    assert slowdown(whole, whole.slice, links) < longer + 3 * 48e-6 / (least + waits + computing)
