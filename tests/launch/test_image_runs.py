"""A vision transformer by the commands of language models: train, resume, evaluate, export."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from launch.cli import main
from launch.trained import read_run
from pjit_train.evaluate import restore_weights
from pjit_train.huggingface.weights import load
from pjit_train.program import Program
from pjit_train.sharding import make_mesh

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

SMALL = [
    "--gin=vit.ViTConfig.num_layers = 1",
    "--gin=vit.ViTConfig.d_model = 16",
    "--gin=vit.ViTConfig.d_ff = 32",
    "--gin=vit.ViTConfig.patch_size = 4",
    "--gin=run.Run.log_every = 1",
    "--gin=run.Run.eval_every = 3",
    "--mesh=data=1",
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    monkeypatch.setattr("launch.process.prepare", lambda devices=None: None)


def train(out, *options, config="configs/vit_digits.gin") -> int:
    return main(["train", config, *SMALL, *options, "--out", str(out)])


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compiles):
    out = tmp_path_factory.mktemp("images") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.process.prepare", lambda devices=None: None)
        assert train(out, "--steps", "6") == 0
    return out


def test_what_it_says(tmp_path, capsys):
    assert train(tmp_path / "run", "--steps", "3") == 0
    said = capsys.readouterr().out
    assert re.search(r"[\d,]+ parameters, 1,438 training images of 10 classes, mesh 1 ", said)
    assert re.search(r"step 2/3  loss \d.*  [\d,]+ images/s", said)
    assert re.search(r"validation after step 3: loss \d\.\d+  accuracy \d+\.\d\d%", said)
    assert re.search(r"least accurate: \d \d+\.\d%, ", said)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"val_loss", "val_accuracy", "images_per_second"} <= rows[-1].keys()


def test_it_resumes_bit_for_bit(trained, tmp_path):
    every = "--gin=checkpoint.CheckpointConfig.every_steps = 3"
    assert train(tmp_path / "run", "--steps", "6", every) == 0
    before = losses(tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").glob("6*"):  # as if killed before it was saved
        shutil.rmtree(step)
    assert train(tmp_path / "run", "--steps", "6", every) == 0
    assert losses(tmp_path / "run") == before == losses(trained)


def test_it_trains_alike_on_a_mesh(trained, tmp_path):
    options = [option for option in SMALL if not option.startswith("--mesh")]
    command = ["train", "configs/vit_digits.gin", *options, "--steps", "6"]
    command += ["--mesh", "fsdp=2,tensor=2", "--out", str(tmp_path / "mesh")]
    assert main(command) == 0
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(trained), rtol=1e-3)


def test_eval_gives_the_accuracy_of_each_class(trained, capsys):
    assert main(["eval", str(trained), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    classes = figures["classes"].values()
    right = sum(row["images"] * row["accuracy"] for row in classes)
    assert sum(row["images"] for row in classes) == 359
    assert figures["val_accuracy"] == pytest.approx(right / 359)
    assert main(["eval", str(trained)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"val_accuracy +0\.\d+", table)
    assert re.search(r"(?m)^class +images +accuracy$", table)
    assert len(re.findall(r"(?m)^\d +\d+ +\d+\.\d\d%$", table)) == 10


def test_what_is_for_text_says_so(trained, tmp_path, capsys):
    assert main(["sample", str(trained)]) == 2
    assert "is a run of image classification and gives no text" in capsys.readouterr().err
    command = ["compress", str(trained), "--pattern", "2:4", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "is calibrated on text: give a run of language modelling" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_exported_folder_is_the_same_function(trained, tmp_path):
    assert main(["export", str(trained), str(tmp_path / "hf")]) == 0
    run, _ = read_run(trained)
    program = Program(run, make_mesh(run.mesh))
    _, weights = restore_weights(program, trained)
    images = run.data.prepare(0).eval_batch(0)["images"][:4]
    with jax.set_mesh(program.mesh):
        expected = nnx.merge(program.graph, weights)(images)
    params = jax.tree.map(jax.numpy.asarray, load(tmp_path / "hf", run.model)[1])
    graph = nnx.split(nnx.eval_shape(lambda: run.model.build(jax.random.key(0), run.rules)))[0]
    np.testing.assert_allclose(nnx.merge(graph, params)(images), expected, atol=1e-6)


def test_a_folder_of_images_by_the_command_of_every_run(tmp_path, monkeypatch, capsys, caplog):
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 160)):
        for i in range(20):
            path = tmp_path / "pictures" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(low, low + 96, (10, 12), np.uint8)).save(path)
    folder = [
        "--gin=images.ImageData.source = @image_sources.ImageFolder()",
        "--gin=image_sources.ImageFolder.path = 'pictures'",
        "--gin=image_sources.ImageFolder.validation_fraction = 0.3",
        "--gin=images.ImageData.batch_size = 8",
        "--gin=optimizers.AdamW.learning_rate = 0.01",
        "--gin=optimizers.Schedule.warmup_steps = 2",
    ]
    monkeypatch.chdir(tmp_path)
    assert train("run", "--steps", "12", *folder) == 2
    assert "num_classes=10 and the data have 2 classes; use num_cl" in capsys.readouterr().err
    assert train("run", "--steps", "12", *folder, "--gin=vit.ViTConfig.num_classes = 2") == 0
    capsys.readouterr()
    monkeypatch.chdir("/")
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["classes"]) == {"dark", "light"}
    assert figures["val_accuracy"] == 1
    (tmp_path / "pictures" / "dark" / "0.png").unlink()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["corpus"] == "changed"
    assert "was trained on other data than its sources hold now" in caplog.text
