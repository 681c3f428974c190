"""The pages of `torsion slice --draw` and `torsion fabric --draw`, in a real headless browser."""

import base64
import fcntl
import functools
import io
import json
import os
import select
import shutil
import subprocess
import time

import numpy as np
import pytest
from matplotlib import colors, image

from launch.cli import main
from topology.drawing.scene import FAILED_COLOUR, LOAD_COLOURS

WIDTH, HEIGHT = 1200, 800


class Browser:
    """A headless Chromium, told what to do through the DevTools protocol over a pipe."""

    def __init__(self, program, profile):
        (theirs, into), (out_of, answers) = os.pipe(), os.pipe()
        self.into, self.out_of = into, out_of
        # Chromium reads from file descriptor 3 and writes to 4; first out of the way of those.
        theirs, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (theirs, answers))
        options = "--headless=new --no-sandbox --disable-gpu --use-gl=angle --remote-debugging-pipe"
        options += " --use-angle=swiftshader --enable-unsafe-swiftshader --no-first-run"
        options += f" --hide-scrollbars --user-data-dir={profile} about:blank"
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{answers}', program, *options.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs, answers),
        )
        self.rest, self.count, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self, seconds=60):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.out_of], [], [], seconds)
            assert ready, f"the browser said nothing for {seconds} s"
            self.rest += os.read(self.out_of, 1 << 20)
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, before=""):
        """Opens a page; returns when it has drawn. `before` is a script that runs first."""
        self.events.clear()
        first = self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=path.as_uri())
        self.until(
            "document.getElementById('status')?.textContent"
            " || document.querySelector('#trouble:not([hidden])')"
        )
        self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=first["identifier"])
        self.settle()

    def settle(self):
        """Waits until what was asked for is drawn."""
        self.do("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def until(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not self.do(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never became true: {expression}"
            time.sleep(0.02)

    def do(self, expression):
        """The value of a JavaScript expression."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)
        self.settle()

    def drag(self, start, end):
        self.mouse("Pressed", *start, button="left", buttons=1, clickCount=1)
        self.mouse("Moved", *end, button="left", buttons=1)
        self.mouse("Released", *end, button="left", clickCount=1)

    def key(self, key):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def tip(self, place):
        """What the page says of a place in the picture."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        return self.do(
            "document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText"
        )

    def pixels(self):
        """float [HEIGHT, WIDTH, 3] of what is on the screen."""
        png = self.call("Page.captureScreenshot", format="png")["data"]
        return image.imread(io.BytesIO(base64.b64decode(png)))[..., :3]

    def drawn(self):
        return self.do("({...document.getElementById('status').dataset})")

    def troubles(self):
        """Errors of scripts and of the content security policy, and requests beyond the page."""
        found = []
        for event in self.events:
            entry = event.get("params", {}).get("entry", {})
            if event.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
                found.append(event)
            if event.get("method") == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                found += [] if url.startswith(("file:", "data:")) else [url]
        return found

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.into)
        os.close(self.out_of)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        say = "no Chromium here: the pages are tested in one; apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(say, pytrace=False)
        pytest.skip(say)
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Draws by the command line; gives the page's path."""
    folder = tmp_path_factory.mktemp("pages")

    @functools.cache
    def run(*arguments):
        path = folder / f"{len(list(folder.iterdir()))}.html"
        assert main([*arguments, "--draw", str(path)]) == 0
        return path

    return run


def of_hue(pixels, colour):
    """bool: which pixels have the hue of a colour, however pale or dark the distance made them."""
    hsv = colors.rgb_to_hsv(pixels)
    away = np.abs(hsv[..., 0] - colors.rgb_to_hsv(colors.to_rgb(colour))[0])
    return (np.minimum(away, 1 - away) < 0.025) & (hsv[..., 1] > 0.3)


