"""`torsion layout`: meshes laid for traffic out of a file, beside JAX's order and the bounds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from jax.experimental import mesh_utils

from launch.cli import main
from launch.reports.layout import REFUSED, TABLED
from topology import Slice, Traffic, traffic_seconds
from topology.routing.throughput import switch_links

TRAFFIC = [
    {"kind": "all_gather", "axes": ["data"], "bytes": "256MiB", "count": 2},
    {"kind": "all_reduce", "axes": "tensor", "bytes": 2**24},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "traffic.json"
    path.write_text(json.dumps(TRAFFIC))
    return str(path)


def found(capsys, file, mesh, slice, *more):
    arguments = ["layout", "--mesh", mesh, "--traffic", file, "--slice", slice, *more]
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def on_jax(slice, sizes):
    devices = [
        SimpleNamespace(
            id=i, platform="tpu", device_kind="TPU v4", coords=c, core_on_chip=0, process_index=0
        )
        for i, c in enumerate(map(tuple, slice.coordinates.tolist()))
    ]
    return np.vectorize(lambda d: d.id)(mesh_utils.create_device_mesh(sizes, devices))


@pytest.mark.parametrize(
    ("slice", "sizes"), [("4x4x8", (16, 8)), ("4x4x8_twisted", (8, 16)), ("2x2x1", (2, 2))]
)
def test_the_order_of_jax_is_that_of_mesh_utils(slice, sizes, file, capsys):
    what = found(capsys, file, f"data={sizes[0]},tensor={sizes[1]}", slice)
    assert what["jax"]["devices"] == on_jax(Slice.parse(slice), sizes).tolist()
    assert what["seconds"] <= what["jax"]["seconds"] * (1 + 1e-9)


def test_where_jax_refuses_it_says_row_major(file, capsys):
    slice = Slice.parse("4x4x8")
    with pytest.raises(NotImplementedError):
        on_jax(slice, (64, 2))
    what = found(capsys, file, "data=-1,tensor=2", "4x4x8")
    assert what["jax"]["source"] == REFUSED
    assert what["jax"]["devices"] == np.arange(128).reshape(64, 2).tolist()
    small = found(capsys, file, "data=4,tensor=4", "4x4", "--pod", "v5e")
    assert small["jax"]["source"] == TABLED


def test_the_devices_have_the_times_and_digits_that_it_says(file, capsys):
    what = found(capsys, file, "data=16,tensor=8", "4x4x8_twisted")
    slice, devices = Slice.parse("4x4x8_twisted"), np.array(what["devices"])
    traffic = [
        Traffic(kind="all_gather", axes=("data",), bytes=2**28, count=2),
        Traffic(kind="all_reduce", axes=("tensor",), bytes=2**24),
    ]
    times = traffic_seconds(slice, what["mesh"], devices, traffic)
    assert [row["seconds"] for row in what["traffic"]] == pytest.approx(times)
    assert what["seconds"] == pytest.approx(sum(times))
    assert sorted(devices.ravel()) == list(range(128))
    for place, axis in enumerate(what["mesh"]):
        one = np.moveaxis(devices, place, 0)[:, 0]
        vectors = np.zeros((1, 3), int)
        for digit in what["axes"][axis]:
            steps = np.arange(digit["size"])[:, None] * digit["vector"]
            vectors = (vectors[:, None] + steps).reshape(-1, 3)
        places = slice.index(slice.reduce(slice.coordinates[one[0]] + vectors))
        assert places.tolist() == one.tolist()


def test_a_ring_takes_what_the_formula_says(tmp_path, capsys):
    """Two links of 45 GB/s: an all-gather of b bytes over 8 chips takes 7/8 b / 90e9, and 4 hops;
    what a chip receives over its six links is a third of that."""
    path = tmp_path / "t.json"
    path.write_text('[{"kind": "all_gather", "axes": ["a"], "bytes": 9e9, "count": 3}]')
    what = found(capsys, str(path), "a=8", "2x2x2")
    transfer = 3 * 7 / 8 * 9e9 / (3 * 45e9)  # on 2x2x2 a chip has three links to others
    assert what["bound_seconds"] >= transfer
    assert what["seconds"] >= what["bound_seconds"] * (1 - 1e-9)
    assert what["traffic"][0]["members"] == 8
    assert what["any_layout_seconds"] == pytest.approx(transfer + 3e-6)
    ring = found(capsys, str(path), "a=8,b=128", "8x8x16")
    assert ring["seconds"] <= 3 * (7 / 8 * 9e9 / 90e9 + 4e-6) * (1 + 1e-9)


def test_around_failed_links_it_says_what_its_own_order_takes(file, capsys):
    options = ("--failed", "ocs:x,0,0", "--failed-one-way", "link:0,1,1,1,+y")
    what = found(capsys, file, "data=16,tensor=8", "4x4x8", *options)
    whole = found(capsys, file, "data=16,tensor=8", "4x4x8")
    assert what["lost_links"] == 4 + 1  # two rings, both ways, and one direction
    assert "lost_links" not in whole
    slice, mesh = Slice.parse("4x4x8"), {"data": 16, "tensor": 8}
    chip = slice.index([1, 1, 1])
    links = [*switch_links(slice, 0, 0, 0).tolist(), int(6 * chip + 2)]
    traffic = [
        Traffic(kind=one["kind"], axes=tuple(one["axes"]), bytes=one["bytes"], count=one["count"])
        for one in what["traffic"]
    ]
    own = traffic_seconds(slice, mesh, what["devices"], traffic, failed_links=links)
    assert sum(own) == pytest.approx(what["seconds"])
    before = traffic_seconds(slice, mesh, whole["devices"], traffic, failed_links=links)
    assert whole["seconds"] < what["seconds"] <= sum(before) * (1 + 1e-9)
    assert whole["bound_seconds"] < what["bound_seconds"] <= what["seconds"]


def test_a_heavy_axis_lies_along_fast_links(file, capsys):
    fast = found(capsys, file, "data=8,tensor=8", "8x8", "--pod", "torus", "--links", "10,100,10")
    assert [digit["vector"] for digit in fast["axes"]["data"]] == [[0, 1, 0]]
    # A bidirectional ring of 8 at 100 GB/s, twice 256 MiB; 4 hops.
    ring = 2 * (7 / 8 * 2**28 / (2 * 100e9) + 4e-6)
    assert fast["traffic"][0]["seconds"] == pytest.approx(ring)


def test_no_order_is_below_the_bound_of_any_layout(file, capsys):
    for slice in ("4x4x8", "4x4x8_twisted"):
        what = found(capsys, file, "data=16,tensor=8", slice)
        assert what["any_layout_seconds"] <= what["bound_seconds"] <= what["seconds"]
        assert what["any_layout_seconds"] <= what["jax"]["seconds"]
        for row in what["traffic"]:  # a chip of a torus has six links of 45 GB/s
            times = row["count"] * (2 if row["kind"] == "all_reduce" else 1)
            received = (row["members"] - 1) / row["members"] * row["bytes"] / 6 / 45e9
            assert row["any_layout_seconds"] <= times * received + row["count"] * 1e-6 + 1e-12


def test_the_page_says_digits_times_and_bounds(file, capsys):
    mesh = ["--mesh", "data=256,tensor=16", "--slice", "16x16x16"]
    assert main(["layout", "--traffic", file, *mesh]) == 0
    page = capsys.readouterr().out
    assert page.startswith("mesh data=256,tensor=16 on 16x16x16 of TPU v4")
    assert "16 along y, then 16 along z" in page
    assert "2 x all_gather of 256 MiB over data" in page
    assert "no schedule on these groups takes less" in page


WRONG = [
    ("[]", "holds no traffic"),
    ("{}", "holds no traffic"),
    ("[", "is no JSON document"),
    ('["all_reduce"]', 'entry 1: "all_reduce": want an object with kind, axes, bytes'),
    ('[{"kind": "all_reduce", "axes": ["data"]}]', "entry 1: bytes is missing"),
    ('[{"kind": "all_reduce", "axis": ["data"], "bytes": 1}]', "did you mean axes?"),
    ('[{"kind": "gather", "axes": ["data"], "bytes": 1}]', "entry 1: kind 'gather': one of"),
    ('[{"kind": "all_reduce", "axes": ["model"], "bytes": 1}]', "each once: data, tensor"),
    ('[{"kind": "all_reduce", "axes": [], "bytes": 1}]', "entry 1: axes []"),
    ('[{"kind": "all_reduce", "axes": ["data", "data"], "bytes": 1}]', "each once"),
    ('[{"kind": "permute", "axes": ["data", "tensor"], "bytes": 1}]', "goes over one axis"),
    *(
        (f'[{{"kind": "all_reduce", "axes": ["data"], "bytes": {bad}}}]', f"bytes {says}")
        for bad, says in {
            "-1": "-1",
            "NaN": "nan",
            "Infinity": "inf",
            "true": "True",
            "null": "None",
            '"much"': "much: no size",
        }.items()
    ),
    ('[{"kind": "all_reduce", "axes": ["data"], "bytes": 1, "count": 0}]', "count 0"),
    ('[{"kind": "all_reduce", "axes": ["data"], "bytes": 1, "count": [2]}]', "count [2]"),
    ('[{"kind": "all_reduce", "axes": ["data"], "bytes": 1, "strategy": "x"}]', "strategy 'x'"),
    ('[{"kind": "all_reduce", "kind": "permute"}]', "'kind' stands twice"),
    ("[" * 100_000, "nested too deeply"),
    ("\xff\xfe", "is no text in UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_traffic_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "wrong.json"
    path.write_bytes(text.encode("latin-1"))
    mesh = ["--mesh", "data=16,tensor=8", "--slice", "4x4x8"]
    assert main(["layout", "--traffic", str(path), *mesh]) == 2
    out, error = capsys.readouterr()
    assert "wrong.json: " in error
    assert message in error
    assert error.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("mesh", "slice", "message"),
    [
        ("data=16,tensor=4", "4x4x8", "makes 64 devices, and the slice has 128 chips"),
        ("data=3,tensor=-1", "4x4x8", "let the product of the sizes be 128"),
        ("data=-1,tensor=-1", "4x4x8", "one axis can be -1, not data and tensor"),
        ("data=-2,tensor=-64", "4x4x8", "--mesh"),
        ("data=16,data=8", "4x4x8", "data is given twice"),
        ("data", "4x4x8", "'data' is no AXIS=SIZE"),
        ("data=16,tensor=8", "4x4x7", "slice 4x4x7"),
    ],
)
def test_a_mesh_that_is_none_of_the_slice_is_one_line(mesh, slice, message, file, capsys):
    assert main(["layout", "--traffic", file, f"--mesh={mesh}", "--slice", slice]) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert error.count("\n") == 1
    assert not out


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    mesh = ["--mesh", "data=16,tensor=8", "--slice", "4x4x8"]
    for name, message in (
        ("none.json", "none.json: no such file; give a JSON list"),
        (str(tmp_path), "Is a directory"),
        ("/dev/zero", "is larger than 64 MiB"),
    ):
        assert main(["layout", "--traffic", name, *mesh]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
