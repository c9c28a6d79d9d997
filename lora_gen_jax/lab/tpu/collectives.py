"""Collectives of a compiled program: which, over which chips, and how many bytes each chip receives.

In: an `hlo.Module` and the mesh it was compiled for. Out: `Collective`s, one a distinct instruction.

Bytes that a chip receives of n that take part: of an all-gather (n-1)/n of its result, of a reduce-scatter (n-1)/n of
its input, of an all-reduce twice that (it is one of each), of an all-to-all (n-1)/n of its operand, of a permutation
the operand. Between slices the compiler has collectives of its own, which every chip does with its fellows on the other
slices through the hosts, written as a pair of send and receive; n is then the number of slices. Should a group span
slices all the same, (s-1)/(n-1) of its bytes are taken to cross: each slice combines its own part first.

An asynchronous pair counts at its start. The TPU compiler writes a reduce-scatter as a fusion of an all-reduce with a
slice, and runs a collective beside the matmuls of several fusions, each of which repeats it with the same chain number:
such a chain counts once.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_gen_jax.inference.hlo import Array, Computation, Instruction, Module

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What a chip receives of n that take part, as a share of the array named above.
_FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
}
_SPELLINGS = {f"{kind}{end}": kind for kind in KINDS for end in ("", "-start")}
_SPELLINGS |= {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LIST_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of `KINDS`.
        shape: what the bytes are of, as dtype[sizes] on one chip.
        count: how often it runs in one call of the program.
        bytes: that a chip receives in all these runs.
        dcn_bytes: of these, that cross the data-center network between slices.
        axis: of the mesh, as "fsdp" or "data+fsdp".
        op_name: where in the source program it is from.
    """

    kind: str
    shape: str
    count: float
    bytes: float
    dcn_bytes: float
    axis: str
    op_name: str


def find_collectives(module: Module, mesh: Any) -> list[Collective]:
    """All collectives, those that move most bytes first; groups of one chip are left out."""
    found, chains = [], set()
    callers = {name: i.op_name for _, i, _ in module.walk() if i.op == "fusion" for name in i.called}
    for computation, instruction, runs in module.walk():
        if instruction.op == "recv" and (transfer := _TRANSFER.search(instruction.text)):
            found.append(_between_slices(computation, instruction, transfer[1], runs, slices_of([], mesh)))
        kind = _SPELLINGS.get(instruction.op)
        if kind is None:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.text)
        if chain is not None and computation.name in module.fused:
            key = (kind, chain[1], instruction.attribute("channel_id"))
            if key in chains:
                continue
            chains.add(key)
        if kind == "all-reduce" and computation.name in module.fused and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        group = _group(instruction, mesh.devices.size)
        if len(group) > 1:
            moved, shape = _moved(kind, computation, instruction, len(group))
            name = instruction.op_name or callers.get(computation.name, "")
            across = runs * moved * (slices_of(group, mesh) - 1) / (len(group) - 1)
            found.append(Collective(kind, shape, runs, runs * moved, across, axis_of(group, mesh), name))
    return sorted(found, key=lambda c: -c.bytes)


def _between_slices(
    computation: Computation, receive: Instruction, transfer: str, runs: float, slices: int
) -> Collective:
    kind = _TRANSFERS.get(transfer, "collective-permute")
    name = receive.attribute("_xla_host_transfer_rendezvous")
    sends = (i for i in computation.instructions.values() if i.op == "send")
    send = next((i for i in sends if i.attribute("_xla_host_transfer_rendezvous") == name), receive)
    array = (receive if kind == "all-gather" else send).arrays[0]
    moved = runs * _FACTORS[kind](slices) * array.bytes
    return Collective(kind, _shape([array]), runs, moved, moved, "slices", receive.op_name or send.op_name)


def _moved(kind: str, computation: Computation, instruction: Instruction, chips: int) -> tuple[float, str]:
    inputs = [computation.instructions[name].arrays[0] for name in instruction.operands]
    inputs = inputs or list(instruction.arrays)
    moved = _results(instruction) if kind == "all-gather" else inputs
    return _FACTORS[kind](chips) * _bytes(moved), _shape(moved)


def _results(instruction: Instruction) -> Sequence[Array]:
    # An asynchronous start gives its operands, its results and numbers of its own.
    count = len(instruction.operands)
    return instruction.arrays[count : 2 * count] if instruction.op.endswith("-start") else instruction.arrays


def _bytes(arrays: Sequence[Array]) -> float:
    return sum(array.bytes for array in arrays)


def _shape(arrays: Sequence[Array]) -> str:
    return " ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in arrays)


def _group(instruction: Instruction, chips: int) -> list[int]:
    # A group among the instruction's own (all are alike), by number in the mesh's order.
    if pairs := _PAIRS.search(instruction.text):
        # Of a permutation, its longest single hop: a ring's wrap-around is still along the same axis.
        hops = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
        return sorted(max(hops, key=lambda hop: abs(hop[0] - hop[1])))
    groups = replica_groups(instruction.text)
    return groups[0] if groups else list(range(chips))


def replica_groups(text: str) -> list[list[int]]:
    """Groups of chips from an instruction's text, in any of XLA's three spellings; empty for "all"."""
    if found := _MESH_GROUPS.search(text):
        return _mesh_groups(*found.groups())
    if found := _IOTA_GROUPS.search(text):
        shape, sizes = ([int(n) for n in part.split(",")] for part in found.groups()[:2])
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        if found[3]:
            numbers = numbers.transpose([int(n) for n in found[3].split(",")])
        return numbers.reshape(shape).tolist()
    if found := _LIST_GROUPS.search(text):
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", found[1]) if group]
    return []


def _mesh_groups(axes: str, devices: str | None, named: str) -> list[list[int]]:
    # mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: groups along axis a; 'a':(2)2 is a part of that axis.
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if devices and (found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)):
        numbers = numbers.reshape([int(n) for n in found[1].split(",")])
        numbers = numbers.transpose([int(n) for n in found[2].split(",")]) if found[2] else numbers
    elif devices:
        numbers = np.array([int(n) for n in re.findall(r"\d+", devices)])
    grid, inner = [], []
    wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in
              re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)}  # fmt: skip
    for name, size in sizes.items():
        before, part = wanted.get(name, (size, 1))
        part = part or size
        inner.append(len(grid) + 1)
        grid += [before, part, size // (before * part)]
    numbers = np.moveaxis(numbers.reshape(grid), inner, range(-len(inner), 0))
    return numbers.reshape(-1, math.prod(grid[i] for i in inner)).tolist()


def axis_of(group: list[int], mesh: Any) -> str:
    """Axes of the mesh that a group runs along; chips are numbered in the mesh's order."""
    coordinates = np.array(np.unravel_index(group, mesh.devices.shape))
    names = []
    for name, values in zip(mesh.axis_names, coordinates, strict=True):
        distinct, size = len(set(values.tolist())), mesh.shape[name]
        if distinct > 1:
            names.append(name if distinct == size or len(group) == 2 else f"{name}({distinct} of {size})")
    return "+".join(names)


def slices_of(group: list[int], mesh: Any) -> int:
    """Slices that a group spans; that the mesh has, for an empty one."""
    devices = mesh.devices.reshape(-1)
    return len({getattr(device, "slice_index", 0) for device in (devices[group] if group else devices)})


def by_kind(collectives: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a chip receives, by kind."""
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for collective in collectives:
        total[collective.kind] += collective.bytes
    return total
