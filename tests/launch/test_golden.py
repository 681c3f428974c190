"""What the shipped configurations amount to, defaults included, kept as text that a diff shows.

After a change that is meant: UPDATE_GOLDEN=1 .venv/bin/pytest tests/launch/test_golden.py
"""

import dataclasses
import difflib
import functools
import os
from pathlib import Path

import jax
import pytest
from flax import nnx

from launch import __version__
from launch.bindings import parse_bindings
from launch.configure import build_run
from pjit_train.models.transformer import count_params
from pjit_train.sharding import Rules

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
CONFIGS = {path.stem: path for path in sorted(TESTS.parent.glob("configs/**/*.gin"))}
BASE = CONFIGS.pop("base")


@functools.cache
def build(name: str):
    """A model is run with the shared defaults, a recipe with them and the tiny model besides; every
    other configuration is a run by itself.
    """
    before = {"models": [BASE], "recipes": [BASE, CONFIGS["tiny"]]}
    parts = [*before.get(CONFIGS[name].parent.name, []), CONFIGS[name]]
    return build_run([str(path) for path in parts])


def without_version(text: str) -> str:
    """A configuration without its first line, which changes with each version."""
    first, _, rest = text.partition("\n")
    assert first == f"# torsion {__version__}"
    return rest


@pytest.mark.parametrize("name", CONFIGS)
def test_operative_configuration_is_the_golden_one(name):
    text = without_version(build(name)[1])
    golden = GOLDEN / f"{name}.gin"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    before = golden.read_text() if golden.exists() else ""
    diff = "\n".join(difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0))
    assert not diff, f"{name}: if this is meant, run {__doc__.splitlines()[-1]}\n{diff}"


def test_every_golden_copy_is_of_a_shipped_configuration():
    assert {path.stem for path in GOLDEN.glob("*.gin")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_copy_is_complete_and_builds_the_same_run(name):
    run, _ = build(name)
    again, text = build_run([str(GOLDEN / f"{name}.gin")])
    assert (again, without_version(text)) == (run, (GOLDEN / f"{name}.gin").read_text())
    bound = {str(key) for key in parse_bindings((GOLDEN / f"{name}.gin").read_text()).values}
    assert bound == set(_parameters(run))


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
        ("gpt2", 124_439_808),
        ("opt_125m", 125_239_296),
        ("opt_6_7b", 6_658_473_984),
        ("llama3_8b", 8_030_261_248),
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
