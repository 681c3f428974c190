"""Updaters from configurations of every kind, and what is said of wrong ones."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

import sparsity
from sparsity import sparsity_schedules as schedules

BASE = {"algorithm": "magnitude", "dist_type": "uniform", "sparsity": 0.5}
UPDATES = {"update_freq": 2, "update_start_step": 2, "update_end_step": 8}


class Keyed:
    """Keys and items and no more, as of a ConfigDict."""

    def __init__(self, items):
        self._items = items

    def keys(self):
        return self._items.keys()

    def __getitem__(self, key):
        return self._items[key]


@pytest.mark.parametrize("kind", [dict, Keyed, lambda d: types.SimpleNamespace(**d)])
def test_configurations_of_every_kind(kind):
    config = BASE | UPDATES | {"dist_type": "erk", "skip_gradients": True}
    updater = sparsity.create_updater_from_config(kind(config))
    assert isinstance(updater, sparsity.MagnitudePruning)
    assert updater.scheduler == schedules.PolynomialSchedule(2, 2, 8)
    assert updater.skip_gradients
    assert updater.sparsity_distribution_fn.func is sparsity.erk
    assert updater.sparsity_distribution_fn.keywords == {"sparsity": 0.5}
    assert config["algorithm"] == "magnitude"  # the configuration is left as it was


def test_schedules():
    create = sparsity.create_updater_from_config
    assert create(BASE).scheduler == schedules.NoUpdateSchedule()
    one_shot = create(BASE | {"update_start_step": 5, "update_end_step": 5})
    assert one_shot.scheduler == schedules.OneShotSchedule(5)
    topkast = BASE | {"algorithm": "topkast"}
    assert create(topkast).scheduler == schedules.PeriodicSchedule(100, 0, None)
    assert create(topkast | UPDATES).scheduler == schedules.PeriodicSchedule(2, 2, 8)


def test_drop_fraction_falls_by_a_cosine():
    config = BASE | UPDATES | {"algorithm": "rigl", "drop_fraction": 0.4}
    fraction = sparsity.create_updater_from_config(config).drop_fraction_fn
    for step in range(12):
        expected = 0.2 * (1 + np.cos(np.pi * min(step, 8) / 8))
        assert float(fraction(step)) == pytest.approx(expected, abs=1e-6)
    default = sparsity.create_updater_from_config(BASE | UPDATES | {"algorithm": "set"})
    assert float(default.drop_fraction_fn(0)) == pytest.approx(0.1)
    fixed = sparsity.create_updater_from_config(BASE | {"algorithm": "set"})
    assert float(fixed.drop_fraction_fn(1000)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sparsity_type": "nm_2,4"}, sparsity.NByM(2, 4)),
        ({"sparsity_type": "2:4"}, sparsity.NByM(2, 4)),
        ({"sparsity": "2:4"}, sparsity.NByM(2, 4)),
        ({"sparsity_type": "block_4,4"}, sparsity.Block((4, 4))),
        ({"sparsity_type": "channel_0"}, sparsity.Channel(0)),
        ({"sparsity_type": sparsity.NByM(1, 4, -2)}, sparsity.NByM(1, 4, -2)),
        ({}, sparsity.Unstructured()),
    ],
)
def test_sparsity_types(keys, expected):
    assert sparsity.create_updater_from_config(BASE | keys).sparsity_type == expected


def test_the_sparsity_of_n_of_m_need_not_be_said():
    updater = sparsity.create_updater_from_config({"algorithm": "magnitude", "sparsity": "1:4"})
    weight = jnp.array([[4.0, -3, 2, 1, 0, 0.5, -7, 6]])
    masks = updater.instant_sparsify({"w": weight})[1]
    np.testing.assert_array_equal(masks["w"], [[1, 0, 0, 0, 0, 0, 1, 0]])


@pytest.mark.parametrize("name", sparsity.all_algorithm_names())
def test_every_algorithm_takes_the_common_keys(name):
    updater = sparsity.create_updater_from_config(BASE | UPDATES | {"algorithm": name})
    assert type(updater) is sparsity.ALGORITHM_REGISTRY[name]


def test_names():
    assert set(sparsity.all_algorithm_names()) >= {
        "no_prune", "magnitude", "random", "saliency", "magnitude_ste", "random_ste",
        "global_magnitude", "global_saliency", "static_sparse", "rigl", "set", "acdc",
        "adam-fisher", "iterative_nm", "topkast",
    }  # fmt: skip


def test_registered_algorithms(monkeypatch):
    monkeypatch.setattr(sparsity.api, "ALGORITHM_REGISTRY", dict(sparsity.ALGORITHM_REGISTRY))

    class Mine(sparsity.MagnitudePruning):
        pass

    sparsity.register_algorithm("mine", Mine)
    assert "mine" in sparsity.all_algorithm_names()
    updater = sparsity.create_updater_from_config(BASE | {"algorithm": "mine"})
    assert type(updater) is Mine


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"algorithm": "magnitud"}, "'magnitud' is not supported; did you mean 'magnitude'"),
        ({"algorithm": None}, "algorithm: None is not supported"),
        ({"dist_type": "normal"}, "dist_type: 'normal' is not supported; use 'uniform' or 'erk'"),
        ({"sparsity": 1.0}, r"sparsity=1.0; use a fraction of zeros in \[0, 1\)"),
        ({"sparsity": -1}, r"use a fraction of zeros in \[0, 1\)"),
        ({"sparsity": None}, "sparsity: missing"),
        ({"sparsity_type": "2;4"}, "(?i)sparsity type"),
        ({"sparsity": "2:4", "sparsity_type": "2:4"}, "give it as sparsity_type alone"),
        ({"updat_freq": 3}, "'magnitude' has no such key; did you mean"),
        ({"update_start_step": 1}, "update_end_step: missing"),
        ({"update_start_step": 1, "update_end_step": 3}, "update_freq: missing"),
        ({"algorithm": "set", "drop_fraction": 2}, "drop_fraction=2; use"),
        ({"algorithm": "global_magnitude", "sparsity_type": "2:4"}, "unstructured only"),
        ({"algorithm": "topkast", "backward_extra_density": -1}, "backward_extra_density=-1; use"),
        ({"algorithm": "acdc", "final_sparse_steps_start": 3}, "use 1 or more of each"),
    ],
)
def test_errors_are_one_line(change, line):
    with pytest.raises(ValueError, match=line) as error:
        sparsity.create_updater_from_config(BASE | change)
    assert "\n" not in str(error.value)
