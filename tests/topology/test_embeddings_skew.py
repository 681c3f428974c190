"""Distinct ids and busiest owners by a law of popularity, against samples and what was measured."""

import numpy as np
import pytest

from topology.embeddings import PowerLaw, Table


def sampled(rows, skew, size, rng):
    """Ids 0 .. rows - 1 by inverting the law's cumulative distribution."""
    u = rng.random(size)
    if skew == 1:
        x = np.exp(u * np.log(rows + 1))
    else:
        x = (1 + u * ((rows + 1) ** (1 - skew) - 1)) ** (1 / (1 - skew))
    return np.minimum(x.astype(np.int64), rows) - 1


# Repeats an id of a core, a chip, a host and the slice, measured on ids of the law: 40M rows, 128
# chips of 10,240 ids; then the share of the top 1024 rows.
MEASURED = {
    0.8: (1.03, 1.06, 1.10, 1.35, 0.09),
    1.0: (1.35, 1.52, 1.72, 2.61, 0.40),
    1.2: (2.66, 3.45, 4.49, 8.95, 0.77),
}


@pytest.mark.parametrize("skew", MEASURED)
def test_repeats_are_those_that_were_measured(skew):
    law, ids = PowerLaw(40_000_000, skew), 10_240
    found = [n / law.unique(n) for n in (ids / 4, ids, 4 * ids, 128 * ids)]
    *repeats, top = MEASURED[skew]
    assert found == pytest.approx(repeats, rel=0.01)
    assert law.share(1024) == pytest.approx(top, abs=0.006)


@pytest.mark.parametrize(("rows", "skew"), [(50, 0.0), (50, 1.0), (5_000, 0.7), (200_000, 1.3)])
def test_distinct_ids_are_those_of_samples(rows, skew):
    rng, law = np.random.default_rng(1), PowerLaw(rows, skew)
    for draws in (10, 3_000):
        trials = [len(np.unique(sampled(rows, skew, draws, rng))) for _ in range(200)]
        error = np.std(trials) / np.sqrt(len(trials))
        assert law.unique(draws) == pytest.approx(np.mean(trials), abs=4 * error + 1e-4)
        cold = [
            len(np.unique(ids[ids >= 20]))
            for ids in (sampled(rows, skew, draws, rng) for _ in range(200))
        ]
        assert law.unique(draws, 20) == pytest.approx(np.mean(cold), abs=0.03 * np.mean(cold) + 0.4)


def test_without_skew_distinct_ids_follow_the_closed_form():
    assert PowerLaw(1000).unique(500) == pytest.approx(1000 * (1 - 0.999**500), rel=1e-9)
    assert PowerLaw(10**9).unique(10) == pytest.approx(10, rel=1e-6)
    assert PowerLaw(3).unique(10**6) == pytest.approx(3)
    assert PowerLaw(1, 2.0).unique(1) == pytest.approx(1)


@pytest.mark.parametrize("skew", [0.0, 0.8, 1.1])
def test_the_busiest_owner_is_near_that_of_samples(skew):
    rng, rows, owners, sources, ids = np.random.default_rng(2), 20_000, 16, 8, 2_000
    law, most, share = PowerLaw(rows, skew), [], []
    for _ in range(60):
        owner = rng.permutation(rows) % owners  # a bijection, then modulo
        drawn = [sampled(rows, skew, ids, rng) for _ in range(sources)]
        most.append(sum(np.bincount(owner[np.unique(d)], minlength=owners) for d in drawn).max())
        share.append(np.bincount(owner[np.concatenate(drawn)], minlength=owners).max())
    # Asked rows: above the mean of the busiest, not far.
    asked = law.asked(ids, sources, owners)
    assert 0.97 * np.mean(most) < asked < 1.15 * np.mean(most)
    assert law.busiest(owners) * sources * ids == pytest.approx(np.mean(share), rel=0.25)


def test_no_owner_has_more_rows_than_there_are():
    law = PowerLaw(3)
    assert law.asked(1000, 64, 64) == pytest.approx(64)  # of 64 owners three have a row each
    assert law.asked(1000, 64, 2) == pytest.approx(128)


def test_bundled_ids_come_together():
    table = Table(name="t", rows=10**6, width=8, hotness=(10.0,), skew=1.1, bundled=True)
    rng, samples = np.random.default_rng(3), 2_000
    bundle = rng.integers(0, table.rows, (table.rows, 9))  # the fixed map of each first id
    first = [np.unique(sampled(table.rows, 1.1, samples, rng)) for _ in range(20)]
    distinct = [len(np.unique(np.concatenate([f, bundle[f].ravel()]))) for f in first]
    assert table.unique(samples) == pytest.approx(np.mean(distinct), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "rows 0"),
        ((2.5,), "rows 2.5"),
        ((10, -1), "skew -1"),
        ((10, float("nan")), "skew nan"),
        ((10, 5), "skew 5"),
    ],
)
def test_a_law_out_of_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PowerLaw(*arguments)
