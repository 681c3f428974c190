"""The command line, in this process and as its user meets it."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.gin_files import tiny
from helpers.processes import TORSION, environment, free_address

import launch.process
import pjit_train.loop
from launch.cli import main
from launch.commands.common import PODS, pod_of
from pjit_train.errors import TrainingError, UserError
from topology import hardware

pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = {
    "run.Run.steps": 4,
    "run.Run.eval_every": 0,
    "run.Run.log_every": 1,
    "text.TextData.batch_size": 4,
}


@pytest.fixture
def here(here, monkeypatch):
    """The folder with a small run, and this process's JAX left as it is."""
    monkeypatch.setattr(launch.process, "prepare", lambda devices: None)
    (here / "small.gin").write_text(tiny(SMALL))
    (here / "corpus.txt").write_text(" ".join(map(str, range(2000))))
    return here


@pytest.fixture
def trained(monkeypatch):
    """What `train` is called with, instead of training."""
    calls = []
    monkeypatch.setattr(
        pjit_train.loop, "train", lambda run, directory, **kwargs: calls.append((run, directory))
    )
    return calls


def mistake(capfd, *argv, code=2) -> str:
    assert main(list(argv)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("torsion: ")
    assert err.count("\n") == 1
    return err.removeprefix("torsion: ").rstrip("\n")


def test_options_are_short_for_bindings_and_come_last(here, trained):
    argv = ["train", "small.gin", "--gin", "run.Run.steps = 7", "--gin", "run.Run.seed = 3"]
    assert main([*argv, "--steps", "8", "--log-every", "2", "--mesh", "data=2,fsdp=4"]) == 0
    run, directory = trained.pop()
    assert (run.steps, run.seed, run.log_every) == (8, 3, 2)
    assert (run.mesh.data, run.mesh.fsdp, run.mesh.sequence, run.mesh.tensor) == (2, 4, 1, 1)
    assert directory == Path("runs/small")
    assert main([*argv, "--seed", "5", "--out", "other"]) == 0
    run, directory = trained.pop()
    assert (run.steps, run.seed, directory) == (7, 5, Path("other"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train smal.gin", "smal.gin: no such file"),
        (
            "train small.gin --mesh fsdp=2,tp=2",
            "--mesh fsdp=2,tp=2: no axis 'tp'; use data, fsdp, sequence, tensor, slices",
        ),
        (
            "train small.gin --mesh fsdp",
            "--mesh fsdp: 'fsdp' is no AXIS=SIZE, such as fsdp=2",
        ),
        (
            "train small.gin --mesh fsdp=0",
            "MeshShape.fsdp=0; use a whole number from 1 to 2147483647 or -1",
        ),
        (
            "train small.gin --gin run.Run.steps=0",
            "Run.steps=0; use a whole number from 1 to 2147483647",
        ),
        (
            "train small.gin --out small.gin",
            "run directory small.gin: small.gin is a file; use another --out",
        ),
        (
            "train small.gin --coordinator localhost:1234",
            "--coordinator, --process-id and --num-processes: give all three, or none",
        ),
        (
            "train small.gin --coordinator localhost --process-id 0 --num-processes 2",
            "--coordinator localhost: want HOST:PORT, such as 10.0.0.1:1234",
        ),
        (
            "train small.gin --coordinator a:80 --process-id 2 --num-processes 2",
            "--process-id 2 of --num-processes 2: want 0 to 1",
        ),
        (
            "eval nowhere",
            "nowhere does not exist; give the directory of a run (the --out of its train)",
        ),
        (
            "sample cache",
            "cache does not exist; give the directory of a run (the --out of its train)",
        ),
        ("tokenizer no*.txt --vocab-size 300", "TextFiles: 'no*.txt' matches no file in {here}"),
        (
            "study pod --pod v5p",
            "study pod: of TPU v5p neither the gain of twists, nor goodput, nor failures of "
            "switches are published, which the study puts beside computed ones; take TPU v4",
        ),
        (
            "tokenizer corpus.txt --vocab-size 300 --out small.gin",
            "small.gin exists; remove it, or use another --out",
        ),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(argv, message, here, capfd):
    before = sorted(here.rglob("*"))
    assert mistake(capfd, *argv.split()) == message.replace("{here}", str(here))
    assert sorted(here.rglob("*")) == before


def test_devices_must_be_positive():
    with pytest.raises(UserError, match=r"--devices 0: use a positive number"):
        launch.process.prepare(0)


def test_training_that_fails_and_an_interrupt_have_their_own_codes(here, monkeypatch, capfd):
    def failing(error):
        def train(*args, **kwargs):
            raise error

        monkeypatch.setattr(pjit_train.loop, "train", train)

    failing(TrainingError("step 3: loss nan"))
    assert mistake(capfd, "train", "small.gin", code=1) == "step 3: loss nan"
    failing(KeyboardInterrupt())
    assert mistake(capfd, "train", "small.gin", code=130) == "interrupted"


@pytest.mark.parametrize("argv", [["fly"], [], ["train", "--stepps", "3"], ["sample"]])
def test_an_unknown_command_or_option_exits_with_2(argv, capfd):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("torsion: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("trian small.gin", "did you mean train? see torsion --help"),
        ("comprss r", "did you mean compress?"),
        ("study recipies", "did you mean recipes? see torsion study --help"),
        (
            "train small.gin --stepps 3",
            "--stepps 3; did you mean --steps? see torsion train --help",
        ),
        ("eval r --jsno", "--jsno; did you mean --json?"),
        ("dataflow --softmax fre", "did you mean free?"),
        ("zzzz", "invalid choice: 'zzzz' (choose from "),
    ],
)
def test_a_mistyped_word_gets_the_nearest_right_one(argv, says, capfd):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    [line] = capfd.readouterr().err.splitlines()
    assert (caught.value.code, line.startswith("torsion: ")) == (2, True)
    assert says.replace("? see", "?; see") in line


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--version"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout[:8], done.stderr) == (0, "torsion ", "")


def test_train_without_a_configuration_explains_the_first_run(here, capfd):
    assert main(["train"]) == 2
    command = "torsion train configs/quickstart.gin\n"
    assert command in capfd.readouterr().err


def test_nobody_to_join(here, capfd):
    launched = ["--num-processes", "2", "--process-id"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        where = f"localhost:{taken.getsockname()[1]}"
        text = mistake(capfd, "train", "small.gin", "--coordinator", where, *launched, "0")
    assert text.startswith(f"--coordinator {where}: process 0 cannot listen there: Address already")
    with pytest.raises(UserError, match="process 1 cannot reach process 0 there: Connection ref"):
        launch.process.join(where, 1, 2, patience=0.0)


def test_pods_are_those_whose_slices_are_known():
    assert [pod_of(version).version for version in PODS] == list(PODS)
    known = {pod.version for pod in hardware.PODS.values() if pod.shapes is not None}
    assert set(PODS) == known


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_the_shell(shell, capfd):
    assert main(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert "--log-every" in script
    assert "tokenizer" in script
    for version in PODS:
        assert version in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_tokenizer(here, capfd):
    from tokenizers import Tokenizer

    (here / "more.jsonl").write_text(json.dumps({"text": "1234 5678 " * 50}) + "\n")
    assert main(["tokenizer", "corpus.txt", "more.jsonl", "--vocab-size", "270"]) == 0
    assert "tokenizer.json: 270 tokens" in capfd.readouterr().out
    tokenizer = Tokenizer.from_file("tokenizer.json")
    ids = tokenizer.encode("1999 2000").ids
    assert tokenizer.decode(ids) == "1999 2000"
    assert len(ids) < len("1999 2000")


def losses(directory) -> list[float]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_processes_started_by_hand_train_as_one_and_the_run_can_be_used(here, capfd):
    address = free_address()
    argv = ["train", "small.gin", "--devices", "2", "--mesh", "data=2,fsdp=2", "--out", "two"]
    joined = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    processes = [
        subprocess.Popen(
            [*TORSION, *argv, *joined, str(i)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    for i, process in enumerate(processes):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        first, *others = err.splitlines()
        assert first.startswith(f"torsion: process {i} of 2 meets the others at {address},")
        assert all(line.startswith("torsion: waiting for ") for line in others)  # when busy

    assert main(["train", "small.gin", "--mesh", "data=1", "--out", "one"]) == 0
    assert losses(here / "two") == pytest.approx(losses(here / "one"), rel=1e-5)

    capfd.readouterr()
    assert main(["eval", "two", "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["step"] == 4
    assert main(["eval", "one"]) == 0
    words = capfd.readouterr().out.split()
    assert float(words[words.index("val_loss") + 1]) == pytest.approx(figures["val_loss"], rel=1e-4)
    assert main(["sample", "two", "--prompt", "1 2", "3", "--tokens", "5"]) == 0
    first, _, second = capfd.readouterr().out.partition("\n\n")
    assert first.startswith("1 2")
    assert second.startswith("3")


@pytest.mark.slow
def test_the_user_sees_one_line_and_no_traceback(here):
    done = subprocess.run(
        [*TORSION, "train", "small.gin", "--gin", "run.Run.step = 3"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "torsion: --gin 'run.Run.step = 3': run.Run.step: no such parameter; "
        "did you mean run.Run.steps?\n"
    )
    assert not (here / "runs").exists()


def test_help_imports_nothing_slow():
    code = (
        "import sys\n"
        "from launch.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "slow = {'jax', 'gin', 'numpy', 'tensorflow_datasets', 'orbax', 'grain', 'shtab'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    root = Path(launch.process.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("train", "eval", "sample", "tokenizer", "configs/quickstart.gin"):
        assert command in done.stdout


@pytest.mark.parametrize("text", ["9" * 20000, "\x1b[31m\x00\r\n\u2028", "[" * 5000])
def test_a_message_is_one_short_line_whatever_it_quotes(capsys, text):
    assert main(["train", "configs/quickstart.gin", "--mesh", f"fsdp={text}"]) == 2
    output = capsys.readouterr().err
    assert len(output) < 1300
    assert output[:-1].isprintable()
    assert output.startswith("torsion: --mesh")
