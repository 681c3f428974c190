"""What a sparse run says in its first lines, against what it then does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsity import recipes
from sparsity.post_training.one_shot import KeepZeros
from sparsity.pruning import Pruning
from sparsity.recipes.autoswitch import AutoSwitch

STEPS = 40
KERNELS = ("attention/query", "feed_forward/down", "feed_forward/up")
LAYERS = {"query/kernel": "2:4", "down/kernel": "1:8", "up/kernel": "2:4", ".*": None}


def params(seed=0):
    rng = np.random.default_rng(seed)
    tree = {"attention": {}, "feed_forward": {}}
    for name in KERNELS:
        part, layer = name.split("/")
        tree[part][layer] = {"kernel": jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.float32)}
    return {"blocks": tree, "embedding": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.sr_ste(LAYERS),
        recipes.asp(LAYERS),
        recipes.mdgf_linear(LAYERS),
        recipes.mdgf_linear(LAYERS, dense_fraction=0.0, fine_tune_fraction=0.025),
        recipes.sdgf_stepwise(LAYERS, dense_fraction=0.5, fine_tune_fraction=0.5),
        recipes.structure_decay(LAYERS),
        recipes.mask_decay(LAYERS, every=2, fine_tune_fraction=0.5),
    ],
)
def test_a_recipe_names_its_kernels_patterns_and_phases(recipe):
    updater = recipe.build(params(), steps=STEPS)
    said = updater.describe()
    assert said.startswith(f"sparse: 2:4 of {KERNELS[0]}, {KERNELS[2]}; 1:8 of {KERNELS[1]}; ")
    assert "embedding" not in said
    phases = {}
    for part, first, last in re.findall(
        r"(dense|anew|fixed)[\w ]* steps? (\d+)(?: to (\d+))?", said
    ):
        for step in range(int(first), int(last or first) + 1):
            assert step not in phases
            phases[step] = ("dense", "anew", "fixed").index(part)
    found = {step: int(updater.settings(step - 1)["phase"]) for step in range(1, STEPS + 1)}
    assert phases == found
    for step in range(STEPS):
        n, m = updater.settings(step)["patterns"]["1:8"]
        assert found[step + 1] == 0 or f"{int(n)}:{int(m)}" in said
    assert ("every 2 steps" in said) == (recipe.update_every == 2)
    assert ("fading by" in said) == (type(recipe.decay).__name__ != "Hard")


def test_a_recipe_with_a_switch_says_how_long_it_may_be_dense():
    said = recipes.step(LAYERS, switch=AutoSwitch(max_fraction=0.3)).build(params(), steps=STEPS)
    assert "dense until the second moments settle, at most to step 12; masks" in said.describe()


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    ["magnitude", "rigl", "set", "static_sparse", "topkast", "magnitude_ste", "global_magnitude"],
)
def test_an_algorithm_says_whether_it_is_sparse_at_first_and_when_its_masks_change(algorithm):
    pruning = Pruning(algorithm=algorithm, sparsity=0.5, update_every=5, layers=("kernel",))
    updater, w = pruning.build(params(), steps=STEPS), params()
    said = updater.describe()
    assert said.startswith(f"sparse: {algorithm} to 0.5 (unstructured, uniform) of {KERNELS[0]}, ")
    optimizer = updater.wrap_optax(optax.sgd(0.1))
    state = optimizer.init(w)
    w = updater.post_gradient_update(w, state)
    shares, changed, update = [], [], jax.jit(optimizer.update)
    for step in range(1, STEPS + 1):
        read = updater.weights(w, state)["blocks"]
        shares.append(float(np.mean([np.mean(x == 0) for x in jax.tree.leaves(read)])))
        before = updater.masks(state, w)
        grads = params(seed=step)
        updates, state = update(grads, state, w)
        w = updater.post_gradient_update(optax.apply_updates(w, updates), state)
        masks = updater.masks(state, w)
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(masks), strict=True)
        if any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs):
            changed.append(step)
    if "at first" in said:
        assert ("sparse at first" in said) == (shares[0] > 0.4)
        first, last = map(int, re.search(r"from step (\d+) to step (\d+)", said).groups())
        assert first <= changed[0] <= changed[-1] <= last
        assert ("ever sparser" in said) == (shares[-1] > shares[0] + 0.1)
    elif "fixed in steps" in said:
        assert changed == []
        assert shares == [shares[0]] * STEPS
    else:
        assert "anew in each of steps 1 to 40, the sparsity rising from step 3 to step 31" in said
        assert shares[2] <= shares[20] <= shares[-1]


def test_a_compressed_run_says_which_zeros_it_keeps():
    layers = {"query": "2:4", "down": "0.5"}
    said = KeepZeros(layers=layers).build(params()).describe()
    assert said.startswith(
        f"sparse: 2:4 of {KERNELS[0]}; 0.5 of {KERNELS[1]}; what is 0 at the start"
    )
