"""What users of JaxPruner call by name and place, and the signatures of all that is public here.

After a change that is meant: UPDATE_GOLDEN=1 .venv/bin/pytest tests/sparsity/test_signatures.py
"""

import difflib
import functools
import importlib
import inspect
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import sparsity
from sparsity.sparsity_distributions import NOT_DIM_ONE_FILTER_FN, uniform

GOLDEN = Path(__file__).parents[1] / "golden" / "sparsity_signatures.txt"
FILTER, UPDATER = "filter_fn=NOT_DIM_ONE", "params, sparse_state=None, grads=None"
BASE = (
    "scheduler=NoUpdateSchedule(), skip_gradients=False, is_sparse_gradients=False, "
    "sparsity_type=Unstructured(), sparsity_distribution_fn=uniform(sparsity=0.0), "
    "rng_seed=, use_packed_masks=False, topk_fn=None"
)
STATIC = BASE.replace("is_sparse_gradients=False", "is_sparse_gradients=True")
SET = STATIC.replace("skip_gradients=False", "skip_gradients=True")
GLOBAL = (
    f"custom_sparsity_map=None, {FILTER}, normalization_eps=1e-08, use_normalization=True, "
    "sparsity=0.0"
)
# JaxPruner's (Lee et al., 2023) by module: the parameters, in their order, of what its pages and
# its tests call, those with an underscore too. "name=" has a default of another value here; after
# "...", names that are given by keyword, wherever they stand.
JAXPRUNER = {
    "all_algorithm_names": "",
    "api.all_algorithm_names": "",
    "api.register_algorithm": "algorithm_name, algorithm",
    "api.create_updater_from_config": "sparsity_config",
    "base_updater.SparseState": "masks, inner_state=None, target_sparsities=None, count=None",
    "base_updater.apply_mask": "param, mask, is_packed=False",
    "base_updater.BaseUpdater": BASE,
    "base_updater.BaseUpdater.apply_masks": "params, masks, is_packed=False",
    "base_updater.BaseUpdater.calculate_scores": UPDATER,
    "base_updater.BaseUpdater.get_initial_masks": "params, target_sparsities",
    "base_updater.BaseUpdater.create_masks": "scores, sparsities",
    "base_updater.BaseUpdater.init_state": "params",
    "base_updater.BaseUpdater.update_state": "sparse_state, params, grads",
    "base_updater.BaseUpdater.wrap_optax": "inner",
    "base_updater.BaseUpdater.instant_sparsify": "params, grads=None",
    "base_updater.BaseUpdater.pre_forward_update": "params, opt_state",
    "base_updater.BaseUpdater.post_gradient_update": "params, sparse_state",
    "base_updater.NoPruning": BASE.replace("uniform(sparsity=0.0)", "None"),
    "base_updater.NoPruning.get_initial_masks": "params, target_sparsities",
    "base_updater.NoPruning.update_state": "sparse_state, params, grads",
    "base_updater.NoPruning.instant_sparsify": "params, grads=None",
    "mask_calculator.get_topk_fn": "sparsity_type",
    "mask_calculator.topk_mask_calculator": "scores, sparsity",
    "mask_calculator.topk_n_by_m_mask_calculator": "scores, sparsity, sparsity_type",
    "mask_calculator.topk_channel_mask_calculator": "scores, sparsity, sparsity_type",
    "mask_calculator.topk_block_mask_calculator": (
        "scores, sparsity, block_height, block_width, use_avg_pooling"
    ),
    "sparsity_types.Unstructured": "",
    "sparsity_types.NByM": "n, m, axis=-1",
    "sparsity_types.Block": "block_shape, use_avg_pooling=True",
    "sparsity_types.Channel": "axis=-1",
    "sparsity_types.is_sparsity_type": "instance_to_check",
    "sparsity_schedules.NoUpdateSchedule": "",
    "sparsity_schedules.NoUpdateSchedule.get_sparsity_at_step": "target_sparsities, step",
    "sparsity_schedules.NoUpdateSchedule.is_mask_update_iter": "step",
    "sparsity_schedules.OneShotSchedule": "target_step",
    "sparsity_schedules.OneShotSchedule.is_mask_update_iter": "step",
    "sparsity_schedules.PeriodicSchedule": "update_freq, update_start_step, update_end_step",
    "sparsity_schedules.PeriodicSchedule.is_mask_update_iter": "step",
    "sparsity_schedules.PolynomialSchedule": (
        "update_freq, update_start_step, update_end_step, power=3"
    ),
    "sparsity_schedules.PolynomialSchedule.get_sparsity_at_step": "target_sparsities, step",
    "sparsity_distributions.KERNEL_FILTER_FN": "key, param",
    "sparsity_distributions.NOT_DIM_ONE_FILTER_FN": "key, param",
    "sparsity_distributions.uniform": f"params, sparsity, {FILTER}, custom_sparsity_map=None",
    "sparsity_distributions.erk": f"param_tree, sparsity, {FILTER}, custom_sparsity_map=None",
    "sparsity_distributions.get_n_zeros": "size, sparsity",
    "sparsity_distributions.get_sparsities_erdos_renyi": (
        "var_shape_dict, default_sparsity, custom_sparsity_map=None, include_kernel=True, "
        "erk_power_scale=1.0"
    ),
    "utils.summarize_sparsity": "param_tree, only_total_sparsity=False",
    "utils.summarize_intersection": "mask_tree1, mask_tree2, only_total_intersection=False",
    "algorithms.pruners.MagnitudePruning": BASE,
    "algorithms.pruners.MagnitudePruning.calculate_scores": UPDATER,
    "algorithms.pruners.SaliencyPruning": BASE,
    "algorithms.pruners.SaliencyPruning.calculate_scores": UPDATER,
    "algorithms.pruners.RandomPruning": BASE,
    "algorithms.pruners.RandomPruning.calculate_scores": UPDATER,
    "algorithms.pruners.generate_random_scores": "params, rng_seed",
    "algorithms.sparse_trainers.StaticRandomSparse": STATIC,
    "algorithms.sparse_trainers.StaticRandomSparse.update_state": "sparse_state, params, grads",
    "algorithms.sparse_trainers.StaticRandomSparse.instant_sparsify": "params, grads=None",
    "algorithms.sparse_trainers.restart_inner_state": "state, masks_activated",
    "algorithms.sparse_trainers._restart_using_mask": "target_tree, masks",
    "algorithms.sparse_trainers.SET": f"{SET}, ... eps=1e-05, drop_fraction_fn=, is_debug=False",
    "algorithms.sparse_trainers.SET._update_masks": (
        "old_mask, drop_score, grow_score, drop_fraction"
    ),
    "algorithms.sparse_trainers.SET._get_drop_scores": "sparse_state, params, grads",
    "algorithms.sparse_trainers.SET._get_grow_scores": "sparse_state, params, grads",
    "algorithms.sparse_trainers.SET.update_state": "sparse_state, params, grads",
    "algorithms.sparse_trainers.RigL": f"{SET}, ... eps=1e-05, drop_fraction_fn=, is_debug=False",
    "algorithms.sparse_trainers.RigL._get_grow_scores": "sparse_state, params, grads",
    "algorithms.ste.SteMixin.pre_forward_update": "params, opt_state",
    "algorithms.ste.SteMixin.get_initial_masks": "params, target_sparsities",
    "algorithms.ste.SteMixin.update_state": "sparse_state, params, grads",
    "algorithms.ste.SteMixin.post_gradient_update": "params, opt_state",
    "algorithms.ste.SteMagnitudePruning": BASE,
    "algorithms.ste.SteRandomPruning": BASE,
    "algorithms.global_pruners.GlobalPruningMixin.init_state": "params",
    "algorithms.global_pruners.GlobalPruningMixin.instant_sparsify": "params, grads=None",
    "algorithms.global_pruners.GlobalPruningMixin.create_masks": "scores, target_sparsity",
    "algorithms.global_pruners.GlobalMagnitudePruning": f"{BASE}, ... {GLOBAL}",
    "algorithms.global_pruners.GlobalSaliencyPruning": f"{BASE}, ... {GLOBAL}",
    "algorithms.acdc.reset_optimizer": "state",
    "algorithms.acdc.add_to_jaxpruner": "",
    "algorithms.acdc.ACDC": (
        f"{BASE.replace('scheduler=NoUpdateSchedule()', 'scheduler=')}, ... init_dense_steps_end=0,"
        " final_sparse_steps_start=0, cycle_sparse_steps=0, cycle_dense_steps=0, "
        "reset_optimizer=False"
    ),
    "algorithms.acdc.ACDC.update_state": "sparse_state, params, grads",
    "algorithms.adam_fisher.find_adamstate": "state",
    "algorithms.adam_fisher.replace_adamstate": "state, replacement",
    "algorithms.adam_fisher.add_to_jaxpruner": "",
    "algorithms.adam_fisher.AdamBasedFisherPruning": f"{BASE}, ... reset_adam=False",
    "algorithms.adam_fisher.AdamBasedFisherPruning.calculate_scores": UPDATER,
    "algorithms.adam_fisher.AdamBasedFisherPruning.update_state": "sparse_state, params, grads",
    "algorithms.iterative_nm.IterativeNMPruning": BASE,
    "algorithms.iterative_nm.IterativeNMPruning.calculate_scores": UPDATER,
    "algorithms.iterative_nm.add_to_jaxpruner": "",
    "algorithms.activation_sparsity.get_activation_context": (
        "sparsity_string, allowlist=('relu',)"
    ),
    "algorithms.activation_sparsity.add_activation_sparsity": (
        "sparsity_type, sparsity=None, allowlist=('relu',)"
    ),
    "algorithms.activation_sparsity.add_activation_sparsity_layers": (
        "sparsity_fn, allowlist=('Dense',), score_fn=, getter_fn=, setter_fn="
    ),
}  # fmt: skip


