"""Rows of a batch over the devices that hold the weights.

In: weights on a mesh, or on one device. Out: the number of rows that divides among its devices, and arrays whose rows
are split over them. Nobody passes a mesh along: the weights say where they are.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lora_gen_jax.buckets import power_of_two
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.sharding import LOGICAL_RULES, MESH_AXES, spec


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that weights lie on; None where they lie on one device.

    Raises:
        ConfigError: for a mesh with other axes than `MESH_AXES`.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if not isinstance(mesh, Mesh) or mesh.size == 1:
        return None
    if missing := [axis for axis in MESH_AXES if axis not in mesh.axis_names]:
        raise ConfigError(
            f"the weights lie on a mesh with the axes {', '.join(map(str, mesh.axis_names))}, without"
            f" {', '.join(missing)}",
            field="mesh",
            remedy="make it with lora_gen_jax.sharding.make_mesh",
        )
    return mesh


def mesh_context(params: Any) -> AbstractContextManager[Any]:
    """The mesh of the weights as the context of a computation, where it has constraints; nothing on one device."""
    mesh = mesh_of(params)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def padded_rows(count: int, params: Any) -> int:
    """The number of rows that a batch of `count` is padded to: a power of two, more where the mesh needs them."""
    rows, mesh = power_of_two(count), mesh_of(params)
    if mesh is None:
        return rows
    axes = LOGICAL_RULES["batch"]
    assert isinstance(axes, tuple)
    shards = 1
    for axis in axes:
        shards *= mesh.shape[axis]
    return -(-rows // shards) * shards


def check_room(kept: Any, params: Any, what: str) -> None:
    """Raises ConfigError for arrays, of which the shapes are known, that all memory there is cannot hold."""
    mesh = mesh_of(params)
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    # A CPU's devices have no limit of their own, and share the machine's memory.
    room = sum(limits) if all(limits) else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    if needed > room:
        raise ConfigError(
            f"{what} take {needed / 1e9:.3g} GB, and there are {room / 1e9:.3g} GB of memory",
            field="rows",
            code="memory",
            remedy="give fewer rows (--rows), or shorter ones (--context)",
        )


def place_rows(tree: Any, params: Any) -> Any:
    """Arrays [B, …] with their rows split over the mesh of the weights; unchanged where there is none."""
    mesh = mesh_of(params)
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec("batch")))
