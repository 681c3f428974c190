"""What all updaters share: masks beside an optimizer, packed, stacked, sharded."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sparsity
from sparsity import base_updater
from sparsity import sparsity_schedules as schedules
from sparsity.sparsity_distributions import erk, uniform

# Small programs, mostly compiled: so the compiler is not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
HALF = functools.partial(uniform, sparsity=0.5)


def model(seed=0):
    """A kernel and a bias, and kernels and norm scales of three scanned layers."""
    normal = np.random.default_rng(seed).standard_normal
    layers = normal((3, 8, 16)) * np.array([1, 5, 9])[:, None, None]
    params = {
        "head": {"kernel": normal((8, 12)), "bias": np.ones(12)},
        "blocks": {"kernel": layers, "scale": normal((3, 8))},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def stacked(path, leaf):
    return 1 if path[0] == "blocks" else 0


def largest(scores, keep):
    """The mask of the `keep` largest, of equal ones the first."""
    mask = np.zeros(scores.size, np.uint8)
    mask[np.argsort(-scores.ravel(), kind="stable")[:keep]] = 1
    return mask.reshape(scores.shape)


def step_of(updater, optimizer):
    """The jitted step of training, of a loss with a gradient everywhere."""

    def loss(params):
        return sum(jnp.sum(jnp.sin(3 * x) + x * x) for x in jax.tree.leaves(params))

    @jit
    def step(params, state):
        grads = jax.grad(loss)(updater.pre_forward_update(params, state))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return updater.post_gradient_update(params, state), state

    return step


def test_magnitude_along_a_ramp_against_numpy():
    updater = sparsity.MagnitudePruning(
        scheduler=schedules.PolynomialSchedule(2, 2, 6),
        sparsity_distribution_fn=functools.partial(uniform, sparsity=0.8),
        stacked_fn=stacked,
    )
    optimizer = updater.wrap_optax(optax.adam(0.05))
    params = model()
    state = optimizer.init(params)
    assert state.masks["head"]["bias"] is None
    assert state.masks["blocks"]["scale"] is None
    step = step_of(updater, optimizer)
    masks = jax.tree.map(np.ones_like, [params["head"]["kernel"], params["blocks"]["kernel"]])
    for count in range(8):
        if count in (2, 4, 6):
            s = 0.8 * (1 - (1 - min(count + 1 - 2, 4) / 4) ** 3)
            masks[0] = largest(np.abs(params["head"]["kernel"]), round(96 * (1 - s)))
            masks[1] = np.stack(
                [largest(np.abs(x), round(128 * (1 - s))) for x in params["blocks"]["kernel"]]
            )
        params, state = step(params, state)
        np.testing.assert_array_equal(state.masks["head"]["kernel"], masks[0])
        np.testing.assert_array_equal(state.masks["blocks"]["kernel"], masks[1])
        np.testing.assert_array_equal(np.asarray(params["head"]["kernel"] != 0), masks[0] == 1)
        assert state.count == count + 1
    assert masks[0].sum() == 19


def test_masks_are_exact_zeros():
    x = jnp.array([np.nan, -np.inf, -1, 2], jnp.bfloat16)
    masked = sparsity.apply_mask(x, jnp.array([0, 0, 0, 1], jnp.uint8))
    assert masked.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(masked.view(jnp.uint16)[:3]), 0)
    assert masked[3] == 2
    assert sparsity.apply_mask(x, None) is not None


def test_straight_through_is_exact():
    x = np.random.default_rng(0).standard_normal(64) * 10.0 ** np.arange(-32, 32)
    x = jnp.asarray(x, jnp.float32)
    mask = jnp.arange(64) % 3 == 0
    out, pull = jax.vjp(lambda x: base_updater.straight_through(x, mask), x)
    np.testing.assert_array_equal(np.asarray(out), np.where(np.asarray(mask), x, 0))
    np.testing.assert_array_equal(np.asarray(pull(x)[0]), np.asarray(x))


def packs(name):
    """(updater, packed updater) of a name, with updates at steps 1 and 3."""
    config = {
        "algorithm": name,
        "sparsity": 0.5,
        "update_freq": 2 if name == "acdc" else 1,
        "update_start_step": 1,
        "update_end_step": 3,
        "stacked_fn": stacked,
    }
    return [
        sparsity.create_updater_from_config(config | {"use_packed_masks": packed})
        for packed in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "magnitude",
        "random",
        "global_magnitude",
        "static_sparse",
        "rigl",
        "set",
        "acdc",
        "adam-fisher",
        "iterative_nm",
        "topkast",
    ],
)
def test_packed_masks_train_alike(name):
    """Parameters and masks are the same, bit for bit, with every algorithm that stores masks."""
    results = []
    for updater in packs(name):
        optimizer = updater.wrap_optax(optax.adam(0.1))
        params = {"blocks": model()["blocks"]}
        state = jit(optimizer.init)(params)
        step = step_of(updater, optimizer)
        for _ in range(5):
            params, state = step(params, state)
        results.append((updater, params, state))
    (_, params, state), (packed, packed_params, packed_state) = results
    for plain, other in zip(jax.tree.leaves(params), jax.tree.leaves(packed_params), strict=True):
        np.testing.assert_array_equal(np.asarray(plain), np.asarray(other))
    unpacked = packed.unpack(packed_state.masks, params)
    for plain, other in zip(jax.tree.leaves(state.masks), jax.tree.leaves(unpacked), strict=True):
        np.testing.assert_array_equal(np.asarray(plain), np.asarray(other))
    assert packed_state.masks["blocks"]["kernel"].shape == (3, 8, 2)  # the axes stay
    assert packed_state.masks["blocks"]["kernel"].dtype == jnp.uint8
    assert 0 < np.asarray(unpacked["blocks"]["kernel"]).mean() < 1


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_packing_round_trips(size):
    mask = np.random.default_rng(size).integers(0, 2, (3, size), np.uint8)
    packed = base_updater.pack_mask(jnp.asarray(mask))
    assert packed.shape == (3, -(-size // 8))
    np.testing.assert_array_equal(base_updater.unpack_mask(packed, mask.shape), mask)
    with pytest.raises(ValueError, match="a packed mask of shape"):
        base_updater.unpack_mask(packed, (4, size))


@pytest.mark.parametrize(
    "sparsity_type",
    [
        sparsity.Unstructured(),
        sparsity.NByM(2, 4, axis=-2),
        sparsity.NByM(1, 4, axis=0),
        sparsity.Block((2, 3)),
        sparsity.Channel(-1),
    ],
)
def test_a_stack_is_masked_layer_by_layer(sparsity_type):
    params = model()["blocks"]
    apart = {f"layer{i}": {k: x[i] for k, x in params.items()} for i in range(3)}
    options = {"sparsity_type": sparsity_type}
    whole = sparsity.MagnitudePruning(
        sparsity_distribution_fn=functools.partial(erk, sparsity=0.5),
        stacked_fn=lambda path, leaf: 1,
        **options,
    )
    single = sparsity.MagnitudePruning(
        sparsity_distribution_fn=functools.partial(erk, sparsity=0.5), **options
    )
    masks, expected = jit(whole.instant_sparsify)(params)[1], jit(single.instant_sparsify)(apart)[1]
    assert masks["scale"] is None
    for i in range(3):
        np.testing.assert_array_equal(masks["kernel"][i], expected[f"layer{i}"]["kernel"])
    if sparsity_type == sparsity.NByM(2, 4, axis=-2):
        groups = np.asarray(masks["kernel"]).reshape(3, 2, 4, 16)
        np.testing.assert_array_equal(groups.sum(axis=2), 2)


def test_n_of_m_along_a_ramp():
    """4:4, then 3:4, then 2:4 as the sparsity rises to a half."""
    updater = sparsity.create_updater_from_config(
        {
            "algorithm": "magnitude",
            "sparsity_type": "2:4",
            "sparsity": 0.5,
            "update_freq": 1,
            "update_start_step": 1,
            "update_end_step": 5,
        }
    )
    optimizer = updater.wrap_optax(optax.sgd(0.0))
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)}
    state = optimizer.init(params)
    kept = []
    for _ in range(7):
        _, state = optimizer.update(params, state, params)
        groups = np.asarray(state.masks["kernel"]).reshape(4, 4, 4)
        kept.append(set(groups.sum(axis=-1).ravel()))
    # 1 - (1 - p)^3 of a half at p = 1/4, 1/2, 3/4, 1: 0.29, 0.44, 0.49, 0.5.
    assert kept == [{4}, {3}, {3}, {3}, {2}, {2}, {2}]


def test_extra_arguments_reach_the_scores_and_the_inner_optimizer():
    seen = {}

    class Noting(sparsity.MagnitudePruning):
        def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
            seen["scores"] = kwargs
            return super().calculate_scores(params)

    def update(updates, state, params=None, *, value, **extra):
        seen["inner"] = value
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    updater = Noting(scheduler=schedules.OneShotSchedule(0), sparsity_distribution_fn=HALF)
    optimizer = updater.wrap_optax(inner)
    params = {"bias": jnp.ones(3)}
    optimizer.update(params, optimizer.init(params), params, value=7.0)
    assert seen == {"scores": {"value": 7.0}, "inner": 7.0}


def test_optimizers_that_need_the_loss():
    updater = sparsity.MagnitudePruning(sparsity_distribution_fn=HALF)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    optimizer = updater.wrap_optax(optax.chain(optax.sgd(1.0), plateau))
    params = {"kernel": jnp.arange(1.0, 9).reshape(2, 4)}
    state = optimizer.init(params)
    for _ in range(4):
        _, state = optimizer.update(params, state, params, value=jnp.float32(1))
    assert state.inner_state[1].scale < 1


@pytest.mark.parametrize("skip", [False, True])
def test_skipped_and_masked_gradients(skip):
    updater = sparsity.MagnitudePruning(
        scheduler=schedules.OneShotSchedule(1),
        sparsity_distribution_fn=HALF,
        skip_gradients=skip,
        is_sparse_gradients=True,
    )
    optimizer = updater.wrap_optax(optax.sgd(1.0, momentum=0.5))
    params = {"kernel": jnp.array([[1.0, -4, 3, 2]])}
    grads = {"kernel": jnp.array([[1.0, 2, 3, 4]])}
    state, update = optimizer.init(params), jit(optimizer.update)
    updates, state = update(grads, state, params)
    np.testing.assert_array_equal(updates["kernel"], [[-1, -2, -3, -4]])
    updates, state = update(grads, state, params)
    expected = [[0, 0, 0, 0]] if skip else [[-0.5, -3, -4.5, -2]]
    np.testing.assert_array_equal(updates["kernel"], expected)
    momentum = state.inner_state[0].trace["kernel"]
    np.testing.assert_array_equal(momentum, [[1, 2, 3, 4]] if skip else [[0.5, 3, 4.5, 2]])
    assert state.count == 2


def test_nothing_is_traced_without_updates():
    class Scoreless(base_updater.BaseUpdater):
        pass

    updater = Scoreless(sparsity_distribution_fn=HALF)
    optimizer = updater.wrap_optax(optax.sgd(1.0))
    params = model()
    assert "cond" not in str(
        jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    )
    with pytest.raises(NotImplementedError, match="Scoreless has no scores"):
        updater.instant_sparsify(params)


def test_no_pruning():
    updater = sparsity.create_updater_from_config({"algorithm": "no_prune"})
    params = model()
    same, masks = updater.instant_sparsify(params)
    assert same is params
    assert jax.tree.leaves(masks) == []
    optimizer = updater.wrap_optax(optax.adam(0.1))
    state = optimizer.init(params)
    ours, _ = optimizer.update(params, state, params)
    theirs, _ = optax.adam(0.1).update(params, state.inner_state, params)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, updater.post_gradient_update(params, state), params)


def test_errors_are_one_line():
    updater = sparsity.MagnitudePruning(sparsity_distribution_fn=HALF)
    params = model()
    bad_rank = sparsity.MagnitudePruning(
        sparsity_distribution_fn=HALF, stacked_fn=lambda path, leaf: 3
    )
    n_of_m = sparsity.MagnitudePruning(
        sparsity_distribution_fn=HALF, sparsity_type=sparsity.NByM(2, 5, -2), stacked_fn=stacked
    )
    mask = jnp.ones((2, 2), jnp.uint8)
    optimizer = updater.wrap_optax(optax.sgd(1.0))
    cases = [
        (lambda: updater.apply_masks(params, {"head": None}), "masks: nothing at 'blocks/"),
        (
            lambda: updater.apply_masks(
                params, {"head": {"kernel": mask, "bias": None}, "blocks": dict.fromkeys(
                    ("kernel", "scale"))}),
            r"head/kernel: a mask of shape \(2, 2\); use the parameter's, \(8, 12\)",
        ),
        (lambda: bad_rank.distribute(params), "stacked_fn gives 3; use 0 to 2"),
        (lambda: n_of_m.instant_sparsify(params), "blocks/kernel: .*8.*5"),
        (lambda: optimizer.update(params, optimizer.init(params)), "params=None"),
        (lambda: updater.create_masks(params, {"a": 0.5}), "sparsities: nothing at"),
        (
            lambda: sparsity.BaseUpdater(sparsity_distribution_fn=None).instant_sparsify(params),
            "sparsity_distribution_fn=None",
        ),
    ]  # fmt: skip
    for call, line in cases:
        with pytest.raises(ValueError, match=line) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["global_magnitude", "rigl"])
def test_sharded_masks_are_those_of_one_device_and_move_no_weights(name):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    updater = sparsity.create_updater_from_config(
        {
            "algorithm": name,
            "sparsity": 0.75,
            "update_freq": 1,
            "update_start_step": 0,
            "update_end_step": 4,
            "stacked_fn": stacked,
        }
    )
    optimizer = updater.wrap_optax(optax.adam(0.1))
    params, grads = model(), model(1)

    def masks(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[1].masks

    specs = {
        "head": {"kernel": P("fsdp"), "bias": P()},
        "blocks": {"kernel": P(None, None, "fsdp"), "scale": P()},
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    arrays = jax.device_put((params, grads), (shardings, shardings))
    kept = jax.tree.map(
        lambda mask, sharding: sharding,
        jax.eval_shape(masks, params, grads),
        {"head": {"kernel": shardings["head"]["kernel"], "bias": None},
         "blocks": {"kernel": shardings["blocks"]["kernel"], "scale": None}},
    )  # fmt: skip
    compiled = jit(masks, out_shardings=kept).lower(*arrays).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "collective-permute" not in text
    assert "all-to-all" not in text
    reductions = [
        line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line
    ]
    assert reductions
    for reduction in reductions:
        for shape in re.findall(r"\w+\[([\d,]*)\]", reduction):
            sizes = [int(size) for size in shape.split(",") if size]
            assert np.prod(sizes, dtype=int) <= 7 * 3 * 8  # counts of rows, for the thresholds
    expected = jit(masks)(params, grads)
    jax.tree.map(np.testing.assert_array_equal, compiled(*arrays), expected)
