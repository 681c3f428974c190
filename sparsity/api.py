"""Updaters by name, from a configuration."""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import optax

from sparsity import algorithms, sparsity_distributions, sparsity_schedules
from sparsity.base_updater import BaseUpdater, NoPruning
from sparsity.sparsity_distributions import check_sparsity
from sparsity.sparsity_types import NByM, parse_sparsity_type

ALGORITHM_REGISTRY: dict[str, type[BaseUpdater]] = {
    "no_prune": NoPruning,
    "magnitude": algorithms.MagnitudePruning,
    "random": algorithms.RandomPruning,
    "saliency": algorithms.SaliencyPruning,
    "magnitude_ste": algorithms.SteMagnitudePruning,
    "random_ste": algorithms.SteRandomPruning,
    "global_magnitude": algorithms.GlobalMagnitudePruning,
    "global_saliency": algorithms.GlobalSaliencyPruning,
    "static_sparse": algorithms.StaticRandomSparse,
    "rigl": algorithms.RigL,
    "set": algorithms.SET,
    "acdc": algorithms.ACDC,
    "adam-fisher": algorithms.AdamBasedFisherPruning,
    "iterative_nm": algorithms.IterativeNMPruning,
    "topkast": algorithms.TopKAST,
}
ALGORITHMS = tuple(ALGORITHM_REGISTRY)

_DISTRIBUTIONS = {
    "uniform": sparsity_distributions.uniform,
    "erk": sparsity_distributions.erk,
}
_CONFIG_KEYS = ("algorithm", "dist_type", "sparsity", "sparsity_type", "filter_fn")
_SCHEDULE_KEYS = ("update_freq", "update_start_step", "update_end_step")


def all_algorithm_names() -> tuple[str, ...]:
    """The names that a configuration may give, registered ones too."""
    return tuple(ALGORITHM_REGISTRY)


def register_algorithm(algorithm_name: str, algorithm: type[BaseUpdater]) -> None:
    """Makes a class known to `create_updater_from_config` under a name."""
    ALGORITHM_REGISTRY[algorithm_name] = algorithm


def create_updater_from_config(sparsity_config: Any) -> BaseUpdater:
    """Creates the updater that a configuration describes.

        create_updater_from_config({"algorithm": "magnitude", "dist_type": "erk", "sparsity": 0.8,
            "update_freq": 10, "update_start_step": 200, "update_end_step": 1000})

    Args:
      sparsity_config: a dictionary, an ml_collections.ConfigDict, or any object with attributes:
        algorithm: of `all_algorithm_names()`.
        dist_type: "uniform" (as where it is missing) or "erk"; global pruning has none.
        sparsity: fraction of zeros in [0, 1); or "2:4", which is the type and its sparsity.
        sparsity_type: a type, or a text: "nm_2,4", "2:4", "block_4,4", "channel_0",
          "unstructured". For N:M the sparsity may be missing; it is then 1 - N/M.
        update_freq, update_start_step, update_end_step: a PolynomialSchedule; OneShotSchedule where
          start and end are equal; NoUpdateSchedule without a start. For topkast, whose sparsity
          does not rise, a PeriodicSchedule, of 100 steps from step 0 where they are missing. For
          acdc, phases of update_freq steps from start to end, where its own keys do not say.
        drop_fraction: for rigl and set, 0.1; falls to zero by a cosine at update_end_step.
        filter_fn, custom_sparsity_map: of the distribution.
        Any other key is a field of the algorithm's class.

    Raises:
      ValueError: one line that names the key, what was wrong, and what would be right.
    """
    config = _as_dict(sparsity_config)
    algorithm = config.pop("algorithm", None)
    if algorithm == "no_prune":
        return NoPruning()
    dist_type = config.pop("dist_type", "uniform")
    if dist_type not in _DISTRIBUTIONS:
        raise ValueError(f"dist_type: {dist_type!r} is not supported; use 'uniform' or 'erk'")
    if algorithm not in ALGORITHM_REGISTRY:
        raise ValueError(
            f"algorithm: {algorithm!r} is not supported; {_nearest(algorithm, ALGORITHM_REGISTRY)}"
            "sparsity.all_algorithm_names() has all (of jaxpruner.all_algorithm_names(), and more)"
        )
    updater_type = ALGORITHM_REGISTRY[algorithm]
    sparsity = _take_sparsity(config)
    if issubclass(
        updater_type, algorithms.GlobalMagnitudePruning | algorithms.GlobalSaliencyPruning
    ):
        config["sparsity"] = sparsity
    else:
        options: dict[str, Any] = {"sparsity": sparsity}
        for key in ("filter_fn", "custom_sparsity_map"):
            if (value := config.pop(key, None)) is not None:
                options[key] = value
        distribution = functools.partial(_DISTRIBUTIONS[dist_type], **options)
        config["sparsity_distribution_fn"] = distribution
    steps = {key: config.pop(key, None) for key in _SCHEDULE_KEYS}
    drop_fraction = config.pop("drop_fraction", 0.1)
    if issubclass(updater_type, algorithms.SET):
        config.setdefault("drop_fraction_fn", _drop_fraction(drop_fraction, steps))
    if issubclass(updater_type, algorithms.ACDC):
        config = _cycles(steps) | config
    else:
        config["scheduler"] = _schedule(updater_type, **steps)
    fields = [field.name for field in dataclasses.fields(updater_type)]
    for key in config:
        if key not in fields:
            names = dict.fromkeys((*_CONFIG_KEYS, *_SCHEDULE_KEYS, *fields))
            raise ValueError(
                f"{key}: {algorithm!r} has no such key; {_nearest(key, names)}its keys are "
                + ", ".join(names)
            )
    return updater_type(**config)


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping) or hasattr(config, "keys"):
        return {key: config[key] for key in config.keys()}  # noqa: SIM118 (not only mappings)
    return dict(vars(config))


