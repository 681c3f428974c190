"""What the pictures of slices and fabrics show, against wiring rules written out as loops."""

import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from topology import TPU_V4, Fabric, Part, Slice, fabric
from topology.drawing import page, picture
from topology.drawing.scene import (
    DIMENSION_ORDER,
    KINDS,
    LIT,
    NO_SLICE,
    OPTIMUM,
    PORT_STATES,
    curves,
    fabric_scene,
    group_colours,
    lost,
    optimum,
    port_states,
    slice_scene,
    stubs,
)


def part(text):
    return Part.parse(text, TPU_V4)


def wired(shape, twist, wrap):
    """{(tail, head, dimension): kind} by walking one step along every dimension of every chip."""
    found = {}
    for c in np.ndindex(*shape):
        for d in range(3):
            to = list(c)
            to[d] += 1
            kind = "inner"
            if to[d] == shape[d]:
                if not wrap:
                    continue
                to[d] = 0
                kind = "twist" if any(twist[d]) else "wrap"
                to = [(t + s) % k for t, s, k in zip(to, twist[d], shape, strict=True)]
            ends = (int(np.ravel_multi_index(p, shape)) for p in (c, to))
            found[(*ends, d)] = kind
    return found


@pytest.mark.parametrize(
    ("name", "twist"),
    [
        ("4x4x4", np.zeros((3, 3), int)),
        ("4x4x8_twisted", np.array([[0, 0, 4], [0, 0, 4], [0, 0, 0]])),
        ("4x8x8_twisted", np.array([[0, 4, 4], [0, 0, 0], [0, 0, 0]])),
        ("8x4x4_twisted", np.array([[0, 0, 0], [4, 0, 0], [4, 0, 0]])),
        ("2x2x4", None),
        ("2x4x1", None),
    ],
)
def test_every_link_stands_once_with_its_kind(name, twist):
    slice = Slice.parse(name)
    scene = slice_scene(slice)
    expected = wired(slice.shape, twist, twist is not None)
    ends = np.column_stack([scene.links, scene.dimensions])
    links = list(map(tuple, ends.tolist()))
    assert len(links) == len(set(links)) == slice.num_links
    kinds = [KINDS[k] for k in scene.kinds]
    assert dict(zip(links, kinds, strict=True)) == expected
    assert scene.title == name
    assert len({tuple(p) for p in scene.positions.round(6).tolist()}) == slice.num_chips


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["4x4x4", "4x4x8_twisted", "8x4x4", "4x8x8_twisted", "2x2x2", "4x4x1"]))
def test_curves_lead_from_chip_to_chip_and_hoops_around_the_outside(name):
    scene = slice_scene(Slice.parse(name))
    lines = curves(scene, 33)
    assert lines[:, 0] == pytest.approx(scene.positions[scene.links[:, 0]])
    assert lines[:, -1] == pytest.approx(scene.positions[scene.links[:, 1]])
    reach = np.abs(scene.positions).max(axis=0)
    for line, kind, d in zip(lines, scene.kinds, scene.dimensions, strict=True):
        if KINDS[kind] == "inner":
            others = np.delete(line, d, axis=1)
            assert np.ptp(others, axis=0) == pytest.approx([0, 0])
            assert (np.diff(line[:, d]) > 0).all()
        else:
            assert (np.abs(line[16]) > reach + 0.3).any()  # its middle is outside of the box
            assert line[1, d] > line[0, d]  # it leaves ahead
            assert line[-2, d] < line[-1, d]
    ends = stubs(scene)
    assert (ends[np.arange(len(ends)), scene.dimensions] > 0).all()
    for end, kind, d in zip(ends, scene.kinds, scene.dimensions, strict=True):
        assert (np.abs(np.delete(end, d)).max() > 0.1) == (KINDS[kind] == "twist")


def test_loads_are_those_of_both_routings():
    scene = slice_scene(Slice.parse("4x4x8"))
    # By hand: a ring of k carries k / 8 of the chips' number, and the middle cut proves z's 128.
    expected = np.array([64, 64, 128])[scene.dimensions]
    for name in (OPTIMUM, DIMENSION_ORDER):
        assert scene.values[name] == pytest.approx(np.column_stack([expected, expected]), rel=1e-5)
    mesh = slice_scene(Slice.parse("2x2x2")).values
    # Of 4 x 4 pairs across each cut, over 4 links.
    assert mesh[OPTIMUM].max() == pytest.approx(4)
    assert mesh[DIMENSION_ORDER] == pytest.approx(np.full((12, 2), 4.0))