@pytest.mark.parametrize(
    ("shape", "chips", "links", "wraps", "twists"),
    [
        ("2x2x4", 16, 28, 0, 0),  # 3 x 4 + 2 x 8 inner links
        ("4x4x4", 64, 192, 48, 0),
        ("4x4x8_twisted", 128, 384, 16, 64),  # z wraps, x and y shift z
        ("16x16x16", 4096, 12288, 768, 0),
    ],
)
def test_a_page_draws_every_chip_and_link_and_needs_no_network(
    shape, chips, links, wraps, twists, browser, draw
):
    browser.open(draw("slice", shape))
    drawn = browser.drawn()
    assert (drawn["nodes"], drawn["links"]) == (str(chips), str(links))
    assert drawn["kinds"] == f"{links - wraps - twists} {wraps} {twists}"
    assert f"{chips:,} chips and {links:,} links" in browser.do("document.body.innerText")
    assert browser.troubles() == []
    assert (
        len(
            {
                e["params"]["request"]["url"]
                for e in browser.events
                if "request" in e.get("params", {})
            }
        )
        == 1
    )
    # Something is in the middle of the picture, and nothing in its corner.
    pixels = browser.pixels()[:, : WIDTH - 360]
    ground = pixels[2, 2]
    middle = pixels[HEIGHT // 4 : -HEIGHT // 4, WIDTH // 5 : WIDTH // 2]
    assert (np.abs(middle - ground).max(axis=-1) > 0.1).mean() > 0.2


def test_no_network_is_even_allowed(browser, draw):
    browser.open(draw("slice", "4x4x4"))
    refused = "fetch('http://127.0.0.1:9/').then(() => 'reached', error => 'refused')"
    assert browser.do(refused) == "refused"
    assert any("Content Security Policy" in json.dumps(event) for event in browser.events)


def test_hovering_tells_the_chip_and_where_its_links_lead(browser, draw):
    browser.open(draw("slice", "4x4x8_twisted"))
    seen = 0
    for x, y, z in [(0, 0, 0), (0, 0, 7), (0, 3, 0), (0, 3, 7), (3, 3, 7), (0, 2, 3)]:
        place = browser.do(f"view.project({(x * 4 + y) * 8 + z})")
        said = browser.tip(place)
        if not said.startswith(f"chip ({x}, {y}, {z}), block {z // 4}"):
            continue  # another chip hides it
        seen += 1
        # A step past the end of x or y adds 4 to z; one back past the beginning takes them away.
        expected = [
            ("+x", ((x + 1) % 4, y, (z + 4 * (x == 3)) % 8)),
            ("−x", ((x - 1) % 4, y, (z - 4 * (x == 0)) % 8)),
            ("+y", (x, (y + 1) % 4, (z + 4 * (y == 3)) % 8)),
            ("−y", (x, (y - 1) % 4, (z - 4 * (y == 0)) % 8)),
            ("+z", (x, y, (z + 1) % 8)),
            ("−z", (x, y, (z - 1) % 8)),
        ]
        lines = said.splitlines()[1:]
        assert len(lines) == 6
        for line, (direction, chip) in zip(lines, expected, strict=True):
            cells = line.split("\t")
            assert cells[0] == direction
            assert cells[1] == f"chip {chip}, block {chip[2] // 4}"
            assert cells[2] == "73.333"  # 220 / 3, of every link
            d = "xyz".index(direction[1])
            ends = (x, y, z)[d] == ((3, 3, 7)[d] if direction[0] == "+" else 0)
            assert cells[3] == (("wrap" if d == 2 else "twist") if ends else "")
    assert seen >= 4
    assert browser.tip((3, 3)) == ""
    assert browser.troubles() == []


def test_hovering_tells_a_links_ends_kind_and_load(browser, draw):
    browser.open(draw("slice", "4x4x8"))
    tails, heads, dimensions, kinds = (
        browser.do(f"JSON.parse(document.getElementById('scene').textContent).{name}")
        for name in ("tail", "head", "dimension", "kind")
    )
    told = 0
    places = np.array(np.unravel_index(tails, (4, 4, 8))).T
    seen = (places[:, 1] == 3) | ((places[:, 0] == 0) & (np.array(kinds) == 0))  # near the reader
    for link in np.flatnonzero(seen)[::5].tolist():
        said = browser.tip(browser.do(f"view.middle({link})"))
        chips = [np.unravel_index(c, (4, 4, 8)) for c in (tails[link], heads[link])]
        ends = [f"chip ({', '.join(map(str, chip))}), block {chip[2] // 4}" for chip in chips]
        if not said.startswith(" → ".join(ends)):
            continue  # a chip or a link in front of it
        told += 1
        d = dimensions[link]
        # Half the distance of a ring of k chips, from all 128: k^2 / 4 x 128 / k / 2.
        load = {0: 64, 1: 64, 2: 128}[d]
        assert f"{('inner', 'wrap')[kinds[link]]}, along {'xyz'[d]}" in said
        assert f"best routing\t{load} of at most 128" in said
        assert f"dimension order\t{load} of at most 128" in said
    assert told >= 6


def test_links_have_the_colour_of_their_load_or_kind(browser, draw):
    browser.open(draw("slice", "4x4x8"))
    scene = "JSON.parse(document.getElementById('scene').textContent)"
    shown = browser.do(f"{scene}.colours")
    assert shown["load"] == list(LOAD_COLOURS)
    choices = browser.do("[...document.getElementById('colour').options].map(o => o.text)")
    assert choices == [
        "colour: all-to-all load, best routing",
        "colour: all-to-all load, dimension order",
        "colour: kind of link",
    ]

    def near(colour):
        """How many pixels of the picture have a colour."""
        return int(of_hue(browser.pixels()[:, : WIDTH - 360], colour).sum())

    choose = "((list) => {{ list.value = {}; list.dispatchEvent(new Event('change')); }})"
    choose += "(document.getElementById('colour'))"
    by_load = near(LOAD_COLOURS[-1])
    browser.do(choose.format(2))
    browser.settle()
    by_kind = near(LOAD_COLOURS[-1])
    assert by_load > 200
    assert by_kind < by_load / 20
    assert near(shown["kinds"][1]) > 200
    # And what the reader does not want to see is gone.
    browser.do("document.querySelectorAll('#kinds input')[1].click()")
    browser.settle()
    assert near(shown["kinds"][1]) < 20
    assert browser.drawn()["kinds"] == "304 0 0"


def test_it_turns_zooms_and_moves_by_mouse_and_keys(browser, draw):
    browser.open(draw("slice", "4x4x4"))

    def places():
        return np.array(browser.do("[0, 21, 42, 63].map(i => view.project(i))"))

    def spread():
        return np.ptp(places(), axis=0).max()

    start, middle = places(), (400, 400)
    browser.drag((700, 60), (620, 100))
    turned = places()
    assert np.abs(turned - start).max() > 10
    browser.key("0")
    assert places() == pytest.approx(start)
    wide = spread()
    browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=400, y=400, deltaX=0, deltaY=-300)
    browser.until(f"view.camera.zoom > 1.2 && {wide}")
    browser.settle()
    assert spread() > 1.2 * wide
    for key, change in [("-", -1), ("+", 1)]:
        before = spread()
        browser.key(key)
        assert np.sign(spread() - before) == change
    browser.key("0")
    for key in ("ArrowLeft", "ArrowUp"):
        before = places()
        browser.key(key)
        assert np.abs(places() - before).max() > 2
    browser.key("x")  # along x: chips that differ in x only lie behind each other
    ahead = np.array(browser.do("[5, 5 + 16, 5 + 32, 5 + 48].map(i => view.project(i))"))
    assert np.ptp(ahead, axis=0) == pytest.approx([0, 0], abs=40)
    browser.key("0")
    browser.call(
        "Input.dispatchMouseEvent", type="mousePressed", x=700, y=60, button="left", modifiers=8
    )
    browser.mouse("Moved", 730, 80, button="left", buttons=1, modifiers=8)
    browser.mouse("Released", 730, 80, button="left", modifiers=8)
    assert places() - start == pytest.approx(np.tile([30, 20], (4, 1)), abs=6)
    assert browser.tip(middle) is not None
    assert browser.troubles() == []


