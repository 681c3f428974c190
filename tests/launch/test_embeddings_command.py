"""`torsion embeddings plan`: files of tables in any spelling, what is printed, and mistakes."""

import json
import subprocess
import sys

import pytest
from helpers.mistakes import mistake

from launch.cli import main
from topology.embeddings import model_of

TABLES = {
    "batch": 4096,
    "optimizer": "rowwise_adagrad",
    "tables": [
        {"name": "users", "rows": 2_000_000, "width": 64, "hotness": 20, "skew": 1.05},
        {"name": "shops", "rows": 5000, "width": 16, "features": 3},
        {"name": "days", "rows": 7, "width": 16},
    ],
}


@pytest.fixture
def planned(tmp_path, capsys):
    """Runs the command on a document: (exit code, what it printed, its errors)."""

    def run(document, *options):
        path = tmp_path / "tables.json"
        text = document if isinstance(document, str) else json.dumps(document)
        path.write_text(text)
        code = main(["embeddings", "plan", str(path), "--slice", "4x4x4", *options])
        return code, *capsys.readouterr()

    return run


def test_json_says_where_all_lies_and_how_long_it_takes(planned):
    code, out, _ = planned(TABLES, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["chips"] == 64
    assert found["batch_per_chip"] == 64
    assert found["bound_seconds"] <= found["step_seconds"] <= 1.05 * found["bound_seconds"]
    assert found["gap"] == pytest.approx(found["step_seconds"] / found["bound_seconds"] - 1)
    assert found["step_seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["memory_bytes"] == max(found["memory_bytes_per_chip"])
    assert len(found["memory_bytes_per_chip"]) == len(found["bytes_sent_per_chip"]) == 64
    assert sum(found["memory_bytes_per_chip"]) >= 2_000_000 * (64 * 4 + 4)
    assert [table["name"] for table in found["tables"]] == ["users", "shops", "days"]
    for table in found["tables"]:
        chips = range(64) if table["chips"] == "all" else table["chips"]
        assert set(chips) <= set(range(64))
        assert table["shards"] == (1 if table["sharding"] == "replicated" else len(chips))
    assert found["torchrec"]["step_seconds"] >= found["bound_seconds"]


def test_the_page_says_the_gap_and_each_table(planned):
    code, out, _ = planned(TABLES)
    assert code == 0
    assert "model" not in out.splitlines()[0]
    assert "tables: 3 tables" in out
    assert "% from the best" in out
    assert "GiB of 30.75 on the fullest chip" in out
    assert "its greedy at the same prices" in out
    for name in ("users", "shops", "days"):
        assert f"| {name} " in out


def test_mlperf_s_model_is_known_by_name(capsys):
    assert main(["embeddings", "plan", "dlrm_v2", "--slice", "4x4x8_twisted", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tables_bytes"] == 204_184_588 * 512
    assert found["ids_per_sample"] == 214
    assert len(found["tables"]) == 26
    assert found["gap"] < 0.05


@pytest.mark.parametrize(
    "document",
    [
        [{"name": "a", "rows": 100, "width": 8, "hotness": 3}],
        {"tables": {"a": {"vocabulary_size": 100, "embedding_dim": 8, "pooling_factor": 3}}},
        {"embedding_tables": [{"name": "a", "num_embeddings": 100, "dim": 8, "multi_hot": 3.0}]},
        {"width": 8, "tables": [{"table_name": "a", "vocab_size": 100.0, "valency": 3}]},
        {"tables": [{"name": "a", "rows": 100, "width": 8, "features": [{"hotness": 3}]}]},
        {"tables": [{"name": "a", "rows": 100, "width": 8, "hotness": [3], "dtype": "fp32"}]},
        {"tables": [{"name": "a", "rows": 100, "width": 8, "hotness": 3, "slots": 1}]},
    ],
)
def test_spellings_mean_the_same(document):
    plain = {"batch": 32, "tables": [{"name": "a", "rows": 100, "width": 8, "hotness": 3}]}
    assert model_of(document, batch=32).tables == model_of(plain).tables


def test_lists_have_an_entry_for_each_table():
    model = model_of(
        {
            "num_embeddings_per_feature": [10, 20, 30],
            "multi_hot_sizes": [1, 2, 3],
            "embedding_dim": 128,
            "batch_size": 8,
        }
    )
    assert [(t.rows, t.ids, t.width) for t in model.tables] == [
        (10, 1, 128),
        (20, 2, 128),
        (30, 3, 128),
    ]


def test_what_stands_beside_the_tables_holds_for_those_that_say_nothing():
    model = model_of(
        {
            "batch": 8,
            "dtype": "bf16",
            "optimizer": "adam",
            "tables": [
                {"rows": 10, "width": 8},
                {"rows": 10, "width": 8, "dtype": "int4", "row_slots": 1},
                {"rows": 10, "width": 8, "features": ["x", "y"], "hotness": [2, 5]},
            ],
        }
    )
    first, second, third = model.tables
    assert (first.dtype, first.slots, first.row_slots) == ("bfloat16", 2, 0)
    assert (second.dtype, second.slots, second.row_slots) == ("int4", 0, 1)
    assert third.hotness == (2, 5)
    assert second.bytes == 10 * (8 / 2 + 4)


ROW = {"name": "a", "rows": 100, "width": 8}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is no JSON document"),
        ("[1e999]", "table 0: inf: want an object"),
        ('{"batch": 1, "batch": 2, "tables": []}', "key 'batch' stands twice"),
        ([], "tables: is empty"),
        (3, "3: want an object with batch and tables"),
        ({"tables": [ROW]}, "batch: is missing"),
        ({"batch": 0, "tables": [ROW]}, "batch 0: a whole number, 1 .. "),
        ({"batch": True, "tables": [ROW]}, "batch True: a whole number"),
        ({"batch": "8", "tables": [ROW]}, "batch '8': a whole number"),
        ({"batch": 8}, "tables: is missing"),
        ({"batch": 8, "batch_size": 8, "tables": [ROW]}, "'batch_size': says again"),
        ({"batch": 8, "tables": [ROW], "tabels": []}, "'tabels': is no key of a model; did you"),
        ({"batch": 8, "tables": {"a": 3}}, "table 'a': 3: want an object"),
        ({"batch": 8, "tables": [{"width": 8}]}, "table 'table_0': rows: is missing"),
        ({"batch": 8, "tables": [{"rows": 8}]}, "table 'table_0': width: is missing"),
        ({"batch": 8, "tables": [ROW | {"rows": -1}]}, "table 'a': rows -1"),
        ({"batch": 8, "tables": [ROW | {"rows": 1.5}]}, "table 'a': rows 1.5: a whole number"),
        ({"batch": 8, "tables": [ROW | {"rows": 10**400}]}, "table 'a': rows of thousands"),
        ({"batch": 8, "tables": [ROW | {"width": 0}]}, "table 'a': width 0"),
        ({"batch": 8, "tables": [ROW | {"hotness": 0}]}, "table 'a': hotness 0"),
        ({"batch": 8, "tables": [ROW | {"hotness": "many"}]}, "table 'a': hotness 'many'"),
        ({"batch": 8, "tables": [ROW | {"hotness": []}]}, "table 'a': hotness: 0 entries"),
        ({"batch": 8, "tables": [ROW | {"hotness": [1, 2], "features": 3}]}, "2 entries for 3"),
        ({"batch": 8, "tables": [ROW | {"features": []}]}, "table 'a': features: is empty"),
        ({"batch": 8, "tables": [ROW | {"dtype": "f8"}]}, "table 'a': dtype 'f8': one of float32"),
        ({"batch": 8, "tables": [ROW | {"optimizer": "lamb"}]}, "table 'a': optimizer 'lamb'"),
        ({"batch": 8, "tables": [ROW | {"optimizer": "sgd", "slots": 1}]}, "give one"),
        ({"batch": 8, "tables": [ROW | {"skew": float("nan")}]}, "table 'a': skew nan"),
        ({"batch": 8, "tables": [ROW | {"skew": -1}]}, "table 'a': skew -1"),
        ({"batch": 8, "tables": [ROW | {"combiner": "max"}]}, "table 'a': combiner 'max'"),
        ({"batch": 8, "tables": [ROW | {"bundled": 1}]}, "table 'a': bundled 1: true or false"),
        ({"batch": 8, "tables": [ROW | {"rwos": 1}]}, "table 'a': 'rwos': is no key of a table"),
        ({"batch": 8, "tables": [ROW, ROW]}, "table 'a': stands twice"),
        ({"batch": 8, "tables": [ROW | {"name": 3}]}, "name 3: want a text"),
        ({"batch": 8, "dense_bytes": -1, "tables": [ROW]}, "dense_bytes -1"),
        ({"batch": 8, "rows": [1, 2], "width": [8]}, "width: 1 entries for 2 tables"),
    ],
)
def test_a_mistake_is_one_line_that_names_table_and_key(document, message, planned):
    code, out, error = planned(document)
    assert code == 2
    assert out == ""
    assert message in error
    assert error.startswith("torsion: ")
    assert error.count("\n") == 1


def test_tables_that_do_not_fit_name_a_slice_that_would_do(planned):
    large = {"batch": 64, "tables": [{"name": "a", "rows": 3 * 10**9, "width": 256}]}
    code, _, error = planned(large)
    assert code == 2
    assert "GiB more" in error
    assert "4x4x12 would do, of 192 chips" in error or "4x4x16 would do" in error
    huge = {"batch": 64, "tables": [{"name": "a", "rows": 2**40, "width": 256}]}
    assert "no slice of TPU v4 has enough" in planned(huge)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json", "--slice", "4x4x4"], "none.json: no such file"),
        ([".", "--slice", "4x4x4"], "directory"),
        (["dlrm_v2", "--slice", "4x4"], "slice '4x4'"),
        (["dlrm_v2", "--slice", "4x4x4", "--skew", "9"], "want a number from 0 to 4"),
        (["dlrm_v2", "--slice", "4x4x4", "--batch", "0"], "want a whole number from 1"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert message in mistake(["embeddings", "plan", *arguments], capsys)


def test_the_command_needs_no_jax(tmp_path):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(TABLES))
    script = "import sys; sys.modules['jax'] = None; from launch.cli import main; "
    script += f"sys.exit(main(['embeddings', 'plan', {str(path)!r}, '--slice', '2x2x1', '--json']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