def test_a_failed_switch_darkens_one_link_a_block_and_loads_go_around_it():
    slice = Slice.parse("4x4x8")
    scene = slice_scene(slice, [part("ocs:z,1,2")])
    chips = np.array(np.unravel_index(scene.links[:, 0], slice.shape)).T
    expected = (scene.dimensions == 2) & (chips[:, 0] == 1) & (chips[:, 1] == 2)
    expected &= chips[:, 2] % 4 == 3
    assert expected.sum() == 2
    assert (scene.link_failed == expected).all()
    assert list(scene.values) == [OPTIMUM]
    loads = scene.values[OPTIMUM]
    assert loads[expected] == pytest.approx(np.zeros((2, 2)))
    assert loads.max() == pytest.approx(128 / 0.9375, rel=1e-5)
    assert not scene.node_failed.any()


@pytest.mark.parametrize(
    ("text", "chips", "links"),
    [
        ("chip:1,0,0,0", 1, 6),
        ("host:0,0", 4, 6 * 4 - 4),  # 2x2x1 chips have 4 links among themselves
        ("block:1", 64, 64 * 3 + 48),  # 144 wires and 96 fibres
        ("link:0,1,1,1,+x", 0, 1),
        ("link:0,3,1,1,+x", 0, 1),
        ("port:y,2,3,1", 0, 1),
        ("port:y,2,3,65", 0, 1),
        ("ocs:x,3,3", 0, 2),
    ],
)
def test_what_a_part_takes_with_it(text, chips, links):
    slice = Slice.parse("4x4x8_twisted")
    gone, dark = lost(slice, [part(text)])
    assert len(gone) == chips
    assert len(dark) == 2 * links
    scene = slice_scene(slice, [part(text)])
    assert scene.node_failed.sum() == chips
    assert scene.link_failed.sum() == links
    # Without a chip a slice does not run: its loads are those of the whole.
    assert (DIMENSION_ORDER in scene.values) == (chips > 0)