def _take_sparsity(config: dict[str, Any]) -> float:
    """The sparsity, taken from a configuration; puts a parsed `sparsity_type` into it."""
    sparsity = config.pop("sparsity", None)
    sparsity_type = config.pop("sparsity_type", None)
    if isinstance(sparsity, str) and not _is_number(sparsity):
        if sparsity_type is not None:
            raise ValueError(f"sparsity: {sparsity!r} is a type; give it as sparsity_type alone")
        sparsity, sparsity_type = None, sparsity
    if sparsity_type is not None:
        if isinstance(sparsity_type, str):
            try:
                sparsity_type = parse_sparsity_type(sparsity_type)
            except ValueError as error:
                raise ValueError(f"Sparsity type: {error}") from None
        config["sparsity_type"] = sparsity_type
    if sparsity is None and isinstance(sparsity_type, NByM):
        sparsity = 1 - sparsity_type.n / sparsity_type.m
    if sparsity is None:
        raise ValueError("sparsity: missing; use a fraction of zeros in [0, 1)")
    check_sparsity(float(sparsity))
    return float(sparsity)


def _schedule(
    updater_type: type[BaseUpdater],
    update_freq: int | None,
    update_start_step: int | None,
    update_end_step: int | None,
) -> sparsity_schedules.NoUpdateSchedule:
    if issubclass(updater_type, algorithms.TopKAST):
        return sparsity_schedules.PeriodicSchedule(
            100 if update_freq is None else update_freq, update_start_step or 0, update_end_step
        )
    if update_start_step is None:
        return sparsity_schedules.NoUpdateSchedule()
    if update_end_step is None:
        raise ValueError("update_end_step: missing; with update_start_step give the last step too")
    if update_end_step == update_start_step:
        return sparsity_schedules.OneShotSchedule(target_step=update_end_step)
    if update_freq is None:
        raise ValueError("update_freq: missing; with update_start_step give the steps between")
    return sparsity_schedules.PolynomialSchedule(update_freq, update_start_step, update_end_step)


def _cycles(steps: Mapping[str, int | None]) -> dict[str, int]:
    """AC/DC's fields as the keys of a schedule say them."""
    if steps["update_start_step"] is None or steps["update_end_step"] is None:
        return {}
    return {
        "init_dense_steps_end": steps["update_start_step"],
        "final_sparse_steps_start": steps["update_end_step"],
        "cycle_sparse_steps": steps["update_freq"] or 0,
        "cycle_dense_steps": steps["update_freq"] or 0,
    }


def _drop_fraction(fraction: float, steps: Mapping[str, int | None]) -> optax.Schedule:
    if not 0 <= fraction <= 1:
        raise ValueError(f"drop_fraction={fraction}; use a fraction of 0 to 1")
    if steps["update_end_step"] is None:
        return optax.constant_schedule(fraction)
    return optax.cosine_decay_schedule(fraction, max(steps["update_end_step"], 1))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest(name: object, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
