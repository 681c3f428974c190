"""A run directory stands by itself: elsewhere, without its inputs, with files lost or damaged."""

import json
import os
import shutil
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from helpers.gin_files import tiny

from launch.cli import main
from launch.directory import check_directory, configuration, restore_configuration
from launch.trained import read_run
from pjit_train import record
from pjit_train.data import TokenizerJson, train_tokenizer
from pjit_train.errors import UserError

RUN = {
    "run.Run.steps": 2,
    "run.Run.log_every": 1,
    "checkpoint.CheckpointConfig.every_steps": 1,
    "optimizers.AdamW.learning_rate": 0.1,
    "transformer.TransformerConfig.vocab_size": 300,
    "transformer.TransformerConfig.max_len": 64,
    "text.TextData.tokenizer": "@tokenizers.TokenizerJson()",
    "text.TextData.cache_dir": "cache",
    "tokenizers.TokenizerJson.path": "words.json",
}
WORDS = "a cat sat on a mat, für Elise. " * 200
TRAIN = ["train", "run.gin", "--out", "out", "--mesh", "data=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compiles):
    """A folder with a corpus, a tokenizer, and a run that names both by relative paths."""
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    try:
        Path("run.gin").write_text(tiny(RUN, imports=("pjit_train.data.tokenizers",)))
        Path("corpus.txt").write_text(WORDS)
        train_tokenizer([WORDS], vocab_size=280, path="words.json")
        assert main(TRAIN) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the working directory."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder, symlinks=True, copy_function=shutil.copy2)
    kept = record.read(folder / "out")
    record.write(  # as if it had been trained here
        folder / "out",
        data=_Data(folder / "words.json"),
        config_text=kept.config,
        corpus=kept.corpus,
        folder=str(folder),
    )
    monkeypatch.chdir(folder)
    return folder


class _Data:
    """The tokenizer of a run, for `record.write`."""

    def __init__(self, path):
        self.tokenizer_file = TokenizerJson(path=str(path))
        self.template_files: list = []


@pytest.fixture
def said(capfd, caplog):
    """Calls a command; gives its exit code, output, and lines of errors and warnings."""

    def call(*argv):
        caplog.clear()
        capfd.readouterr()
        code = main(list(argv))
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("torsion: ")]
        return code, out, lines + [m for m in caplog.messages if f"torsion: {m}" not in lines]

    return call


SAMPLE = ["--prompt", "a cat", "--tokens", "8", "--temperature", "0"]


def figures(said, run="out", warns=()):
    code, out, lines = said("eval", str(run), "--json")
    assert code == 0, lines
    assert len(lines) == len(warns)
    for line, part in zip(lines, warns, strict=True):
        assert part in line
    return json.loads(out)


@pytest.mark.slow
def test_a_run_is_read_from_another_folder_and_without_its_tokenizer(here, said, monkeypatch):
    before, text = figures(said), said("sample", "out", *SAMPLE)[1]
    (here / "words.json").rename(here / "gone.json")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    # What lies there under the names of the run's inputs is none of the run's business.
    Path("corpus.txt").write_text("something else " * 99)
    Path("words.json").write_text("{}")
    assert figures(said, here / "out") == before
    assert said("sample", str(here / "out"), *SAMPLE) == (0, text, [])
    compressed = ["compress", str(here / "out"), "--method", "magnitude", "--sequences", "9"]
    assert said(*compressed, "--out", "small")[0] == 0
    shutil.rmtree(here / "out")
    assert figures(said, "small")["step"] == 0
    assert said("sample", "small", *SAMPLE)[0] == 0
    (Path("small") / "tokenizer.json").unlink()
    code, _, [line] = said("sample", "small", *SAMPLE)
    assert code == 2
    assert "tokenizer.json is missing, and 'words.json' is not the tokenizer" in line


