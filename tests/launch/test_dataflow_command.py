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
    for name in ("naive", "flex", "flat", "flash"):
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
    assert small[4] == small[8] == "-"  # flat: 32 KiB are a row of logits
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
        (["--draw-rows", "rows.gif"], "--draw-rows rows.gif: must end in .png, .svg, .pdf"),
        (["--platform", "edge", "--accelerator", "a.json"], "--platform and --accelerator: give"),
        (["T5", "--workload", "w.json"], "MODEL and --workload: the file says it"),
        (["--causal", "--workload", "w.json"], "--causal and --workload: the file says it"),
        (["--workload", "no.json"], "no.json: no such file; give a JSON file of an attention"),
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


ACCELERATOR = {
    "name": "two levels",
    "array": {"rows": 64, "columns": 64, "count": 2},
    "vector_lanes": 256,
    "frequency": 1e9,
    "memories": [
        {"size": "256KiB", "bandwidth": 4e12},
        {"name": "shared", "size": "16MiB", "bandwidth": 1e12},
        {"bandwidth": 1e11},
    ],
}
WORKLOAD = {"name": "one layer", "heads": 32, "kv_heads": 8, "sequence": 8192, "head_dim": 128}


def files(tmp_path, accelerator=ACCELERATOR, workload=WORKLOAD):
    paths = []
    for name, document in (("accelerator", accelerator), ("workload", workload)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        paths += [f"--{name}", str(path)]
    return paths


def test_an_accelerator_and_a_workload_of_files(tmp_path, capsys):
    workload = WORKLOAD | {"causal": True, "bytes_per_logit": 4}
    assert main(["dataflow", *files(tmp_path, workload=workload), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["attention"]) == {"flex", "flash"}
    assert "layer" not in found
    seen = 8192 * 8193 // 2  # logits of a head
    array = 2 * 32 * seen * 128 / (2 * 64 * 64) / 1e9
    assert found["lower_bound"]["seconds"] == pytest.approx(array)
    flash = found["attention"]["flash"]
    assert flash["seconds"] >= array
    [crossed] = flash["level_bytes"]  # between the buffer and the shared level
    assert crossed >= flash["off_chip_bytes"] >= 2 * (32 + 8) * 8192 * 128 * 2
    # A head's keys and values, 4 MiB, twice, stay in the shared level.
    assert flash["off_chip_bytes"] == 2 * (32 + 8) * 8192 * 128 * 2
    tile, [level] = found["mapping"]["tile"], found["mapping"]["levels"]
    assert tile["rows"] * tile["columns"] * 4 < 256 * 2**10
    assert level["columns"] == 8192 or level["rows"] == 4 * 8192


def test_the_page_of_a_file_and_matmuls_of_its_layer(tmp_path, capsys):
    one = ACCELERATOR | {"memories": [ACCELERATOR["memories"][0], {"bandwidth": 1e11}]}
    matmuls = [{"name": "up", "m": 8192, "k": 4096, "n": 16384}, {"m": 8192, "k": 16384, "n": 4096}]
    workload = WORKLOAD | {"matmuls": matmuls, "batch": 2}
    assert main(["dataflow", *files(tmp_path, one, workload)]) == 0
    page = capsys.readouterr().out
    assert "one layer, 32 heads of 128 (8 of keys), sequence 8192, batch 2, on two levels" in page
    names = [line.split()[0] for line in page.splitlines() if " J" in line]
    assert names == ["bound", "naive", "flex", "flat", "flash", "naive", "flex", "flat", "flash"]
    assert "tiles of whole rows take" in page


def test_the_backward_pass_of_a_model(capsys):
    assert main(["dataflow", "T5", "--sequence", "1024", "--backward", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backward"]
    assert "layer" not in found
    macs = 4 * 64 * 8 * 1024**2 * 64
    assert found["attention"]["flash"]["macs"] == macs
    assert found["attention"]["flash"]["utilisation"] <= 0.8 + 1e-9  # five matmuls for four


def test_the_map_of_whole_rows_is_written(tmp_path, capsys):
    path = tmp_path / "rows.png"
    assert main(["dataflow", "--sequence", "512", "--draw-rows", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def _without(document, key):
    return {name: value for name, value in document.items() if name != key}


MEMORIES = ACCELERATOR["memories"]


@pytest.mark.parametrize(
    ("accelerator", "workload", "message"),
    [
        ([], WORKLOAD, "want an object with array, vector_lanes, frequency, memories"),
        (_without(ACCELERATOR, "frequency"), WORKLOAD, "frequency is missing"),
        (ACCELERATOR | {"clock": 1}, WORKLOAD, 'unknown key "clock"; the keys are name'),
        (ACCELERATOR | {"frequency": 0}, WORKLOAD, "frequency 0: Hz, more than 0"),
        (ACCELERATOR | {"array": {"rows": 8}}, WORKLOAD, "array: columns is missing"),
        (
            ACCELERATOR | {"array": {"rows": 3, "columns": 5, "reshapes": True}},
            WORKLOAD,
            "array: reshapes: 15 elements; a power of two can",
        ),
        (ACCELERATOR | {"memories": MEMORIES[:1]}, WORKLOAD, "memories: [{"),
        (
            ACCELERATOR | {"memories": [MEMORIES[1], MEMORIES[0], MEMORIES[2]]},
            WORKLOAD,
            "memories: level 1 has 262144 bytes, no more than shared inside",
        ),
        (
            ACCELERATOR | {"memories": [{"size": 12, "bandwidth": 1e9}, {"bandwidth": 1e9}]},
            WORKLOAD,
            "a buffer of 12 bytes is too small for one row of 8192 logits: the least that works",
        ),
        (
            ACCELERATOR | {"memories": [{"size": "big", "bandwidth": 1e9}, {"bandwidth": 1e9}]},
            WORKLOAD,
            "entry 1: size big: no size; write bytes",
        ),
        (ACCELERATOR | {"memories": [*MEMORIES[:2], MEMORIES[1]]}, WORKLOAD, "entry 3: size: the"),
        (ACCELERATOR, _without(WORKLOAD, "heads"), "heads is missing"),
        (ACCELERATOR, WORKLOAD | {"sequence": -4}, "sequence -4: a whole number, 1"),
        (ACCELERATOR, WORKLOAD | {"kv_heads": 5}, "5 heads of keys and values do not divide 32"),
        (ACCELERATOR, WORKLOAD | {"causal": "yes"}, 'causal "yes": true or false'),
        (ACCELERATOR, WORKLOAD | {"causal": True, "keys": 5}, "fewer keys than the 8192 queries"),
        (ACCELERATOR, WORKLOAD | {"matmuls": [{"m": 1}]}, "matmuls: entry 1: k is missing"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line(accelerator, workload, message, tmp_path, capsys):
    assert main(["dataflow", *files(tmp_path, accelerator, workload)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
