"""A model's tables out of a JSON document, by the spellings that libraries use.

A document is an object with `batch` and `tables`, a list of objects with at least `rows` and
`width`, or an object of them by name. What stands beside `tables` holds for each table that does
not say it itself. In place of `tables`, `rows` and `hotness` may be lists with an entry for each
table, as in MLPerf's reference. A list alone is the tables.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from topology.embeddings.skew import MOST_ROWS, MOST_SKEW
from topology.embeddings.tables import (
    DTYPES,
    MOST_BATCH,
    MOST_HOTNESS,
    MOST_SLOTS,
    MOST_WIDTH,
    SLOTS,
    EmbeddingModel,
    Table,
)

_SPELLINGS = {
    "name": "name table table_name",
    "rows": "rows vocabulary_size vocab_size vocabulary vocab num_embeddings cardinality num_rows "
    "num_embeddings_per_feature table_sizes",
    "width": "width dim d embedding_dim embedding_dimension embedding_size dimension columns",
    "hotness": "hotness multi_hot multi_hot_size multi_hot_sizes pooling_factor pooling_factors "
    "valency ids_per_sample ids",
    "features": "features feature_names num_features",
    "dtype": "dtype data_type precision type",
    "optimizer": "optimizer",
    "slots": "slots optimizer_slots slots_per_element",
    "row_slots": "row_slots slots_per_row",
    "skew": "skew zipf alpha zipf_exponent exponent",
    "bundled": "bundled",
    "combiner": "combiner pooling",
}
_OF_TABLE = {word: key for key, words in _SPELLINGS.items() for word in words.split()}
_OF_MODEL = {
    word: key
    for key, words in {
        "model": "name model",
        "tables": "tables embedding_tables table_specs",
        "batch": "batch batch_size global_batch global_batch_size samples",
        "dense_bytes": "dense_bytes",
        "source": "source comment",
    }.items()
    for word in words.split()
}
_DTYPE_NAMES = {
    "f32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
    "i8": "int8",
    "i4": "int4",
} | {name: name for name in DTYPES}
_OPTIMIZER_NAMES = {
    "row_wise_adagrad": "rowwise_adagrad",
    "exact_row_wise_adagrad": "rowwise_adagrad",
    "exact_rowwise_adagrad": "rowwise_adagrad",
    "lazy_adam": "adam",
    "exact_adagrad": "adagrad",
    "exact_sgd": "sgd",
} | {name: name for name in SLOTS}
_COMBINERS = ("sum", "mean", "sqrtn")


def model_of(
    document: Any, *, name: str = "model", batch: int | None = None, skew: float | None = None
) -> EmbeddingModel:
    """The model of a document, as `json.load` gives it.

    Args:
      name: of the model, where the document has none.
      batch: samples of a step, in place of the document's.
      skew: in place of all tables'.

    Raises:
      ValueError: something is missing, stands twice, is unknown or out of its range; names the
        table and the key.
    """
    if isinstance(document, list):
        document = {"tables": document}
    if not isinstance(document, Mapping):
        raise ValueError(f"{_short(document)}: want an object with batch and tables")
    of_model, shared = _sorted_keys(document)
    entries = _entries(of_model.get("tables"), shared)
    if skew is not None:
        entries = [(of, said | {"skew": skew}) for of, said in entries]
    tables = [_table(of, said) for of, said in entries]
    given = of_model.get("batch") if batch is None else batch
    if given is None:
        raise ValueError("batch: is missing; give the samples of a step, such as 65536")
    size = _whole("batch", given, 1, MOST_BATCH)
    dense = _number("dense_bytes", of_model.get("dense_bytes", 0), 0, 2**60)
    label = of_model.get("model", name)
    if not isinstance(label, str):
        raise ValueError(f"name {_short(label)}: want a text")
    return EmbeddingModel(
        name=label,
        tables=tuple(tables),
        batch=size,
        dense_bytes=dense,
        source=str(of_model.get("source", "")),
    )


def _sorted_keys(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is of the model, what is of all tables), by the names here."""
    of_model: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for word, value in document.items():
        if key := _OF_MODEL.get(_plain(word)):
            _put(of_model, key, word, value, "")
        elif (key := _OF_TABLE.get(_plain(word))) and key != "name":
            _put(shared, key, word, value, "")
        else:
            raise ValueError(f"{_short(word)}: is no key of a model{_near(word, _ALL)}")
    return of_model, shared


