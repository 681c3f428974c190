"""Runs by the command in this process: what a user may get wrong, and what a run leaves."""

import fcntl
import json
import re
from pathlib import Path

import pytest
import tensorstore
from helpers.gin_files import tiny
from helpers.run_directories import files

from launch.cli import main

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def here(here):
    """The folder with a run that samples at its end."""
    Path("run.gin").write_text(tiny({"run.Samples.tokens": 4}))
    return here


def tokenizer_with(tokens: int) -> None:
    """A tokenizer of words in the format of Hugging Face, with ids up to `tokens`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["</s>", "a", "cat", "sat", "on", "mat.", *(f"w{i}" for i in range(tokens - 6))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("words.json")


WORDS = (
    "--gin",
    "text.TextData.tokenizer = @tokenizers.TokenizerJson()",
    "--gin",
    "tokenizers.TokenizerJson.path = 'words.json'",
)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mesh", "data=3"], r"batch_size / accumulate = 8 is not divisible by data=3"),
        (["--mesh", "data=4,fsdp=4"], r"data=4,fsdp=4 needs 16 devices and there are 8"),
        (["--mesh", "data=1,tensor=4"], r"heads.*tensor=4 does not divide"),
        (["--mesh", "data=1,sequence=3"], r"seq_len = 16 is not divisible by sequence=3"),
        (["--mesh", "rows=2"], r"no axis 'rows'"),
        (["--mesh", "data=-1,fsdp=-1"], r"only one axis may be -1"),
        (["--gin", "sources.TextFiles.train = 'missing.txt'"], r"missing\.txt"),
        (["--gin", "sources.TextFiles.train = 'empty.txt'"], r"empty\.txt"),
        (["--gin", "sources.TextFiles.train = 'short.txt'"], r"fewer than the 17 of one row"),
        (["--gin", "transformer.TransformerConfig.vocab_size = 200"], r"vocab_size >= 256"),
        (["--gin", "text.TextData.seq_len = 64"], r"seq_len=64 exceeds the model's max_len=32"),
        (["--gin", "run.Samples.tokens = 100"], r"samples.*max_len=32"),
        (["--gin", "run.Run.accumulate = 3"], r"accumulate=3 does not divide batch_size=8"),
        (["--gin", "run.Run.initial_weights = 'nowhere'"], r"nowhere"),
        (["--gin", "transformer.TransformerConfig.num_kv_heads = 3"], r"num_kv_heads=3"),
        (["--gin", "run.Run.steps = 0"], r"steps=0"),
        ([*WORDS], r"vocab_size >= 400"),
        (["--out", "corpus.txt"], r"corpus\.txt"),
        (["--out", "corpus.txt/run"], r"corpus\.txt"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(here, capfd, options, says):
    Path("empty.txt").touch()
    Path("short.txt").write_text("a b c")
    tokenizer_with(400)
    before = files(here)
    out = [] if "--out" in options else ["--out", "out"]
    assert main(["train", "run.gin", *out, *options]) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("torsion: ")
    assert re.search(says, line), line
    assert files(here) == before
    assert not Path("out").exists()


def test_the_directory_of_another_run_is_left_as_it_is(here, capfd):
    assert main(["train", "run.gin", "--out", "out", "--mesh", "data=1"]) == 0
    before = files(here)
    for binding in (
        "optimizers.AdamW.learning_rate = 0.5",
        "transformer.TransformerConfig.d_model = 32",
        "run.Run.seed = 7",
    ):
        capfd.readouterr()
        assert main(["train", "run.gin", "--out", "out", "--gin", binding]) == 2
        [line] = capfd.readouterr().err.strip().splitlines()
        assert binding.split(" =")[0] in line
        assert "--out" in line
        assert files(here) == before


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(here, capfd):
    """A learning rate beyond all measure: the first update leaves nothing to compute with."""
    options = ["--gin", "optimizers.AdamW.learning_rate = 1e38", "--mesh", "data=1", "--steps", "9"]
    assert main(["train", "run.gin", "--out", "out", *options]) == 1
    [line] = [ln for ln in capfd.readouterr().err.splitlines() if ln.startswith("torsion: step")]
    step = int(line.split()[2].rstrip(":"))
    rows = [json.loads(ln) for ln in Path("out/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == step
    assert rows[-1]["skipped"] == 1
    assert "on_nonfinite = 'skip'" in line


@pytest.mark.slow
def test_an_exported_run_is_where_another_starts(here, capfd):
    """Trains, exports, and starts again from the folder: the first loss goes on from the last."""
    options = ["--mesh", "data=1", "--gin", "optimizers.AdamW.learning_rate = 3e-2"]
    base = ["train", "run.gin", *options, "--log-every", "1"]
    assert main([*base, "--out", "out", "--steps", "30"]) == 0
    assert main(["export", "out", "folder"]) == 0
    assert main(["eval", "out", "--json"]) == 0
    evaluated = json.loads(capfd.readouterr().out.splitlines()[-1])
    start = ["--gin", "run.Run.initial_weights = 'folder'", "--steps", "1"]
    assert main([*base, *start, "--out", "again"]) == 0
    losses = [
        [json.loads(line)["loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        for out in ("out", "again")
    ]
    assert losses[0][0] > 5
    assert losses[1][0] == pytest.approx(losses[0][-1], abs=0.5)
    assert evaluated["step"] == 30
    assert main(["export", "out", "folder"]) == 2
    assert "folder" in capfd.readouterr().err
    options = ["--gin", "transformer.TransformerConfig.d_ff = 64"]
    assert main([*base, *start, *options, "--out", "other"]) == 2
    assert "d_ff=32, not 64" in capfd.readouterr().err
    assert not Path("other").exists()


@pytest.mark.slow
def test_a_schedule_that_is_not_as_configured_is_said_at_the_start(here, capfd):
    def said(*options):
        assert main(["train", "run.gin", "--out", "out", "--mesh", "data=1", *options]) == 0
        lines = capfd.readouterr().out.splitlines()
        return [line for line in lines if "schedule" in line]

    rises = "the learning rate rises through all of them and does not fall"
    long = f"schedule: warmup_steps=100 exceeds the run's {{}} steps; {rises}".format
    assert said() == [long(2)]
    assert said("--steps", "3") == [long(3), "the schedule now spans 3 steps instead of 2"]
    Path("out/checkpoints/3").rename("elsewhere")
    assert said("--steps", "3") == [long(3)]  # it resumes, and spans what it did


@pytest.fixture
def trained(here):
    """A run directory with the checkpoints of steps 1 and 2."""
    options = [
        "optimizers.AdamW.learning_rate = 0.3",
        "checkpoint.CheckpointConfig.every_steps = 1",
    ]
    bindings = [word for option in options for word in ("--gin", option)]
    assert main(["train", "run.gin", "--out", "out", "--mesh", "data=1", *bindings]) == 0
    return Path("out/checkpoints")


def delete_optimizer(checkpoint: Path) -> None:
    """Deletes the optimizer's arrays from a checkpoint's files."""
    store = {"driver": "ocdbt", "base": f"file://{checkpoint.resolve()}/state/"}
    arrays = tensorstore.KvStore.open(store).result()
    keys = [key for key in arrays.list().result() if key.startswith(b"optimizer.")]
    assert keys
    for key in keys:
        arrays[key] = None


@pytest.mark.slow
def test_a_trained_run_is_used_without_its_optimizer_at_any_step(trained, capfd):
    for step in ("1", "2"):
        delete_optimizer(trained / step)

    def output(*argv):
        capfd.readouterr()
        assert main(list(argv)) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out

    losses = [json.loads(output("eval", "out", "--json", "--step", s))["val_loss"] for s in "12"]
    assert losses[0] != losses[1]
    assert json.loads(output("eval", "out", "--json"))["val_loss"] == losses[1]
    sample = ["sample", "out", "--prompt", "a cat", "--tokens", "20", "--seed", "4"]
    first, second = (output(*sample, "--step", step) for step in "12")
    assert output(*sample) == second != first
    assert "after step 1, " in output("export", "out", "folder", "--step", "1")
    for command in (["eval", "out"], sample, ["export", "out", "other"]):
        assert main([*command, "--step", "9"]) == 2
        assert "has no checkpoint 9; it has [1, 2]" in capfd.readouterr().err


def test_a_run_that_is_being_trained_is_evaluated_without_alarm(trained, caplog, capfd):
    """Its half-written checkpoint is one that is being written."""
    half = trained / "3.orbax-checkpoint-tmp"
    half.mkdir()
    with Path("out/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["eval", "out"]) == 0
    assert caplog.messages == []
    assert main(["eval", "out"]) == 0
    said = f"checkpoint {half.resolve()} is half-written: its save was cut off; ignored"
    assert caplog.messages == [said]
