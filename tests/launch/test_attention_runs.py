"""What a user may get wrong about attention in a run's configuration."""

import json
from pathlib import Path

import pytest
from helpers.gin_files import tiny

from launch.cli import main

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = {
    "transformer.TransformerConfig.num_heads": 4,
    "run.Run.eval_every": 1,
    "run.Run.eval_batches": 1,
    "run.Samples.tokens": 4,
}


@pytest.fixture
def train(here, capfd):
    """Trains with these fields of the model: (exit status, lines said)."""
    Path("run.gin").write_text(tiny(MODEL))

    def train(*options, **model):
        bindings = [f"transformer.TransformerConfig.{k} = {v!r}" for k, v in model.items()]
        words = [word for binding in bindings for word in ("--gin", binding)]
        status = main(["train", "run.gin", "--out", "out", *words, *options])
        said = capfd.readouterr()
        return status, (said.out + said.err).strip().splitlines()

    return train


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"num_heads": 3}, "model: num_heads=3 does not divide d_model=16; use a divisor, or say "
         "head_dim"),
        ({"num_kv_heads": 3}, "model: num_kv_heads=3 does not divide num_heads=4; use a divisor of "
         "4"),
        ({"attention_tile_rows": 0}, "TransformerConfig.attention_tile_rows=0; use a "
         "whole number from 1 to 2147483647 or None"),
        ({"attention": "fast"}, "transformer.TransformerConfig.attention = 'fast': want 'auto' or "
         "'rows' or 'flat' or 'splash' or 'cudnn'"),
        ({"attention_sequence": "rings"}, "transformer.TransformerConfig.attention_sequence = "
         "'rings': want 'gather' or 'ring'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(train, model, says):
    status, lines = train("--mesh", "data=1", **model)
    assert (status, lines) == (2, [f"torsion: {says}"])
    assert not Path("out").exists()


@pytest.mark.parametrize(("way", "platform"), [("cudnn", "gpu"), ("splash", "tpu")])
def test_a_device_that_lacks_the_chosen_way_is_one_line(train, way, platform):
    status, lines = train("--mesh", "data=1", attention=way)
    says = f"attention={way!r} runs on {platform} and this is cpu; use 'rows' or 'auto'"
    assert (status, lines) == (2, [f"torsion: {says}"])
    assert not Path("out").exists()


def test_heads_that_the_mesh_does_not_divide_are_one_line(train):
    status, [line] = train("--mesh", "data=1,tensor=4", num_kv_heads=2)
    assert status == 2
    assert "tensor=4 does not divide" in line


def losses() -> list[float]:
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_tile_larger_than_the_sequence_is_said_once(train):
    """Through training, evaluation and samples, whose lengths differ; and it changes nothing."""
    status, lines = train("--mesh", "data=1", attention_tile_rows=64)
    assert status == 0
    said = [line for line in lines if "attention_tile_rows" in line]
    assert said == ["torsion: attention_tile_rows=64 exceeds seq_len=16: all 16 rows are one tile"]
    clamped = losses()
    Path("out").rename("clamped")
    status, lines = train("--mesh", "data=1", attention_tile_rows=16)
    assert status == 0
    assert not [line for line in lines if "attention_tile_rows" in line]
    assert losses() == clamped