def test_failed_parts_are_marked(browser, draw):
    browser.open(draw("slice", "8x8x8", "--failed", "chip:5,1,2,3", "ocs:y,0,0"))
    drawn = browser.drawn()
    # A chip's 6 links; of OCS y,0,0 one per block and dimension y: 8.
    assert (drawn["failedNodes"], drawn["failedLinks"]) == ("1", str(6 + 8))
    x, y, z = 4 * 1 + 1, 4 * 0 + 2, 4 * 1 + 3  # block 5 of 2 x 2 x 2
    place = browser.do(f"view.project({(x * 8 + y) * 8 + z})")
    around = browser.pixels()[
        int(place[1]) - 8 : int(place[1]) + 9, int(place[0]) - 8 : int(place[0]) + 9
    ].reshape(-1, 3)
    # It is seen through whatever is before it: its colour, in some light, and a white cross.
    assert of_hue(around, FAILED_COLOUR).mean() > 0.3
    assert (around.min(axis=1) > 0.9).mean() > 0.03
    text = browser.do("document.querySelector('aside').innerText")
    assert "failed chip" in text
    assert "1 chip: the slice needs another block" in text
    assert browser.troubles() == []


def test_loads_are_those_around_a_failed_switch(browser, draw):
    browser.open(draw("slice", "4x4x8", "--failed-ocs", "z,0,0"))
    text = browser.do("document.querySelector('aside').innerText")
    assert "93.75% kept" in text
    most = browser.do(
        "JSON.parse(document.getElementById('scene').textContent).values[0].table.at(-1)"
    )
    assert most == pytest.approx(128 / 0.9375, abs=1e-3)
    cut = browser.do("JSON.parse(document.getElementById('scene').textContent).cut.length")
    assert cut == 2  # one z-link between the blocks, and the wrap


