"""Published runs as data: what a record says of its step, and which part of it is assumed.

A record is an object such as those of docs/plan.md: chip, chips, slices, slice_topology, arch (L
layers, D width, H heads, K head_dim, F feed-forward width, V vocabulary, kv, gated, tied,
parallel_block, act), seq, batch_per_chip, mesh, remat, attention. Whatever it leaves open is
assumed by the rules below and said in `Record.assumed`; what this step cannot express is refused
with the reason. No JAX here.
"""

import dataclasses
import math
import re
from typing import Any

SHAPES = {
    # chips of a slice -> the shape assumed where a record gives none: the most cubic.
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
        192: "4x4x12", 256: "4x8x8", 384: "4x8x12", 512: "8x8x8", 768: "8x8x12",
        1024: "8x8x16", 1536: "8x12x16", 2048: "8x16x16", 3072: "12x16x16", 4096: "16x16x16",
        6144: "16x16x24",
    },
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}  # fmt: skip
DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
ALIASES = {"v5litepod": "v5e", "v5 lite": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e"}

NAMES = {"qkv": ("query", "key", "value"), "query": ("query",), "key": ("key",),
         "value": ("value",), "context": ("context",), "out_proj": ("out_proj",),
         "o_proj": ("out_proj",), "mlpwi": ("mlpwi",), "mlpwo": ("mlpwo",)}  # fmt: skip

_ARCH = {"L", "D", "H", "K", "F", "V", "kv", "gated", "tied", "parallel_block", "act", "qk_norm",
         "norm", "bias", "rope", "positions", "name"}  # fmt: skip


class NotModelled(ValueError):
    """Reason why a record's step cannot be expressed here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The step of a published run on one of its slices.

    Attributes:
      L, D, H, J, K, F, V, T: sizes, as in `published_step`; J key and value heads.
      rows: sequences of a slice's batch.
      mesh: sizes of data, fsdp and tensor on a slice.
      saved: what remat keeps; None where nothing is made again.
      flash: attention by a kernel that holds no logits.
      one_hot: the embedding is read by a matmul with one-hot rows.
    """

    L: int
    D: int
    H: int
    J: int
    K: int
    F: int
    V: int
    T: int
    rows: int
    mesh: dict[str, int]
    act: str = "gelu"
    gated: bool = False
    tied: bool = True
    parallel_block: bool = False
    qk_norm: bool = False
    saved: tuple[str, ...] | None = ()
    flash: bool = False
    one_hot: bool = False

    @property
    def parameters(self) -> int:
        """Elements of all kernels and tables."""
        attention = self.D * self.K * 2 * (self.H + self.J)
        block = attention + self.D * self.F * (3 if self.gated else 2)
        return self.L * block + self.V * self.D * (1 if self.tied else 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A record, read: the step, the slice that it runs on, and what of both is assumed.

    Attributes:
      pod: "v4", "v5p", "v5e" or "v6e"; shape: of a slice, such as "4x4x8".
      slices: how many, joined by the data-centre network.
      options: compiler flags that the record gives.
      assumed: what the record leaves open, in words.
      seconds: the published time of a step; None where there is none.
    """

    step: Record
    pod: str
    shape: str
    slices: int
    options: dict[str, Any]
    assumed: tuple[str, ...]
    seconds: float | None
    flops: float | None
    params: float | None


def read(record: Any) -> Published:
    """Reads a record.

    Raises:
      NotModelled: a field is missing or makes no sense, or the step is of a kind that the program
        here does not express.
    """
    if not isinstance(record, dict):
        raise NotModelled("the record is no object")
    assumed: list[str] = []
    chip = str(record.get("chip", "")).lower().removeprefix("tpu").strip()
    pod = ALIASES.get(chip, chip)
    if pod not in DIMENSIONS:
        raise NotModelled(f"chip {record.get('chip')!r}: one of {', '.join(DIMENSIONS)}")
    chips = _whole(record, "chips")
    slices = _whole(record, "slices", 1)
    if chips % slices:
        raise NotModelled(f"chips {chips}: not divisible by slices {slices}")
    shape = _shape(record, pod, chips // slices, assumed)
    arch = record.get("arch")
    if not isinstance(arch, dict):
        raise NotModelled("arch: want an object of sizes")
    text = " ".join(str(record.get(k, "")) for k in ("dtype", "note", "attention", "quantization"))
    if re.search(r"int8|fp8|\bAQT\b", text, re.IGNORECASE):
        raise NotModelled("int8 or fp8 matmuls: the step here multiplies in bfloat16")
    if other := sorted(k for k, v in arch.items() if k not in _ARCH and v not in (None, False, 0)):
        raise NotModelled(f"arch has {', '.join(other)}, which the step here has not")
    sizes = {name: _whole(arch, name) for name in ("L", "D", "H", "F", "V")}
    sizes["K"] = _whole(arch, "K", sizes["D"] // sizes["H"])
    kv = _whole(arch, "kv", sizes["H"])
    if sizes["H"] % kv:
        raise NotModelled(f"arch: kv {kv} does not divide H {sizes['H']}")
    seq = _whole(record, "seq")
    mesh = _mesh(record.get("mesh"), chips, slices, assumed)
    rows = _number(record, "batch_per_chip") * chips / slices
    if abs(rows - round(rows)) > 1e-6 * rows or round(rows) < 1:
        raise NotModelled(f"batch_per_chip {record['batch_per_chip']}: no whole batch of a slice")
    rows = round(rows)
    if rows % (mesh["data"] * mesh["fsdp"]):
        raise NotModelled(f"batch {rows} of a slice: not divisible by data x fsdp of {mesh}")
    act = str(arch.get("act", "gelu")).lower()
    if act not in ("relu", "gelu", "swiglu", "geglu", "silu"):
        raise NotModelled(f"act {act!r}: one of relu, gelu, swiglu, geglu")
    source = str(record.get("source", "")).lower()
    step = Record(
        **sizes,
        J=kv,
        T=seq,
        rows=rows,
        mesh=mesh,
        act=act,
        gated=bool(arch.get("gated", act in ("swiglu", "geglu"))),
        tied=bool(arch.get("tied", True)),
        parallel_block=bool(arch.get("parallel_block", False)),
        qk_norm=bool(arch.get("qk_norm", False)),
        saved=_saved(record.get("remat"), assumed),
        flash=_flash(record.get("attention"), source, pod, seq, assumed),
        one_hot=False,
    )
    if confidence := record.get("confidence"):
        assumed.append(str(confidence))
    return Published(
        step=step,
        pod=pod,
        shape=shape,
        slices=slices,
        options=options_of(str(record.get("xla") or "")) or dict(SCRIPTS[pod]),
        assumed=tuple(assumed),
        seconds=_time(record),
        flops=_positive(record.get("model_tflop_per_chip_step"), 1e12),
        params=_positive(record.get("params_B"), 1e9),
    )


# The flags of the scripts of each chip's published runs, where a record does not give its own.
SCRIPTS: dict[str, dict[str, Any]] = {
    "v4": {},
    "v5p": dict.fromkeys(
        (
            "xla_tpu_enable_data_parallel_all_reduce_opt",
            "xla_tpu_data_parallel_opt_different_sized_ops",
            "xla_tpu_enable_async_collective_fusion",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "xla_tpu_enable_async_collective_fusion_multiple_steps",
            "xla_tpu_overlap_compute_collective_tc",
            "xla_enable_async_all_gather",
            "xla_enable_async_collective_permute",
            "xla_tpu_enable_ag_backward_pipelining",
        ),
        True,
    )
    | {"xla_tpu_megacore_fusion_allow_ags": False},
    "v5e": {},
    "v6e": {},
}


def options_of(flags: str) -> dict[str, Any]:
    """Compiler options of flags as scripts write them, `--xla_...=true`; others are left out."""
    found: dict[str, Any] = {}
    for name, value in re.findall(r"--(xla_\w+)=(\S+)", flags):
        value = value.strip("'\"")
        found[name] = value == "true" if value in ("true", "false") else value
    return found


def _time(record) -> float | None:
    for name in ("step_s_published", "step_s_derived"):
        if (value := _positive(record.get(name))) is not None:
            return value
    return None


def _positive(value: Any, unit: float = 1.0) -> float | None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value * unit if real and math.isfinite(value) and value > 0 else None


def _number(of: dict, name: str) -> float:
    if (value := _positive(of.get(name))) is None:
        raise NotModelled(f"{name} {of.get(name)!r}: want a positive number")
    return value


def _whole(of: dict, name: str, default: int | None = None) -> int:
    value = of.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise NotModelled(f"{name} {value!r}: want a positive whole number")
    return value


def _shape(record: dict, pod: str, chips: int, assumed: list[str]) -> str:
    given = str(record.get("slice_topology") or "")
    if found := re.search(r"\d+(?:x\d+){1,2}(?:_twisted)?", given):
        sizes = [int(k) for k in found[0].removesuffix("_twisted").split("x")]
        if math.prod(sizes) != chips:
            raise NotModelled(f"slice_topology {given}: {math.prod(sizes)} chips and not {chips}")
        return found[0]
    if chips not in SHAPES[DIMENSIONS[pod]]:
        raise NotModelled(f"slice_topology is not given, and {chips} chips of {pod} leave it open")
    shape = SHAPES[DIMENSIONS[pod]][chips]
    assumed.append(f"slice {shape}")
    return shape


def _mesh(mesh: Any, chips: int, slices: int, assumed: list[str]) -> dict[str, int]:
    """Sizes of data, fsdp and tensor on one slice."""
    each = chips // slices
    if mesh is None:
        assumed.append(f"mesh fsdp={each}")
        return {"data": 1, "fsdp": each, "tensor": 1}
    if not isinstance(mesh, dict):
        raise NotModelled(f"mesh {mesh!r}: want an object of sizes")
    found, across = {"data": 1, "fsdp": 1, "tensor": 1}, 1
    if "rule" in mesh:
        return _rule(str(mesh["rule"]), each, assumed)
    for name, size in mesh.items():
        if name == "replica_data_model" and isinstance(size, list) and len(size) == 3:
            replica, data, model = (_whole({name: k}, name) for k in size)
            found["data"] *= replica
            found["fsdp"] *= data
            found["tensor"] *= model
            continue
        size = -1 if size == -1 else _whole(mesh, name)
        axis = name.removeprefix("ici_").removeprefix("dcn_").removeprefix("pod_")
        axis = {"model": "tensor", "mdl": "tensor", "replica": "data"}.get(axis, axis)
        if axis not in found:
            if size in (1, -1):
                continue
            raise NotModelled(f"mesh has {name}={size}, which the step here has not")
        if name.startswith(("dcn_", "pod_")):
            if axis != "data" and size != 1:
                raise NotModelled(f"mesh has {name}={size}: across slices only data is modelled")
            across *= size
        else:
            found[axis] *= size
    return _filled(found, each)


def _filled(found: dict[str, int], each: int) -> dict[str, int]:
    """The mesh with what is -1 filled up."""
    open_ = [axis for axis, size in found.items() if size < 0]
    known = math.prod(abs(size) for size in found.values())
    if len(open_) == 1 and each % known == 0:
        found[open_[0]] = each // known
    if math.prod(found.values()) != each:
        raise NotModelled(f"mesh {found}: a slice has {each} chips")
    return found


def _rule(rule: str, each: int, assumed: list[str]) -> dict[str, int]:
    """The mesh of a rule such as data=-1,fsdp=16; of alternatives the first that divides."""
    found = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in rule.split(","):
        axis, _, size = part.strip().partition("=")
        axis = {"model": "tensor"}.get(axis, axis)
        numbers = [int(n) for n in re.findall(r"-?\d+", size)]
        if axis not in found or not numbers:
            raise NotModelled(f"mesh rule {rule!r}: want sizes of data, fsdp, model")
        if len(numbers) > 1:
            assumed.append(f"{axis}={numbers[0]} of {size}")
        found[axis] = numbers[0]
    return _filled(found, each)


def _saved(remat: Any, assumed: list[str]) -> tuple[str, ...] | None:
    text = str(remat or "").strip().lower()
    first = re.split(r"[ (,;]", text)[0] if text else ""
    if first in ("full", "save_nothing", "nothing"):
        return ()
    if first in ("none", "no", "save_everything"):
        return None
    if first in ("minimal", "save_dot_with_no_batch_dims", "save_dot_with_no_batch_dim"):
        return ("dots",)
    if first in ("save_dot_only", "save_dots"):
        return ("all_dots",)
    if "offload" in text:
        raise NotModelled(f"remat {remat!r}: activations kept by the host are not modelled")
    if first.startswith("save_dot_except_mlp"):
        out = ("query", "key", "value", "out_proj")
        return (*out, "mlpwo") if first.endswith("wi") else out
    if first == "minimal_flash":
        return ("query", "key", "value", "context", "out_proj", "mlpwi", "mlpwo")
    if "everything" in text:
        return None
    if text.startswith("save") or "saved" in text:
        found = {name for key, names in NAMES.items() if key in text for name in names}
        if found:
            if "?" in text or "not re-derived" in text or "/" in text:
                assumed.append(f"remat keeps {', '.join(sorted(found))}")
            return tuple(sorted(found))
    if text in ("", "?", "unknown"):
        assumed.append("remat full")
        return ()
    raise NotModelled(f"remat {remat!r}: no list of what is kept that is known here")


def _flash(attention: Any, source: str, pod: str, seq: int, assumed: list[str]) -> bool:
    text = str(attention or "").lower()
    if re.search(r"flash|splash|pallas", text):
        return True
    if re.search(r"dense|dot", text):
        return False
    # Pax, PaLM and axlearn's configurations without "flash" in their names hold all logits; MaxText
    # takes a kernel where it has one.
    plain = any(name in source for name in ("pax", "palm", "axlearn"))
    flash = not plain and seq >= 2048
    assumed.append(f"attention {'by a flash kernel' if flash else 'with dense logits'}")
    return flash
