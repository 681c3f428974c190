"""Gin files and bindings to a Run: what holds, and one line for every mistake."""

import dataclasses

import pytest

from launch.configure import build_run
from pjit_train.errors import UserError

QUICKSTART = ["configs/quickstart.gin"]
IMPORTS = (
    "from __gin__ import dynamic_registration\n"
    "from pjit_train import run\n"
    "from pjit_train.data import sources\n"
    "from pjit_train.data import text\n"
)

SPARSITIES = "@one_shot.KeepZeros() or @pruning.Pruning() or @recipes.Recipe() or None"


def mistake(files, bindings=()) -> str:
    with pytest.raises(UserError) as caught:
        build_run(files, bindings)
    return str(caught.value)


def test_the_last_binding_holds_and_nothing_stays_for_the_next_call():
    before = build_run(QUICKSTART)
    run, _ = build_run(
        QUICKSTART,
        ["run.Run.steps = 7", "transformer.TransformerConfig.d_model = 96", "run.Run.steps = 9"],
    )
    assert (run.steps, run.model.d_model, run.model.head_dim) == (9, 96, 96 // 6)
    assert build_run(QUICKSTART) == before


@pytest.mark.parametrize(
    ("bindings", "kind"),
    [
        (["run.Run.sparsity = @recipes.Recipe()"], "Recipe"),
        (["run.Run.sparsity = @pruning.Pruning()"], "Pruning"),
        (
            [
                "run.Run.sparsity = @one_shot.KeepZeros()",
                "one_shot.KeepZeros.layers = {'up/': '2:4'}",
            ],
            "KeepZeros",
        ),
        (["run.Run.sparsity = None"], "NoneType"),
    ],
)
def test_every_kind_of_sparsity_is_taken(bindings, kind):
    assert type(build_run(QUICKSTART, bindings)[0].sparsity).__name__ == kind


def test_what_is_no_sparsity_is_refused_without_gin_too():
    run, _ = build_run(QUICKSTART)
    with pytest.raises(UserError, match=r"run: sparsity='2:4'; use a Sparsity, such as"):
        dataclasses.replace(run, sparsity="2:4")


@pytest.mark.parametrize("written", ["configs/quickstart.gin", "quickstart.gin"])
def test_shipped_files_are_found_from_any_directory(written, tmp_path, monkeypatch, capfd):
    expected = build_run(QUICKSTART)
    monkeypatch.chdir(tmp_path)
    assert build_run([written]) == expected
    assert capfd.readouterr() == ("", "")


def test_a_file_here_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.gin").write_text(
        f"{IMPORTS}include 'configs/quickstart.gin'\nrun.Run.steps = 3\n"
    )
    assert build_run(["quickstart.gin"])[0].steps == 3


def test_the_operative_configuration_builds_the_same_run(tmp_path):
    source = tmp_path / "mine.gin"
    source.write_text(
        f"{IMPORTS}include 'configs/quickstart.gin'\n"
        "count = 12\nrun.Run.steps = %count\nrun.Samples.prompts = ('é\\n', '%x @y()')\n"
        "text.TextData.sources = [@a/sources.TextFiles(), @b/sources.TextFiles()]\n"
        "a/sources.TextFiles.train = 'a.txt'\nb/sources.TextFiles.train = ['b.txt']\n"
    )
    run, text = build_run([str(source)])
    assert (run.steps, run.samples.prompts) == (12, ("é\n", "%x @y()"))
    assert [s.train for s in run.data.sources] == ["a.txt", ["b.txt"]]
    saved = tmp_path / "config.gin"
    saved.write_text(text)
    assert build_run([str(saved)]) == (run, text)


def test_the_operative_configuration_keeps_the_order_of_patterns(tmp_path):
    """Of which the first that matches counts."""
    layers = {"up/kernel": "1:4", "down/kernel": "1:8", "(attention|feed_forward)/.*kernel": "2:4"}
    recipe = "configs/recipes/sr_ste.gin"
    run, text = build_run([*QUICKSTART, recipe], [f"recipes.Recipe.layers = {layers}"])
    (tmp_path / "config.gin").write_text(text)
    again, same = build_run([str(tmp_path / "config.gin")])
    assert list(again.sparsity.layers.items()) == list(layers.items())
    assert (again, same) == (run, text)