def test_who_only_reads_writes_nothing(here, said):
    """Not even a file that goes again: it would change the time of its folder."""

    def times():
        return {path: path.stat().st_mtime_ns for path in [here, *(here / "out").rglob("*")]}

    before = times()
    figures(said)
    assert said("sample", "out", *SAMPLE)[0] == 0
    assert said("export", "out", str(here.parent / "folder"))[0] == 0
    assert times() == before


def test_the_copy_of_the_tokenizer_is_known_by_its_digest(here, said):
    copy = here / "out/tokenizer.json"
    whole = copy.read_text()
    text = said("sample", "out", *SAMPLE)[1]
    copy.write_text(whole + "\n")
    assert said("sample", "out", *SAMPLE) == (0, text, [])  # by the original
    assert said(*TRAIN, "--steps", "3")[0] == 0
    assert copy.read_text() == whole
    copy.write_text(whole[:-9])
    (here / "words.json").write_text(whole + "\n")
    code, _, [line] = said("sample", "out", *SAMPLE)
    assert code == 2
    assert "tokenizer.json is damaged" in line
    copy.write_text(whole)
    code, _, [line] = said(*TRAIN, "--steps", "4")
    assert code == 2
    assert "was begun with another tokenizer than 'words.json' is now (sha256 " in line
    (here / "words.json").unlink()
    assert said(*TRAIN, "--steps", "4")[0] == 0


def test_a_corpus_that_changed_is_said_by_its_digest(here, said):
    before = figures(said)
    (here / "corpus.txt").write_text(WORDS + "more")
    digest = record.read(here / "out").corpus
    after = figures(said, warns=[f"other data than its sources hold now (sha256 {digest[:16]}"])
    assert after.pop("corpus") == "changed"
    assert after["val_loss"] != before["val_loss"]
    code, _, [line] = said(*TRAIN, "--steps", "3")
    assert code == 2
    assert f"{digest[:16]}... then" in line


