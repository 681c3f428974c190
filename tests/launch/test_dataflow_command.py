"""`torsion dataflow`, for people, as JSON, and as a picture."""

import json
import subprocess
import sys

import pytest

from launch.cli import main
from launch.reports.sizes import parse_size


def test_json_has_the_costs_and_a_bound_below_them(capsys):
    assert main(["dataflow", "bert", "--sequence", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bound = found["lower_bound"]
    # 64 sequences of 12 heads, 2 matmuls of 2048 x 2048 x 64 on 256 x 256 elements at 940 MHz.
    assert bound["seconds"] == pytest.approx(64 * 12 * 2 * 2048**2 * 64 / 65_536 / 940e6)
    assert bound["off_chip_bytes"] == 4 * 64 * 12 * 2048 * 64 * 2
    for name in ("naive", "flex", "flat"):
        cost = found["attention"][name]
        assert cost["seconds"] >= bound["seconds"] * (1 - 1e-9)
        assert cost["utilisation"] == pytest.approx(bound["array_cycles"] / cost["cycles"])
        assert found["layer"][name]["seconds"] > cost["seconds"]
    assert found["attention"]["flat"]["utilisation"] == pytest.approx(1)
    assert found["attention"]["flex"]["utilisation"] < 0.3
    curve = found["curves"]["attention"]["flat"]
    assert len(curve) == len(found["buffers"])
    at = found["buffers"].index(4 * 2**20)
    assert curve[at] == pytest.approx(1, abs=0.05)


def test_the_page_names_all_and_marks_buffers_that_are_too_small(capsys):
    assert main(["dataflow", "T5", "--platform", "tpu-v4", "--sequence", "16384"]) == 0
    page = capsys.readouterr().out
    assert "T5, 8 heads of 64, sequence 16384, batch 64, on tpu-v4 with a buffer of 16 MiB" in page
    rows = [line.split() for line in page.splitlines()]
    [small] = [row for row in rows if row[:2] == ["16", "KiB"]]
    assert small[4] == small[7] == "-"  # flat: 32 KiB are a row of logits
    assert "tile of a kernel: 64 rows of 1 head (R), 12.03 MiB on chip" in page


def test_a_charged_softmax_is_slower(capsys):
    seconds = []
    for softmax in ("free", "overlapped", "in-turn"):
        assert main(["dataflow", "--sequence", "512", "--softmax", softmax, "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["attention"]["flat"]["seconds"])
    assert seconds[0] < seconds[1] < seconds[2]


def test_the_picture_is_written_whole(tmp_path, capsys):
    path = tmp_path / "use.png"
    assert main(["dataflow", "--sequence", "512", "--draw", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["use.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["GPT"], "model 'GPT': one of BERT, TrXL, FlauBERT, T5, XLM"),
        (["--platform", "moon"], "platform 'moon': one of edge, cloud, independent-edge"),
        (["--buffer", "0"], "a buffer of 0 bytes is too small"),
        (
            ["--buffer", "8000"],
            "too small for one row of 4096 logits: the least that works is 8704",
        ),
        (["--buffer", "much"], "--buffer much: no size; write bytes, or such as 512KiB"),
        (["--draw", "use.gif"], "--draw use.gif: must end in .png, .svg, .pdf"),
        (["--draw", "no/such/use.png"], "no folder no/such to write in"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["dataflow", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_sizes():
    assert parse_size("512KiB") == 524_288
    assert parse_size("20 MB") == 20_000_000
    assert parse_size("1.5gib") == 1_610_612_736
    assert parse_size("7") == 7


def test_the_command_needs_no_jax():
    script = "import sys; sys.modules['jax'] = None; from launch.cli import main; "
    script += "sys.exit(main(['dataflow', '--sequence', '512', '--json']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
