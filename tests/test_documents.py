"""What README, BUILD and docs tell a user to run: it runs, shortened.

A block says by its language what it is: `sh` is run line by line, `gin` beside the quickstart,
`python` as it is, `text` is shown. Commands run in one folder, one after another, on a tiny model
in the quickstart's place. Training that nothing after it reads is built and not run; so are studies
and pods.
"""

import contextlib
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import sparsity
import topology
from launch import argparse_internals
from launch.cli import main, parser
from launch.configure import build_run

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted(ROOT.glob("docs/*.md"))]
TINY = f"""\
from __gin__ import dynamic_registration
from pjit_train import run
from pjit_train import sharding
from pjit_train.models import transformer
from pjit_train.data import sources
from pjit_train.data import text
include '{ROOT}/configs/quickstart.gin'
run.Run:
  steps = 2
  eval_batches = 1
run.Samples.tokens = 0
sharding.MeshShape.data = 1
transformer.TransformerConfig:
  max_len = 256
  d_model = 128
  num_layers = 1
  num_heads = 4
  d_ff = 128
  layers = 'scan'
text.TextData:
  sources = [@sources.TextFiles()]
  seq_len = 32
sources.TextFiles.train = 'corpus.txt'
"""
# The run that a page calls RUN, and so on.
NAMES = {"RUN": "runs/quickstart", "FOLDER": "folder", "CONFIG.gin": "configs/quickstart.gin"}
NAMES |= {"DIR": "runs/by_hand", "/shared/runs/a": "runs/shared"}
# Read by later commands, so made; what else is trained or compressed is checked to its last step.
MADE = ("runs/quickstart", "runs/sparse", "runs/quickstart-compressed-sparsegpt-int4")
PODS = ("runs/quiet", "runs/failing")  # likewise
MADE += ("runs/small", *PODS)
SHORT = {
    "--steps": "4",
    "--finetune": "2",
    "--sequence": "512",
    "--sequences": "4",
    "--tokens": "8",
}


@dataclasses.dataclass(frozen=True)
class Block:
    file: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks() -> list[Block]:
    """The fenced blocks of all pages."""
    found = []
    for file in FILES:
        fences = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", file.read_text(), re.MULTILINE)
        for match in fences:
            line = file.read_text().count("\n", 0, match.start()) + 1
            found.append(Block(file, line, match[1], match[2]))
    return found


def of_language(*languages: str):
    return [pytest.param(block, id=str(block)) for block in blocks() if block.language in languages]


class Enough(Exception):
    """Stands for what a command would do for minutes, when all that comes before it is done."""


