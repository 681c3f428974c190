"""Which run directories may be trained in; the check writes nothing."""

import pytest

from launch.configure import build_run
from launch.directory import check_directory, check_is_run, configuration, steps_before
from pjit_train.errors import UserError

TEXT = build_run(["configs/quickstart.gin"])[1]


def contents(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(folder, directory, text=TEXT) -> str:
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        check_directory(directory, text)
    assert contents(folder) == before
    return str(caught.value)


def begun(directory, text=TEXT):
    directory.mkdir()
    (directory / "config.gin").write_text(text)
    return directory


def test_a_missing_or_empty_directory_may_be_trained_in(tmp_path):
    check_directory(tmp_path / "a" / "b", TEXT)
    check_directory(tmp_path, TEXT)
    assert not list(tmp_path.iterdir())


def test_a_start_that_was_killed_early_is_in_nobodys_way(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run.json.new").touch()
    check_directory(tmp_path, TEXT)
    (tmp_path / "checkpoints" / "5").mkdir()
    assert "is not a run directory" in refusal(tmp_path, tmp_path)


def test_other_folders_and_files_are_refused(tmp_path):
    file = tmp_path / "thesis.tex"
    file.write_text("x")
    where = f"run directory {file}: {file} is a file; use another --out"
    assert refusal(tmp_path, file) == where
    below = file / "run" / "one"
    assert refusal(tmp_path, below) == where.replace(f"directory {file}", f"directory {below}")
    assert refusal(tmp_path, tmp_path) == (
        f"{tmp_path} is not a run directory: it is not empty and has no config.gin; "
        "use another --out"
    )


@pytest.mark.parametrize(
    "binding",
    [
        "run.Run.steps = 9",
        "run.Run.log_every = 9",
        "run.Run.eval_every = 9",
        "run.Run.profile = (1, 2)",
        "run.Samples.tokens = 9",
        "sharding.MeshShape.fsdp = 2",
        "checkpoint.CheckpointConfig.every_steps = 9",
        "transformer.TransformerConfig.layers = 'scan'",
    ],
)
def test_what_is_not_the_run_itself_may_change(binding, tmp_path):
    check_directory(begun(tmp_path / "run"), build_run(["configs/quickstart.gin"], [binding])[1])


@pytest.mark.parametrize(
    ("binding", "before"),
    [
        ("run.Run.seed = 9", "0"),
        ("run.Run.accumulate = 2", "1"),
        ("text.TextData.batch_size = 32", "16"),
        ("text.TextData.sources = [@sources.Tfds()]", "[@sources.PythonStdlib()]"),
        ("optimizers.AdamW.learning_rate = 9.0", "0.003"),
        ("optimizers.Schedule.shape = 'wsd'", "'cosine'"),
        ("transformer.TransformerConfig.d_model = 384", "192"),
        ("transformer.TransformerConfig.dtype = 'bfloat16'", "'float32'"),
    ],
)
def test_another_run_is_refused_with_both_values(binding, before, tmp_path):
    more = ["sources.Tfds.name = 'x'"] if "Tfds" in binding else []
    text = build_run(["configs/quickstart.gin"], [binding, *more])[1]
    directory = begun(tmp_path / "run")
    name = binding.partition(" = ")[0]
    assert refusal(tmp_path, directory, text) == (
        f"run directory {directory} was begun with {name} = {before}, now it is {binding}; "
        "use another --out, or the configuration that it has"
    )


def test_another_optimizer_is_refused(tmp_path):
    changed = ["run.Run.optimizer = @optimizers.SGD()", "optimizers.SGD.learning_rate = 0.1"]
    text = build_run(["configs/quickstart.gin"], changed)[1]
    message = refusal(tmp_path, begun(tmp_path / "run"), text)
    assert "run.Run.optimizer = @optimizers.AdamW(), now it is run.Run.optimizer = @opt" in message


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path):
    directory = begun(tmp_path / "run", "run.Run.steps = (")
    path = directory / "config.gin"
    way = f"{path} cannot be read; remove it, and the command that trained the run goes on with the"
    assert refusal(tmp_path, directory) == f"{way} configuration that it is given"


def test_what_is_no_run(tmp_path):
    directory = begun(tmp_path / "run")
    assert configuration(directory) == (TEXT, [])
    for folder, what in ((tmp_path, "has no config.gin"), (tmp_path / "x", "does not exist")):
        with pytest.raises(UserError, match=what):
            check_is_run(folder)
        with pytest.raises(UserError, match=what):
            configuration(folder)


def test_steps_before_are_those_of_the_directory(tmp_path):
    assert steps_before(tmp_path / "x") is None
    assert steps_before(tmp_path) is None
    text = build_run(["configs/quickstart.gin"], ["run.Run.steps = 77"])[1]
    assert steps_before(begun(tmp_path / "run", text)) == 77
