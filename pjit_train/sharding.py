"""The mesh, and the rules that lay arrays on it.

Every parameter names its axes logically (`("embed", "mlp")`), every activation likewise (`("batch",
"length", None)`), and `Rules` says which mesh axes each logical axis is split over. The mesh has
explicit axis types: an array's sharding is part of its type, so a layout that was not meant is an
error while tracing and not a collective found later in a profile.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from pjit_train.errors import UserError
from sparsity.ranges import Count, check_fields

Size = Count | Literal[-1]

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Number of devices along each mesh axis; one of them may be -1 and takes what is left.

    `data` replicates parameters and splits the batch; `fsdp` splits both; `sequence` splits the
    tokens of a row; `tensor` splits heads, feed-forward width and vocabulary.

    Attributes:
      slices: how many slices, joined by a data-centre network, the devices are of. `data` is laid
        across them, slice after slice, and no other axis: what crosses that network is the sum of
        gradients. Devices that do not say their slice are cut into as many equal runs.
    """

    data: Size = -1
    fsdp: Size = 1
    sequence: Size = 1
    tensor: Size = 1
    slices: Count = 1

    def __post_init__(self):
        check_fields(self, UserError)
        sizes = self._asked
        if list(sizes.values()).count(-1) > 1:
            raise UserError("mesh: only one axis may be -1 (the one that takes what is left)")

    @property
    def _asked(self) -> dict[str, int]:
        """The sizes of the axes, as they are given."""
        return {axis: size for axis, size in dataclasses.asdict(self).items() if axis != "slices"}

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of every axis on `num_devices` devices.

        Raises:
          UserError: the mesh needs more devices than there are, or does not divide them.
        """
        sizes = self._asked
        fixed = math.prod(size for size in sizes.values() if size != -1)
        shown = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        if fixed > num_devices:
            raise UserError(
                f"mesh: {shown} needs {fixed} devices and there are {num_devices}; "
                f"make it smaller, or emulate more with --devices {fixed}"
            )
        if -1 in sizes.values():
            if num_devices % fixed:
                raise UserError(
                    f"mesh: {shown} leaves {num_devices} devices to divide by {fixed}; "
                    "use sizes whose product divides the number of devices"
                )
            sizes = {a: num_devices // fixed if s == -1 else s for a, s in sizes.items()}
        if sizes["data"] % self.slices:
            raise UserError(
                f"mesh: data={sizes['data']} is laid across slices={self.slices}; use a multiple"
            )
        return sizes


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `sequence`, `tensor`, all of explicit type.

    Fewer devices than given are used where the shape asks for fewer.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.sizes(len(devices))
    count = math.prod(sizes.values())
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh: {count} devices of {len(devices)} would leave processes without work; "
            "use all of them (one axis may be -1)"
        )
    kinds, axes = (AxisType.Explicit,) * len(sizes), tuple(sizes)
    parts = _by_slice(devices[:count], shape.slices)
    of_slice = sizes | {"data": sizes["data"] // shape.slices}
    meshes = [
        jax.make_mesh(tuple(of_slice.values()), axes, axis_types=kinds, devices=part)
        for part in parts
    ]
    if len(meshes) == 1:
        return meshes[0]
    across = np.concatenate([mesh.devices for mesh in meshes], axis=axes.index("data"))
    return Mesh(across, axes, axis_types=kinds)


def _by_slice(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice, in their order.

    Raises:
      UserError: they are not of so many slices, or not equally many of each.
    """
    said: dict[int, list[jax.Device]] = {}
    for device in devices:
        said.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    parts = [said[index] for index in sorted(said)]
    if devices[0].platform != "tpu" and 1 in (len(parts), slices):  # GPUs say their host
        each = len(devices) // slices
        parts = [list(devices[i * each : (i + 1) * each]) for i in range(slices)]
    if len(parts) != slices:
        raise UserError(
            f"mesh: the devices are of {len(parts)} slices and slices={slices}; use "
            f"sharding.MeshShape.slices = {len(parts)}"
        )
    if len({len(part) for part in parts}) > 1:
        shown = ", ".join(str(len(part)) for part in parts)
        raise UserError(f"mesh: it takes {shown} devices of the slices; use equally many of each")
    return parts


