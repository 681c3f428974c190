"""Prices and the clock: against closed forms, by hand."""

import json
import math

import pytest
from helpers.programs import ASYNC, BY_TWO, FUSED, HEADER, ODD

from topology.hardware import TPU_V4, TPU_V5E
from topology.plan.economics import GOOGLE_OKLAHOMA, cost_of, failures_a_day
from topology.plan.machine import machine_of
from topology.plan.predict import across_slices, predict, summary
from topology.plan.replay import TRACKS
from topology.timeline import trace_text
from topology.torus.slices import Slice

CUBE = Slice(shape=(4, 4, 4))
V4 = machine_of(TPU_V4)


def gather_seconds(size: float, links: int, n: int, hops: int) -> float:
    return size * (n - 1) / n / links / V4.link + hops * V4.hop


def test_a_loop_takes_its_rounds():
    found = predict(BY_TWO, CUBE)
    assert found.low == found.high == pytest.approx(4 * 1050 / V4.clock)


def test_a_gather_hides_behind_what_is_computed_meanwhile():
    found = predict(ASYNC, CUBE)
    gather = gather_seconds(2 * 8192 * 4096, 6, 64, 6)  # 64 MiB over six links, six hops apart
    reduce = 2 * gather_seconds(4 * 128 * 128, 6, 64, 6)
    computed = 1_050_000 / V4.clock
    assert gather < computed
    assert found.high == pytest.approx(computed + reduce, rel=1e-6)
    by_kind = {c["kind"]: c for c in summary(found)["collectives"]}
    assert by_kind["all_gather"]["exposed_seconds"] == 0
    assert by_kind["all_gather"]["seconds"] == pytest.approx(gather)
    assert by_kind["all_reduce"]["exposed_seconds"] == pytest.approx(reduce)


def test_what_the_computing_does_not_hide_shows():
    text = ASYNC.replace('"1050000"', '"1050"')
    found = predict(text, CUBE)
    gather = gather_seconds(2 * 8192 * 4096, 6, 64, 6)
    shown = {c["kind"]: c["exposed_seconds"] for c in summary(found)["collectives"]}
    assert shown["all_gather"] == pytest.approx(gather - 1050 / V4.clock)


def test_seconds_are_computing_and_what_shows():
    for text in (ASYNC, ASYNC.replace('"1050000"', '"1050"'), FUSED):
        for replayed in (predict(text, CUBE).interval.low, predict(text, CUBE).interval.high):
            parts = replayed.computing + replayed.exposed + replayed.waits
            assert replayed.seconds == pytest.approx(parts)


def test_transfers_in_one_direction_queue_in_the_upper_end_only():
    second = ASYNC.replace(
        "  %c-start",
        "  %all-gather-start.2 = (bf16[8192,64]{1,0}, bf16[8192,4096]{1,0}) all-gather-start(%x), "
        "replica_groups=[1,64]<=[64], dimensions={1}\n  %c-start",
    ).replace(
        "  ROOT",
        "  %all-gather-done.2 = bf16[8192,4096]{1,0} all-gather-done(%all-gather-start.2)\n  ROOT",
    )
    second = second.replace('"1050000"', '"1050"')
    found = predict(second, CUBE)
    gather = gather_seconds(2 * 8192 * 4096, 6, 64, 6)
    assert found.high - found.low == pytest.approx(gather)


def test_an_asynchronous_collective_fusion_is_priced_once():
    found = summary(predict(FUSED, CUBE))["collectives"]
    assert [(c["kind"], c["count"], c["bytes"]) for c in found] == [("all_gather", 1, 4096 * 256)]


def test_kernels_scatters_and_the_unknown_have_prices_that_say_their_rule():
    square = Slice(shape=(2, 2, 1))
    found = predict(ODD, square)
    step = found.interval.low
    assert step.rules["kernel"] == pytest.approx(
        2 * 2 * 8 * 1024 * 1024 * 128 / 2 / (V4.flash * V4.peak)
    )
    scatter = next(c for c in step.collectives.values() if c.kind == "reduce_scatter")
    # A ring of four without links around a plane of 2x2: every chip has two links.
    assert scatter.bytes == 4 * 512 * 256
    assert scatter.seconds > 0
    assert any("frobnicate" in what for what in found.not_understood)
    assert step.rules["bytes"] >= 2 * 4 * 512 * 256 / V4.hbm
    assert step.recomputed == pytest.approx(100 / V4.clock)


