"""A short run that several modules train, each in its own way."""

import functools

import pytest
from helpers.tiny_models import BYTES_MODEL

from pjit_train import evaluate, loop
from pjit_train.checkpoint import CheckpointConfig
from pjit_train.data.sources import TextFiles
from pjit_train.data.text import TextData
from pjit_train.optimizers import AdamW, Schedule
from pjit_train.program import Program
from pjit_train.run import Run, Samples
from pjit_train.sharding import MeshShape


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """(a corpus, a folder for its cache)."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400)]
    (folder / "corpus.txt").write_text("".join(lines))
    return str(folder / "corpus.txt"), str(folder / "cache")


@pytest.fixture(scope="module")
def run(text):
    """A run of 30 steps, which is made in a second."""
    corpus, cache = text
    data = TextData(sources=[TextFiles(train=corpus)], seq_len=32, batch_size=4, cache_dir=cache)
    return Run(
        model=BYTES_MODEL,
        data=data,
        optimizer=AdamW(learning_rate=1e-2, schedule=Schedule(warmup_steps=5)),
        steps=30,
        mesh=MeshShape(data=1),
        checkpoints=CheckpointConfig(every_steps=10, keep_last=9, keep_best=0),
        samples=Samples(tokens=0),
        log_every=1,
        eval_every=12,
        eval_batches=3,
    )


class Reused(Program):
    """A program that compiles a step once for all that train with it."""

    @functools.cached_property
    def steps(self) -> dict:
        return {}

    def compile_step(self, batch, step=1):
        packed = self.abstract_state_after(step) is not self.abstract_state
        if packed not in self.steps:
            self.steps[packed] = super().compile_step(batch, step)
        return self.steps[packed]


@pytest.fixture
def reused(monkeypatch):
    """Makes a run that is trained again, or evaluated, use the program that was compiled first.

    What a resumed run reads, it reads from its directory all the same. Processes that begin anew
    are in `tests/launch/test_end_to_end.py`.
    """
    programs = []

    def program(run, mesh):
        for known in programs:
            if (known.run, known.mesh) == (run, mesh):
                return known
        programs.append(Reused(run, mesh))
        return programs[-1]

    for module in (loop, evaluate):
        monkeypatch.setattr(module, "Program", program)
