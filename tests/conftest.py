"""Every test sees eight emulated CPU devices."""

import logging
import os

# Enough threads for all devices to wait in collectives (see launch.process.prepare).
os.environ["PJRT_NPROC"] = "64"

import jax
import pytest

from pjit_train.data.cache import default_cache_dir

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Compiled programs are kept for the next run of the tests, as `torsion train` keeps its own; also
# those of commands that tests start, which are compiled quickly (see `quick_compiles`).
XLA_CACHE = str(default_cache_dir() / "xla")
jax.config.update("jax_compilation_cache_dir", XLA_CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
os.environ["JAX_COMPILATION_CACHE_DIR"] = XLA_CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(autouse=True)
def warnings_reach_caplog(monkeypatch):
    """A command that an earlier test ran in this process keeps our warnings to its own handler."""
    monkeypatch.setattr(logging.getLogger("torsion"), "propagate", True)


@pytest.fixture(scope="module")
def quick_compiles():
    """LLVM makes slower code in a fraction of the time; XLA's program (HLO) is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
