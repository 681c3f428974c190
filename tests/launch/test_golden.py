"""What the shipped configurations amount to, as text that a diff shows.

`golden/` holds what each configuration changes of the defaults, and `defaults.txt` these, so that a
new field changes one file. After a change that is meant:
UPDATE_GOLDEN=1 .venv/bin/pytest tests/launch/test_golden.py
"""

import dataclasses
import difflib
import functools
import importlib
import os
from pathlib import Path

import jax
import pytest
from flax import nnx

from launch.bindings import Configurable, Key, format_bindings, parse_bindings
from launch.configure import build_run
from launch.explain import STANDARD
from launch.versions import is_default
from pjit_train.models.transformer import count_params
from pjit_train.sharding import Rules

TESTS = Path(__file__).parents[1]
GOLDEN, SHIPPED = TESTS / "golden", TESTS.parent / "configs"
CONFIGS = [str(path.relative_to(SHIPPED)) for path in sorted(SHIPPED.glob("**/*.gin"))]
CONFIGS.remove("base.gin")
CONFIGS.remove("finetune.gin")  # its model is that of a folder: test_finetune.py
CONFIGS.remove("finetune_sparse.gin")  # likewise
CONFIGS.remove("finetune_chats.gin")


@functools.cache
def build(name: str):
    """A model is run with the shared defaults, a recipe with them and the tiny model besides; every
    other configuration is a run by itself.
    """
    before = {"models": ["base.gin"], "recipes": ["base.gin", "models/tiny.gin"]}
    parts = [*before.get(str(Path(name).parent), []), name]
    return build_run([str(SHIPPED / part) for part in parts])


def check_golden(name: str, text: str) -> None:
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    before = golden.read_text() if golden.exists() else ""
    diff = "\n".join(difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0))
    assert not diff, f"{name}: if this is meant, run {__doc__.splitlines()[-1]}\n{diff}"


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_configuration_changes_is_the_golden_text_and_all_of_it(name):
    run, text = build(name)
    values = parse_bindings(text).values
    changed = {key: value for key, value in values.items() if not is_default(key, value)}
    kinds = {key.configurable for key in changed}
    # A default part of which something is changed has to be made by what changes it.
    changed |= {k: v for k, v in values.items() if getattr(v, "configurable", None) in kinds}
    check_golden(name, format_bindings(changed))
    assert build_run([str(GOLDEN / name)])[0] == run


def test_defaults_are_the_golden_ones():
    defaults = {}
    for module in STANDARD:
        for kind in vars(importlib.import_module(module)).values():
            if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
                continue
            if kind.__module__ != module:
                continue
            for field in dataclasses.fields(kind):
                if field.default is not dataclasses.MISSING and field.init:
                    key = Key(Configurable(module, kind.__name__), "", field.name)
                    defaults[key] = field.default
    # Objects stand as what makes them.
    check_golden("defaults.txt", "".join(f"{k} = {v!r}\n" for k, v in sorted(defaults.items())))


def test_every_golden_copy_is_of_a_shipped_configuration():
    assert {str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("**/*.gin")} == set(CONFIGS)


def test_a_configuration_binds_every_parameter_of_its_run():
    run, text = build("quickstart.gin")
    assert {str(key) for key in parse_bindings(text).values} == set(_parameters(run))


def _parameters(part):
    """Every parameter of a part of a run and of its parts."""
    for field in dataclasses.fields(part):
        yield f"{type(part).__module__.split('.')[-1]}.{type(part).__name__}.{field.name}"
        value = getattr(part, field.name)
        inside = list(value.values()) if isinstance(value, dict) else value
        for inner in inside if isinstance(inside, list | tuple) else [inside]:
            if dataclasses.is_dataclass(inner):
                yield from _parameters(inner)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("models/gpt2.gin", 124_439_808),
        ("models/opt_125m.gin", 125_239_296),
        ("models/opt_6_7b.gin", 6_658_473_984),
        ("models/llama3_8b.gin", 8_030_261_248),
    ],
)
def test_models_have_the_published_number_of_parameters(name, published):
    model = build(name)[0].model
    assert model.num_params == built_params(model) == published


def built_params(model) -> int:
    built = nnx.eval_shape(functools.partial(model.build, jax.random.key(0), Rules()))
    return count_params(nnx.state(built, nnx.Param))


def test_every_model_has_as_many_parameters_as_it_says():
    for model in {build(name)[0].model for name in CONFIGS}:
        assert model.num_params == built_params(model), model
