"""Configurations of earlier versions: moved names, parameters that came later, changed defaults."""

import json
import logging
from pathlib import Path

import pytest

from launch import __version__, versions
from launch.bindings import Configurable, Key, parse_bindings
from launch.cli import main
from launch.configure import build_run
from launch.directory import check_directory, configuration
from pjit_train.errors import UserError

QUICK = "configs/quickstart.gin"
OLD = "pjit_train.nets.llama"


@pytest.fixture
def moved(monkeypatch):
    """The transformer's module, class and a parameter of it as if they had had other names."""
    new = "pjit_train.models.transformer"
    rows = {
        OLD: new,
        f"{new}.Config": f"{new}.TransformerConfig",
        f"{new}.TransformerConfig.width": f"{new}.TransformerConfig.d_model",
    }
    monkeypatch.setattr(versions, "MOVED", rows)
    monkeypatch.setattr(versions, "_told", set())


def as_of_then(text: str) -> str:
    """A configuration as the version wrote it that had the other names."""
    text = text.replace(
        "from pjit_train.models import transformer", "from pjit_train.nets import llama"
    )
    text = text.replace("transformer.TransformerConfig.d_model", "llama.Config.width")
    return text.replace("transformer.TransformerConfig", "llama.Config")


def test_a_configuration_says_the_version_that_wrote_it():
    text = build_run([QUICK])[1]
    assert text.startswith(f"# torsion {__version__}\n")
    assert build_run([], text=text)[1] == text


@pytest.mark.parametrize(
    ("statement", "now"),
    [
        ("from pjit_train.nets import llama", "from pjit_train.models import transformer as llama"),
        (
            "from pjit_train.nets import llama as net",
            "from pjit_train.models import transformer as net",
        ),
        ("import pjit_train.nets.llama as net", "from pjit_train.models import transformer as net"),
        ("from pjit_train.models import transformer", "from pjit_train.models import transformer"),
        ("from pjit_train.nets import llama2", "from pjit_train.nets import llama2"),
    ],
)
def test_imports_of_moved_modules_keep_the_name_that_the_text_uses(moved, statement, now):
    assert versions.renamed(statement + "\n") == now + "\n"


def test_names_are_changed_whole_and_only_of_their_module(moved):
    text = (
        "from pjit_train.nets import llama as net\nfrom other import net2\n"
        "net.Config.width = 8\nnet.Configuration.width = 8\nnet2.Config.width = 8\n"
        "a/net.Config.widths = [@net.Config, @b/net.Config()]\n"
    )
    assert versions.renamed(text) == (
        "from pjit_train.models import transformer as net\nfrom other import net2\n"
        "net.TransformerConfig.d_model = 8\nnet.Configuration.width = 8\nnet2.Config.width = 8\n"
        "a/net.TransformerConfig.widths = [@net.TransformerConfig, @b/net.TransformerConfig()]\n"
    )


def test_old_files_bindings_and_includes_build_the_run_of_today(
    moved, tmp_path, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "torsion")
    run, text = build_run([QUICK])
    Path("old.gin").write_text(as_of_then(text))
    Path("more.gin").write_text("include 'old.gin'\n")
    assert build_run(["more.gin"]) == (run, text)
    assert build_run([], text=as_of_then(text)) == (run, text)
    binding = f"from pjit_train.nets import llama\nllama.Config.width = {run.model.d_model}"
    assert build_run([QUICK], [binding]) == (run, text)
    notices = [record.getMessage() for record in caplog.records]
    assert len(notices) == len(set(notices))
    assert (
        f"{OLD} is pjit_train.models.transformer now; the old name is read as the new one"
        in notices
    )


def test_a_run_of_before_a_move_is_the_same_run(moved, tmp_path):
    text = build_run([QUICK])[1]
    (tmp_path / "config.gin").write_text(as_of_then(text))
    check_directory(tmp_path, text)
    values = parse_bindings(configuration(tmp_path)[0]).values
    assert values == parse_bindings(text).values