def find(name: str):
    """What stands under "module.Class.method" in the package, and whether it is given a self."""
    parent = found = sparsity
    for part in name.split("."):
        parent = found
        if not hasattr(parent, part):
            importlib.import_module(f"{parent.__name__}.{part}")
        found = getattr(parent, part)
    return found, inspect.isclass(parent)


def parameters(f, bound: bool) -> list[inspect.Parameter]:
    return list(inspect.signature(f).parameters.values())[bound:]


def shown(default) -> str:
    if default is NOT_DIM_ONE_FILTER_FN:
        return "NOT_DIM_ONE"
    if isinstance(default, functools.partial) and default.func is uniform:
        return f"uniform(sparsity={default.keywords['sparsity']})"
    return "function" if inspect.isfunction(default) else repr(default)


@pytest.mark.parametrize("name", JAXPRUNER)
def test_users_of_jaxpruner_find_the_parameters_they_give(name):
    ours = parameters(*find(name))
    in_order, _, by_name = JAXPRUNER[name].partition("...")
    split = lambda text: [each for each in text.strip(" ,").split(", ") if each]
    in_order, by_name = split(in_order), split(by_name)
    known = {p.name: p for p in ours}
    for place, text in enumerate([*in_order, *by_name]):
        wanted, has_default, default = text.partition("=")
        if place < len(in_order):
            assert ours[place].name == wanted
        parameter = known.pop(wanted)
        assert parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert (parameter.default is not inspect.Parameter.empty) == bool(has_default)
        if default:
            assert shown(parameter.default) == default
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for parameter in known.values():  # what is beyond theirs may be left out
        assert parameter.kind in variable or parameter.default is not inspect.Parameter.empty