def test_the_operative_configuration_evaluates_in_the_scope_of_a_macro(tmp_path):
    """What a macro refers to, in another macro, in a list and with a scope of its own too."""
    source = tmp_path / "mine.gin"
    source.write_text(
        f"{IMPORTS}include 'configs/quickstart.gin'\n"
        "text.TextData.sources = %both\nboth = [%first, @sources.TextFiles()]\n"
        "first = @own/sources.TextFiles()\n"
        "run.Run.samples = %short\nshort = @run.Samples()\n"
        "short/run.Samples.tokens = 7\n"
        "own/sources.TextFiles.train = 'a.txt'\nboth/sources.TextFiles.train = 'b.txt'\n"
    )
    run, text = build_run([str(source)])
    assert [s.train for s in run.data.sources] == ["a.txt", "b.txt"]
    assert run.samples.tokens == 7
    saved = tmp_path / "config.gin"
    saved.write_text(text)
    assert build_run([str(saved)]) == (run, text)


def test_parameters_that_are_not_in_use_may_be_bound_in_files():
    run, text = build_run(
        QUICKSTART, ["run.Run.optimizer = @optimizers.SGD()", "optimizers.SGD.learning_rate = 0.1"]
    )
    assert run.optimizer.learning_rate == 0.1
    assert "AdamW" not in text


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "run.Run.step = 3",
            "--gin 'run.Run.step = 3': run.Run.step: no such parameter; "
            "did you mean run.Run.steps?",
        ),
        (
            "run.Rum.steps = 3",
            "--gin 'run.Rum.steps = 3': run.Rum.steps: no such parameter; "
            "did you mean run.Run.steps?",
        ),
        (
            "optimiser.AdamW.b1 = 0.8",
            "--gin 'optimiser.AdamW.b1 = 0.8': optimiser.AdamW.b1: no such parameter; "
            "did you mean optimizers.AdamW.b1?",
        ),
        (
            "run.Run.learning_rate = 0.1",  # several optimizers have one: that of this run is meant
            "--gin 'run.Run.learning_rate = 0.1': run.Run.learning_rate: no such parameter; "
            "did you mean optimizers.AdamW.learning_rate?",
        ),
        *(
            (
                f"{written} = 1",
                f"--gin '{written} = 1': {written}: no such parameter; did you mean {meant}?",
            )
            for written, meant in (
                ("checkpoint.CheckpointConfig.every", "checkpoint.CheckpointConfig.every_steps"),
                ("checkpoint.CheckpointConfig.steps", "checkpoint.CheckpointConfig.every_steps"),
                ("checkpoint.CheckpointConfg.every", "checkpoint.CheckpointConfig.every_steps"),
                ("optimizers.AdamW.beta1", "optimizers.AdamW.b1"),
                ("optimizers.AdamW.rate", "optimizers.AdamW.learning_rate"),
                ("optimizers.Schedule.warmup", "optimizers.Schedule.warmup_steps"),
                ("transformer.TransformerConfig.heads", "transformer.TransformerConfig.num_heads"),
                ("text.TextData.batch", "text.TextData.batch_size"),
                ("run.Run.batch_size", "text.TextData.batch_size"),
                ("recipes.Recipe.sr_st", "recipes.Recipe.sr_ste"),
            )
        ),
        (
            "run.Run.optimizer = @optimizers.Adam()",
            "--gin 'run.Run.optimizer = @optimizers.Adam()': optimizers.Adam: no such "
            "configurable; did you mean optimizers.AdamW?",
        ),
        (
            "steps = 3",
            "steps = 3: sets a macro that nothing uses; did you mean run.Run.steps?",
        ),
        (
            "optimizers.Lion.b1 = 0.8",
            "--gin 'optimizers.Lion.b1 = 0.8': this run does not use optimizers.Lion",
        ),
        (
            "x/run.Run.steps = 3",
            "--gin 'x/run.Run.steps = 3': this run does not use x/run.Run",
        ),
        ("run.Run.steps = 'ten'", "run.Run.steps = 'ten': want an int"),
        ("run.Run.steps = 1e3", "run.Run.steps = 1000.0: want an int"),
        ("run.Run.seed = True", "run.Run.seed = True: want an int"),
        ("optimizers.AdamW.b1 = '1'", "optimizers.AdamW.b1 = '1': want a float"),
        (
            "optimizers.AdamW.clip_norm = 'no'",
            "optimizers.AdamW.clip_norm = 'no': want a float or None",
        ),
        (
            "text.TextData.mask_documents = 1",
            "text.TextData.mask_documents = 1: want True or False",
        ),
        (
            "run.Run.profile = (1, 2, 3)",
            "run.Run.profile = (1, 2, 3): want (an int, an int) or None",
        ),
        (
            "run.Samples.prompts = 'a'",
            "run.Samples.prompts = 'a': want a list (each item a string)",
        ),
        (
            "transformer.TransformerConfig.norm = 'batch'",
            "transformer.TransformerConfig.norm = 'batch': want 'rmsnorm' or 'layernorm'",
        ),
        (
            "run.Run.model = @transformer.TransformerConfig",
            "run.Run.model = @transformer.TransformerConfig: want @dlrm.DLRMConfig() or "
            "@transformer.TransformerConfig() or @vit.ViTConfig()",
        ),
        (
            "run.Run.mesh = @run.Samples()",
            "run.Run.mesh = @run.Samples(): want @sharding.MeshShape()",
        ),
        ("run.Run.sparsity = '2:4'", f"run.Run.sparsity = '2:4': want {SPARSITIES}"),
        (
            "run.Run.sparsity = @quantized.Quantization()",
            f"run.Run.sparsity = @quantized.Quantization(): want {SPARSITIES}",
        ),
        (
            "run.Run.sparsity = @pruning.Pruning",
            f"run.Run.sparsity = @pruning.Pruning: want {SPARSITIES}",
        ),
        (
            "run.Run.sparsity = @patterns.Fixed()",
            f"run.Run.sparsity = @patterns.Fixed(): want {SPARSITIES}",
        ),
        ("run.Run.rules = 'fsdp'", "run.Run.rules = 'fsdp': want @sharding.Rules()"),
        (
            "optimizers.Schedule.shape = linear",
            "--gin 'optimizers.Schedule.shape = linear': linear is no value; a string needs quotes",
        ),
        (
            "run.Run.steps",
            "--gin 'run.Run.steps': cannot be parsed; "
            "a binding is written module.Class.parameter = value",
        ),
        ("run.Run.steps = ", "--gin 'run.Run.steps = ': Unable to parse value"),
        (
            "run.Run.steps = %n",
            "configs/quickstart.gin: %n is used and nothing sets it; add n = ...",
        ),
        (
            "from pjit_train import runs",
            "--gin 'from pjit_train import runs': no module pjit_train.runs; "
            "did you mean pjit_train.run?",
        ),
        (
            "run.Run.optimizer = @optimizers.SGD()",
            "optimizers.SGD.learning_rate is missing; bind it",
        ),
        (
            "transformer.TransformerConfig.num_heads = 5",
            "model: num_heads=5 does not divide d_model=192; use a divisor, or say head_dim",
        ),
    ],
)
def test_a_wrong_binding_is_told_in_one_line(binding, message):
    assert mistake(QUICKSTART, [binding]) == message