def contrast(first, second):
    """The contrast ratio of the Web Content Accessibility Guidelines 2."""

    def luminance(text):
        channels = np.array([float(v) for v in text[4:-1].split(",")]) / 255
        linear = np.where(
            channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_light_and_dark(scheme, browser, draw):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    browser.open(draw("slice", "4x4x8_twisted"))
    style = "getComputedStyle(document.querySelector('{}')).{}"
    for what, ground in [
        ("aside", "aside"),
        ("dt", "aside"),
        (".note", "aside"),
        (".caption", "body"),
    ]:
        ink, paper = (
            browser.do(style.format(what, "color")),
            style.format(ground, "backgroundColor"),
        )
        assert contrast(ink, browser.do(paper)) >= 4.5, what
    before = browser.pixels()
    assert (before[5, 5].mean() > 0.5) == (scheme == "light")
    browser.key("t")
    browser.settle()
    after = browser.pixels()
    assert (after[5, 5].mean() > 0.5) == (scheme == "dark")
    browser.call("Emulation.setEmulatedMedia", features=[])


def test_without_webgl_the_page_says_so_and_has_its_figures(browser, draw):
    none = "HTMLCanvasElement.prototype.getContext = () => null"
    browser.open(draw("slice", "4x4x4"), before=none)
    text = browser.do("document.body.innerText")
    assert "This browser has no WebGL 2" in text
    assert "32.00 units" in text


def test_the_fabric_page_shows_blocks_slices_and_ports(browser, draw):
    page = draw("fabric", "--slices", "4x4x8_twisted,8x8x8", "--failed", "block:1", "ocs:x,0,0")
    browser.open(page)
    drawn = browser.drawn()
    # 3 links a block of 2 + 8; of dimension x one fibre of 16 is dark.
    assert (drawn["nodes"], drawn["links"], drawn["failedNodes"]) == ("64", "30", "1")
    assert drawn["failedLinks"] == "10"
    labels = browser.do("JSON.parse(document.getElementById('scene').textContent).labels")
    assert sorted(labels) == sorted(f"block {block}" for block in range(64))
    said = browser.tip(browser.do(f"view.project({labels.index('block 40')})"))
    assert said.splitlines() == ["block 40", "slice\tin no slice"]
    said = browser.tip(browser.do(f"view.project({labels.index('block 1')})"))
    assert said.splitlines() == ["block 1", "slice\tin no slice", "state\tfailed"]
    floor = browser.do("[...document.querySelectorAll('.floor span')].map(s => s.title)")
    assert floor[1] == "block 1: failed"
    assert [line for line in floor if line.endswith("slice 1")] == [
        "block 0: slice 1",
        "block 10: slice 1",  # in the place of block 1
    ]
    # 47 switches with 2 x 10 ports in use and 8 spare ones; one switch lost.
    counts = browser.do("document.getElementById('ports').dataset.counts")
    assert counts == f"{47 * 108:,} free, {47 * 20:,} used, {47 * 8:,} spare, 136 failed"
    # The ports of a switch are rows of 17, 4 units each: port 2 of OCS x,0,1 is the third.
    browser.do("document.getElementById('ports').scrollIntoView()")
    box = browser.do(
        "(({x, y, width}) => [x, y, width])"
        "(document.getElementById('ports').getBoundingClientRect())"
    )
    unit = box[2] / (4 * (17 * 4 + 10))
    browser.mouse("Moved", box[0] + unit * (78 + 2 * 4 + 2), box[1] + unit * 22)
    assert browser.do("document.getElementById('port').textContent") == (
        "OCS x,0,1, port 2: used, the + fibre of block 2, joined to port 70, the − fibre of block 6"
    )
    assert browser.troubles() == []


def test_sixty_slices_are_readable_on_a_narrow_screen(browser, draw):
    """At 380 px no two captions overlap, nothing is wider than the screen, and every slice is
    listed."""
    page = draw("fabric", "--slices", *["4x4x4"] * 60)
    size = {"deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", width=380, height=800, **size)
    try:
        browser.open(page)
        boxes = browser.do(
            "[...document.querySelectorAll('.caption')].filter(e => e.style.visibility != 'hidden')"
            ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
        )
        assert browser.do("document.documentElement.scrollWidth") <= 380
        assert browser.do("document.querySelectorAll('table.list td:first-child').length") == 60
    finally:
        browser.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, **size)
    assert len(boxes) > 5
    left, top, right, bottom = np.array(boxes).T
    meet = (left[:, None] < right - 0.5) & (left < right[:, None] - 0.5)
    meet &= (top[:, None] < bottom - 0.5) & (top < bottom[:, None] - 0.5)
    assert meet.sum() == len(boxes)  # each meets itself


def test_the_picture_beside_the_page_shows_the_same(draw):
    whole = draw("slice", "4x4x4")
    broken = draw("slice", "4x4x4", "--failed", "chip:0,0,0,0")
    pictures = [image.imread(page.with_suffix(".png"))[..., :3] for page in (whole, broken)]
    marks = [int(of_hue(picture, FAILED_COLOUR).sum()) for picture in pictures]
    assert marks[0] == 0
    assert marks[1] > 200
    for picture in pictures:
        assert picture.shape[0] >= 1000
        # All links carry the largest load.
        assert of_hue(picture, LOAD_COLOURS[-1]).sum() > 2000