@pytest.fixture(scope="module")
def here(tmp_path_factory, quick_compiles):
    """A folder to run commands in, in which the quickstart is tiny, and trained."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.gin").write_text(TINY)
    (folder / "docs").symlink_to(ROOT / "docs")  # whose examples the pages name
    (folder / "corpus.txt").write_text(" ".join(map(str, range(4000))))
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        import launch.process
        import pjit_train.compression.compress
        import pjit_train.loop

        train, compress = pjit_train.loop.train, pjit_train.compression.compress.compress

        def trained(run, directory, **options):
            if str(directory) not in MADE:
                raise Enough
            return train(run, directory, **options)

        def compressed(run, directory, new_run, out, **options):
            if str(out) not in MADE:
                raise Enough
            return compress(run, directory, new_run, out, **options)

        def enough(*args, **kwargs):
            raise Enough

        patch.setenv("TORSION_CACHE", str(folder / "cache"))
        patch.setattr(launch.process, "prepare", lambda devices=None: None)
        patch.setattr(launch.process, "join", lambda *processes: None)
        patch.setattr(pjit_train.loop, "train", trained)
        patch.setattr(pjit_train.compression.compress, "compress", compressed)
        patch.setattr("launch.pod.keeper.keep", check_pod)
        for study in (
            "pod_study.study_pod",
            "flat_study.study_flat",
            "embeddings_study.study_embeddings",
        ):
            patch.setattr(f"launch.reports.{study}", enough)
        assert main(["train", "configs/quickstart.gin"]) == 0
        yield folder


def check_pod(options: dict) -> int:
    """What `launch.pod.driver` does before it starts a pod; a run that is read is trained here."""
    from launch.pod.faults import Fault, Repair
    from launch.pod.plan import Plan, default_hosts_per_process
    from topology import Slice

    run, _ = build_run(options["configs"], options["bindings"])
    slice = Slice.parse(options["slice"])
    Plan(
        run=run,
        config=Path("run.gin"),
        directory=Path(options["out"]),
        slice=slice,
        hosts_per_process=options["hosts_per_process"] or default_hosts_per_process(slice),
        elastic=options["elastic"],
        blocks=options["blocks"] or 64,
        hang_seconds=options["hang_after"],
        faults=tuple(map(Fault.parse, options["fail"])),
        repairs=tuple(map(Repair.parse, options["repair"])),
        emulate=True,
    )
    if options["out"] in PODS:
        return main(["train", *options["configs"], "--steps", "4", "--out", options["out"]])
    return 0


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block of shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removesuffix("&"), comments=True) for line in lines]
    return [words for words in split if words]


def shortened(words: list[str]) -> list[str]:
    """The arguments of `torsion`, in the names of this test, with small numbers."""
    named = []
    for word in words:
        name = next((n for n in NAMES if word == n or word.startswith(f"{n}-")), None)
        named.append(word if name is None else word.replace(name, NAMES[name], 1))
    for i, word in enumerate(named[:-1]):
        if word in SHORT and not (word == "--sequence" and named[0] != "dataflow"):
            named[i + 1] = SHORT[word]
    if named[0] == "compress" and "--sequences" not in named:
        named += ["--sequences", "4"]
    if named[0] == "pod" and "--mesh" not in named:
        named += ["--mesh", "data=-1"]  # as the quickstart's own
    if named[0] == "sample":
        named += ["--tokens", "8"]
    return named


def test_every_block_says_what_it_is():
    assert {block.language for block in blocks()} == {"sh", "gin", "python", "text"}
    shown = [block for block in blocks() if block.language == "text"]
    assert len(shown) == 23, "is another block really shown, and not to be run?"


# README first, whose runs the others read; the blocks of a page in their order.
@pytest.mark.parametrize("block", of_language("sh", "python"))
def test_commands_run(block, here, capfd):
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {})
    else:
        for words in commands(block):
            run_command(words, block)
    capfd.readouterr()


def run_command(words: list[str], block: Block) -> None:
    match words:
        case ["torsion", *rest]:
            with contextlib.suppress(Enough):
                assert main(shortened(rest)) == 0, f"{block}: {words}"
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["eval", substitution]:
            inner = re.fullmatch(r"\$\((.*)\)", substitution)[1]
            run_command(shlex.split(inner), block)
        case ["ray", "start", *_]:
            pass  # of Ray
        case ["ray", "job", "submit", *rest]:
            after = rest[rest.index("--") + 1 :]
            assert_options(after[1:])
        case _:
            raise AssertionError(f"{block}: {words}: how is this run?")


@pytest.mark.parametrize("block", of_language("gin"))
def test_gin_blocks_are_files(block, here):
    file = here / f"block{block.line}.gin"
    file.write_text(block.text)
    build_run(["configs/quickstart.gin", str(file)])


def test_a_gin_file_without_its_imports_is_told_which(here):
    from pjit_train.errors import UserError

    file = here / "mine.gin"
    file.write_text(
        "from sparsity.numbers import quantized\nrun.Run.quantization = @quantized.Quant()\n"
    )
    says = (
        "quantized.Quant is unknown; begin the file with the lines from __gin__ import "
        "dynamic_registration, and from sparsity.numbers import quantized"
    )
    with pytest.raises(UserError, match=says):
        build_run(["configs/quickstart.gin", str(file)])


def test_commands_in_sentences_have_the_options_that_they_name():
    count = 0
    for file in FILES:
        text = re.sub(r"^```(.*)\n((?:.*\n)*?)```$", "", file.read_text(), flags=re.MULTILINE)
        for code in re.findall(r"`((?:torsion|python) [^`]*)`", text):
            words = shlex.split(code.replace("\n", " "))
            count += 1
            if words[0] == "python":
                assert (ROOT / words[1]).exists(), f"{file.name}: {code}"
            else:
                assert_options(words[1:])
    assert count > 30


@pytest.mark.parametrize("library", [sparsity, topology], ids=lambda library: library.__name__)
def test_the_site_has_every_public_name(library):
    name = library.__name__
    page = (ROOT / "docs" / "api" / f"{name}.md").read_text()
    shown = re.findall(rf"^::: ({name}\.(?:\w+\.)*\w+)$", page, re.MULTILINE)
    assert set(library.__all__) <= {path.split(".")[-1] for path in shown}
    assert len(set(shown)) == len(shown)


def assert_options(words: list[str]) -> None:
    """The command is there, with every option that is named."""
    at = parser()
    for word in words:
        if word.startswith("-"):
            known = [
                option for a in argparse_internals.arguments(at) for option in a.option_strings
            ]
            assert word.partition("=")[0] in known, words
        at = argparse_internals.commands(at).get(word, at)
    assert at.prog != "torsion" or words == ["--version"], words
