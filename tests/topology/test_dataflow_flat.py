"""FLAT's model: against independent rows, a walk that counts bytes, and the paper's footprints."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.accelerator.accelerator import EDGE, INDEPENDENT_CLOUD, INDEPENDENT_EDGE, MatrixArray
from topology.accelerator.dataflow_cost import lower_bound
from topology.accelerator.dataflow_flat import FlatMapping, flat_cost, least_buffer, search_flat
from topology.accelerator.dataflow_replay import replay_flat
from topology.accelerator.workloads import Attention

few = settings(max_examples=40, deadline=None)

# Of FPSG-UIUC/micro24-fusemax-artifact, data/pregenerated/flat_validation.csv (MIT licence,
# copyright (c) 2024 FPSG-UIUC), batch 64, 2 bytes an element: what of Q, K, L, V and O is kept,
# stationarity, rows of a tile (0: a head), part spilled, bytes, ideal and actual seconds.
ROWS = """\
platform,heads,d,n,kept,stationarity,rows,spilled,bytes,ideal,seconds
cloud,12,64,512,L,output,0,0,352485376.00000006,0.0004183148936170213,0.00105107083142869
cloud,12,64,1024,L,output,0,0,1308786688.0000005,0.0016732595744680852,0.00418843253355635
cloud,12,64,2048,L,output,0,0,5033328640.000001,0.006693038297872341,0.016737879342066986
cloud,12,64,4096,L,output,0,0.007751937984496138,20179643177.67442,0.026772153191489362,0.06693566657610954
cloud,12,64,8192,L,output,1024,0,78114881536.00002,0.10708861276595745,0.2677611304058968
cloud,12,64,16384,L,output,1024,0.007751937984496138,318039995034.7908,0.4283544510638298,1.0709649431718542
cloud,12,64,32768,L,output,512,0.007751937984496138,1268938263147.1628,1.7134178042553192,4.283858628278237
cloud,12,64,65536,LO,output,256,0.007751937984496138,5069360018836.838,6.853671217021277,17.135433292409825
cloud,12,64,131072,QL,output,256,0.5019455252918288,43022236345626.9,27.414684868085107,100.17145968717385
cloud,12,64,262144,QO,weight,1024,0,224351912656896.0,109.65873947234043,522.3616755483928
cloud,12,64,524288,QO,weight,1024,0,897304568463360.0,438.6349578893617,2089.2033488079674
cloud,12,64,1048576,QO,weight,1024,0,3589012112474112.0,1754.5398315574469,8356.326695327116
cloud,16,128,512,KLV,output,0,0,671547392.0,0.0011155063829787234,0.0016808638599152262
cloud,16,128,1024,LV,output,0,0,2684878848.0,0.004462025531914894,0.006700795171210107
cloud,16,128,2048,LV,output,0,0,9664462847.999998,0.017848102127659575,0.026780520416389626
cloud,16,128,4096,LV,output,0,0.06909090909090909,43630369415.91273,0.0713924085106383,0.10709820069398271
cloud,16,128,8192,QL,output,1024,0,141734445055.99997,0.2855696340425532,0.4284079611286569
cloud,16,128,16384,QL,output,1024,0.026615969581749055,594926982817.5817,1.1422785361702128,1.7135236036818484
cloud,16,128,32768,QL,output,512,0.019157088122605415,2321520723677.671,4.569114144680851,6.854090447442237
cloud,16,128,65536,QLO,output,256,0.01538461538461533,9169028598484.676,18.276456578723405,27.416358738011137
cloud,16,128,131072,QO,weight,1024,0,79233557987328.0,73.10582631489362,184.4811185581408
cloud,16,128,262144,QO,weight,1024,0,316796789063680.0,292.4233052595745,737.6022340645237
cloud,16,128,524288,QO,weight,1024,0,1266912274415616.0,1169.693221038298,2949.7644650772895
cloud,16,128,1048576,QO,weight,1024,0,5067099337916416.0,4678.772884153192,11797.768927102821
edge,12,64,512,QKV,output,0,0,1409490944.0,0.026772153191489362,0.026780870016414562
edge,12,64,1024,Q,weight,0,0.022900763358778664,5677436349.557253,0.10708861276595745,0.10710136689271318
edge,12,64,2048,QL,weight,128,0.09859154929577463,14467195629.971828,0.4283544510638298,0.42845971643274183
edge,12,64,4096,QL,weight,64,0.05882352941176472,70535384124.23529,1.7134178042553192,1.7138365006186627
edge,12,64,8192,Q,weight,128,0,413927520256.0,6.853671217021277,7.710419192273988
edge,12,64,16384,Q,weight,128,0,1652488714240.0,27.414684868085107,30.780837507167604
edge,12,64,32768,Q,weight,128,0,6603512264704.0,109.65873947234043,123.00167413695483
edge,12,64,65536,Q,weight,128,0,26401164015616.0,438.6349578893617,491.7633473965293
edge,12,64,131072,Q,weight,128,0,105578886117376.0,1754.5398315574469,1966.5666939156783
edge,12,64,262144,Q,weight,128,0,422264004720640.0,7018.159326229787,7865.293386953976
edge,12,64,524288,Q,weight,128,0,1688952939526144.0,28072.63730491915,31459.226773030572
edge,12,64,1048576,Q,weight,128,0,6755605599533056.0,112290.5492196766,125833.01354518376
edge,16,128,512,Q,weight,0,0,3221460992.0,0.0713924085106383,0.07140551030611078
edge,16,128,1024,L,weight,128,0,13153359872.0,0.2855696340425532,0.2856397728081886
edge,16,128,2048,QL,weight,128,0.1466666666666666,48490234019.83999,1.1422785361702128,1.1424189662893742
edge,16,128,4096,Q,weight,128,0,242665715712.0,4.569114144680851,4.569394203832748
edge,16,128,8192,Q,weight,128,0,966367705088.0,18.276456578723405,18.277015514471046
edge,16,128,16384,Q,weight,128,0,3856880695296.0,73.10582631489362,73.10694300383275
edge,16,128,32768,Q,weight,128,0,15410342721536.0,292.4233052595745,292.4255374548966
edge,16,128,65536,Q,weight,128,0,61607010957312.0,1169.693221038298,1169.697684246386
edge,16,128,131072,Q,weight,128,0,246359324162048.0,4678.772884153192,4678.781809386811
edge,16,128,262144,Q,weight,128,0,985299857504256.0,18715.091536612767,18715.10938589745
edge,16,128,524288,Q,weight,128,0,3940924551919616.0,74860.36614645107,74860.40184383788
edge,16,128,1048576,Q,weight,128,0,1.5763148451674112e+16,299441.46458580426,299441.5359793953
"""


@pytest.mark.parametrize(
    "row",
    list(csv.DictReader(io.StringIO(ROWS))),
    ids=lambda r: f"{r['platform']}-{r['d']}-{r['n']}",
)
def test_rows_of_an_independent_model(row):
    accelerator = {"cloud": INDEPENDENT_CLOUD, "edge": INDEPENDENT_EDGE}[row["platform"]]
    n, rows = int(row["n"]), int(row["rows"])
    work = Attention(batch=64, heads=int(row["heads"]), rows=n, head_dim=int(row["d"]))
    mapping = FlatMapping(
        granularity="R" if rows else "H",
        rows=rows or n,
        kept=row["kept"],
        stationarity=(row["stationarity"],) * 2,
    )
    spilled = float(row["spilled"])
    cost = flat_cost(accelerator, work, mapping, spilled=spilled)
    assert lower_bound(accelerator, work).array_cycles / 940e6 == pytest.approx(
        float(row["ideal"]), rel=1e-12
    )
    assert cost.off_chip_bytes == pytest.approx(float(row["bytes"]), rel=1e-3)
    assert cost.seconds == pytest.approx(float(row["seconds"]), rel=6e-3)
    if spilled:  # what does not fit follows from the live buffer
        assert 1 - accelerator.buffer / cost.live_buffer == pytest.approx(spilled, rel=1e-9)
        own = flat_cost(accelerator, work, mapping)
        assert own.off_chip_bytes == pytest.approx(cost.off_chip_bytes, rel=1e-9)


sizes = st.integers(1, 9)
mappings = st.builds(
    lambda granularity, rows, kept, stationarity, shapes: FlatMapping(
        granularity=granularity,
        rows=rows if granularity == "R" else 10**6,
        kept="".join(kept),
        stationarity=stationarity,
        shapes=shapes,
    ),
    st.sampled_from("RHBM"),
    sizes,
    st.sets(st.sampled_from("QKVOL")),
    st.tuples(*[st.sampled_from(["output", "weight", "input"])] * 2),
    st.tuples(*[st.tuples(st.integers(1, 4), st.integers(1, 4))] * 2),
)


@few
@given(mappings, st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), sizes, sizes, sizes,
       st.sampled_from([0, 0.25, 1]), st.integers(0, 6))  # fmt: skip
def test_bytes_and_cycles_are_those_of_the_walk(mapping, batch, kv, group, n, c, d, spilled, load):
    work = Attention(
        batch=batch, heads=kv * group, kv_heads=kv, rows=n, columns=c, head_dim=d, bytes_per_logit=4
    )
    accelerator = EDGE.replace(array=MatrixArray(rows=3, columns=3, count=2, load_cycles=load))
    cost = flat_cost(accelerator, work, mapping, spilled=spilled)
    moved, cycles = replay_flat(accelerator, work, mapping, spilled=spilled)
    assert cost.off_chip_bytes == pytest.approx(moved)
    assert cost.array_cycles == pytest.approx(cycles)


@pytest.mark.parametrize(
    ("granularity", "elements"),
    [  # of the paper, with double buffering; B 4, H 6, R 8, N 32, d 16
        ("M", lambda b, h, r, n, d: 8 * b * h * n * d + b * h * n * n),
        ("B", lambda b, h, r, n, d: 8 * h * n * d + h * n * n),
        ("H", lambda b, h, r, n, d: 8 * n * d + n * n),
        ("R", lambda b, h, r, n, d: 4 * r * d + 4 * n * d + r * n),
    ],
)
def test_footprints_of_the_paper(granularity, elements):
    work = Attention(batch=4, heads=6, rows=32, head_dim=16)
    mapping = FlatMapping(granularity=granularity, rows=8 if granularity == "R" else 32)
    assert flat_cost(EDGE, work, mapping).live_buffer == 2 * elements(4, 6, 8, 32, 16)


@few
@given(st.integers(1, 3), st.integers(1, 300), st.integers(1, 300), st.integers(1, 40),
       st.integers(2_000, 10**6), st.sampled_from(["free", "overlapped", "in-turn"]))  # fmt: skip
def test_the_search_is_above_the_bound_and_falls_with_the_buffer(heads, n, c, d, buffer, softmax):
    work = Attention(batch=2, heads=heads, rows=n, columns=c, head_dim=d)
    bound = lower_bound(EDGE, work, softmax)
    found = []
    for size in (buffer, 2 * buffer, 100 * buffer):
        accelerator = EDGE.replace(buffer=max(size, least_buffer(work)))
        mapping, cost = search_flat(accelerator, work, softmax=softmax)
        assert flat_cost(accelerator, work, mapping, softmax=softmax) == cost
        for name in ("cycles", "off_chip_bytes", "on_chip_bytes", "energy", "array_cycles"):
            assert getattr(cost, name) >= getattr(bound, name) * (1 - 1e-9)
        assert 0 < cost.utilisation <= 1 + 1e-9
        found.append(cost.seconds)
    # To float32: nearer times count as equal.
    assert found[0] >= found[1] * (1 - 1e-6)
    assert found[1] >= found[2] * (1 - 1e-6)


@few
@given(mappings, st.integers(1, 60), st.integers(1, 60), st.integers(1, 20))
def test_no_mapping_is_faster_than_the_best(mapping, n, c, d):
    work = Attention(batch=2, heads=3, rows=n, columns=c, head_dim=d)
    rows = 2 ** int(np.log2(min(mapping.rows, n)))  # those that the search tries
    tried = FlatMapping(
        granularity=mapping.granularity,
        rows=rows if mapping.granularity == "R" else n,
        kept="".join(sorted({*mapping.kept, "L"})),
        stationarity=mapping.stationarity,
    )
    accelerator = EDGE.replace(array=MatrixArray(rows=8, columns=4), buffer=4000)
    best = search_flat(accelerator, work)[1]
    assert best.seconds <= flat_cost(accelerator, work, tried).seconds * (1 + 1e-6)


def test_softmax_costs_what_the_lanes_take():
    work = Attention(batch=1, heads=2, rows=64, head_dim=8)
    lanes = EDGE.replace(vector_lanes=2)
    vector = 4 * 2 * 64 * 64 / 2
    free, overlapped, turn = (
        flat_cost(lanes, work, FlatMapping(granularity="H", rows=64), softmax=softmax)
        for softmax in ("free", "overlapped", "in-turn")
    )
    assert free.vector_cycles == 0
    assert overlapped.cycles == pytest.approx(vector)
    assert turn.cycles == pytest.approx(vector + free.array_cycles)
    assert overlapped.off_chip_bytes == free.off_chip_bytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"granularity": "X"}, "granularity 'X': one of R, H, B, M"),
        ({"rows": 0}, "a tile of 0 rows"),
        ({"kept": "QX"}, "kept 'QX'"),
        ({"stationarity": ("row", "output")}, "stationarity 'row': one of output"),
    ],
)
def test_wrong_mappings(wrong, message):
    with pytest.raises(ValueError, match=message):
        FlatMapping(**{"granularity": "R", "rows": 4} | wrong)


def test_a_buffer_too_small_says_the_least():
    work = Attention(batch=1, heads=1, rows=512, head_dim=64)
    least = 512 * 2 + 4 * 64 * 2
    for buffer in (0, least - 1):
        with pytest.raises(ValueError, match=f"a buffer of {buffer} bytes .* works is {least}"):
            search_flat(EDGE.replace(buffer=buffer), work)
    assert search_flat(EDGE.replace(buffer=least), work)[1].seconds > 0
    with pytest.raises(ValueError, match="softmax 'cheap': one of free, overlapped"):
        search_flat(EDGE, work, softmax="cheap")
