"""Embeddings on emulated devices, against NumPy on whole tables, and against themselves in bits."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pjit_train.embeddings import row_optimizers
from pjit_train.embeddings.collection import Embeddings
from pjit_train.embeddings.storage import Storage
from pjit_train.embeddings.tables import Bags, Feature, Normal, Table, ragged

BATCH, WIDTH = 48, 16
ADAGRAD = row_optimizers.Adagrad(learning_rate=0.1)


def mesh_of(devices: int):
    kinds = (AxisType.Explicit,)
    return jax.make_mesh((devices,), ("data",), kinds, devices=jax.devices()[:devices])


def features(shardings=("row", "row", "replicated"), optimizer=ADAGRAD, storage=None):
    """Four features, two of which share the first of three tables."""

    def table(name, rows, sharding, **more):
        hot = (0, 1, 4) if sharding == "hot" else ()
        return Table(
            name=name,
            rows=rows,
            width=WIDTH,
            optimizer=optimizer,
            storage=storage or Storage(),
            sharding="row" if hot else sharding,
            hot=hot,
            **more,
        )

    a = table("a", 500, shardings[0], combiner="mean")
    b = table("b", 37, shardings[1], combiner="sqrtn", invalid="drop", initializer=Normal())
    c = table("c", 5, shardings[2], invalid="reserve")
    return [
        Feature(name="f", table=a, hotness=6),
        Feature(name="g", table=a, hotness=2),
        Feature(name="h", table=b, hotness=3),
        Feature(name="i", table=c),
    ]


def batches(steps=3):
    """Bags with repeats, padding, empty bags, weights, and ids out of range where they may be."""
    rng = np.random.default_rng(0)
    zipf = lambda shape: (rng.zipf(1.3, shape) % 500).astype(np.int32)
    for _ in range(steps):
        lengths = rng.integers(0, 7, BATCH).astype(np.int32)
        bags = {
            "f": Bags(zipf((BATCH, 6)), rng.random((BATCH, 6)).astype(np.float32), lengths),
            "g": Bags(zipf((BATCH, 2))),
            "h": Bags(rng.integers(-3, 50, (BATCH, 3)).astype(np.int32)),
            "i": Bags(rng.integers(-2, 9, (BATCH, 1)).astype(np.int32)),
        }
        yield bags, {k: rng.standard_normal((BATCH, WIDTH)).astype(np.float32) for k in "fghi"}


def trained(features, devices, capacity=None, saved=None, first=0):
    """(what each step looked up, the logical rows and slots after the last)."""
    mesh = mesh_of(devices) if devices > 1 else None
    axes = ("data",) if devices > 1 else ()
    embeddings = Embeddings(features, mesh, axes=axes, capacity=capacity)

    def step(state, bags, gradients, number):
        found, routing = embeddings.lookup(state, bags)
        return embeddings.update(state, routing, gradients, number), found

    step, looked_up = jax.jit(step, donate_argnums=0), []
    state = embeddings.init(7) if saved is None else embeddings.loaded(saved)
    for number, (bags, gradients) in itertools.islice(enumerate(batches(), 1), first, None):
        if mesh is not None:
            split = NamedSharding(mesh, PartitionSpec("data"))
            bags, gradients = jax.device_put((bags, gradients), split)
        state, found = step(state, bags, gradients, number)
        looked_up.append(jax.device_get(found))
    return looked_up, jax.device_get(embeddings.saved(state))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(
            x.view(f"u{x.dtype.itemsize}"), y.view(f"u{y.dtype.itemsize}")
        )


@pytest.fixture(scope="module")
def alone():
    """By optimizer and storage, what one device has."""
    known = {}

    def get(optimizer=ADAGRAD, storage=None):
        key = optimizer, storage
        if key not in known:
            known[key] = trained(features(("row",) * 3, optimizer, storage), 1)
        return known[key]

    return get


def gain_matrix(feature, bag):
    """float64 [batch, rows + 1]: how often each row counts in each bag, by the definition."""
    table, ids = feature.table, np.asarray(bag.ids)
    weights = np.ones(ids.shape) if bag.weights is None else np.asarray(bag.weights, float)
    lengths = np.full(len(ids), ids.shape[1]) if bag.lengths is None else bag.lengths
    matrix = np.zeros((len(ids), table.rows + 1))
    for sample, row in enumerate(ids):
        used = []
        for id_, weight in list(zip(row, weights[sample], strict=True))[: lengths[sample]]:
            if not 0 <= id_ < table.rows:
                if table.invalid == "drop":
                    continue
                id_ = table.rows
            used.append((id_, weight))
        total = {
            "sum": 1.0,
            "mean": sum(w for _, w in used),
            "sqrtn": sum(w * w for _, w in used) ** 0.5,
        }[table.combiner]
        for id_, weight in used:
            matrix[sample, id_] += weight / total if total else 0.0
    return matrix


def test_lookups_and_adagrad_are_those_of_whole_tables(alone):
    found, saved = alone()
    fs = features(("row",) * 3)
    embeddings = Embeddings(fs)
    start = embeddings.saved(embeddings.init(7))
    tables = {t: np.zeros((of.rows + 1, WIDTH)) for t, of in embeddings.tables.items()}
    for name, of in embeddings.tables.items():
        count = of.rows + (of.invalid == "reserve")
        tables[name][:count] = embeddings.rows(start, name, np.arange(count))
    squares = {t: np.full_like(x, 0.1) for t, x in tables.items()}
    for got, (bags, gradients) in zip(found, batches(), strict=True):
        sums = {t: np.zeros_like(x) for t, x in tables.items()}
        for feature in fs:
            matrix, table = gain_matrix(feature, bags[feature.name]), feature.table.name
            np.testing.assert_allclose(got[feature.name], matrix @ tables[table], atol=2e-6)
            sums[table] += matrix.T @ gradients[feature.name]
        for t in tables:
            squares[t] += sums[t] ** 2
            tables[t] -= 0.1 * sums[t] / np.sqrt(squares[t])
    for name, of in embeddings.tables.items():
        ids = np.arange(of.rows)
        np.testing.assert_allclose(embeddings.rows(saved, name, ids), tables[name][:-1], atol=3e-6)
        kept = saved["slots"][name]["accumulator"][of.bijection(ids)]
        np.testing.assert_allclose(kept, squares[name][:-1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "capacity", "shardings"),
    [
        (2, None, ("row", "row", "row")),
        (3, 1, ("row", "row", "replicated")),  # many rounds
        (4, None, ("hot", "hot", "hot")),
        (6, 5, ("table_row", "table", "hot")),  # 8 samples a device, devices no power of two
        (8, None, ("table_row", "table_row", "table")),  # 6 samples a device: several units a row
        (8, 4, ("row", "replicated", "table")),
        (8, None, ("column", "row", "column")),
    ],
)
def test_no_device_count_capacity_or_sharding_changes_a_bit(alone, devices, capacity, shardings):
    assert_same_bits(trained(features(shardings), devices, capacity), alone())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "storage", "shardings"),
    [
        (row_optimizers.SGD(learning_rate=0.1), Storage(values="bfloat16"), ("row",) * 3),
        (row_optimizers.RowWiseAdagrad(learning_rate=0.1), None, ("column", "row", "hot")),
        (
            row_optimizers.LazyAdam(learning_rate=0.1, variant="skipped"),
            Storage(values="int4"),
            ("hot", "table", "replicated"),
        ),
        (row_optimizers.FTRL(learning_rate=0.1, l1=0.01), Storage(values="int8"), ("row",) * 3),
    ],
    ids=lambda x: type(x).__name__,
)
def test_nor_with_other_optimizers_and_values(alone, optimizer, storage, shardings):
    assert_same_bits(trained(features(shardings, optimizer, storage), 4), alone(optimizer, storage))


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_on_two_with_other_shardings(alone):
    whole = alone()
    mesh = mesh_of(8)
    embeddings = Embeddings(features(("row", "hot", "table")), mesh, axes=("data",))
    step = jax.jit(lambda s, b, g, n: embeddings.update(s, embeddings.lookup(s, b)[1], g, n))
    state = embeddings.init(7)
    bags, gradients = next(batches())
    bags, gradients = jax.device_put((bags, gradients), NamedSharding(mesh, PartitionSpec("data")))
    saved = jax.device_get(embeddings.saved(step(state, bags, gradients, 1)))
    other = features(("column", "replicated", "hot"))
    found, end = trained(other, 2, saved=saved, first=1)
    assert_same_bits((found, end), (whole[0][1:], whole[1]))


@pytest.mark.slow
def test_gradients_of_tables_are_exact_and_zero_elsewhere():
    table = Table(name="t", rows=40, width=4)
    feature = Feature(name="f", table=table, hotness=3)
    ids = np.array([[0, 0, 3], [3, 39, 1]] * 4, np.int32)
    cotangent = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    want = gain_matrix(feature, Bags(ids)).T @ cotangent
    for devices in (1, 4):
        mesh = mesh_of(devices) if devices > 1 else None
        embeddings = Embeddings([feature], mesh, axes=("data",) if mesh else ())

        def loss(state, bags, embeddings=embeddings):
            return jnp.sum(embeddings.lookup(state, bags)[0]["f"] * cotangent)

        bags = {"f": Bags(ids)}
        if mesh:
            bags = jax.device_put(bags, NamedSharding(mesh, PartitionSpec("data")))
        state = embeddings.init()
        got = embeddings.saved(jax.jit(jax.grad(loss))(state, bags))
        got = np.asarray(got["rows"]["t"]["rows"])[table.bijection(np.arange(40))]
        np.testing.assert_allclose(got, want[:40], rtol=1e-6)
        assert (got[[2, *range(4, 39)]] == 0).all()


def test_an_update_that_is_not_applied_leaves_everything():
    embeddings = Embeddings(features())
    bags, gradients = next(batches())
    state = embeddings.init()
    gradients["f"] = np.full_like(gradients["f"], np.nan)

    @jax.jit
    def step(state):
        routing = embeddings.lookup(state, bags)[1]
        return embeddings.update(state, routing, gradients, 1, apply=False)

    after = step(state)
    assert_same_bits(jax.device_get(after), jax.device_get(state))


def test_an_update_costs_the_rows_of_the_batch_and_not_the_table():
    costs = []
    for rows in (100_000, 1_600_000):
        table = Table(name="t", rows=rows, width=WIDTH, optimizer=ADAGRAD)
        embeddings = Embeddings([Feature(name="f", table=table, hotness=2)])

        def step(state, bags, embeddings=embeddings):
            found, routing = embeddings.lookup(state, bags)
            return embeddings.update(state, routing, found, 1), found

        bags = {"f": Bags(np.zeros((64, 2), np.int32))}
        state = jax.eval_shape(embeddings.init)
        compiled = jax.jit(step, donate_argnums=0).lower(state, bags).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * 4 * WIDTH * rows  # in place
        costs.append(memory.temp_size_in_bytes)
        # What is as large as the table is given, and written by rows: nothing passes over it.
        size = f"f32[{table.positions},{WIDTH}]"
        text = compiled.as_text()
        whole = re.findall(rf" = {re.escape(size)}\S* ([\w-]+)\(", text)
        assert set(whole) <= {"parameter", "scatter", "fusion"}
        fused = [x for x in text.splitlines() if f" = {size}" in x and " fusion(" in x]
        assert len(fused) == 2
        assert all("calls=%wrapped_scatter" in x for x in fused)
    assert costs[0] == costs[1]
    assert costs[0] < 2**20


def test_strided_ids_are_spread_evenly():
    table = Table(name="t", rows=1_000_003, width=1)
    for ids in (np.arange(0, 1_000_003, 128), np.arange(8000) * 100, np.arange(8000)):
        owners = table.bijection(ids) // (table.positions // 128)
        counts = np.bincount(owners, minlength=128)
        mean = len(ids) / 128
        assert abs(counts - mean).max() < 5 * mean**0.5 + 1


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 97, 1000, 65_537])
def test_the_bijection_is_one(rows):
    bijection = Table(name="t", rows=rows, width=1).bijection
    every = np.arange(bijection.size)
    assert rows <= bijection.size <= max(rows * 17 / 16, rows + 8)
    np.testing.assert_array_equal(np.sort(bijection(every)), every)
    np.testing.assert_array_equal(bijection.inverse(bijection(every)), every)


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
def test_stochastic_rounding_is_right_on_average(values):
    storage = Storage(values=values)
    w = np.tile(np.linspace(-1, 1, 32, dtype=np.float32) ** 3, (4000, 1))
    rows = jnp.arange(4000, dtype=jnp.int32)
    read = np.asarray(storage.read(storage.write(w, rows, jnp.int32(3), jnp.int32(0))))
    step = {"bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[values]
    assert abs(read - w).max() <= step * 1.001
    assert abs(read.mean(axis=0) - w[0]).max() < 5 * step / 2 / 4000**0.5
    again = storage.read(storage.write(w, rows, jnp.int32(4), jnp.int32(0)))
    assert (np.asarray(again) != read).any()
    small = jnp.full((4000, 1), 1.0).at[:, 0].add(2**-12)  # less than half a step of bfloat16
    if values == "bfloat16":
        even = Storage(values=values, rounding="even")
        up = storage.read(storage.write(small, rows, jnp.int32(3), jnp.int32(0)))
        assert float(up.mean()) > 1
        assert float(even.read(even.write(small, rows, jnp.int32(3), jnp.int32(0))).mean()) == 1


def dense_adam(w, gradients, variant):
    """By the formulas, with moments that decay in every step only where the variant says so."""
    m, v, w = np.zeros_like(w), np.zeros_like(w), w.copy()
    for t, g in enumerate(gradients, 1):
        seen = (g != 0).any(axis=1)[:, None]
        decays = seen if variant == "global" else np.ones_like(seen)
        m = np.where(decays, 0.9 * m + 0.1 * g, m)
        v = np.where(decays, 0.999 * v + 0.001 * g * g, v)
        moved = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = np.where(seen, moved, w)
    return w


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["global", "skipped"])
def test_lazy_adam_is_adam_on_the_rows_that_are_seen(variant):
    optimizer = row_optimizers.LazyAdam(learning_rate=0.1, variant=variant)
    table = Table(name="t", rows=6, width=4, optimizer=optimizer)
    embeddings = Embeddings([Feature(name="f", table=table)])
    state = embeddings.init()
    start = embeddings.rows(embeddings.saved(state), "t", np.arange(6)).astype(float)
    rng, dense = np.random.default_rng(2), []
    for step, seen in enumerate([[0, 1, 1], [2, 3, 3], [0, 2, 5], [1, 1, 0]], 1):
        g = rng.standard_normal((3, 4)).astype(np.float32)
        _, routing = embeddings.lookup(state, {"f": Bags(np.array(seen, np.int32)[:, None])})
        state = embeddings.update(state, routing, {"f": g}, step)
        dense.append(np.zeros((6, 4)))
        np.add.at(dense[-1], seen, g)
    got = embeddings.rows(embeddings.saved(state), "t", np.arange(6))
    np.testing.assert_allclose(got, dense_adam(start, dense, variant), atol=2e-6)


def simple(**table):
    return Embeddings(
        [Feature(name="f", table=Table(name="t", rows=10, width=4, **table), hotness=2)]
    )


@pytest.mark.parametrize(
    ("bag", "words"),
    [
        (Bags(np.array([[1, 10]])), "feature f: id 10 of sample 0 is out of range; use 0 to 9"),
        (Bags(np.array([[1, 2], [0, -1]])), "feature f: id -1 of sample 1"),
        (Bags(np.array([[1, 2**32 + 3]])), "feature f: id 4294967299"),
        (Bags(np.array([[1.0, 2.0]])), "feature f: ids are float64; use integers"),
        (Bags(np.array([[True, False]])), "feature f: ids are bool; use integers"),
        (Bags(np.array([1, 2])), "feature f: ids are [2]; use [batch, 2]"),
        (Bags(np.array([[1, 2, 3]])), "feature f: ids are [1, 3]; use [batch, 2]"),
        (Bags([[1, 2]]), "feature f: ids: list; use an array"),
        (Bags(np.array([[1, 2]]), np.ones((1, 3))), "feature f: weights are [1, 3]; use [1, 2]"),
        (Bags(np.array([[1, 2]]), None, np.array([3])), "feature f: a length is 3; use 0 to 2"),
    ],
)
def test_bad_ids_are_refused_by_feature_and_id(bag, words):
    embeddings = simple()
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        embeddings.lookup(embeddings.init(), {"f": bag})
    assert "\n" not in str(error.value)


def test_ids_that_nobody_saw_make_no_neighbours_row():
    ids = np.array([[1, 10], [2, 3], [-1, -1]], np.int32)
    embeddings = simple()
    found, routing = jax.jit(embeddings.lookup)(embeddings.init(), {"f": Bags(ids)})
    assert np.isnan(np.asarray(found["f"])[[0, 2]]).all()
    assert np.isfinite(found["f"][1]).all()
    assert int(routing.dropped["f"]) == 3
    embeddings = simple(invalid="drop", combiner="mean")
    state = embeddings.init()
    found, routing = embeddings.lookup(state, {"f": Bags(ids.astype(np.int64) + 2**33)})
    assert int(routing.dropped["f"]) == 6
    assert not np.asarray(found["f"]).any()
    found, _ = embeddings.lookup(state, {"f": Bags(ids)})
    row = embeddings.rows(embeddings.saved(state), "t", [1])
    np.testing.assert_array_equal(found["f"][0], row[0])  # the divisor is that of what is left


@pytest.mark.slow
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_bags_that_are_empty_or_weigh_nothing_are_zero(combiner):
    embeddings = simple(combiner=combiner)
    state = embeddings.init()
    zero = Bags(np.array([[1, 2]] * 2), np.zeros((2, 2), np.float32))
    empty = ragged(np.array([4, 5]), np.array([0, 2, 2]), 2)
    against = Bags(np.array([[1, 2]]), np.array([[1, -1]], np.float32))
    assert not np.asarray(embeddings.lookup(state, {"f": zero})[0]["f"]).any()
    assert not np.asarray(embeddings.lookup(state, {"f": empty})[0]["f"][1]).any()
    assert np.asarray(embeddings.lookup(state, {"f": empty})[0]["f"][0]).any()
    if combiner == "mean":
        assert not np.asarray(embeddings.lookup(state, {"f": against})[0]["f"]).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Table(name="t", rows=4, width=4, combiner="max"), "combiner='max' is unknown"),
        (lambda: Table(name="t", rows=0, width=4), "Table.rows=0"),
        (lambda: Table(name="t", rows=4, width=4, hot=(4,)), "hot id 4"),
        (lambda: Table(name="t", rows=4, width=3, storage=Storage(values="int4")), "width=3"),
        (lambda: simple(sharding="diagonal"), "sharding='diagonal' is unknown"),
        (lambda: Embeddings([]), "give at least one Feature"),
        (
            lambda: simple() and Embeddings(features(("column",) * 3), mesh_of(3), axes=("data",)),
            "width=16 with sharding='column' is not divisible by 3",
        ),
        (lambda: Embeddings(features(), capacity=0), "capacity=0"),
        (lambda: ragged(np.arange(3), np.array([0, 3]), 2), "bag 0 has 3 ids"),
        (lambda: ragged(np.arange(3), np.array([0, 2]), 2), "must rise from 0 to 3"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    embeddings = Embeddings(features(), mesh_of(4), axes=("data",))
    bags = {
        name: jax.ShapeDtypeStruct((6, n), jnp.int32)
        for name, n in zip("fghi", (6, 2, 3, 1), strict=True)
    }
    bags = {name: Bags(ids) for name, ids in bags.items()}
    with pytest.raises(ValueError, match="batch of 6 samples is not divisible by 4 devices"):
        jax.eval_shape(embeddings.lookup, jax.eval_shape(embeddings.init), bags)
