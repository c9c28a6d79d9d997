"""Names of array axes and the mesh axes they are split over: one table, loud about typos.

In: logical axis names written beside each parameter. Out: `NamedSharding`s for a mesh with the axes
``data`` (batch rows), ``fsdp`` (batch rows and frozen weights) and ``model`` (tensor parallelism).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axis. A weight is split over `model` along the axis that its matmul does not contract
# first, and over `fsdp` along the other.
LOGICAL_RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "batch": ("data", "fsdp"),
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
            raise ConfigError(f"unknown logical axis {axis!r}; LOGICAL_RULES has {', '.join(LOGICAL_RULES)}")
    return PartitionSpec(*(None if axis is None else LOGICAL_RULES[axis] for axis in axes))


def partitioned(init: Callable[..., jax.Array], *axes: str) -> Callable[..., Any]:
    """An initialiser whose result carries its logical axes; the names are checked here."""
    spec(*axes)
    return nn.with_logical_partitioning(init, axes)


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or those given; one of the sizes may be -1 and takes what the others leave.

    Raises:
        ConfigError: when the sizes do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, model], jax.device_count() if devices is None else len(devices)
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if sizes.count(-1) > 1 or count % known or (-1 not in sizes and known != count):
        raise ConfigError(f"mesh sizes data={data}, fsdp={fsdp}, model={model} do not fit {count} devices")
    sizes = [count // known if size == -1 else size for size in sizes]
    # Linen's boxed initialisers need Auto axes; jax.make_mesh makes Explicit ones by default.
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def evaluation_mesh() -> Mesh | None:
    """A mesh over this process's accelerators, for rows to be split over; None where there is one device, or a CPU.

    Every process of several evaluates everything by itself.
    """
    devices = jax.local_devices()
    return None if len(devices) == 1 or jax.default_backend() == "cpu" else make_mesh(devices=devices)


def param_shardings(mesh: Mesh, init: Callable[[], Any]) -> Any:
    """Shardings of the variables that ``init()`` would make, without making them."""
    logical = nn.get_partition_spec(jax.eval_shape(init))
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec(*axes)), logical, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