def without(text: str, name: str) -> str:
    """A configuration as it was before a parameter was added."""
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith(f"{name} =")]
    assert len(lines) < len(text.splitlines())
    return "".join(lines)


@pytest.mark.parametrize("name", ["transformer.TransformerConfig.rope_scaling", "run.Run.profile"])
def test_a_parameter_that_came_later_means_its_default(tmp_path, name):
    run, text = build_run([QUICK])
    (tmp_path / "config.gin").write_text(without(text, name))
    check_directory(tmp_path, text)
    assert build_run([str(tmp_path / "config.gin")]) == (run, text)


def test_a_parameter_that_came_later_may_not_be_another_value(tmp_path):
    text = build_run([QUICK])[1]
    (tmp_path / "config.gin").write_text(without(text, "optimizers.AdamW.b1"))
    check_directory(tmp_path, text)
    other = build_run([QUICK], ["optimizers.AdamW.b1 = 0.8"])[1]
    with pytest.raises(UserError, match=r"no optimizers\.AdamW\.b1, now it is .*0\.8"):
        check_directory(tmp_path, other)


def test_a_parameter_born_with_another_default_is_what_it_was_then(tmp_path, monkeypatch):
    """Old runs go on with 0.95; a new run, and a file of the user, have the default of today."""
    monkeypatch.setattr(versions, "BORN", {"pjit_train.optimizers.AdamW.b1": 0.95})
    text = build_run([QUICK])[1]
    (tmp_path / "config.gin").write_text(without(text, "optimizers.AdamW.b1"))
    with pytest.raises(UserError, match=r"begun with optimizers\.AdamW\.b1 = 0\.95, now it is 0?"):
        check_directory(tmp_path, text)
    old, old_text = build_run([str(tmp_path / "config.gin")])
    check_directory(tmp_path, old_text)
    assert old.optimizer.b1 == 0.95
    key = Key(Configurable("pjit_train.optimizers", "AdamW"), "", "b1")
    assert parse_bindings(configuration(tmp_path)[0]).values[key] == 0.95
    assert build_run([QUICK])[0].optimizer.b1 == 0.9


@pytest.mark.parametrize(
    ("version", "newer"), [("99.0", True), (__version__, False), ("0.0.1", False)]
)
def test_a_configuration_of_a_newer_version_is_said_to_be_one(tmp_path, version, newer):
    text = build_run([QUICK])[1].replace(f"# torsion {__version__}", f"# torsion {version}")
    (tmp_path / "config.gin").write_text(text)
    assert [f"written by torsion {version}" in line for line in configuration(tmp_path)[1]] == (
        [True] if newer else []
    )


def test_every_name_that_has_moved_is_there_under_its_new_name():
    """A row of the table that leads nowhere would break the runs that it is for."""
    import importlib

    def exists(name: str) -> bool:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            rest = parts[length:]
            if rest[:1]:
                found = getattr(found, rest[0], None)
            fields = getattr(found, "__dataclass_fields__", {})
            return found is not None and (len(rest) < 2 or rest[1] in fields)
        return False

    assert all(exists(new) for new in versions.MOVED.values())
    assert exists("pjit_train.run.Run.steps")
    assert not exists("pjit_train.run.Run.stepz")


@pytest.mark.slow
def test_a_run_directory_has_the_version_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text of a few words " * 40)
    small = ["transformer.TransformerConfig.d_model = 96", "run.Samples.tokens = 0"]
    small += ["text.TextData.sources = [@sources.TextFiles()]", "sources.TextFiles.train = 'a.txt'"]
    small += ["text.TextData.seq_len = 8", "text.TextData.batch_size = 8", "run.Run.eval_every = 0"]
    options = [word for binding in small for word in ("--gin", binding)]
    assert main(["train", QUICK, "--steps", "1", "--out", "run", *options]) == 0
    assert Path("run/config.gin").read_text().startswith(f"# torsion {__version__}\n")
    kept = json.loads(Path("run/checkpoints/run.json").read_text())
    assert kept["config"] == Path("run/config.gin").read_text()
