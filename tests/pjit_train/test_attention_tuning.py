"""The choice of tiles on a CPU, with a clock that the test sets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjit_train.attention import attention
from pjit_train.attention import tuning as attention_tuning
from pjit_train.attention.masks import Mask
from pjit_train.attention.rows import Tiles, tiles_for
from pjit_train.attention.tuning import candidates, fastest_tiles

SHAPE, MASK = (1, 24, 2, 8), Mask(True, None, 0, False)
DEFAULT = tiles_for(24, 24)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Seconds that each candidate takes, in their order, and how often any was timed."""
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path))
    fastest_tiles.cache_clear()

    class Clock:
        seconds = [1.0] * len(candidates(DEFAULT))
        timed = 0

        def __call__(self, function):
            function()
            self.timed += 1
            return self.seconds[(self.timed - 1) % len(self.seconds)]

    clock = Clock()
    monkeypatch.setattr(attention_tuning, "_seconds", clock)
    monkeypatch.setattr(attention_tuning, "_RUNS", 1)
    # One program to compile: every candidate computes what the default does.
    monkeypatch.setattr(
        attention_tuning,
        "attend_rows",
        lambda q, k, v, segments, offset, mask, tiles: q + k + v,
    )
    yield clock
    fastest_tiles.cache_clear()


def test_the_fastest_is_taken_and_kept(clock, tmp_path):
    clock.seconds[2] = 0.5
    best = fastest_tiles(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT)
    assert best == candidates(DEFAULT)[2] != DEFAULT
    timed = clock.timed
    fastest_tiles.cache_clear()  # as in another process
    clock.seconds[2] = 2.0
    assert fastest_tiles(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT) == best
    assert clock.timed == timed
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


def test_the_default_stays_unless_another_is_clearly_faster(clock):
    clock.seconds[3] = 0.97
    assert fastest_tiles(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT) == DEFAULT


def test_an_unreadable_choice_is_measured_again(clock, tmp_path):
    fastest_tiles(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT)
    (path,) = tmp_path.iterdir()
    for text in ("{", '{"tiles": {"rows": 1}}', "[]"):
        path.write_text(text)
        fastest_tiles.cache_clear()
        timed = clock.timed
        assert fastest_tiles(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT) == DEFAULT
        assert clock.timed > timed


def test_a_directory_that_cannot_be_written_is_no_error(clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path / "file"))
    clock.seconds[1] = 0.5
    assert fastest_tiles(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT) == candidates(DEFAULT)[1]


def test_attention_uses_what_was_measured_while_it_is_traced(monkeypatch):
    """And computes the same."""
    asked = []

    def tiles(*key):
        asked.append(key)
        return Tiles(5, 2**10, 7, 2**10)

    monkeypatch.setattr(attention_tuning, "fastest_tiles", tiles)
    q = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    got = jax.jit(lambda q: attention(q, q, q, causal=True, measured=True))(q)
    assert asked == [(SHAPE, SHAPE, jnp.float32, MASK, DEFAULT)]
    np.testing.assert_allclose(got, attention(q, q, q, causal=True), atol=1e-6)


def test_a_measurement_within_a_trace_and_a_mesh(monkeypatch, tmp_path):
    """The real thing, with two candidates."""
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path))
    other = dataclasses.replace(DEFAULT, rows=8)
    monkeypatch.setattr(attention_tuning, "candidates", lambda default: [default, other])
    fastest_tiles.cache_clear()
    q = jnp.ones(SHAPE)
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
        jax.jit(lambda q: attention(q, q, q, causal=True, measured=True))(q)
    fastest_tiles.cache_clear()
    assert len(list(tmp_path.iterdir())) == 1
