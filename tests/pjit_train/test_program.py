"""A program checks that its parts fit, and makes global batches of the rows that each needs."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.processes import environment, free_address
from helpers.tiny_models import (
    LLAMA,
    TOKENS,
    B,
    T,
    V,
    Vocabulary,
    make_program,
    make_run,
    recording,
)

from pjit_train.data.text import TextData
from pjit_train.errors import UserError


@pytest.mark.parametrize(
    ("mesh", "rows", "tokens"),
    [
        ({}, B, T),
        ({"data": 4}, B // 4, T),
        ({"data": 2, "fsdp": 2, "sequence": 2}, B // 4, T // 2),
        ({"fsdp": 2, "tensor": 4}, B // 2, T),  # the same rows on four devices
        ({"sequence": 8}, B, T // 8),
    ],
)
def test_a_batch_is_read_once_in_the_pieces_that_devices_hold(mesh, rows, tokens):
    calls = []
    model = dataclasses.replace(LLAMA, num_kv_heads=4)
    batch = make_program(model, mesh).global_batch(recording(calls))
    assert sorted(calls) == [(i, i + rows) for i in range(0, B, rows)]
    for name, whole in (("inputs", TOKENS), ("targets", -TOKENS)):
        np.testing.assert_array_equal(batch[name], whole)
        for shard in batch[name].addressable_shards:
            assert shard.data.shape == (rows, tokens)
            np.testing.assert_array_equal(shard.data, whole[shard.index])


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from helpers.tiny_models import make_program, recording
calls = []
batch = make_program(mesh={"data": 2, "sequence": 2}).global_batch(recording(calls))
print(calls, [s.data.shape for s in batch["inputs"].addressable_shards])
"""


def test_a_process_reads_only_its_own_rows():
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    half = [(B // 2, T // 2)] * 2
    for i, (out, err) in enumerate(outputs):
        rows = [(i * B // 2, (i + 1) * B // 2)]
        assert out.strip() == f"{rows} {half}", err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"mesh": {"data": 3}},
            "mesh: batch_size / accumulate = 8 is not divisible by data=3 * fsdp=1 = 3; "
            "use a multiple of 3, or a smaller mesh",
        ),
        (
            {"mesh": {"data": 2, "fsdp": 4}, "accumulate": 2},
            "mesh: batch_size / accumulate = 4 is not divisible by data=2 * fsdp=4 = 8; "
            "use a multiple of 8, or a smaller mesh",
        ),
        (
            {"mesh": {"sequence": 5}},
            "mesh: seq_len = 24 is not divisible by sequence=5 = 5; "
            "use a multiple of 5, or a smaller mesh",
        ),
        (
            {"accumulate": 3},
            "run: accumulate=3 does not divide batch_size=8; use a divisor of it",
        ),
        (
            {"data": TextData(seq_len=T + 1, batch_size=B, tokenizer=Vocabulary())},
            "data: seq_len=25 exceeds the model's max_len=24; "
            "use seq_len <= 24, or a larger max_len",
        ),
        (
            {"data": TextData(seq_len=T, batch_size=B, tokenizer=Vocabulary(V + 1))},
            "data: token ids go up to 56 and the model has vocab_size=56; use vocab_size >= 57",
        ),
        ({"steps": 0}, "Run.steps=0; use a whole number from 1 to 2147483647"),
        ({"on_nonfinite": "halt"}, "run: on_nonfinite='halt' is unknown; use stop or skip"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(options, says):
    with pytest.raises(UserError) as error:
        make_program(**options)
    assert str(error.value) == says


def test_a_run_is_made_without_touching_a_device():
    """gin constructs runs of any size on any machine."""
    run = make_run(mesh={"data": 4096, "tensor": 2})
    with pytest.raises(UserError, match="needs 8192 devices and there are 8"):
        run.mesh.sizes(jax.device_count())


def test_the_mesh_is_described_by_the_axes_that_split():
    assert (
        make_program(mesh={"fsdp": 2, "tensor": 2}).describe_mesh()
        == "mesh fsdp 2 x tensor 2 (cpu)"
    )
    assert make_program().describe_mesh() == "mesh 1 (cpu)"
