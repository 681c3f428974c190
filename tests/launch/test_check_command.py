"""`torsion check` with a stand-in for `transformers`; tests/oracle has the real one."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from launch.cli import main
from pjit_train.huggingface import check, weights
from pjit_train.sharding import Rules
from pjit_train.step import split_model

FOLDER = str(Path(__file__).parents[1] / "fixtures" / "huggingface" / "gemma2")


@pytest.fixture
def differing(monkeypatch):
    """Puts logits that are off by so much, at one place, in the place of those of transformers."""

    def make(difference):
        def by_transformers(folder, config, inputs):
            params = weights.load(folder)[1]
            model = nnx.merge(split_model(config, Rules())[0], params)
            logits = np.array(model(inputs.astype(np.int32)))
            logits[0, 3, logits[0, 3].argmin()] += difference
            return logits, "9.9"

        monkeypatch.setattr(check, "_by_transformers", by_transformers)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "code", "agreeing"), [(0, 0, 24), (1e-5, 0, 24), (9, 1, 23)]
)
def test_the_exit_code_says_whether_logits_differ(differing, difference, code, agreeing, capsys):
    differing(difference)
    assert main(["check", FOLDER, "--tokens", "24", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["difference"] == pytest.approx(difference, abs=2e-6)
    assert (found["agreeing"], found["positions"], found["tokens"]) == (agreeing, 24, 24)
    assert (found["family"], found["within"], found["version"]) == ("gemma2", code == 0, "9.9")
    assert main(["check", FOLDER, "--tokens", "24"]) == code
    out = capsys.readouterr().out
    assert ("MORE than" in out) == bool(code)
    assert f"at {agreeing} of 24" in out


def test_a_window_that_is_not_reached_is_said(differing, capsys):
    differing(0)
    assert main(["check", FOLDER, "--tokens", "4"]) == 0
    assert (
        "the window of 4 tokens is not reached; --tokens 68 reaches it" in capsys.readouterr().out
    )


def test_without_transformers_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["check", FOLDER]) == 0
    out = capsys.readouterr().out
    assert "Gemma2ForCausalLM, 3,252 parameters" in out
    assert "not compared: torch and transformers are not installed" in out
    assert "pip install torch transformers" in out
    assert main(["check", FOLDER, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["within"] is None


def test_a_folder_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
