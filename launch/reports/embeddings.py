"""`torsion embeddings plan`: reads a model's tables, plans them, and says what was found."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from launch.reports.documents import read_json
from pjit_train.errors import UserError
from pjit_train.markdown import markdown_table
from topology import Slice
from topology.embeddings import machine as constants
from topology.embeddings.document import model_of
from topology.embeddings.greedy import greedy_plan
from topology.embeddings.machine import Machine
from topology.embeddings.plan import DoNotFitError, Plan, fitting_slice, plan_tables
from topology.embeddings.shardings import KINDS, Sharding, samples_a_chip
from topology.embeddings.tables import DLRM_V2, EmbeddingModel, synthetic
from topology.hardware import Pod

_NAMES = {"dlrm_v2": lambda: DLRM_V2, "synthetic": synthetic}
_SHOWN = 60  # tables, of which a page shows each
_LARGEST_SHOWN = 20


def model_named(
    name: str, *, batch: int | None = None, skew: float | None = None
) -> EmbeddingModel:
    """The model of a file, or one that is built in.

    Raises:
      UserError: there is neither, or the file is no model; one line that names table and key.
    """
    known = name.lower().replace("-", "_")
    path = Path(name)
    if known in _NAMES and not path.exists():
        model = _NAMES[known]()
        changed: dict[str, Any] = {} if batch is None else {"batch": batch}
        if skew is not None:
            tables = tuple(dataclasses.replace(table, skew=skew) for table in model.tables)
            changed["tables"] = tables
        return dataclasses.replace(model, **changed)
    document = read_json(name, f"a JSON file of tables, or {' or '.join(_NAMES)}")
    try:
        return model_of(document, name=path.stem, batch=batch, skew=skew)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def report(model: EmbeddingModel, shape: str, pod: Pod) -> dict[str, Any]:
    """The plan of a model on a slice, as `torsion embeddings plan --json` prints it.

    Returns:
      Times in seconds, sizes in bytes. `step_seconds` is the sum of `parts`; `bound_seconds` is a
      bound below every plan, and `gap` is step_seconds / bound_seconds - 1, at most by which the
      plan is from the best. `memory_bytes` and `bytes_sent` are the fullest chip's, `..._per_chip`
      all chips'. Of each table: `sharding`, one of "row", "hot_row", "table_row", "column",
      "table", "replicated"; `pooling`; `shards`; the `chips` that hold them, "all" where all chips
      do alike; `memory_bytes` on each of them. `torchrec` is what TorchRec's greedy gets, None
      where its plan does not fit.

    Raises:
      UserError: there is no such slice, or the tables do not fit; says how much is missing and
        which slice would do.
    """
    try:
        slice = Slice.parse(shape, pod)
        machine = Machine.of(slice)
        plan = plan_tables(model, machine)
    except DoNotFitError as error:
        raise UserError(f"{error}; {_what_would_do(model, slice)}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    greedy = greedy_plan(model, machine)
    memory = plan.memory + model.dense_bytes
    return {
        "model": model.name,
        "pod": pod.name,
        "slice": str(slice),
        "chips": machine.chips,
        "batch": model.batch,
        "batch_per_chip": samples_a_chip(model, machine),
        "ids_per_sample": model.ids,
        "tables_bytes": model.bytes,
        "step_seconds": plan.seconds,
        "bound_seconds": plan.bound,
        "gap": plan.gap,
        "parts": plan.parts,
        "memory_bytes": float(memory.max()),
        "memory_limit_bytes": float(machine.memory),
        "memory_bytes_per_chip": [float(held) for held in memory],
        "bytes_sent": float(plan.sent.max()),
        "bytes_sent_per_chip": [float(sent) for sent in plan.sent],
        "torchrec": None
        if greedy is None
        else {
            "step_seconds": greedy.seconds,
            "ratio": greedy.seconds / plan.seconds,
            "memory_bytes": float(greedy.held.max() + greedy.everywhere + model.dense_bytes),
        },
        "constants": {
            "pair_seconds_per_byte": machine.pair_seconds,
            "memory_bandwidth": machine.bandwidth,
            "access_bytes": machine.access_bytes,
            "peer_seconds": constants.PEER_SECONDS,
        },
        "tables": [_table(plan, k) for k in range(len(model.tables))],
    }


def _table(plan: Plan, k: int) -> dict[str, Any]:
    table, way = plan.model.tables[k], plan.ways[k]
    b = samples_a_chip(plan.model, plan.machine)
    return {
        "name": table.name,
        "rows": table.rows,
        "width": table.width,
        "dtype": table.dtype,
        "hotness": list(table.hotness),
        "sharding": way.kind,
        "pooling": way.pooling or None,
        "shards": _shards(plan, way),
        "chips": "all" if way.is_everywhere else plan.chips[k].tolist(),
        "hot_rows": way.hot_rows,
        "unique_ids_per_chip": table.unique(b),
        "memory_bytes": way.every_memory + way.shard_memory,
    }


def _shards(plan: Plan, way: Sharding) -> int:
    if way.is_everywhere:
        return 1 if way.kind == "replicated" else plan.machine.chips
    return way.shards * (plan.machine.hosts.shape[1] if way.on_hosts else 1)


def _what_would_do(model: EmbeddingModel, slice: Slice) -> str:
    larger = fitting_slice(model, slice.pod, slice.num_chips)
    if larger is not None:
        return f"{larger} would do, of {larger.num_chips} chips"
    return (
        f"no slice of {slice.pod.name} has enough; take narrower tables, a smaller dtype, or an "
        "optimizer with less state such as rowwise_adagrad"
    )


def describe(found: dict[str, Any]) -> str:
    """The plan for people."""
    per_chip, limit = found["memory_bytes"] / 2**30, found["memory_limit_bytes"] / 2**30
    lines = [
        f"{found['model']}: {len(found['tables'])} tables, {found['tables_bytes'] / 1e9:,.1f} GB, "
        f"{found['ids_per_sample']:g} ids a sample, batch {found['batch']:,}",
        f"on {found['slice']} of {found['pod']}, {found['chips']} chips of "
        f"{found['batch_per_chip']:,} samples",
        "",
        f"step       {_time(found['step_seconds'])}, at most {100 * found['gap']:.2g} % from the "
        f"best: none is below {_time(found['bound_seconds'])}",
        f"memory     {per_chip:.2f} GiB of {limit:.2f} on the fullest chip",
        f"sent       {found['bytes_sent'] / 2**20:,.1f} MiB a step by the chip that sends most",
    ]
    torchrec = found["torchrec"]
    lines.append(
        "TorchRec   its greedy finds no plan that fits"
        if torchrec is None
        else f"TorchRec   its greedy at the same prices: {_time(torchrec['step_seconds'])}, "
        f"{torchrec['ratio']:.2f} times as long"
    )
    lines += ["", "parts of a step", *_parts(found["parts"]), "", *_tables(found["tables"])]
    return "\n".join(lines)


_PART_NAMES = {
    "ids": "ids to the chips that own their rows",
    "gather": "rows read by their owners",
    "vectors": "vectors back",
    "gradients": "gradients to the owners",
    "update": "rows updated by their owners",
    "replicas": "all-reduce of the replicas' gradients",
    "latency": "latency of the exchanges",
}


def _parts(parts: dict[str, float]) -> list[str]:
    return [f"  {_time(seconds):>10}  {_PART_NAMES[name]}" for name, seconds in parts.items()]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _tables(tables: list[dict[str, Any]]) -> list[str]:
    counts = Counter(table["sharding"] for table in tables)
    said = [f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]]
    shown = tables
    if len(tables) > _SHOWN:
        shown = sorted(tables, key=lambda t: -t["rows"] * t["width"])[:_LARGEST_SHOWN]
    rows = [
        (
            table["name"],
            f"{table['rows']:,}",
            f"{table['width']}",
            f"{sum(table['hotness']):g}",
            table["sharding"] + (f" {table['hot_rows']:,}" if table["hot_rows"] else ""),
            table["pooling"] or "",
            _where(table["chips"]),
        )
        for table in shown
    ]
    heads = ("table", "rows", "width", "ids", "sharding", "pooled by", "chips")
    rest = len(tables) - len(shown)
    more = [f"the largest; {rest} more stand in --json"] if rest else []
    return [f"shardings: {', '.join(said)}", markdown_table(heads, rows), *more]


def _where(chips: str | list[int]) -> str:
    if chips == "all" or len(chips) <= 8:
        return chips if isinstance(chips, str) else " ".join(map(str, chips))
    return f"{' '.join(map(str, chips[:7]))} .. ({len(chips)})"
