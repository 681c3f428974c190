"""The state of a run, and the one jitted function that takes it a step further."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, auto_axes

from pjit_train.sharding import Rules, has_mesh
from sparsity.numbers.quantized import Quantizer
from sparsity.updater import Updater

State = dict[str, Any]
"""{"step": int32 [], "params": nested dict of arrays, "optimizer": optax's state}; and in a sparse
run "sparsity": the updater's state (masks), without the optimizer's inside it; of a model with
`Embeddings` "embeddings": their state; and of a run with adapters "adapters": what is trained in
place of "params", a nested dict of arrays; and "teacher": the parameters of one, where it is not
those of "params" that adapters leave as they are."""


def split_model(config, rules: Rules) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's graph definition and its abstract parameters; makes no array."""
    # Without a mesh, which would refuse shapes that it does not divide less clearly than the rules.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return nnx.split(nnx.eval_shape(lambda: config.build(jax.random.key(0), rules)))


def check_layout(config, rules: Rules, mesh) -> None:
    """Raises a UserError where the mesh does not divide a parameter."""
    for path, param in nnx.to_flat_state(split_model(config, rules)[1]):
        rules.check(mesh, param.get_metadata("axes"), param.shape, ".".join(map(str, path)))


def new_params(config, rules: Rules, seed) -> Any:
    """Random parameters of a model: a nested dict of arrays, each created sharded."""
    return nnx.to_pure_dict(nnx.state(config.build(jax.random.key(seed), rules)))


def new_state(
    params,
    optimizer: optax.GradientTransformation,
    updater: Updater | None = None,
    embeddings: Any = None,
    seed: int = 0,
    trained: Any = None,
) -> State:
    """Makes the state before the first step; the tables of `embeddings` from the seed.

    Args:
      trained: the parameters of adapters; None where `params` are trained.
    """
    if trained is not None:
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "adapters": trained}
        if updater is not None:
            state["sparsity"] = idle(updater).init(params)._replace(inner_state=None)
        return state | {"optimizer": optimizer.init(trained)}
    optimizer_state = optimizer.init(params)
    if updater is not None:
        params = updater.post_gradient_update(params, optimizer_state)
    state = {"step": jnp.zeros((), jnp.int32), "params": params}
    if embeddings is not None:
        state["embeddings"] = embeddings.init(seed)
    return state | split(optimizer_state, updater)


def abstract(make: Callable, *args) -> Any:
    """Shapes, dtypes and shardings of what `make(*args)` gives; makes no array."""
    mesh = jax.sharding.get_mesh()

    def concrete(x):
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, jax.eval_shape(make, *args))


def weights(
    state: State,
    updater: Updater | None = None,
    quantizer: Quantizer | None = None,
    clock: jax.Array | None = None,
    adapters: Any = None,
) -> Any:
    """The parameters as the forward pass reads them: of a sparse run masked, of others quantized.

    Embeddings are not among them.

    Args:
      clock: of `Quantizer.weights`; None for an evaluation, for which adapters are merged.
      adapters: the `Adapters` of the run; None where it has none.
    """
    params = state["params"]
    if updater is not None:
        params = updater.weights(params, state["sparsity"])
    if adapters is not None:
        params = adapters.adapt(params, state["adapters"], sparse=updater is not None)
        params = adapters.merge(params) if clock is None else params
    return params if quantizer is None else quantizer.weights(params, clock)


def split(optimizer_state, updater: Updater | None) -> State:
    """Splits the wrapped optimizer's state from what the updater keeps for the forward pass."""
    if updater is None:
        return {"optimizer": optimizer_state}
    return {
        "optimizer": optimizer_state.inner_state,
        "sparsity": optimizer_state._replace(inner_state=None),
    }


def idle(updater: Updater) -> optax.GradientTransformationExtraArgs:
    """A recipe around an optimizer that changes nothing: it goes on with the masks alone."""
    return updater.wrap_optax(optax.set_to_zero(), learning_rate=0.0)


def joined(state: State) -> Any:
    """Joins what `split` has split."""
    if "sparsity" not in state:
        return state["optimizer"]
    return state["sparsity"]._replace(inner_state=state["optimizer"])


