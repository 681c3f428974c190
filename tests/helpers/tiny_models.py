"""Tiny models and their programs, by which layouts, recipes and formats are compared.

B rows of a batch, T tokens of a row, D d_model, H heads, K heads of keys and values, d head_dim,
F d_ff, V entries of the vocabulary.
"""

import dataclasses
import functools

import jax
import numpy as np

from pjit_train.data.text import TextData
from pjit_train.models.transformer import TransformerConfig
from pjit_train.optimizers import AdamW, Schedule
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, make_mesh

# Sizes that tell arrays apart by their shape alone, on every mesh below (`test_collectives`).
B, T, D, H, K, d, F, V = 8, 24, 32, 4, 2, 6, 40, 56
LLAMA = TransformerConfig(
    vocab_size=V,
    max_len=T,
    d_model=D,
    num_layers=3,
    num_heads=H,
    num_kv_heads=K,
    head_dim=d,
    d_ff=F,
)
GPT2 = TransformerConfig(
    vocab_size=V,
    max_len=T,
    d_model=D,
    num_layers=2,
    num_heads=H,
    head_dim=d,
    d_ff=F,
    norm="layernorm",
    activation="gelu_tanh",
    use_bias=True,
    positions="learned",
    position_offset=2,
    tie_head=True,
)
BYTES_MODEL = TransformerConfig(
    vocab_size=256, max_len=32, d_model=16, num_layers=2, num_heads=2, d_ff=32
)
UNROLLED = dataclasses.replace(GPT2, layers="unroll")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a program asks of a tokenizer."""

    vocab_size: int = V
    separator: int = 0


def make_run(model=LLAMA, mesh=None, **options) -> Run:
    """A run of a tiny model; the mesh is one device where none is given."""
    return Run(
        **{
            "model": model,
            "data": TextData(seq_len=T, batch_size=B, tokenizer=Vocabulary()),
            "optimizer": AdamW(learning_rate=1e-2, schedule=Schedule(warmup_steps=2)),
            "steps": 20,
            "mesh": MeshShape(**{"data": 1, **(mesh or {})}),
            **options,
        }
    )


def make_program(model=LLAMA, mesh=None, **options) -> Program:
    run = make_run(model, mesh, **options)
    return Program(run, make_mesh(run.mesh))


def make_batch(program: Program, seed: int, **more):
    """Random tokens, the same on every mesh, that have something to learn: half of them are 7."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.5] = 7
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **more}
    return program.global_batch(lambda rows: {name: x[rows] for name, x in arrays.items()})


@functools.cache
def compiled(model, mesh: tuple[tuple[str, int], ...], accumulate: int = 1):
    """(program, compiled step) of a layout; compiled once for all the tests of a process."""
    program = make_program(model, dict(mesh), accumulate=accumulate)
    return program, program.compile_step(make_batch(program, 0))


@functools.cache
def initial(model):
    """A state of the model, in host memory."""
    return jax.device_get(make_program(model).new_state())


def place(program: Program, state):
    """A state in host memory, or a part of one, laid out as the program's."""
    abstract = program.abstract_state if "step" in state else program.abstract_state["params"]
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))


TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T)


def recording(calls: list):
    """A read function that notes the rows it was asked for."""

    def read(rows):
        calls.append((rows.start, rows.stop))
        return {"inputs": TOKENS[rows], "targets": -TOKENS[rows]}

    return read