def device_memory(device: jax.Device, devices: int) -> int | None:
    """Bytes of memory that a device has; None where nobody knows.

    Args:
      devices: of a mesh, which on a CPU share its memory.
    """
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
        except (AttributeError, OSError, ValueError):
            return None
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, NotImplementedError):  # one that is only compiled for
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Mesh axes of each logical axis; `()` keeps an axis whole.

    The default is fully sharded data parallel over `fsdp`, tensor parallel over `tensor` and
    sequence parallel over `sequence`, in any mix.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def __post_init__(self):
        known = {f.name for f in dataclasses.fields(MeshShape)} - {"slices"}
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            for axis in axes if isinstance(axes, (tuple, list)) else (axes,):
                if axis not in known:
                    raise UserError(
                        f"sharding rule {field.name}={axes!r}: {axis!r} is no mesh axis; "
                        f"use a tuple of {', '.join(sorted(known))}"
                    )
            object.__setattr__(self, field.name, (axes,) if isinstance(axes, str) else tuple(axes))
        if self.heads != self.kv_heads:
            raise UserError(
                f"sharding rules: heads={self.heads} and kv_heads={self.kv_heads}; query heads "
                "stay with their keys and values, so use the same for both"
            )
        if not set(self.embed) <= set(self.batch):
            raise UserError(
                f"sharding rules: embed={self.embed} is not among batch={self.batch}; parameters "
                "are gathered over axes that split the batch, so use some of those"
            )

    def spec(self, axes: Axes, *, gathered: bool = False) -> PartitionSpec:
        """Returns the partition of an array by the logical axis of each dimension.

        Args:
          axes: a logical axis, or None for one that stays whole, for each dimension.
          gathered: leave out the mesh axes that split the batch: how a parameter that is stored
            sharded over `fsdp` looks when it meets the activations.

        Raises:
          UserError: two dimensions would be split over the same mesh axis.
        """
        parts = []
        for axis in axes:
            part = () if axis is None else getattr(self, axis)
            parts.append(tuple(a for a in part if not (gathered and a in self.batch)))
        used = [a for part in parts for a in part]
        if len(set(used)) < len(used):
            raise UserError(
                f"sharding rules: {axes} would be laid on {parts}, one mesh axis twice; "
                "give these logical axes different mesh axes"
            )
        return PartitionSpec(*map(_present, parts))

    def with_whole_rows(self) -> "Rules":
        """The rules with the tokens of a row kept on one device."""
        return dataclasses.replace(self, length=())

    def shards(self, sizes: Mapping[str, int], axis: str | None) -> int:
        """Shards that a logical axis is cut into on a mesh of these sizes; 1 for None."""
        return 1 if axis is None else math.prod(sizes[a] for a in getattr(self, axis))

    def check(self, mesh: Mesh, axes: Axes, shape: tuple[int, ...], name: str) -> None:
        """Checks that the mesh divides the array `name`.

        Raises:
          UserError: a dimension is not divisible by the devices that it is split over.
        """
        axes = (None,) * (len(shape) - len(axes)) + axes
        for axis, size in zip(axes, shape, strict=True):
            over = () if axis is None else getattr(self, axis)
            ways = self.shards(mesh.shape, axis)
            if size % ways:
                shown = " * ".join(f"{a}={mesh.shape[a]}" for a in over)
                raise UserError(
                    f"mesh: {name} has {size} along its axis {axis!r}, which {shown} does not "
                    f"divide; use a divisor of {size}"
                )


def _present(part: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """The mesh axes of a part of a spec without those of size 1, which split nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    part = tuple(a for a in part if mesh.empty or mesh.shape[a] > 1)
    return part[0] if len(part) == 1 else part or None


def has_mesh() -> bool:
    """Tells whether a mesh is set (`jax.set_mesh`), that is, whether arrays have sharded types."""
    return not jax.sharding.get_abstract_mesh().empty


def reshard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` laid out by `spec`, communicating as needed; `x` itself where no mesh is set."""
    return jax.sharding.reshard(x, spec) if has_mesh() else x


def out_sharding(spec: PartitionSpec) -> PartitionSpec | None:
    """`spec` for the `out_sharding` argument of an operation, or None where no mesh is set."""
    return spec if has_mesh() else None


def fan_out(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, alike along the mesh axes `axes`, about to meet arrays that are split over them.

    Its cotangents are then parts of a sum on each device; they are added up there over all uses,
    and reduced over these axes in one collective (Megatron's f, Shoeybi et al., 2019).
    """
    mesh, spec = jax.sharding.get_abstract_mesh(), spec_of(x)
    axes = {axis for axis in axes if not mesh.empty and mesh.shape[axis] > 1}
    axes -= set(spec_axes(spec))
    return jax.sharding.reshard(x, PartitionSpec(*spec, reduced=axes)) if axes else x


def varying(tree, axes):
    """Arrays inside a `shard_map`, typed as different on the devices along `axes`.

    The cotangent of what was the same on them is so reduced once, outside the operations on it.
    """

    def cast(x):
        missing = tuple(sorted(set(axes) - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which an array inside a `shard_map` differs; none outside of one."""
    return jax.typeof(x).manual_axis_type.varying


def spec_of(x: jax.Array) -> PartitionSpec:
    """Partitions of an array, by its type: None for each of its axes where no mesh is set."""
    sharding = jax.typeof(x).sharding
    return PartitionSpec(*[None] * x.ndim) if sharding is None else sharding.spec


def spec_axes(*specs: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that partitions split anything over, each once.

    In the order of the partitions: that of a set differs between processes, and with it that of
    the devices in a collective, for which processes would then wait in vain.
    """
    parts = [part for spec in specs for part in spec.partitions if part is not None]
    axes = [axis for part in parts for axis in ((part,) if isinstance(part, str) else part)]
    return tuple(dict.fromkeys(axes))