def test_all_that_jaxpruner_has_at_its_top_level_is_at_ours():
    assert set(dir(sparsity)) >= {
        "ALGORITHM_REGISTRY", "BaseUpdater", "GlobalMagnitudePruning", "GlobalSaliencyPruning",
        "MagnitudePruning", "NoPruning", "NoUpdateSchedule", "OneShotSchedule", "PeriodicSchedule",
        "PolynomialSchedule", "RandomPruning", "RigL", "SET", "SaliencyPruning", "SparseState",
        "SparsityType", "StaticRandomSparse", "SteMagnitudePruning", "SteRandomPruning",
        "all_algorithm_names", "algorithms", "api", "apply_mask", "base_updater",
        "create_updater_from_config", "mask_calculator", "register_algorithm",
        "sparsity_distributions", "sparsity_schedules", "sparsity_types", "summarize_intersection",
        "summarize_sparsity", "utils",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("drop_fraction", "new"),
    [
        (0.0, [0, 1, 0, 1, 0, 0, 1, 0, 1]),  # the mask stays
        (0.25, [0, 1, 1, 1, 0, 0, 0, 0, 1]),  # 0.5 goes; 9 has the largest gradient left
        (0.5, [0, 1, 1, 1, 0, 0, 0, 0, 1]),  # 2 goes as well, and comes back by its gradient of 8
        (1.0, [0, 1, 1, 1, 1, 0, 0, 0, 0]),  # one weight stays, whatever is to be dropped
    ],
)
def test_rigl_moves_a_mask_without_a_type(drop_fraction, new):
    """By hand: kept weights 2, 3, 0.5 and 4."""
    weights = np.float32([7, 2, 7, 3, 7, 7, 0.5, 7, 4])
    grads = np.float32([1, 8, 9, 6, 5, 2, 3, 4, 0.5])
    updater = sparsity.RigL(is_debug=True)
    old = np.uint8([0, 1, 0, 1, 0, 0, 1, 0, 1])
    if drop_fraction == 1.0:
        weights[3] = 9  # now the one that stays
    found = updater._update_masks(old, weights, grads, drop_fraction=drop_fraction)
    np.testing.assert_array_equal(found, new)
    assert found.dtype == jnp.uint8
    # Blocks of three: one is kept, and moves to where the gradients are largest.
    blocks = sparsity.RigL(sparsity_type=sparsity.Block((1, 3)))
    old = np.repeat(np.uint8([0, 0, 1]), 3)
    found = blocks._update_masks(old, weights, grads, drop_fraction=0.0)
    np.testing.assert_array_equal(found, old)


