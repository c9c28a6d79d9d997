"""Names of array axes and the mesh axes they are split over: one table, loud about typos.

In: logical axis names written beside each parameter and activation. Out: `NamedSharding`s, and constraints inside
compiled programs, for a mesh with the axes ``data`` (batch rows), ``fsdp`` (batch rows and frozen weights) and
``model`` (heads, FFN columns and, between them, tokens).

A frozen weight is stored in pieces over `fsdp` and `model`. Where a layer uses it, it is gathered over `fsdp` (every
device then computes its own rows with the whole matrix) and stays split over `model` (every device computes its
heads or columns of the same rows). What is trained is small and lies whole on every device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "model")

LOGICAL_RULES: dict[str, str | tuple[str, ...] | None] = {
    # Axes of activations.
    "batch": ("data", "fsdp"),
    "length": "model",
    # Rows while their tokens are looked up in an embedding whose columns lie over `fsdp`.
    "lookup": "data",
    # Axes of weights. One is split over `model`, along the axis that its matmul does not contract first; another over
    # `fsdp`, to be stored.
    "layers": None,
    "vocab": "model",
    "embed": "fsdp",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "norm": None,
    "positions": None,
}


def spec(*axes: str | None) -> PartitionSpec:
    """Mesh axes for logical axis names.

    Raises:
        ConfigError: for a name that is not in `LOGICAL_RULES` (Flax's own helpers ignore such a name silently).
    """
    for axis in axes:
        if axis is not None and axis not in LOGICAL_RULES:
            raise ConfigError(
                f"unknown logical axis {axis!r}; LOGICAL_RULES has {', '.join(LOGICAL_RULES)}", field=axis
            )
    return PartitionSpec(*(None if axis is None else LOGICAL_RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, split inside a compiled program as the logical names of its axes say; None is an axis that is not split.

    Without a mesh in the context (`jax.set_mesh`) nothing happens, so that modules work on one device as they are.
    An axis that its mesh axes do not divide is left whole.

    Raises:
        ConfigError: for a name that is not in `LOGICAL_RULES`.
    """
    wanted, mesh = divided_spec(x.shape, *axes), jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, wanted)


def replicate(tree: Any) -> Any:
    """The arrays of a tree, replicated on every device of the mesh in the context; unchanged without a mesh."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * jnp.ndim(x)), tree)


def divided_spec(shape: Sequence[int], *axes: str | None, mesh: Any = None) -> PartitionSpec:
    """`spec` for an array of this shape on a mesh, the context's if none is given: an axis that its mesh axes do not
    divide evenly stays whole.

    Raises:
        ConfigError: for a name that is not in `LOGICAL_RULES`.
    """
    wanted, mesh = spec(*axes), jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        return PartitionSpec()
    kept = (part if size % _size(mesh, part) == 0 else None for size, part in zip(shape, wanted, strict=True))
    return PartitionSpec(*kept)


def mesh_size(axis: str) -> int:
    """Devices that a logical axis is split over in the mesh of the context; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _size(mesh, spec(axis)[0])


def _size(mesh: Any, part: str | tuple[str, ...] | None) -> int:
    names = () if part is None else (part,) if isinstance(part, str) else part
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def partitioned(init: Callable[..., jax.Array], *axes: str) -> Callable[..., Any]:
    """An initializer whose result carries its logical axes; the names are checked here."""
    spec(*axes)
    return nn.with_logical_partitioning(init, axes)


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or those given; one of the sizes may be -1 and takes what the others leave.

    On several TPU slices `data` runs over the slices first: only what is summed or gathered over `data` crosses the
    network between them, which is the trainable tree's gradient.

    Raises:
        ConfigError: when the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = [data, fsdp, model], len(devices)
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if sizes.count(-1) > 1 or known < 1 or min(sizes) < -1 or count % known or (-1 not in sizes and known != count):
        raise ConfigError(
            f"mesh sizes data={data}, fsdp={fsdp}, model={model} do not fit {count} devices",
            field="mesh",
            remedy="set --mesh.data, --mesh.fsdp and --mesh.model to numbers whose product that is; one may be -1",
        )
    sizes = [count // known if size == -1 else size for size in sizes]
    # Linen's boxed initializers need Auto axes; jax.make_mesh makes Explicit ones by default.
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh.data = {sizes[0]} must be a multiple of the {slices} slices that the devices are on",
            field="mesh.data",
        )
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices=devices), MESH_AXES, axis_types=types)


def evaluation_mesh(fsdp: int = 1) -> Mesh | None:
    """A mesh over this process's accelerators, for rows to be split over; None where there is one device, or a CPU.

    Every process of several evaluates everything by itself. `fsdp` is that of training: weights that were spread over
    so many devices are spread over as many of these as divide it.
    """
    devices = jax.local_devices()
    if len(devices) == 1 or jax.default_backend() == "cpu":
        return None
    return make_mesh(fsdp=len(devices) if fsdp == -1 else math.gcd(fsdp, len(devices)), devices=devices)


def param_shardings(mesh: Mesh, init: Callable[[], Any]) -> Any:
    """Shardings of the variables that ``init()`` would make, without making them; see `divided_spec`."""
    boxed = jax.eval_shape(init)
    return jax.tree.map(
        lambda axes, x: NamedSharding(mesh, divided_spec(x.shape, *axes, mesh=mesh)),
        nn.get_partition_spec(boxed),
        nn.unbox(boxed),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
