"""Folders that commands work in."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import compressed_runs

from launch.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a corpus, which becomes the current one; the cache is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path / "cache"))
    Path("corpus.txt").write_text("a cat sat on a mat. " * 200)
    return tmp_path


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A folder with a run of 40 steps in `dense`; it becomes the current one."""
    folder = tmp_path_factory.mktemp("compress")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TORSION_CACHE", str(folder / "cache"))
        rng = np.random.default_rng(0)
        words = rng.choice(["a cat ", "sat on ", "the mat. ", "it ran ", "home. "], size=1200)
        Path("corpus.txt").write_text("".join(words))
        Path("run.gin").write_text(compressed_runs.CONFIG)
        jax.config.update("jax_disable_most_optimizations", True)
        compiled = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # each once
        trained = tmp_path_factory.getbasetemp() / "dense"  # once for all modules
        if not trained.exists():
            assert main(["train", "run.gin", "--out", str(trained), "--mesh", "data=1"]) == 0
        shutil.copytree(trained, "dense")
        yield folder
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", compiled)