def test_faster_links_free_collectives_and_slower_chips():
    text = ASYNC.replace('"1050000"', '"1050"')
    plain = predict(text, CUBE).high
    assert predict(text, CUBE, machine=V4.what_if(link=2)).high < plain
    assert predict(text, CUBE, free=("all_gather", "all_reduce")).high == pytest.approx(
        1050 / V4.clock
    )
    assert predict(BY_TWO, CUBE, machine=V4.what_if(clock=0.5)).high == pytest.approx(
        2 * predict(BY_TWO, CUBE).high
    )


def test_a_permute_takes_the_most_loaded_link():
    """A ring along z in the order of the chips: one hop each; against one that jumps two."""

    def permute(step: int) -> str:
        pairs = ",".join(
            f"{{{4 * r + i},{4 * r + (i + step) % 4}}}" for r in range(16) for i in range(4)
        )
        return HEADER.format(name="p", partitions=64) + (
            "ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {\n"
            "  %x = f32[1024,1024]{1,0} parameter(0)\n"
            "  ROOT %p = f32[1024,1024]{1,0} collective-permute(%x), "
            f"source_target_pairs={{{pairs}}}\n}}\n"
        )

    bytes = 4 * 1024 * 1024
    assert predict(permute(1), CUBE).low == pytest.approx(V4.hop + bytes / V4.link)
    assert predict(permute(2), CUBE).low == pytest.approx(2 * V4.hop + 2 * bytes / V4.link)


def test_a_program_of_other_chips_is_refused():
    with pytest.raises(ValueError, match="64"):
        predict(BY_TWO, Slice(shape=(4, 4, 8)))
    with pytest.raises(ValueError, match="outside"):
        predict(BY_TWO, CUBE, partitions=[[0, 0, 0, 9]] * 64)


def test_a_timeline_has_the_step_in_it():
    step = predict(ASYNC, CUBE).interval.high
    text = trace_text(step.events, processes={0: "step"}, tracks=TRACKS)
    rows = [r for r in json.loads(text)["traceEvents"] if r["ph"] != "M"]
    assert max(r["ts"] + r.get("dur", 0) for r in rows) == pytest.approx(1e6 * step.seconds)
    begun, ended = ([r["id"] for r in rows if r["ph"] == ph] for ph in "be")
    assert sorted(begun) == sorted(ended)
    assert {r["name"] for r in rows if r["tid"] == 1} == {
        "all_gather BarnaCoreAllGatherEmitter",
        "all_reduce UniDirectionNDRingStrategy",
    }


def test_loops_are_drawn_to_their_end():
    step = predict(BY_TWO, CUBE).interval.high
    assert max(e.begin + e.seconds for e in step.events) == pytest.approx(step.seconds)


def test_more_slices_take_longer_by_the_gradients_that_they_exchange():
    found = predict(ASYNC, CUBE)
    one = across_slices(found, 1, gradient_bytes=1e9, machine=V4)
    assert one == (found.low, found.high)
    two = across_slices(found, 2, gradient_bytes=1e9, machine=V4)
    four = across_slices(found, 4, gradient_bytes=1e9, machine=V4)
    assert one[1] + 1e9 / V4.dcn <= two[1] < four[1]


def test_the_cost_of_a_run_by_the_renewal_formula():
    found = cost_of(1e5, 2.0, CUBE)
    # 16 hosts, 240 cables of the block, 48 switches.
    assert failures_a_day(CUBE) == pytest.approx(16 * 0.0008 + 240 * 0.00005 + 48 * 0.0004)
    assert found.seconds == pytest.approx(1e5 * 2 / found.goodput)
    assert found.chip_hours == pytest.approx(64 * found.seconds / 3600)
    assert found.energy == pytest.approx(170 * 64 * found.seconds)
    assert 0.9 < found.goodput < 1
    # A MWh of computers: 1.1 MWh of the site, 74 kg of CO2e each.
    assert GOOGLE_OKLAHOMA.tonnes(3.6e9) == pytest.approx(1.1 * 0.074)
    v5e = cost_of(1e5, 2.0, Slice.parse("16x16", TPU_V5E))
    assert v5e.energy is None  # no power is published
    assert math.isfinite(v5e.days)
