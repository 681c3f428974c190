"""Steps compiled by libtpu for slices that are not there, as `torsion plan` compiles them."""

import dataclasses

import pytest

from pjit_train.compiler.compile import DoesNotFit, Job, compile_job
from pjit_train.compiler.records import Record
from pjit_train.compiler.target import target_of
from topology.hardware import TPU_V4
from topology.plan.predict import predict, read
from topology.plan.tree import Loop
from topology.torus.slices import Slice

pytestmark = pytest.mark.oracle

SMALL = Slice(shape=(2, 2, 1), pod=TPU_V4)
RECORD = Record(
    L=5, D=512, H=4, J=4, K=128, F=2048, V=2048, T=256, rows=8,
    mesh={"data": 1, "fsdp": 2, "tensor": 2},
)  # fmt: skip


def job(record: Record) -> Job:
    arguments = {"record": dataclasses.asdict(record)}
    function = "pjit_train.compiler.published_step:lowered"
    return Job(target=target_of(SMALL), function=function, arguments=arguments)


def test_a_step_is_compiled_read_and_priced(tmp_path):
    compiled = compile_job(job(RECORD), cache=tmp_path)
    tree = read(compiled.text)
    assert [n.rounds for n in tree.nodes if isinstance(n, Loop)] == [RECORD.L] * 2
    found = predict(tree, SMALL, partitions=compiled.partitions)
    assert not found.not_understood
    # Not faster than its matmuls at the peak: 6 FLOPs a parameter and token.
    tokens = RECORD.rows * RECORD.T
    assert found.low > 6 * RECORD.parameters * tokens / 4 / TPU_V4.chip.peak_bf16
    assert compile_job(job(RECORD), cache=tmp_path).cached


def test_a_step_that_does_not_fit_says_by_how_much(tmp_path):
    huge = dataclasses.replace(RECORD, D=16384, F=65536, H=128, L=40)
    with pytest.raises(DoesNotFit, match="GiB more than there are") as caught:
        compile_job(job(huge), cache=tmp_path)
    assert caught.value.needed > caught.value.limit