_ALL = [*_OF_MODEL, *_OF_TABLE]


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(_plain(word), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _put(to: dict[str, Any], key: str, word: str, value: Any, of: str) -> None:
    if key in to:
        raise ValueError(f"{of}{_short(word)}: says again what another key says ({key}); give one")
    to[key] = value


def _entries(tables: Any, shared: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(how a message names it, what is said of it) for each table."""
    if tables is None:
        rows = shared.get("rows")
        if not isinstance(rows, list):
            raise ValueError("tables: is missing; give a list of objects with rows and width")
        return [
            (
                f"table {k}: ",
                {key: _entry(key, value, k, len(rows)) for key, value in shared.items()},
            )
            for k in range(len(rows))
        ]
    if isinstance(tables, Mapping):
        for name, said in tables.items():
            if isinstance(said, Mapping) and "name" in said and said["name"] != name:
                raise ValueError(f"table {name!r}: name {_short(said['name'])}: is not {name!r}")
        named = [(name, said) for name, said in tables.items()]
    elif isinstance(tables, list):
        named = [(None, said) for said in tables]
    else:
        raise ValueError(f"tables {_short(tables)}: want a list of objects with rows and width")
    if not named:
        raise ValueError("tables: is empty; give at least one with rows and width")
    found = []
    for k, (name, said) in enumerate(named):
        of = f"table {k if name is None else repr(name)}: "
        if not isinstance(said, Mapping):
            raise ValueError(f"{of}{_short(said)}: want an object with rows and width")
        if name is None and isinstance(said.get("name"), str):
            of = f"table {said['name']!r}: "
        own: dict[str, Any] = {} if name is None else {"name": name}
        for word, value in said.items():
            key = _OF_TABLE.get(_plain(word))
            if key is None:
                raise ValueError(
                    f"{of}{_short(word)}: is no key of a table{_near(word, [*_OF_TABLE])}"
                )
            if key == "name" and name is not None:
                continue
            _put(own, key, word, value, of)
        own.setdefault("name", f"table_{k}")
        if isinstance(own["name"], str) and own["name"]:
            of = f"table {own['name']!r}: "
        other = own.keys() & set(_STATE)  # its own, of one kind or the other
        rest = {k: v for k, v in shared.items() if not (other and k in _STATE)}
        found.append((of, rest | own))
    return found


_STATE = ("optimizer", "slots", "row_slots")


def _entry(key: str, value: Any, k: int, count: int) -> Any:
    """The k-th table's of a list that has an entry for each table."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise ValueError(f"{key}: {len(value)} entries for {count} tables; give one each")
    return value[k]


def _table(of: str, said: dict[str, Any]) -> Table:
    for key in ("rows", "width"):
        if key not in said:
            words = _SPELLINGS[key].split()
            raise ValueError(f"{of}{key}: is missing; give it ({', '.join(words[:4])})")
    name = said.get("name", of.removesuffix(": ").replace("table ", "table_"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"{of}name {_short(name)}: want a text")
    if "combiner" in said:
        _choice(f"{of}combiner", said["combiner"], {c: c for c in _COMBINERS})
    dtype = _choice(f"{of}dtype", said.get("dtype", "float32"), _DTYPE_NAMES)
    if "optimizer" in said and {"slots", "row_slots"} & said.keys():
        raise ValueError(f"{of}optimizer and slots: both say the state of a row; give one")
    optimizer = _choice(f"{of}optimizer", said.get("optimizer", "adagrad"), _OPTIMIZER_NAMES)
    slots, row_slots = SLOTS[optimizer]
    if {"slots", "row_slots"} & said.keys():
        slots = _number(f"{of}slots", said.get("slots", 0), 0, MOST_SLOTS)
        row_slots = _number(f"{of}row_slots", said.get("row_slots", 0), 0, MOST_SLOTS)
    bundled = said.get("bundled", False)
    if not isinstance(bundled, bool):
        raise ValueError(f"{of}bundled {_short(bundled)}: true or false")
    return Table(
        name=name,
        rows=_whole(f"{of}rows", said["rows"], 1, MOST_ROWS),
        width=_whole(f"{of}width", said["width"], 1, MOST_WIDTH),
        hotness=_hotness(of, said),
        dtype=dtype,
        slots=slots,
        row_slots=row_slots,
        skew=_number(f"{of}skew", said.get("skew", 0), 0, MOST_SKEW),
        bundled=bundled,
    )


def _hotness(of: str, said: dict[str, Any]) -> tuple[float, ...]:
    """Ids a sample of each feature of a table."""
    hotness, features = said.get("hotness", 1), said.get("features")
    every = [
        _id_count(f"{of}hotness", h) for h in (hotness if isinstance(hotness, list) else [hotness])
    ]
    if isinstance(features, list):
        if not features:
            raise ValueError(f"{of}features: is empty; give at least one")
        if any(isinstance(feature, Mapping) for feature in features):
            return tuple(_feature(of, feature, every) for feature in features)
        count = len(features)
    else:
        count = len(every) if features is None else _whole(f"{of}features", features, 1, 10**5)
    if len(every) not in (1, count) or not every:
        raise ValueError(f"{of}hotness: {len(every)} entries for {count} features; give one each")
    return tuple(every * count if len(every) == 1 else every)


def _feature(of: str, feature: Any, every: list[float]) -> float:
    if not isinstance(feature, Mapping):
        raise ValueError(f"{of}features: {_short(feature)}: want an object with hotness, as others")
    known = {word: key for word, key in _OF_TABLE.items() if key in ("name", "hotness")}
    found = {known.get(_plain(word), word): value for word, value in feature.items()}
    if unknown := found.keys() - {"name", "hotness"}:
        raise ValueError(f"{of}features: {_short(next(iter(unknown)))}: want name and hotness only")
    return _id_count(f"{of}hotness", found.get("hotness", every[0]))


def _id_count(name: str, value: Any) -> float:
    found = _number(name, value, 0, MOST_HOTNESS)
    if not found:
        raise ValueError(f"{name} 0: want more than 0 ids a sample")
    return found


def _choice(name: str, value: Any, known: Mapping[str, str]) -> str:
    word = _plain(value) if isinstance(value, str) else ""
    if word not in known:
        raise ValueError(
            f"{name} {_short(value)}: one of {', '.join(dict.fromkeys(known.values()))}"
        )
    return known[word]


def _whole(name: str, value: Any, least: int, most: int) -> int:
    found = _number(name, value, least, most, "a whole number")
    if found != int(found):
        raise ValueError(f"{name} {_short(value)}: a whole number, {least} .. {most}")
    return int(value)


def _number(name: str, value: Any, least: float, most: float, kind: str = "a number") -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or (isinstance(value, float) and math.isnan(value)) or not least <= value <= most:
        raise ValueError(f"{name} {_short(value)}: {kind}, {least:g} .. {most:g}")
    return float(value)


def _short(value: Any) -> str:
    text = (
        "of thousands of digits" if isinstance(value, int) and abs(value) > 10**40 else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."
