"""The reader of scheduled programs: against texts whose meaning is known by hand."""

import contextlib

import numpy as np
import pytest
from helpers.programs import ASYNC, BY_TWO, FUSED, KNOWN, ODD

from topology.plan.hlo import UnknownDialect, arrays_of, parse
from topology.plan.replica_groups import UnreadGroups, groups_of, pairs_of
from topology.plan.tree import Loop, tree_of


def loops(text: str) -> list[int | None]:
    return [n.rounds for n in tree_of(parse(text)).nodes if isinstance(n, Loop)]


def roles(text: str) -> dict[str, str]:
    return {op.instruction.name: op.role for op, _ in tree_of(parse(text)).ops()}


def test_a_loop_that_goes_by_two_from_two_goes_round_half_as_often():
    assert loops(BY_TWO) == [4]  # at 2, 4, 6 and 8


@pytest.mark.parametrize("begin", [0, 1, 2, 8, 9, 12])
@pytest.mark.parametrize("direction", ["LT", "LE", "NE"])
@pytest.mark.parametrize("bound", [8, 9])
def test_rounds_are_those_of_a_counter_that_counts(begin, direction, bound):
    text = BY_TWO.replace("constant(9)", f"constant({bound})")
    text = text.replace("%two = s32[]{:T(128)} constant(2)", f"%two = s32[] constant({begin})")
    text = text.replace("direction=LT", f"direction={direction}")
    holds = {"LT": int.__lt__, "LE": int.__le__, "NE": int.__ne__}[direction]
    count, i = 0, begin
    while holds(i, bound) and count < 100:
        count, i = count + 1, i + 2
    if count < 100:  # or the loop has no end
        assert loops(text) == [count]


def test_a_test_with_its_sides_exchanged_is_the_same():
    text = BY_TWO.replace("compare(%n, %bound), direction=LT", "compare(%bound, %n), direction=GT")
    assert loops(text) == [4]


def test_what_a_compiler_says_of_rounds_is_taken():
    assert loops(KNOWN) == [31]


def test_a_loop_without_known_rounds_is_counted_and_not_guessed():
    tree = tree_of(parse(BY_TWO.replace("copy(%two)", "negate(%two)")))
    assert [n.rounds for n in tree.nodes if isinstance(n, Loop)] == [None]
    assert sum(tree.not_understood.values()) == 1


def test_asynchronous_pairs_belong_together():
    found = {op.instruction.name: op for op, _ in tree_of(parse(ASYNC)).ops()}
    assert found["all-gather-start.1"].role == "start"
    assert found["all-gather-done.1"].of == "all-gather-start.1"
    assert (found["c-start"].kind, found["c-done"].of) == ("dma", "c-start")
    assert found["all-reduce.1"].role == "collective"


def test_an_asynchronous_collective_fusion_is_one_transfer():
    found = {op.instruction.name: op for op, _ in tree_of(parse(FUSED)).ops()}
    transfers = [op for op in found.values() if op.collective is not None]
    assert [op.instruction.name for op in transfers] == ["s"]
    assert found["f"].role == "compute"
    assert (found["d"].role, found["d"].of) == ("done", "s")


def test_reduce_scatter_by_fusion_kernels_over_lines_and_unknown_opcodes():
    tree = tree_of(parse(ODD))
    found = {op.instruction.name: op for op, _ in tree.ops()}
    assert found["f"].kind == "reduce_scatter"
    assert found["splash_mqa_fwd.3"].instruction.op_name.endswith("pallas_call")
    assert found["what"].role == "unknown"
    assert tree.not_understood == {"opcode frobnicate": 1}
    assert found["conv.remat"].instruction.is_recomputed


def test_memory_spaces_and_sizes_of_arrays():
    found = arrays_of(
        "(bf16[2,3]{1,0:T(8,128)(2,1)S(3)}, /*index=1*/f32[]{:T(128)}, s4[7]{0:S(1)})"
    )
    assert [(a.dtype, a.sizes, a.space, a.bytes) for a in found] == [
        ("bf16", (2, 3), 3, 12),
        ("f32", (), 0, 4),
        ("s4", (7,), 1, 3.5),
    ]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}, x", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x",
            [[0, 2], [1, 3]],
        ),
    ],
)
def test_groups_in_every_syntax(text, groups):
    assert sorted(groups_of(text, 4).tolist()) == sorted(groups)


@pytest.mark.parametrize(
    "text",
    [
        "no groups",
        "replica_groups={{0,1},{2}}",
        "replica_groups=[3,2]<=[4]",
        "replica_groups=mesh['a'=4] {'b'}",
        "replica_groups=mesh['a'=4] {'a':(3)2}",
    ],
)
def test_groups_that_make_no_sense_are_refused(text):
    with pytest.raises(UnreadGroups):
        groups_of(text, 4)


def test_iota_groups_are_those_of_numpy():
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(1, 5, size=3)
        order = generator.permutation(3)
        ids = np.arange(sizes.prod()).reshape(sizes).transpose(order).reshape(-1, sizes[order[2]])
        shape = ",".join(map(str, ids.shape))
        text = f"[{shape}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, order))})"
        assert groups_of(f"replica_groups={text}, y", 0).tolist() == ids.tolist()


def test_pairs_of_a_permute():
    assert pairs_of("source_target_pairs={{0,1},{1,0}}, x") == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no HLO"),
        ("module @jit_step { }", "StableHLO"),
        (ASYNC.replace("is_scheduled=true, ", ""), "not scheduled"),
        (ASYNC[: ASYNC.index("ENTRY")], "ENTRY"),
        (ASYNC[: ASYNC.index("ROOT %all-reduce.1")], "ENTRY"),
    ],
)
def test_what_is_no_scheduled_program_is_refused_in_a_line(text, says):
    with pytest.raises(UnknownDialect, match=says) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_program_is_read_or_refused():
    """A text that was cut off anywhere, or lost a line, ends in no other error."""
    from topology.plan.predict import read

    lines = FUSED.splitlines(keepends=True) + BY_TWO.splitlines(keepends=True)[1:]
    for cut in range(len(lines)):
        for text in ("".join(lines[:cut]), "".join(lines[:cut] + lines[cut + 1 :])):
            with contextlib.suppress(UnknownDialect):
                read(text)