def test_a_subclass_may_move_masks_as_in_jaxpruner():
    class Still(sparsity.RigL):
        def _update_masks(self, old_mask, drop_score, grow_score, drop_fraction):
            return old_mask

    half = functools.partial(uniform, sparsity=0.5)
    updater = Still(sparsity_distribution_fn=half)
    params = {"w": jnp.arange(16.0).reshape(4, 4)}
    state = updater.init_state(params)
    after = updater.update_state(state, params, params)
    np.testing.assert_array_equal(after.masks["w"], state.masks["w"])


def public():
    """(name, value) of all that `sparsity.__all__` names, and of what stands in its modules."""
    modules = ["mask_calculator", "utils"]
    modules += [f"post_training.{name}" for name in ("gptq", "one_shot", "smoothquant")]
    modules += ["numbers.blocks", "numbers.elements"]
    for name in sorted({*sparsity.__all__, *modules}):
        found, _ = find(name)
        if not inspect.ismodule(found):
            yield name, found
            continue
        for inner, value in sorted(vars(found).items()):
            here = getattr(value, "__module__", None) == found.__name__
            if here and callable(value) and not inner.startswith("_"):
                yield f"{name}.{inner}", value


def written(name: str, f, bound: bool = False):
    """The lines of a function, or of a class, its methods and properties."""
    try:
        found = parameters(f, bound)
    except (TypeError, ValueError):  # a type alias
        return
    texts, by_keyword = [], False
    for p in found:
        if p.kind == inspect.Parameter.KEYWORD_ONLY and not by_keyword:
            texts.append("*")
        by_keyword |= p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        star = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
        has = p.default is not inspect.Parameter.empty
        texts.append(star.get(p.kind, "") + p.name + (f"={shown(p.default)}" if has else ""))
    yield f"{name}({', '.join(texts)})"
    if inspect.isclass(f):
        for inner, value in sorted(vars(f).items()):
            if inner.startswith("_"):
                continue
            if isinstance(value, property):
                yield f"{name}.{inner}"
            elif inspect.isfunction(value) and value.__name__ == inner:
                yield from written(f"{name}.{inner}", value, bound=True)


def test_signatures_are_the_golden_ones():
    lines = [line for name, value in public() for line in written(name, value)]
    text = "".join(f"{line}\n" for line in lines)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    diff = difflib.unified_diff(
        GOLDEN.read_text().splitlines(), text.splitlines(), lineterm="", n=0
    )
    shown = "\n".join(diff)
    assert not shown, f"if this is meant, run {__doc__.splitlines()[-1]}\n{shown}"
