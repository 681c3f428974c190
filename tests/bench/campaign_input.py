"""Input that is wrong in any way: every text that a user or a file gives, changed at random.

A case is right where it is taken, or refused by a UserError or ValueError of one line, within ten
seconds and without much memory.
"""

import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import campaign_runs as runs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

LIMIT_SECONDS, LIMIT_BYTES = 10, 3 << 30
_NUMBERS = ["0", "-1", "1", "1e400", "nan", "-inf", "1e-40", "0x10", "1_0", "٣", "1.5", "1e9"]
_SIGNS = [*"'\"@%=.,:/\\\0\n\t #()[]{}-+*~$é🦒", "\r\n", "\ud800", "\ufeff", "\x1b[31m", "../"]
_WORDS = [
    "",
    "None",
    "True",
    "null",
    "''",
    "x",
    "%s",
    "__import__('os')",
    "4x4x8",
    "2:4",
    "a" * 300,
]
_LARGE = ["9" * 30, "9" * 5000, "[" * 3000, "{'a': " * 200]
_PIECES = [*_NUMBERS, *_SIGNS, *_WORDS]


def changed(samples: list[str], rng: random.Random) -> str:
    """A text near the samples: pieces of one cut, doubled, spliced, or replaced by odd ones."""
    text = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        at, length = rng.randint(0, len(text)), rng.randint(0, 12)
        piece = rng.choice(_PIECES if rng.random() < 0.95 else _LARGE)
        match rng.randrange(6):
            case 0:
                text = text[:at] + piece + text[at:]
            case 1:
                text = text[:at] + text[at + length :]
            case 2:
                text = text[:at] + piece + text[at + length :]
            case 3:
                text = text[:at] + text[at : at + length] + text[at:]
            case 4:
                text = text[:at] + rng.choice(samples)[at:]
            case 5:
                numbers = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", text))
                if numbers:
                    number = rng.choice(numbers)
                    text = text[: number.start()] + piece + text[number.end() :]
    return text


class _TooLongError(Exception):
    pass


@contextlib.contextmanager
def _limited():
    def late(*_):
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(function: Callable[[str], object], text: str, wrong: dict[str, str]) -> None:
    """Calls a function with a text, and puts what it did wrong under the place where it did."""
    from pjit_train.errors import UserError

    try:
        with _limited(), contextlib.redirect_stderr(io.StringIO()):
            function(text)
    except (UserError, ValueError) as error:
        # What is printed is one line whatever it holds; an empty one would say nothing.
        if not str(error).strip():
            wrong.setdefault(f"no message at {_place(error)}", repr(text))
        elif isinstance(error, UnicodeError):
            wrong.setdefault(
                f"{type(error).__name__} {str(error)[:80]} at {_place(error)}", repr(text)
            )
    except _TooLongError as error:
        wrong.setdefault(f"over {LIMIT_SECONDS} s at {_place(error)}", repr(text))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong.setdefault(
            f"{type(error).__name__} at {_place(error)}: {str(error)[:80]}", repr(text)
        )


