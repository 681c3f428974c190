"""The collectives of the compiled step, held against the list that each layout needs.

XLA's CPU partitioner writes a reduce-scatter as an all-reduce of the whole array, so a gradient
that `fsdp` shards is an all-reduce here (tests/oracle compiles for a TPU and sees the former). The
layers are scanned: the collectives of a block stand once in the program. Shapes are what a device
sees, their dimensions sorted (XLA lays gradients out as it likes), and the sizes of `tiny_models`
tell all arrays apart.
"""

from collections import Counter

import pytest
from helpers.collectives import collectives
from helpers.tiny_models import LLAMA, B, D, F, H, K, T, V, compiled, d

pytestmark = pytest.mark.usefixtures("quick_compiles")


def count(**arrays) -> Counter:
    kinds = {"gather": "all-gather", "reduce": "all-reduce", "scatter": "reduce-scatter"}
    return Counter(
        (kinds[kind], tuple(sorted(shape))) for kind, shapes in arrays.items() for shape in shapes
    )


def kernels(tensor: int = 1, fsdp: int = 1) -> list[tuple[int, ...]]:
    """Of a block: query and output, key and value, and three of the feed-forward."""
    width = D // fsdp
    heads = [(width, H // tensor, d)] * 2 + [(width, K // tensor, d)] * 2
    return heads + [(width, F // tensor)] * 3


def tables(tensor: int = 1, fsdp: int = 1) -> list[tuple[int, ...]]:
    """Token embedding and head."""
    return [(V // tensor, D // fsdp)] * 2


NORMS = [(D,)] * 3  # two of a block, and the last one


def of_tensor(rows: int, length: int) -> list[tuple[int, ...]]:
    """What tensor parallelism sums up, for the tokens of one device."""
    activations = [(rows, length, D)] * 6  # in order:
    # forward: output of attention, output of feed-forward, and the embedding of the tokens;
    # backward: inputs of the feed-forward, of query, key and value together, and of the head.
    statistics = [(rows * length,)] * 3  # loss: greatest logit, sum of exponentials, target's logit
    return activations + statistics


LAYOUTS = {
    # One device talks to nobody.
    (): count(),
    # Data: every gradient is summed once.
    (("data", 8),): count(reduce=kernels() + tables() + NORMS),
    # Fully sharded: besides, each kernel is gathered for the forward pass and again for the
    # backward pass; embedding and head are gathered once for both.
    (("fsdp", 8),): count(
        gather=kernels() * 2 + tables(),
        reduce=kernels() + tables() + NORMS,
    ),
    # Tensor: no gradient of a parameter is communicated, and no parameter.
    (("tensor", 2),): count(reduce=of_tensor(B, T)),
    # Sequence: keys and values of all tokens are gathered, their gradients summed and cut apart;
    # the gradients of parameters are summed as for data.
    (("sequence", 8),): count(
        gather=[(B, T, K, d)] * 2,
        scatter=[(B, T // 8, K, d)] * 2,
        reduce=kernels() + tables() + NORMS,
    ),
    # Gradients are summed over fsdp, and what a device keeps of that over data.
    (("data", 2), ("fsdp", 2), ("tensor", 2)): count(
        gather=kernels(2) * 2 + tables(2),
        reduce=kernels(2)
        + tables(2)
        + kernels(2, fsdp=2)
        + tables(2, fsdp=2)
        + NORMS
        + of_tensor(B // 2 // 2 // 2, T),
    ),
    (("fsdp", 2), ("sequence", 2), ("tensor", 2)): count(
        gather=kernels(2) * 2 + tables(2) + [(B // 2, T, K // 2, d)] * 2,
        scatter=[(B // 2, T // 2, K // 2, d)] * 2,
        reduce=kernels(2)
        + tables(2)
        + kernels(2, fsdp=2)
        + tables(2, fsdp=2)
        + of_tensor(B // 2, T // 2)
        # Tokens split along two dimensions: XLA sums these few numbers along one, then the other.
        + NORMS * 2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", LAYOUTS, ids=lambda m: "x".join(f"{a}{n}" for a, n in m) or "one")
def test_a_layout_has_the_collectives_that_it_needs_and_none_more(mesh):
    # data x fsdp x tensor goes through its batch in two parts (half the rows at a time, above).
    accumulate = 2 if dict(mesh).get("data") == dict(mesh).get("tensor") == 2 else 1
    _, step = compiled(LLAMA, mesh, accumulate)
    assert collectives(step.as_text()) == LAYOUTS[mesh]


def test_the_parser_sees_tuples_and_every_kind():
    text = """
      %a = (f32[4,2]{1,0}, /*index=1*/bf16[3]{0}, f32[]) all-reduce(%x, %y, %z), to_apply=%add
      ROOT %b = f32[2,8]{1,0} all-gather(%x), dimensions={0}, metadata={op_name="all-to-all("}
      %c = f32[2,8]{1,0} fusion(%a), calls=%all-reduce.1
      %d = s32[5]{0} collective-permute(%x)
    """
    assert collectives(text) == {
        ("all-reduce", (2, 4)): 1,
        ("all-reduce", (3,)): 1,
        ("all-gather", (2, 8)): 1,
        ("collective-permute", (5,)): 1,
    }


@pytest.mark.parametrize(
    ("tensor", "rows", "length"), [(1, B, T), (2, B // 8, T), (2, B // 2, T // 2)]
)
def test_sizes_tell_the_arrays_of_a_layout_apart(tensor, rows, length):
    """Or a collective too many could stand in for one that is missing."""
    weights = kernels(tensor) + tables(tensor) + NORMS
    shapes = [set(x) for x in (count(reduce=weights), count(reduce=of_tensor(rows, length)))]
    assert list(map(len, shapes)) == [5, 2]
    assert not shapes[0] & shapes[1]