def test_an_unfinished_value_is_told_in_one_line():
    text = mistake(QUICKSTART, ["run.Run.steps = (3"])
    assert text.startswith("--gin 'run.Run.steps = (3': ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jog.Jog.steps = 3\n", "{f}:1: jog.Jog is unknown; begin the file with: "
         "from __gin__ import dynamic_registration"),
        (
            "from __gin__ import dynamic_registration\n\nrun.Run.steps = 3\n",
            "{f}:3: run is not imported; add the line: from pjit_train import run",
        ),
        (
            f"{IMPORTS}run.Run:\n  seed = 1\n  stepps = 3\n",
            "{f}:7: run.Run.stepps: no such parameter; did you mean run.Run.steps?",
        ),
        (f"{IMPORTS}run.Rum:\n  seed = 1\n",
         "{f}:5: run.Rum: no such configurable; did you mean run.Run?"),
        (f"{IMPORTS}run.Run.steps = ?\n", "{f}:5: Unable to parse value"),
        (f"{IMPORTS}import pjit_trian.run\n",
         "{f}:5: no module pjit_trian; did you mean pjit_train.run?"),
        (f"{IMPORTS}include 'nope.gin'\n", "{f}:5: included file nope.gin is missing"),
        ("include 'loop.gin'\n", "{f}: a file includes itself, or a macro uses itself"),
        ("", "run.Run.model, run.Run.data, run.Run.optimizer, run.Run.steps are missing; "
         "add configs/base.gin and a model of configs/models"),
        (f"{IMPORTS}include 'configs/base.gin'\n",
         "run.Run.model is missing; add configs/base.gin and a model of configs/models"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_in_one_line(text, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.gin").write_text("include 'loop.gin'\n")
    (tmp_path / "mine.gin").write_text(text)
    assert mistake(["mine.gin"]) == message.format(f="mine.gin")
    assert capfd.readouterr() == ("", "")


def test_a_missing_or_unreadable_file_is_told_in_one_line(tmp_path):
    message = "configs/quikstart.gin: no such file; did you mean configs/quickstart.gin?"
    assert mistake(["configs/quikstart.gin"]) == message
    assert mistake([str(tmp_path)]) == f"{tmp_path}: no such file"
    binary = tmp_path / "binary.gin"
    binary.write_bytes(b"\xff\xfe\x00")
    text = mistake([str(binary)])
    assert text.startswith(f"{binary}: ")
    assert "\n" not in text