def test_several_parts_are_lost_together():
    slice = Slice.parse("8x8x8")
    both = [part("ocs:x,0,0"), part("chip:7,1,1,1")]
    gone, dark = lost(slice, both)
    for text in both:
        one, few = lost(slice, [text])
        assert set(one) <= set(gone)
        assert set(few) <= set(dark)
    assert len(dark) == 2 * (8 + 6)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("4x4x8", "block:2", "whose blocks are 0 .. 1"),
        ("4x4x4", "port:x,0,0,1", "whose block is 0"),
        ("2x2x2", "ocs:x,0,0", "no optical link"),
        ("2x2x2", "chip:0,3,3,3", "carries nothing of 2x2x2"),
    ],
)
def test_a_part_of_another_slice_is_refused(name, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slice_scene(Slice.parse(name), [part(text)])


def test_the_optimum_is_left_out_where_it_takes_minutes():
    large = Slice.parse("16x16x16")
    _, links = lost(large, [part("link:0,0,0,0,+x")])
    assert optimum(large, links) is None
    assert slice_scene(large, [part("link:0,0,0,0,+x")]).values == {}
    smaller = Slice.parse("8x8x8")
    _, links = lost(smaller, [part("ocs:x,0,0")])
    assert optimum(smaller, links).max_link_load == pytest.approx(512 / 0.9375, rel=1e-5)


def pod():
    state = Fabric()
    for name, slice in [("1", "4x4x8_twisted"), ("2", "4x4x4"), ("3", "2x2x4")]:
        state = fabric.place(state, name, Slice.parse(slice))
    return state


def test_a_fabric_shows_every_block_once_and_its_slices_wiring():
    scene = fabric_scene(pod())
    assert sorted(scene.labels) == sorted(f"block {b}" for b in range(64))
    assert scene.group_names == ("1: 4x4x8_twisted", "2: 4x4x4", "3: 2x2x4", NO_SLICE)
    assert np.bincount(scene.groups).tolist() == [2, 1, 1, 60]
    assert len({tuple(p) for p in scene.positions.round(3).tolist()}) == 64
    # The twisted slice's blocks are 1 x 1 x 2: z inner and wrapped, x and y led to the other block.
    assert len(scene.links) == 6 + 3
    first = [
        (*ends, int(d), KINDS[k])
        for ends, d, k in zip(scene.links.tolist(), scene.dimensions, scene.kinds, strict=True)
    ]
    assert sorted(first) == sorted(
        [(0, 1, d, "twist") for d in (0, 1)]
        + [(1, 0, d, "twist") for d in (0, 1)]
        + [(0, 1, 2, "inner"), (1, 0, 2, "wrap")]
        + [(2, 2, d, "wrap") for d in range(3)]
    )
    assert scene.values[LIT].tolist() == [[16, 16]] * 9
    assert not scene.link_failed.any()
    assert len(set(group_colours(scene))) == 4


def test_a_fabric_shows_which_fibres_are_dark():
    state = fabric.fail(fabric.fail(pod(), part("ocs:z,0,0")), part("chip:9,0,0,0"))
    state = fabric.fail(state, part("port:x,1,1,0"))
    scene = fabric_scene(state)
    lit = {
        (*ends, int(d)): int(count)
        for ends, d, (count, _) in zip(
            scene.links.tolist(), scene.dimensions, scene.values[LIT], strict=True
        )
    }
    assert {key for key, count in lit.items() if count == 15} == {
        (0, 1, 2), (1, 0, 2), (2, 2, 2), (0, 1, 0)
    }  # fmt: skip
    assert set(lit.values()) == {15, 16}
    assert [scene.labels[i] for i in np.flatnonzero(scene.node_failed)] == ["block 9"]


def test_port_states_count_to_136_and_follow_a_patch():
    state = pod()
    counts = np.array([np.bincount(row, minlength=4) for row in port_states(state)])
    # 3 whole blocks, each with a + and a - port of every switch.
    assert (counts == [128 - 6, 6, 8, 0]).all()
    state = fabric.patch(fabric.fail(state, part("port:y,0,3,2")), part("port:y,0,3,2"))
    row = 16 + 3
    states = [PORT_STATES[s] for s in port_states(state)[row]]
    assert (states[2], states[128]) == ("failed", "used")
    assert states.count("used") == 6
    state = fabric.fail(state, part("ocs:y,0,3"))
    assert set(port_states(state)[row]) == {PORT_STATES.index("failed")}


def data_of(html):
    return json.loads(re.search(r'id="scene">(.*?)</script>', html, re.DOTALL)[1])


def test_a_page_holds_the_scene_and_asks_nothing_of_the_network():
    scene = slice_scene(Slice.parse("4x4x8_twisted"), [part("ocs:x,0,0")])
    rows = [("a <b>", "1 & 2")]
    html = page.page(
        scene, heading="</script><b>", lead="a lead", sections=[page.figures("T", rows)]
    )
    data = data_of(html)
    assert np.array(data["at"]).reshape(-1, 3) == pytest.approx(scene.positions, abs=1e-3)
    assert data["cut"] == np.flatnonzero(scene.link_failed).tolist()
    [value] = data["values"]
    table = np.array(value["table"])
    loads = np.column_stack([table[value["ahead"]], table[value["back"]]])
    assert loads == pytest.approx(scene.values[OPTIMUM], abs=1e-5)
    assert "<b>" not in html
    assert "a &lt;b&gt;</dt><dd>1 &amp; 2" in html
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|src=|@import|url\(", html)
    assert not re.search(r"{{\w+}}", html)


def test_a_picture_is_a_png_of_a_size_to_print():
    for scene in (slice_scene(Slice.parse("2x2x1")), fabric_scene(pod()), fabric_scene(Fabric())):
        pixels = image.imread(io.BytesIO(picture.picture(scene, heading="h", lines=["l"])))
        assert pixels.shape[0] >= 1000
        assert pixels.shape[1] >= 1500
        assert (pixels[..., :3].min(axis=-1) < 0.5).mean() > 0.005


def test_drawings_are_written_whole_and_replace_only_drawings(tmp_path):
    html, png = '<meta name="generator" content="torsion">1', b"Software\0torsion1"
    with pytest.raises(ValueError, match=r"no folder .*new to write in"):
        page.write(tmp_path / "new" / "a.png", html, png)
    (tmp_path / "new").mkdir()
    files = page.write(tmp_path / "new" / "a.png", html, png)
    assert files == (tmp_path / "new" / "a.html", tmp_path / "new" / "a.png")
    page.write(tmp_path / "new" / "a", html.replace("1", "2"), png)
    assert files[0].read_text().endswith("2")
    (tmp_path / "mine.png").write_bytes(b"a photograph of torsion")
    with pytest.raises(ValueError, match=r"mine\.png exists and is no drawing"):
        page.write(tmp_path / "mine.html", html, png)
    with pytest.raises(ValueError, match=r"give it as NAME\.html"):
        page.write(tmp_path / "a.svg", html, png)
    with pytest.raises(ValueError, match="no folder"):
        page.write(tmp_path / "mine.png" / "b", html, png)
    assert (tmp_path / "mine.png").read_bytes() == b"a photograph of torsion"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.html", "a.png", "mine.png", "new"]
