"""The stages of each schedule of patterns: published sequences, and what holds for all of them."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.recipes.patterns import Fixed, Geometric, Stepwise, StructureDecay, parse_pattern

ALL = [Fixed(), Stepwise(), Geometric(), StructureDecay(), StructureDecay(variant="code")]


def kept(pattern, n, m):
    stages = pattern.stages(n, m)
    assert all(size == m for _, size in stages)
    return [n for n, _ in stages]


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        ((1, 8), [7, 4, 2, 1]),  # the paper's example
        ((2, 4), [3, 2]),
        ((1, 4), [3, 2, 1]),
        ((1, 16), [15, 8, 4, 2, 1]),
        ((1, 2), [1]),
        ((3, 8), [7, 4, 3]),  # the authors' program ends at 4:8
        ((5, 8), [7, 5]),
        ((1, 6), [5, 3, 1]),
        ((4, 4), [4]),
    ],
)
def test_stepwise(target, counts):
    assert kept(Stepwise(), *target) == counts
    assert kept(StructureDecay(), *target) == counts


def test_geometric():
    five = ((16, 128), (8, 64), (4, 32), (2, 16), (1, 8))
    assert Geometric().stages(1, 8) == five
    assert Geometric(variant="code").stages(1, 8) == five[1:]
    assert Geometric(k=2).stages(2, 4) == ((4, 8), (2, 4))
    assert Geometric(k=1, variant="code").stages(2, 4) == ((2, 4),)


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        ((1, 16), [15, 4, 2, 1]),  # 8:16 is left out
        ((1, 4), [3, 1]),  # and 0:4 never comes
        ((2, 4), [3, 2]),
        ((3, 8), [7, 3]),
        ((1, 2), [1]),
    ],
)
def test_structure_decay_as_programmed(target, counts):
    assert kept(StructureDecay(variant="code"), *target) == counts


@pytest.mark.parametrize("pattern", ALL, ids=str)
@given(st.integers(1, 64), st.integers(0, 64))
@settings(max_examples=30, deadline=None)
def test_every_schedule_reaches_its_target_and_never_prunes_all(pattern, n, more):
    m = n + more
    stages = pattern.stages(n, m)
    assert stages[-1] == (n, m)
    assert all(1 <= kept <= size for kept, size in stages)
    density = [Fraction(*stage) for stage in stages]
    assert density == sorted(density, reverse=True)
    assert len(set(stages)) == len(stages)


@given(st.integers(1, 32), st.integers(1, 32), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_geometric_keeps_the_density(n, more, log_k):
    stages = Geometric(k=2**log_k).stages(n, n + more)
    assert {Fraction(*stage) for stage in stages} == {Fraction(n, n + more)}
    assert [m for _, m in stages] == [(n + more) * 2**d for d in range(log_k, -1, -1)]
    assert len(stages) == 1 + math.log2(2**log_k)


@pytest.mark.parametrize(("text", "pair"), [("2:4", (2, 4)), ("1:128", (1, 128)), ("4:4", (4, 4))])
def test_parse(text, pair):
    assert parse_pattern(text) == pair


@pytest.mark.parametrize("text", ["2/4", "24", "2:4:8", "-1:4", "a:b", "", ":4", 0.5, (2, 4)])
def test_no_pattern(text):
    with pytest.raises(ValueError, match="is not N:M; write how many of every M"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["4:2", "0:4"])
def test_impossible_pattern(text):
    with pytest.raises(ValueError, match="N is the number kept, from 1 to"):
        parse_pattern(text)


@pytest.mark.parametrize("k", [0, 3, -2])
def test_k_is_a_power_of_two(k):
    with pytest.raises(ValueError, match=f"k={k}(; use a whole number from 1| is no power of two)"):
        Geometric(k=k)


@pytest.mark.parametrize("schedule", [Geometric, StructureDecay])
def test_unknown_variant(schedule):
    with pytest.raises(ValueError, match="variant='repo' is unknown; use paper or code"):
        schedule(variant="repo")
