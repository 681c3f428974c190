"""The collectives of the step that XLA compiles for TPU v4, held to the list each layout needs.

libtpu compiles for a slice that is not there; run as a script, this file does so for each layout.
The slice is 2x2x1, and shards fill the TPU's tiles: where either fails, the compiler sums whole
arrays and cuts, even where a program says `psum_scatter`, and a list would not tell what the
program asked for.
"""

import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle

# Sizes that tell arrays apart by their shape alone; no size but the number of layers is 3.
L, B, T, D, H, K, d, F, V = 3, 4, 384, 512, 8, 4, 128, 1536, 2560


def kernels(fsdp: int = 1, tensor: int = 1) -> list[tuple[int, ...]]:
    """Of all blocks: query and output, key and value, and three of the feed-forward."""
    heads = [(D // fsdp, H // tensor, d)] * 2 + [(D // fsdp, K // tensor, d)] * 2
    return (heads + [(D // fsdp, F // tensor)] * 3) * L


def tables(fsdp: int = 1, tensor: int = 1) -> list[tuple[int, ...]]:
    """Token embedding and head."""
    return [(V // tensor, D // fsdp)] * 2


NORMS = [(D,)] * (2 * L + 1)  # two of each block, and the last one


def of_tensor(rows: int) -> list[tuple[int, ...]]:
    """What tensor parallelism sums up, for the rows of one device."""
    # Of a block, forward: outputs of attention and feed-forward; backward: inputs of the
    # feed-forward, and of query, key and value together. Once: embedded tokens, input of the head.
    activations = [(rows, T, D)] * (4 * L + 2)
    statistics = [(rows * T,)] * 3  # loss: greatest logit, sum of exponentials, target's logit
    return activations + statistics


def count(**arrays) -> Counter:
    kinds = {"gather": "all-gather", "reduce": "all-reduce", "scatter": "reduce-scatter"}
    return Counter(
        (kinds[kind], tuple(sorted(size for size in shape if size > 1)))
        for kind, shapes in arrays.items()
        for shape in shapes
    )


LAYOUTS = {
    # Data: every gradient is summed once.
    "data=4": count(reduce=kernels() + tables() + NORMS),
    # Fully sharded: each kernel is gathered for the forward pass and again for the backward pass,
    # embedding and head once for both; a device keeps its shard of the sum of their gradients.
    "fsdp=4": count(
        gather=kernels() * 2 + tables(),
        scatter=kernels(fsdp=4) + tables(fsdp=4),
        reduce=NORMS,
    ),
    # Tensor: no gradient of a parameter is communicated, and no parameter.
    "tensor=4": count(reduce=of_tensor(B)),
    # Sequence: keys and values of all tokens are gathered and their gradients summed, of which a
    # device needs those of its own tokens; the gradients of parameters are summed as for data.
    "sequence=4": count(
        gather=[(B, T, K, d)] * 2 * L,
        scatter=[(B, T // 4, K, d)] * 2 * L,
        reduce=kernels() + tables() + NORMS,
    ),
    "fsdp=2,tensor=2": count(
        gather=kernels(tensor=2) * 2 + tables(tensor=2),
        scatter=kernels(fsdp=2, tensor=2) + tables(fsdp=2, tensor=2),
        reduce=NORMS + of_tensor(B // 2),
    ),
    # Gradients are summed over fsdp, of which a device keeps its shard, and that over data.
    "data=2,fsdp=2": count(
        gather=kernels() * 2 + tables(),
        scatter=kernels(fsdp=2) + tables(fsdp=2),
        reduce=kernels(fsdp=2) + tables(fsdp=2) + NORMS,
    ),
}

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(-start|-done)?\(")
# The TPU's other form of a reduce-scatter: a fusion of an all-reduce and a slice.
FUSED_SCATTER = re.compile(r" = (.*?) fusion\(.* calls=%(all-reduce-scatter[\w.-]*)")
HEADER = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
CALL = re.compile(r"(?:body|calls|to_apply)=%([\w.-]+)")
WHILE = re.compile(r" while\(.* condition=%([\w.-]+), body=%([\w.-]+)")


def collectives(text: str) -> Counter:
    """How often a step runs each (kind, sorted shape of its result); scalars are left out.

    One in a loop counts as often as the loop goes round, one of an array of all layers once for
    each; sizes of 1 are dropped, since XLA puts them where it likes. What is asynchronous counts
    at its end, where the result stands alone.
    """
    computations, callers, conditions, fused = {}, {}, {}, set()
    for line in text.splitlines():
        if header := HEADER.match(line):
            name = header[2]
            computations[name] = []
            if header[1]:
                callers[name] = None
        elif " = " in line:
            computations[name].append(line)
            callers |= dict.fromkeys(CALL.findall(line), name)
            if loop := WHILE.search(line):
                conditions[loop[2]] = loop[1]
            if scatter := FUSED_SCATTER.search(line):
                fused.add(scatter[2])

    def runs(name: str) -> int:
        if callers[name] is None:
            return 1
        rounds = trip_count(computations[conditions[name]]) if name in conditions else 1
        return rounds * runs(callers[name])

    found = Counter()
    for name, lines in computations.items():
        if name in fused:
            continue
        for line in lines:
            if scatter := FUSED_SCATTER.search(line):
                kind, result = "reduce-scatter", scatter[1]
            elif (match := COLLECTIVE.search(line)) and match[3] != "-start":
                kind, result = match[2], match[1]
            else:
                continue
            for shape in re.findall(r"\w+\[([\d,]+)\]", result):
                sizes = [int(size) for size in shape.split(",")]
                kept = tuple(sorted(size for size in sizes if size not in (1, L)))
                found[kind, kept] += runs(name) * (L if L in sizes else 1)
    return found


def trip_count(condition: list[str]) -> int:
    """Of a loop that counts from zero to a constant."""
    (bound,) = (int(n) for line in condition for n in re.findall(r" constant\((\d+)\)", line))
    assert "direction=LT" in condition[-1], condition[-1]
    return bound


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder with the compiled program of each layout, as text."""
    folder, root = tmp_path_factory.mktemp("programs"), Path(__file__).parents[2]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    # Another process: where libtpu does not like a slice, it ends the process.
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_collectives_that_it_needs_and_none_more(programs, layout):
    assert collectives((programs / layout).read_text()) == LAYOUTS[layout]


def test_the_parser_sees_every_form():
    text = """
%all-reduce-scatter.1 (input: f32[512,2]) -> f32[128,2] {
  %input = f32[512,2]{1,0} parameter(0)
  %all-reduce.7 = f32[512,2]{1,0:T(8,128)} all-reduce(%input), to_apply=%add
  ROOT %slice = f32[128,2]{1,0} dynamic-slice(%all-reduce.7, %i), dynamic_slice_sizes={128,2}
}
%body (param: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = (bf16[1,16]{1,0:T(8,128)(2,1)S(3)}, f32[4,2]{1,0}) all-gather(%x, %y), dimensions={1}
  %f = f32[128,2]{1,0:T(8,128)S(3)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, x={}
  %p-start = (f32[5]{0}, f32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z)
  %p-done = f32[5]{0} collective-permute-done(%p-start)
}
%condition (param.1: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5), metadata={op_name="while/cond/lt"}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%outer (param.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
}
%outer_condition (param.3: (s32[], f32[8])) -> pred[] {
  %two = s32[] constant(2)
  ROOT %lt.1 = pred[] compare(%i, %two), direction=LT
}
%wrapped (x: f32[7]) -> f32[7] {
  ROOT %a = f32[7]{0} all-to-all(%x), dimensions={0}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w.1 = (s32[], f32[8]) while(%t), condition=%outer_condition, body=%outer
  %r = (f32[3,64]{1,0}, /*index=1*/f32[], f32[6]{0}) all-reduce(%x), to_apply=%add
  %s = f32[9]{0} reduce-scatter(%r), metadata={op_name="all-to-all(/all_gather"}
  %b = f32[2,9]{1,0} fusion(%all-reduce.2), kind=kLoop, calls=%fused_computation
  %c = ((f32[7]{0}), f32[7]{0}, u32[]) async-start(%x), calls=%wrapped
}
"""
    assert collectives(text) == {
        ("all-gather", (16,)): 10,
        ("all-gather", (2, 4)): 10,
        ("reduce-scatter", (2, 128)): 10,
        ("collective-permute", (5,)): 10,
        ("all-reduce", (64,)): 3,
        ("all-reduce", (6,)): 1,
        ("reduce-scatter", (9,)): 1,
        ("all-to-all", (7,)): 1,
    }


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_sizes_tell_the_arrays_of_a_layout_apart(fsdp, tensor):
    """Or a collective too many could stand in for one that is missing."""
    weights = kernels(tensor=tensor) + tables(tensor=tensor) + NORMS
    groups = [weights, kernels(fsdp, tensor) + tables(fsdp, tensor), of_tensor(B // fsdp)]
    groups.append([(B, T, K, d), (B, T // 4, K, d)])
    shapes = [set(count(reduce=group)) for group in groups]
    assert list(map(len, shapes)) == [5, 4, 2, 2]
    assert not (shapes[0] | shapes[1]) & (shapes[2] | shapes[3])
    assert not shapes[2] & shapes[3]


def compile_all(folder: Path):
    """Writes the program of each layout."""
    import dataclasses

    import jax
    from jax.experimental.topologies import get_topology_desc

    from pjit_train.data.text import TextData
    from pjit_train.models.transformer import TransformerConfig
    from pjit_train.optimizers import AdamW
    from pjit_train.program import Program
    from pjit_train.run import Run
    from pjit_train.sharding import MeshShape, make_mesh

    @dataclasses.dataclass(frozen=True)
    class Vocabulary:
        """What a program asks of a tokenizer."""

        vocab_size: int = V

    model = TransformerConfig(
        vocab_size=V,
        max_len=T,
        d_model=D,
        num_layers=L,
        num_heads=H,
        num_kv_heads=K,
        head_dim=d,
        d_ff=F,
    )
    slice_ = get_topology_desc(
        platform="tpu",
        topology_name="v4:2x2x1",
        chip_config_name="megacore",
        wrap=(False, False, False),
    )
    for layout in LAYOUTS:
        axes = {axis: int(size) for axis, size in (x.split("=") for x in layout.split(","))}
        assert math.prod(axes.values()) == len(slice_.devices)
        run = Run(
            model=model,
            data=TextData(seq_len=T, batch_size=B, tokenizer=Vocabulary()),
            optimizer=AdamW(learning_rate=1e-3),
            steps=20,
            mesh=MeshShape(**{"data": 1, **axes}),
        )
        program = Program(run, make_mesh(run.mesh, slice_.devices))
        with jax.set_mesh(program.mesh):
            tokens = jax.ShapeDtypeStruct(
                (B, T),
                "int32",
                sharding=jax.NamedSharding(program.mesh, run.rules.spec(("batch", "length"))),
            )
        step = program.compile_step({"inputs": tokens, "targets": tokens})
        (folder / layout).write_text(step.as_text())


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