def _place(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(runs.ROOT) in f.filename]
    frames = [f for f in frames if "tests/bench" not in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"


def surfaces(folder: Path) -> dict[str, tuple[list[str], Callable[[str], object]]]:
    """{name: (samples that are right, what reads a text of this kind)}."""
    from launch.commands.common import mesh_bindings
    from launch.configure import build_run
    from launch.pod.faults import Fault, parse_chaos
    from pjit_train.data import Bytes, TextFiles, TokenizerJson, train_tokenizer
    from pjit_train.data.cache import encode
    from pjit_train.huggingface import weights as huggingface
    from sparsity.numbers import formats
    from sparsity.post_training.one_shot import parse_pattern
    from sparsity.recipes import patterns
    from topology import TPU_V4, Part, Slice

    shipped = sorted((runs.ROOT / "configs").glob("**/*.gin"))
    shipped = [path for path in shipped if not path.name.startswith("finetune")]  # of a folder
    quick = str(runs.ROOT / "configs" / "quickstart.gin")

    def gin_file(text: str):
        path = folder / "case.gin"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        build_run([quick, str(path)])

    bindings = [
        "run.Run.steps = 7", "optimizers.AdamW.learning_rate = 1e-3", "run.Run.eval_every = 0",
        "text.TextData.seq_len = 32", "transformer.TransformerConfig.d_model = 96",
        "run.Samples.prompts = ('a', 'b')", "text.TextData.sources = [@sources.PythonStdlib()]",
        "optimizers.Schedule.shape = 'linear'", "checkpoint.CheckpointConfig.every_minutes = 2.5",
        "run.Run.sparsity = @recipes.Recipe()\nrecipes.Recipe.layers = {'feed_forward': '2:4'}",
        "sharding.MeshShape.fsdp = 2", "A = 3\nrun.Run.steps = %A", "run.Run.seed = 5",
    ]  # fmt: skip

    def recipe(text: str):
        build_run(
            [quick, str(runs.ROOT / "configs/recipes/sr_ste.gin")],
            [f"recipes.Recipe.layers = {{'feed_forward': {text!r}}}"],
        )

    def pattern(text: str):
        for parse in (patterns.parse_pattern, parse_pattern, formats.get_format):
            with contextlib.suppress(ValueError):
                parse(text)

    source = runs.ROOT / "tests" / "fixtures" / "huggingface"
    models = [path for path in sorted(source.iterdir()) if path.is_dir()]
    configs = [(path / "config.json").read_text() for path in models]

    def config_json(text: str):
        here = folder / "model"
        if not here.exists():
            shutil.copytree(models[0], here)
        (here / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        huggingface.check(here)

    data = (source / "llama" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size].decode(), data[8 + size :]

    def safetensors(text: str):
        here = folder / "tensors"
        if not here.exists():
            shutil.copytree(source / "llama", here)
        raw = text.encode("utf-8", "surrogatepass")
        (here / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + body)
        huggingface.load(here)

    trained = folder / "tokenizer.json"
    train_tokenizer(["some text of a few words"] * 3, vocab_size=280, path=str(trained))
    tokenizers = [trained.read_text()]
    for model in (
        {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"},
        {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], "unk_id": 0},
    ):
        tokenizers.append(json.dumps({"version": "1.0", "model": model}))

    def tokenizer(text: str):
        path = folder / "case.json"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        encode(["a", "ab"], TokenizerJson(path=str(path)))

    lines = [
        '{"text": "one of a few"}\n{"text": "two of a few"}\n',
        '{"text": "a document", "id": 3}\n\n{"id": 4, "text": "b, too\\n"}\n',
        '{"text": "\\u00e9 is a letter"}\r\n{"text": ""}\n',
    ]  # fmt: skip

    def jsonl(text: str):
        path = folder / "case.jsonl"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        data = TextFiles(train=str(path), validation_fraction=0.5)
        for split in ("train", "validation"):
            encode(list(data.documents(split)), Bytes())

    return {
        "gin-file": ([path.read_text() for path in shipped], gin_file),
        "gin-binding": (bindings, lambda text: build_run([quick], [text])),
        "slice": (
            ["4x4x8", "4x4x8_twisted", "4x4x16_twist:0,0,4/0,0,8/0,0,0", "2x2x1"], Slice.parse
        ),
        "part": (
            ["block:12", "host:12,3", "chip:12,0,1,3", "link:12,0,1,3,+x", "ocs:x,0,0"],
            lambda text: Part.parse(text, TPU_V4),
        ),
        "mesh": (["data=2,fsdp=2,tensor=2", "fsdp=-1", "sequence=4,data=1"], mesh_bindings),
        "fail": (["process:1@step:40", "ocs:x,0,0@step:9", "manager@step:40"], Fault.parse),
        "chaos": (["process=0.02,host=0.01", "hang=1"], parse_chaos),
        "pattern": (["2:4", "16:128", "0.5", "int4:32", "mxfp8_e4m3", "hbfp6", "W4A16"], pattern),
        "recipe": (["2:4", "1:8"], recipe),
        "config-json": (configs, config_json),
        "safetensors": ([header], safetensors),
        "tokenizer": (tokenizers, tokenizer),
        "jsonl": (lines, jsonl),
    }  # fmt: skip


def fuzz(report, name: str, cases: int, number: int) -> None:
    """Runs so many cases of one surface, and reports each place that did wrong once."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    samples, function = surfaces(folder)[name]
    for sample in samples:  # what is right is taken
        function(sample)
    wrong: dict[str, str] = {}
    began = time.monotonic()
    resource.setrlimit(
        resource.RLIMIT_DATA,
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + LIMIT_BYTES, -1),
    )
    done = 0
    while done < cases:

        @seed(number + done)
        @settings(
            max_examples=min(5000, cases - done), database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.integers(0, 2**64 - 1))
        def one(number):
            nonlocal done
            done += 1
            judge(function, changed(samples, random.Random(number)), wrong)

        one()
    report.cases += done
    for place, text in wrong.items():
        report.failure(f"{name}: {place}: {text[:300]}")
    report.count(f"{name}: {done:,} cases, {time.monotonic() - began:.0f} s")
    shutil.rmtree(folder, ignore_errors=True)
