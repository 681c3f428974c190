"""A pretrained model here and in `transformers` on torch: perplexity, decoding, a training step.

The two sides alternate in one process; figures are medians. It runs where torch and transformers
are (make test-oracle makes such an environment):

    .venv-oracle/bin/python tests/bench/pretrained.py FOLDER TEXT [--only perplexity]
"""

import argparse
import dataclasses
import gc
import math
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
import transformers

from pjit_train.data import TextData
from pjit_train.evaluation.scorer import Row, Scorer
from pjit_train.language_model import LanguageModel, of_folder
from pjit_train.models.sampler import Choice, Sampler
from pjit_train.optimizers import AdamW, Schedule
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, make_mesh

ONE = MeshShape(data=1)


class Clock:
    """Seconds of each side, by the wall and of processor time."""

    def __init__(self):
        self.wall: dict[str, list[float]] = {}
        self.busy: dict[str, list[float]] = {}

    def __call__(self, side: str, do):
        began, busy = time.perf_counter(), time.process_time()
        result = do()
        self.wall.setdefault(side, []).append(time.perf_counter() - began)
        self.busy.setdefault(side, []).append(time.process_time() - busy)
        return result

    def say(self, ours: str, other: str, *, skip: int = 1) -> None:
        """Prints the medians without the first few, which compile, and their ratio."""
        for name, times in (("wall", self.wall), ("processor", self.busy)):
            a, b = (statistics.median(times[side][skip:]) for side in (ours, other))
            print(f"{name:<10} {ours} {a:.4f} s, {other} {b:.4f} s, ratio {a / b:.2f}")


def their_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def text_tokens(model: LanguageModel, file: Path) -> np.ndarray:
    return model.tokenizer.encode_marked(file.read_text(encoding="utf-8")).astype(np.int32)


def perplexity(folder: Path, file: Path, windows: int, sequence: int) -> None:
    model, theirs, clock = of_folder(folder, ONE), their_model(folder).eval(), Clock()
    tokens, scorer = text_tokens(model, file), Scorer(model)
    ours_nats = their_nats = their_nats_64 = 0.0

    @torch.no_grad()
    def loss(row, exact=False):
        logits = theirs(torch.from_numpy(row[None].astype(np.int64))).logits[0, :-1]
        targets = torch.from_numpy(row[1:].astype(np.int64))
        nats = torch.nn.functional.cross_entropy
        single = nats(logits, targets, reduction="none").double().sum().item()
        return (single, nats(logits.double(), targets, reduction="sum").item()) if exact else single

    for i in range(windows):
        row = tokens[i * sequence : (i + 1) * sequence]
        [score] = clock("torsion", lambda row=row: scorer([Row(row, sequence - 1)]))
        ours_nats -= score.log_probability
        clock("torch", lambda row=row: loss(row))
        single, exact = loss(row, exact=True)
        their_nats, their_nats_64 = their_nats + single, their_nats_64 + exact
    count = windows * (sequence - 1)
    print(f"perplexity of {windows} windows of {sequence} tokens ({count} predicted)")
    for name, nats in (
        ("torsion", ours_nats),
        ("torch, cross_entropy in float32", their_nats),
        ("torch, the same logits in float64", their_nats_64),
    ):
        print(f"  {name:<34} {math.exp(nats / count):.6f}  ({nats:.5f} nats)")
    clock.say("torsion", "torch")


def decoding(folder: Path, count: int) -> None:
    model, clock = of_folder(folder, ONE), Clock()
    size = sum(x.nbytes for x in jax.tree.leaves(model.params))
    whole, total = jax.numpy.zeros(size // 4), jax.jit(lambda x: x.sum())
    model = model.taken_apart()
    sampler = Sampler(model.config, model.rules, model.tokenizer, ends=())
    with jax.set_mesh(model.mesh):
        for _ in range(6):
            steps = sampler.generate(
                model.params, [np.arange(5, 15)], tokens=count + 1, choice=Choice(temperature=0)
            )
            next(steps)  # the prompt
            clock("decoding", lambda steps=steps: list(steps))
            clock("reading", lambda: [total(whole).block_until_ready() for _ in range(count)])
    print(f"decoding {count} tokens, and reading the {size:,} bytes of weights as often")
    clock.say("decoding", "reading")


def training(folder: Path, file: Path, steps: int, batch: int, sequence: int) -> None:
    model, clock = of_folder(folder, ONE), Clock()
    tokens = text_tokens(model, file)[: batch * (sequence + 1)].reshape(batch, sequence + 1)
    theirs = their_model(folder).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, targets = (
        torch.from_numpy(x.astype(np.int64)) for x in (tokens[:, :-1], tokens[:, 1:])
    )

    def their_step():
        optimizer.zero_grad()
        logits = theirs(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    run = Run(
        model=dataclasses.replace(model.config, layers="unroll"),
        data=TextData(seq_len=sequence, batch_size=batch, tokenizer=model.tokenizer),
        optimizer=AdamW(learning_rate=1e-5, schedule=Schedule(shape="constant", warmup_steps=0)),
        steps=1000,
        mesh=ONE,
        initial_weights=str(folder),
    )
    del model
    gc.collect()
    program = Program(run, make_mesh(ONE, jax.devices()[:1]))
    rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    data = program.global_batch(lambda part: {name: x[part] for name, x in rows.items()})
    compiled, state = program.compile_step(data), program.new_state()

    def step():
        nonlocal state
        state, metrics = compiled(state, data)
        return float(metrics["loss"])

    losses = [(clock("torsion", step), clock("torch", their_step)) for _ in range(steps + 1)]
    print(f"training step of {batch} x {sequence} tokens")
    print("  losses " + ", ".join(f"{a:.5f} and {b:.5f}" for a, b in losses))
    clock.say("torsion", "torch")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", choices=("perplexity", "decoding", "training"))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    if args.only in (None, "perplexity"):
        perplexity(args.folder, args.text, args.windows, args.sequence)
        gc.collect()
    if args.only in (None, "decoding"):
        decoding(args.folder, args.tokens)
        gc.collect()
    if args.only in (None, "training"):
        training(args.folder, args.text, args.steps, 2, 1024)


if __name__ == "__main__":
    main()
