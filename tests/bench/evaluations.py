"""Whole evaluations of a pretrained model, here and by `transformers` and lm-eval on torch.

    .venv-oracle/bin/python tests/bench/evaluations.py FOLDER DATA [--limit ROWS] [--only piqa]

DATA holds `wikitext2/test.txt` and `tasks/lambada_test.jsonl`, `piqa_valid.jsonl` and
`arc_easy_test.jsonl`. It runs where torch, transformers and lm-eval are (make test-oracle makes
such an environment). Each line is printed as it is known.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before the imports

import numpy as np
import torch
import transformers
import yaml

from pjit_train.evaluation.choices import run_task
from pjit_train.evaluation.perplexity import perplexity
from pjit_train.language_model import of_folder
from pjit_train.sharding import MeshShape

TASKS = {"piqa": "piqa_valid", "arc_easy": "arc_easy_test", "lambada": "lambada_test"}
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}


def timed(name: str, side: str, evaluate) -> None:
    began, busy = time.perf_counter(), time.process_time()
    figures = evaluate()
    took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - busy:.0f} s of processor"
    said = ", ".join(f"{key} {value}" for key, value in figures.items())
    print(f"{name:<10} {side:<8} {said}  ({took})", flush=True)


@torch.no_grad()
def their_perplexity(folder: Path, file: Path, sequence: int, limit: int | None) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = len(ids) // sequence
    nats = 0.0
    for i in range(min(windows, limit or windows)):
        row = ids[i * sequence : (i + 1) * sequence]
        logits = model(row[None]).logits[0, :-1].double()
        nats += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    count = min(windows, limit or windows) * (sequence - 1)
    return {"perplexity": np.exp(nats / count), "nats": nats, "predicted": count}


def their_tasks(folder: Path, data: Path, name: str, limit: int | None) -> dict:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as at:
        task = (LAST_WORD if name == "lambada" else CHOICES) | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str((data / f"{TASKS[name]}.jsonl").resolve())},
                "cache_dir": at,
            },
            "test_split": "test",
        }
        Path(at, f"{name}.yaml").write_text(yaml.safe_dump(task))
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8),
            tasks=[name],
            task_manager=TaskManager(include_path=at, include_defaults=False),
            limit=limit,
            bootstrap_iters=10,
        )["results"][name]
    return {key: value for key, value in found.items() if not isinstance(value, str)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=("wikitext2", *TASKS))
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="windows, or rows")
    args = parser.parse_args()
    model = of_folder(args.folder, MeshShape(data=1))
    text = args.data / "wikitext2" / "test.txt"
    if args.only in (None, "wikitext2"):
        options = args.folder, text, args.sequence, args.limit
        timed(
            "wikitext2",
            "torsion",
            lambda: perplexity(model, text, sequence=args.sequence, limit=args.limit),
        )
        timed("wikitext2", "torch", lambda: their_perplexity(*options))
    for name, file in TASKS.items():
        if args.only in (None, name):
            rows = args.data / "tasks" / f"{file}.jsonl"
            timed(name, "torsion", lambda rows=rows: run_task(model, rows, limit=args.limit))
            options = args.folder, args.data / "tasks", name, args.limit
            timed(name, "lm-eval", lambda options=options: their_tasks(*options))


if __name__ == "__main__":
    main()
