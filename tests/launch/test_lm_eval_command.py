"""`torsion lm_eval` where lm-eval is not installed; tests/oracle has the real one."""

import importlib.util
import sys
import types

import pytest

from launch.cli import main
from launch.lm_eval_arguments import read_arguments
from pjit_train.errors import UserError


@pytest.fixture
def harness(monkeypatch):
    """Puts a stand-in in the place of lm-eval; gives what its command line and registry get."""
    seen = {"registered": {}}

    class Registry(dict):
        def register(self, name, target):
            self[name] = target

    def cli_evaluate():
        seen["argv"] = sys.argv

    modules = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": cli_evaluate},
        "lm_eval.api": {},
        "lm_eval.api.registry": {"model_registry": Registry()},
    }
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "argv", sys.argv)
    seen["registered"] = modules["lm_eval.api.registry"]["model_registry"]
    return seen


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--help"],
        ["ls", "tasks"],
        ["--model", "torsion", "--model_args", "model=x,mesh=data=2", "--tasks", "a", "--limit=3"],
    ],
)
def test_every_argument_is_handed_to_lm_eval(harness, given):
    assert main(["lm_eval", *given]) == 0
    assert main(["lm_eval", *given]) == 0  # registered before
    assert harness["argv"][1:] == given
    assert harness["registered"] == {"torsion": "launch.lm_eval:Torsion"}


def test_without_lm_eval_one_line_says_what_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["lm_eval", "--model", "torsion"]) == 2
    assert capsys.readouterr().err == (
        "torsion: lm_eval: lm-eval is not installed; pip install 'torsion[lm-eval]'\n"
    )


def test_arguments_become_the_options_of_the_command_line():
    given = {"batch_size": 8, "max_batch_size": None, "device": "cuda:0", "add_bos_token": True}
    given |= {"mesh": "data=2", "tensor": 2, "step": 3, "devices": 4, "dtype": "bfloat16"}
    found = read_arguments({"model": "--runs/a b", "max_length": 64, "seed": 7, **given})
    assert vars(found) == {
        "run": "--runs/a b",
        "step": 3,
        "dtype": "bfloat16",
        "mesh": "data=2,tensor=2",
        "devices": 4,
        "max_length": 64,
        "add_bos_token": True,
        "seed": 7,
    }
    found = read_arguments({"pretrained": 7, "fsdp": 2, "add_bos_token": False})
    assert (found.run, found.mesh, found.add_bos_token, found.seed) == ("7", "fsdp=2", False, 0)
    assert (found.max_length, found.step, found.dtype, found.devices) == (None, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "model_args: give one model=RUN_OR_FOLDER"),
        ({"model": "a", "pretrained": "b"}, "model_args: give one model=RUN_OR_FOLDER"),
        ({"model": "a", "dtyp": "float32"}, "unrecognized arguments: dtyp"),
        ({"model": "a", "dtype": "int8"}, "argument dtype: invalid choice: 'int8'"),
        ({"model": "a", "max_length": "8k"}, "argument max_length: '8k': want a whole number"),
        ({"model": "a", "max_length": True}, "'True': want a whole number"),
        ({"model": "a", "add_bos_token": "yes"}, "'yes': want True or False"),
        ({"model": "a", "seed": -1}, "argument seed: '-1'"),
        ({"model": "a", "parallelize\nnow": True}, "unrecognized arguments: parallelize"),
    ],
)
def test_a_mistake_in_arguments_names_it(arguments, said):
    with pytest.raises(UserError) as caught:
        read_arguments(arguments)
    assert said in str(caught.value)
    assert str(caught.value).startswith("model_args: ")