def test_the_same_text_under_another_path_is_the_same_run(here, said):
    (here / "moved").mkdir()
    (here / "corpus.txt").rename(here / "moved/text.TXT")
    moved = ["--gin", "sources.TextFiles.train = 'moved/*.TXT'", "--steps", "3"]
    assert said(*TRAIN, *moved)[0] == 0
    rows = [json.loads(x) for x in (here / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert figures(said)["step"] == 3  # where it lies now is what the run knows
    for binding in ("text.TextData.seq_len = 8", "text.TextData.tokenizer = @tokenizers.Bytes()"):
        code, _, [line] = said(*TRAIN, *moved, "--gin", binding)
        assert code == 2
        assert f"now it is {binding}" in line


@pytest.mark.parametrize("damage", ["lost", "empty", "cut", "zeros", "other"])
def test_a_configuration_that_is_lost_or_damaged_has_a_copy(here, caplog, damage):
    path, before = here / "out/config.gin", read_run(here / "out")
    whole = path.read_text()
    damaged = {
        "empty": "",
        "cut": whole[: len(whole) // 2],
        "zeros": "\0" * len(whole),
        "other": whole.replace("norm_epsilon = 1e-05", "norm_epsilon = 9e-05"),
    }
    if damage == "lost":
        path.unlink()
    else:
        assert damaged[damage] != whole
        path.write_text(damaged[damage])
    assert read_run(here / "out") == before
    [line] = caplog.messages
    assert str(path) in line
    check_directory(here / "out", whole)  # and may be trained in, with its own configuration alone
    with pytest.raises(UserError, match="was begun with"):
        check_directory(here / "out", whole.replace("d_ff = 32", "d_ff = 64"))


def test_a_run_whose_configuration_is_cut_off_goes_on(here, said):
    path = here / "out/config.gin"
    whole = path.read_text()
    path.write_text(whole[:200])
    assert said("export", "out", "folder")[0] == 0
    assert Path("folder/tokenizer.json").read_text() == Path("words.json").read_text()
    assert json.loads(Path("folder/tokenizer_config.json").read_text())["model_max_length"] == 64
    assert said(*TRAIN, "--steps", "3")[0] == 0
    assert path.read_text() == whole.replace("Run.steps = 2", "Run.steps = 3")
    assert configuration(here / "out") == (path.read_text(), [])


def test_a_done_run_gets_its_lost_configuration_back(here, said):
    path = here / "out/config.gin"
    whole = path.read_text()
    path.unlink()
    assert said(*TRAIN)[0] == 0
    assert path.read_text() == whole
    assert record.read(here / "out").config == whole
    # Without the copy too, what is given counts: the command that trained it.
    path.unlink()
    (here / "out/checkpoints/run.json").unlink()
    code, _, [line] = said("eval", "out")
    assert code == 2
    assert "has no config.gin; the command that trained it writes it again" in line
    code, _, lines = said(*TRAIN)
    assert code == 0
    assert "is lost: going on with the configuration that is given" in lines[0]
    assert path.read_text() == whole


def test_a_run_goes_on_by_its_own_lost_configuration(here, caplog):
    path = here / "out/config.gin"
    whole = path.read_text()
    for damage in (path.unlink, lambda: path.write_text("run.Run.steps = (")):
        damage()
        restore_configuration("out/config.gin")
        assert path.read_text() == whole
    assert len(caplog.messages) == 2
    path.write_text(changed := whole + "# mine")
    for file in ("out/config.gin", "run.gin", "nowhere/config.gin"):
        restore_configuration(file)
    assert path.read_text() == changed
    assert len(caplog.messages) == 2


def test_what_config_gin_may_say_anew_counts_and_is_said(here, caplog):
    path = here / "out/config.gin"
    path.write_text(path.read_text().replace("eval_batches = 20", "eval_batches = 1"))
    assert read_run(here / "out")[0].eval_batches == 1
    [line] = caplog.messages
    assert line == (
        f"{path} has run.Run.eval_batches = 1; the run was trained with run.Run.eval_batches = 20"
    )
    path.write_text("# mine\n" + record.read(here / "out").config)
    assert read_run(here / "out")[0].eval_batches == 20
    assert len(caplog.messages) == 1


def test_a_damaged_record_is_named_and_config_gin_counts(here, said, caplog):
    path, before = here / "out/checkpoints/run.json", read_run(here / "out")
    whole = path.read_text()
    for damaged in (whole.replace("300", "301"), whole[:99], "", "[]", "[" * 99999):
        path.write_text(damaged)
        caplog.clear()
        assert read_run(here / "out")[1] == before[1]
        assert "run.json is damaged" in caplog.text
        code, _, [line] = said(*TRAIN, "--steps", "3")
        assert code == 2
        assert "run.json is damaged: it does not have the digest that it holds; remove it" in line
    assert figures(said, warns=["run.json is damaged"])["step"] == 2


def test_plain_orbax_reads_the_checkpoints_beside_the_record(here):
    with ocp.CheckpointManager(here / "out/checkpoints") as manager:
        assert sorted(manager.all_steps()) == [1, 2]
        assert (
            "params"
            in manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore()))[
                "state"
            ]
        )


def test_a_run_of_before_has_no_record(here, said):
    """It is read by its config.gin alone; what resumes it writes the record."""
    kept, before = record.read(here / "out"), figures(said)
    (here / "out/checkpoints/run.json").unlink()
    (here / "out/tokenizer.json").unlink()
    (here / "out/corpus.sha256").write_text(kept.corpus + "\n")
    assert figures(said) == before
    assert said("sample", "out", *SAMPLE)[0] == 0
    (here / "corpus.txt").rename(here / "other.txt")
    moved = ["--gin", "sources.TextFiles.train = 'other.txt'", "--steps", "3"]
    assert said(*TRAIN, *moved)[0] == 0
    assert record.read(here / "out").corpus == kept.corpus
