"""Distributions: ERK against an independent solver, filters, custom maps, stacks of layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import sparsity_distributions as distributions
from sparsity.sparsity_distributions import Stacked, erk, get_sparsities_erdos_renyi, uniform


def solved(shapes, sparsity, copies=None):
    """Densities min(1, epsilon p_i) whose kept weights are the budget, epsilon by bisection."""
    layers = np.array([math.prod(shape) for shape in shapes.values()])
    count = np.array([(copies or {}).get(key, 1) for key in shapes])
    sizes = layers * count
    p = np.array([sum(s) / math.prod(s) for s in shapes.values()])
    budget = np.sum((layers - np.floor(layers * sparsity)) * count)
    low, high = 0.0, 1 / p.min()
    for _ in range(200):
        middle = (low + high) / 2
        if np.sum(np.minimum(1, middle * p) * sizes) < budget:
            low = middle
        else:
            high = middle
    return dict(zip(shapes, 1 - np.minimum(1, high * p), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
    ),
    sparsity=st.floats(0, 0.99),
    stack=st.integers(1, 5),
)
def test_erk_against_a_solver(shapes, sparsity, stack):
    shapes = dict(enumerate(shapes))
    ours = get_sparsities_erdos_renyi(shapes, sparsity, copies={0: stack})
    expected = solved(shapes, sparsity, {0: stack})
    for key in shapes:
        assert ours[key] == pytest.approx(expected[key], abs=1e-6)


def test_erk_by_hand():
    # p = (2 + 8) / 16 and (4 + 4) / 16; half of the 32 weights: epsilon (10 + 8) = 16.
    tree = {"a": np.zeros((2, 8)), "b": np.zeros((4, 4))}
    assert erk(tree, 0.5) == pytest.approx({"a": 1 - 16 / 18 * 10 / 16, "b": 1 - 16 / 18 / 2})


def test_erk_of_a_stack_is_erk_of_its_layers():
    apart = {f"layer{i}": np.zeros((8, 24)) for i in range(3)} | {"head": np.zeros((8, 100))}
    stacked = {"layers": Stacked((8, 24), jnp.float32, 3), "head": np.zeros((8, 100))}
    expected, ours = erk(apart, 0.7), erk(stacked, 0.7)
    assert ours["layers"] == pytest.approx(expected["layer1"])
    assert ours["head"] == pytest.approx(expected["head"])


def test_custom_layers_stay_out_of_the_budget():
    shapes = {"a": (10, 10), "b": (20, 10), "c": (10, 10)}
    ours = get_sparsities_erdos_renyi(shapes, 0.5, {"c": 0.9, "unknown": 0.1})
    assert set(ours) == set(shapes)
    assert ours["c"] == 0.9
    assert 100 * ours["a"] + 200 * ours["b"] == pytest.approx(150)
    assert get_sparsities_erdos_renyi(shapes, 0.5, dict.fromkeys(shapes, 0.3)) == dict.fromkeys(
        shapes, 0.3
    )


def test_filters_see_keys_and_one_layer():
    tree = {
        "embed": np.zeros((16, 8)),
        "block": {"kernel": np.zeros((8, 8)), "bias": np.zeros(8)},
        "scales": Stacked((8,), jnp.float32, 4),
        "list": [np.zeros((2, 2)), np.zeros(2)],
    }
    assert uniform(tree, 0.5) == {
        "embed": 0.5,
        "block": {"kernel": 0.5, "bias": None},
        "scales": None,
        "list": [0.5, None],
    }
    kernels = uniform(tree, 0.5, distributions.KERNEL_FILTER_FN)
    assert [x for x in jax.tree.leaves(kernels)] == [0.5]
    assert kernels["block"]["kernel"] == 0.5
    custom = uniform(tree, 0.5, custom_sparsity_map={("block", "bias"): 0.2, ("embed",): None})
    assert custom["block"] == {"kernel": 0.5, "bias": 0.2}
    assert custom["embed"] is None
    assert uniform(np.zeros((2, 2)), 0.5) == 0.5


def test_keys_of_flax_variables():
    layer = nnx.state(nnx.eval_shape(lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0))))
    shares = uniform({"a": layer}, 0.5, distributions.KERNEL_FILTER_FN)
    assert jax.tree.leaves(shares) == [0.5]
    key = ("a", "kernel")
    assert jax.tree.leaves(uniform({"a": layer}, 0.5, custom_sparsity_map={key: 0.1})) == [0.1]
    named = {"attention": {"query": np.zeros((2, 2)), "value": np.zeros((2, 2))}}
    shares = uniform(named, 0.5, lambda key, _: key == ("attention", "value"))
    assert shares == {"attention": {"query": None, "value": 0.5}}


@pytest.mark.parametrize("include_kernel", [True, False])
def test_erk_of_layers_without_entries_or_axes(include_kernel):
    """They take nothing from the others, and a lone entry is as dense as any density allows."""
    plain = {"a": (4, 6), "b": (16, 8)}
    expected = get_sparsities_erdos_renyi(plain, 0.7, include_kernel=include_kernel)
    shapes = plain | {"none": (0, 4), "scalar": ()}
    found = get_sparsities_erdos_renyi(shapes, 0.7, include_kernel=include_kernel)
    assert found["none"] == 0
    assert found["scalar"] == 0  # its p, 1 or more, is the greatest
    for key in plain:
        assert found[key] == pytest.approx(expected[key], abs=0.02)  # one entry more is kept
    nothing = {"none": (0, 4), "empty": (0,)}
    assert get_sparsities_erdos_renyi(nothing, 0.7, include_kernel=include_kernel) == {
        "none": 0,
        "empty": 0,
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"erk_power_scale": float("nan")}, "erk_power_scale=nan"),
        ({"erk_power_scale": float("inf")}, "erk_power_scale=inf"),
        ({"erk_power_scale": -1.0}, "erk_power_scale=-1.0"),
        ({"copies": {"a": 0}}, r"copies\['a'\]=0"),
        ({"var_shape_dict": {"a": (-1, 4)}}, r"var_shape_dict\['a'\].*size=-1"),
        ({"var_shape_dict": {"a": (1.5, 4)}}, r"var_shape_dict\['a'\].*size=1.5"),
        ({"custom_sparsity_map": [0.5]}, "custom_sparsity_map"),
    ],
)
def test_numbers_of_erk_are_named(given, says):
    with pytest.raises(ValueError, match=says):
        get_sparsities_erdos_renyi(
            **({"var_shape_dict": {"a": (4, 4)}, "default_sparsity": 0.5} | given)
        )


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), None, "0.5", True, [0.5]])
def test_sparsities_outside_the_range(sparsity):
    tree = {"a": np.zeros((2, 2))}
    for distribution in (uniform, erk):
        with pytest.raises(ValueError, match=r"use a fraction of zeros in \[0, 1\)"):
            distribution(tree, sparsity)
        with pytest.raises(ValueError, match=r"custom_sparsity_map\[\('a',\)\]"):
            distribution(
                tree,
                0.5,
                custom_sparsity_map={("a",): sparsity} if sparsity is not None else {("a",): 2},
            )


def test_erk_needs_something_to_prune():
    with pytest.raises(ValueError, match="no parameter passes the filter"):
        erk({"bias": np.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match="Single parameter"):
        erk(jnp.zeros((2, 2)), 0.5)
