"""Repositories of the Hub, fetched from a server of its interface on loopback by real commands."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import gguf_files
from helpers.hub_server import COMMIT, served
from huggingface_folders import FIXTURES, stored
from huggingface_hub import constants

from launch.cli import main
from pjit_train.huggingface import weights
from pjit_train.huggingface.sources import folder_of

LLAMA = {path.name: path.read_bytes() for path in (FIXTURES / "llama").iterdir()}
EXTRAS = {
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# A model",
    "pytorch_model.bin": b"\x80\x02pickle",
    "onnx/model.safetensors": b"another form",
}


@pytest.fixture
def hub():
    with served() as hub:
        hub.repositories["me/llama"] = LLAMA | EXTRAS
        yield hub


@pytest.fixture
def torsion(hub, tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own; settings are those of `huggingface_hub`."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))

    def run(*argv, code=0, endpoint=hub.url, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # from HF_ENDPOINT, at its import
        address = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert main(list(argv)) == code
        out, err = capsys.readouterr()
        if code:
            assert len(err.splitlines()) == 1, err
            assert err.startswith("torsion: ")
            assert not (tmp_path / "out").exists()
        return out + err

    return run


@pytest.fixture
def process(hub, tmp_path):
    """What starts a command as users do, for `subprocess`: all settings in the environment."""

    def started(*argv, **settings):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **settings}
        env |= {"TORSION_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
        return {"args": [sys.executable, "-m", "launch.cli", *argv], "env": env, "cwd": tmp_path}

    return started


def fetched(hub):
    paths = [path for method, path, _ in hub.asked if method == "GET"]
    return [path.rsplit("/", 1)[1] for path in paths if "/resolve/" in path]


def test_a_repository_is_fetched_once_and_only_what_is_needed(hub, torsion, tmp_path):
    assert "out: hf:me/llama, " in torsion("import", "hf:me/llama", "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = set(LLAMA) | {"tokenizer.json", "chat_template.jinja"}
    assert names == wanted | {"SHA256SUMS"}
    for name in wanted:
        assert (tmp_path / "out" / name).read_bytes() == (LLAMA | EXTRAS)[name]
    got = [
        path.rsplit("/", 1)[1]
        for method, path, _ in hub.asked
        if method == "GET" and "/resolve/" in path
    ]
    assert sorted(got) == sorted(wanted)  # each once; no pickle, no page

    hub.asked.clear()  # then nothing large again, and offline nothing at all
    torsion("import", f"hf:me/llama@{COMMIT}", "again")
    assert fetched(hub) == []
    hub.asked.clear()
    torsion("import", "hf:me/llama", "offline", offline=True)
    assert hub.asked == []
    for name in ("again", "offline"):
        assert stored(tmp_path / name).keys() == stored(tmp_path / "out").keys()


def ranges(hub):
    return [asked for _, path, asked in hub.asked if path.endswith("model.safetensors") and asked]


def test_a_connection_that_breaks_off_goes_on(hub, torsion, tmp_path):
    whole = LLAMA["model.safetensors"]
    hub.break_after = len(whole) // 3
    torsion("import", "hf:me/llama", "out")
    assert ranges(hub) == [f"bytes={len(whole) // 3}-"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def test_a_server_that_sends_less_than_it_says(hub, torsion):
    hub.break_after, hub.ends_early = 1000, True
    text = torsion("import", "hf:me/llama", "out", code=2)
    assert "1,000 bytes came, and it has 30,056; run it again" in text


@pytest.mark.slow
def test_what_a_kill_broke_off_goes_on(hub, process, tmp_path):
    whole = LLAMA["model.safetensors"]
    hub.break_after, hub.stalls = len(whole) // 3, True
    with subprocess.Popen(**process("import", "hf:me/llama", "out")) as first:
        began = time.monotonic()
        while not any(p.stat().st_size for p in tmp_path.rglob("*.torsion.incomplete")):
            assert time.monotonic() < began + 60
            assert first.poll() is None
            time.sleep(0.05)
        first.kill()
    assert not (tmp_path / "out").exists()
    hub.asked.clear()
    again = process("import", "hf:me/llama", "out", HF_TOKEN="secret")
    hub.gated.add("me/llama")
    subprocess.run(**again, check=True, timeout=120)
    assert ranges(hub) == [f"bytes={len(whole) // 3}-"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole
    assert (tmp_path / "home/hub/models--me--llama/refs/main").read_text() == COMMIT
    assert not list(tmp_path.rglob("*.incomplete*"))


def test_no_network_takes_what_is_in_the_cache(hub, torsion, tmp_path, caplog):
    text = torsion("import", "hf:me/llama", "out", code=2, endpoint="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in text
    torsion("import", "hf:me/llama", "first")
    torsion("import", "hf:me/llama", "out", endpoint="http://127.0.0.1:9")
    assert "taken from the cache" in caplog.text
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "first").keys()


@pytest.mark.parametrize(
    ("source", "files", "says"),
    [
        ("hf:me/nothing", None, "has no such repository, or it is private"),
        ("hf:me/llama@v9", None, "hf:me/llama@v9: has no such revision"),
        (
            "hf:me/pickles",
            {"config.json": LLAMA["config.json"], "pytorch_model.bin": b"x"},
            "pickle",
        ),
        ("hf:me/gguf", {"a.gguf": b"x", "b.gguf": b"y"}, "after a colon: a.gguf, b.gguf"),
        ("hf:me/gguf:c.gguf", {"a.gguf": b"x"}, "no such file; name one of its"),
        ("hf:me/odd", {"x.txt": b"x"}, "has no config.json"),
        ("hf:me/bert", LLAMA | {"config.json": b'{"model_type": "bert"}'}, "model_type='bert'"),
        ("hf:me/gated", LLAMA, "is gated: accept its terms at"),
        ("hf:nothing", None, "is no hf:OWNER/NAME"),
        ("hf:../..", None, "hf:../.."),
    ],
)
def test_what_is_not_there_is_one_line(source, files, says, hub, torsion):
    if files is not None:
        hub.repositories[source.removeprefix("hf:").split(":")[0]] = files
    hub.gated.add("me/gated")
    assert says in torsion("import", source, "out", code=2)


def test_offline_without_a_copy_and_a_failing_server(hub, torsion):
    text = torsion("import", "hf:me/llama", "out", code=2, offline=True)
    assert "HF_HUB_OFFLINE is set" in text
    assert hub.asked == []
    hub.status = 500
    assert "answers 500" in torsion("import", "hf:me/llama", "out", code=2)


def test_a_gguf_file_of_a_repository(hub, torsion, tmp_path):
    tensors = gguf_files.llama_tensors()
    path = gguf_files.write(tmp_path / "tiny.gguf", tensors)
    hub.repositories["me/gguf"] = {"tiny.gguf": path.read_bytes()}
    torsion("import", "hf:me/gguf@v1:tiny.gguf", "out")
    assert stored(tmp_path / "out").keys() == tensors.keys()


def test_a_source_is_a_folder_in_the_caches(hub, torsion, tmp_path):
    """As `run.Run.initial_weights` and commands that read a model take it."""
    torsion("import", "hf:me/llama", "out")
    folder = folder_of("hf:me/llama@v1")
    assert folder == tmp_path / "home/hub/models--me--llama/snapshots" / COMMIT
    config, _ = weights.load(folder)
    assert config == weights.load(FIXTURES / "llama")[0]
    tensors = gguf_files.llama_tensors()
    path = gguf_files.write(tmp_path / "tiny.gguf", tensors)
    hub.repositories["me/gguf"] = {"a/tiny.gguf": path.read_bytes()}
    folder = folder_of("hf:me/gguf:a/tiny.gguf")
    assert folder.parent == tmp_path / "cache"
    assert folder == folder_of(path)  # the same bytes


def test_out_is_looked_at_first(hub, torsion, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    assert "there is something already" in torsion("import", "hf:me/llama", "full", code=2)
    text = torsion("import", "hf:me/llama", "missing/out", code=2)
    assert "the folder missing is missing; make it first" in text
    text = torsion("import", "hf:me/llama", "out", "--dtype", "float16", code=2)
    assert "hf:me/llama is copied as it is; a GGUF file can be cast" in text
    assert "is a folder" in torsion("import", str(Path("full")), "out", code=2)
    assert hub.asked == []