def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    loss: Callable,
    accumulate: int = 1,
    updater: Updater | None = None,
    quantizer: Quantizer | None = None,
    lookup: Callable | None = None,
    update: Callable | None = None,
    adapters: Any = None,
    teacher: Any = None,
) -> Callable[[State, dict], tuple[State, dict]]:
    """The function (state, batch) -> (state, metrics) that the loop jits, donating the state.

    Args:
      graph: of the model.
      optimizer: wrapped by the updater, where there is one.
      updater: what `build` of a recipe of `sparsity` gave; None trains dense.
      quantizer: what `build` of a `sparsity.numbers.quantized.Quantization` gave; None for none.
      loss: (model, batch) -> (sum of losses, sum of weights).
      lookup: (state of embeddings, batch) -> (what it found by feature, which the loss reads as
        the batch's "embedded"; routing); None where the model has none.
      update: `Embeddings.update`, with these.
      adapters: the `Adapters` that are trained; None trains the parameters.
      teacher: a `Teacher`, whose loss takes the place of `loss`; None for no teacher.
      accumulate: the batch goes through in this many parts, whose gradients are summed: the update
        is that of the whole batch, with the activations of a part in memory.

    An update whose loss or gradient is not finite is not applied; `metrics["finite"]` says so, and
    the state keeps its parameters and moments, only steps are counted on.
    """

    trained = "params" if adapters is None else "adapters"

    def gradients(state, found, batch):
        """The mean loss, and its gradients by what is trained and by what was looked up."""
        params = state[trained]

        def summed(params, found, part, index=0):
            clock = state["step"] * accumulate + index
            read = weights(state | {trained: params}, updater, quantizer, clock, adapters)
            if teacher is not None:
                taught = state["teacher"] if "teacher" in state else state["params"]
                return teacher.loss(nnx.merge(graph, read), taught, part)
            return loss(nnx.merge(graph, read), part | ({"embedded": found} if found else {}))

        def mean(params, found, batch):
            total, weight = summed(params, found, batch)
            return total / weight

        if accumulate == 1:
            return jax.value_and_grad(mean, argnums=(0, 1))(params, found, batch)

        def body(sums, part):
            of_part = jax.value_and_grad(summed, argnums=(0, 1), has_aux=True)(params, *part)
            (total, weight), (grads, of_found) = of_part
            return jax.tree.map(jnp.add, sums, (total, weight, grads)), of_found

        zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        parts = _parts(found, accumulate), _parts(batch, accumulate), jnp.arange(accumulate)
        (total, weight, grads), of_found = jax.lax.scan(body, zeros, parts)
        grads = grads, jax.tree.map(_joined_parts, of_found)
        return total / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)

    def step(state: State, batch: dict) -> tuple[State, dict]:
        found, routing = {}, None
        if lookup is not None:
            found, routing = lookup(state["embeddings"], batch)
        value, (grads, of_found) = gradients(state, found, batch)
        if updater is None or adapters is not None:
            norm = optax.tree.norm(grads)
        else:
            norm = updater.global_norm(grads, state["step"])
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        for of_feature in of_found.values():
            finite &= jnp.isfinite(of_feature).all()
        new = _update(optimizer, grads, norm, state, updater, finite)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
            "finite": finite,
        }
        if update is not None:
            metrics["ids_out_of_range"] = sum(routing.dropped.values())
            new["embeddings"] = update(
                state["embeddings"], routing, of_found, state["step"] + 1, apply=finite
            )
        return {"step": state["step"] + 1, **new}, metrics

    return step


def eval_step(sums_of: Callable) -> Callable:
    """The function (weights, batch, sums) -> these sums with those of the batch.

    Args:
      sums_of: (weights, batch) -> sums of the batch.
    """

    def step(weights, batch, sums):
        return jax.tree.map(jnp.add, sums, sums_of(weights, batch))

    return step


def _update(optimizer, grads, norm, state: State, updater: Updater | None, finite) -> State:
    """The state without its step after an update, sharded as before.

    The optimizer comes from optax and says nothing of shardings: the partitioner chooses inside it.
    The choice between the branches is one of whole states, so that arrays are updated in place.
    """

    names = ("params", "teacher") if "adapters" in state else ("teacher",)
    frozen = {name: state[name] for name in names if name in state}

    def applied(grads, norm, state, frozen):
        if "adapters" in state:
            return of_adapters(grads, norm, state, frozen["params"])
        params = state["params"]
        updates, optimizer_state = optimizer.update(grads, joined(state), params, norm=norm)
        params = optax.apply_updates(params, updates)
        if updater is not None:
            params = updater.post_gradient_update(params, optimizer_state)
        return {"params": params, **split(optimizer_state, updater)}

    def of_adapters(grads, norm, state, params):
        """Adapters are trained by the bare optimizer; a recipe sees frozen weights and no more."""
        updates, optimizer_state = optimizer.update(
            grads, state["optimizer"], state["adapters"], norm=norm
        )
        new = {
            "adapters": optax.apply_updates(state["adapters"], updates),
            "optimizer": optimizer_state,
        }
        if updater is not None:
            zeros = jax.tree.map(jnp.zeros_like, params)
            clock = state["sparsity"]._replace(inner_state=optax.EmptyState())
            _, sparsity = idle(updater).update(zeros, clock, params)
            new["sparsity"] = sparsity._replace(inner_state=None)
        return new

    def skipped(grads, norm, state, frozen):
        """Counts go on, so that the schedule stays with the step, and masks that follow it."""
        new = applied(jax.tree.map(jnp.zeros_like, grads), jnp.ones_like(norm), state, frozen)
        if updater is not None:
            sparsity = updater.skip((state | frozen)["params"], joined(state))
            state = state | {"sparsity": sparsity._replace(inner_state=None)}

        def keep(new, old):
            counts = new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer)
            # Not the step that something happened at, which a zero gradient may have brought about.
            return jnp.where(new == old + 1, new, old) if counts else old

        counted = jax.tree.map(keep, new["optimizer"], state["optimizer"])
        return state | {"optimizer": counted}

    def choose(finite, grads, norm, state, frozen):
        return jax.lax.cond(finite, applied, skipped, grads, norm, state, frozen)

    left = {"step", "embeddings", *frozen}
    state = {name: x for name, x in state.items() if name not in left}
    if not has_mesh():
        return choose(finite, grads, norm, state, frozen) | frozen
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    chosen = auto_axes(choose, out_sharding=specs)(finite, grads, norm, state, frozen)
    return chosen | frozen


def _parts(batch, accumulate):
    """[batch, ...] -> [accumulate, batch / accumulate, ...]; every device keeps its own rows."""

    def split(x):
        x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(split, batch)


def _joined_parts(x):
    """Joins what `_parts` has split."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
