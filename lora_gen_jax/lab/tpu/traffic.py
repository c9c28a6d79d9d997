"""Bytes that a compiled program moves between HBM and a chip's core, and flops of its flash kernels.

In: an `hlo.Module`. Out: bytes and flops of one chip. Every instruction outside a fusion reads its operands and writes
its results where these lie in HBM; what the compiler placed on the core (memory space 1) costs nothing, the copies
there and back do. Of an operand that is only sliced or indexed, the slice counts; of one that is updated in place, the
update. A fusion's inner arrays exist nowhere.

The flash kernels are those of JAX's splash attention with a causal mask, which the compiler sees as calls without a
cost: blocks above the diagonal are skipped, blocks on it are computed whole.

| kernel | matmuls a block | read again for every block |
|---|---|---|
| fwd | scores, mixing | keys, values |
| dq  | scores, dP = dO·V, dQ = dS·K | keys, values |
| dkv | scores, dV = P·dO, dP, dK = dS·Q | queries, dO and a row's two statistics |
"""

import re

from lora_gen_jax.inference.hlo import Array, Computation, Instruction, Module
from lora_gen_jax.lab.tpu.collectives import KINDS

CALL = 'custom_call_target="tpu_custom_call"'
_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)_")
# Operands are block tables (s8), then queries, keys, values, two of segments and, in backward kernels, statistics and
# dO; by kernel, the places that are read again, the first of queries being 0.
_READ_AGAIN = {"fwd": (1, 2), "dq": (1, 2), "dkv": (0, 5, 6, 7)}
# They give other names to arrays that exist, run others (which are counted), or end what was counted at its start.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "copy-done", "slice-done", "iota", "opt-barrier", "domain", "async-done"}
_FREE |= {f"{kind}-done" for kind in KINDS} | {"async-update", "add-dependency"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_RENAMES = {"bitcast", "reshape", "tuple", "get-tuple-element"}
_COLLECTIVES = {f"{kind}{end}" for kind in KINDS for end in ("", "-start")}
# Parts of a collective that runs beside several fusions: the arrays are passed on, not read.
_CHAIN = ("AsyncCollectiveStart", "AsyncCollectiveDone")


def hbm_bytes(module: Module) -> float:
    """Bytes read and written, loops counted as often as they run."""
    total = 0.0
    for computation, instruction, runs in module.walk():
        if computation.name in module.fused or instruction.op in _FREE or "AllocateBuffer" in instruction.text:
            continue
        total += runs * instruction_bytes(module, computation, instruction)
    return total


def instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes of one run of an instruction outside a fusion."""
    i, op = instruction, instruction.op
    if op in ("fusion", "async-start"):
        return _fusion_bytes(module, computation, i)
    if op in ("copy-start", "slice-start"):
        source = computation.operand(i, 0).arrays[0]
        target = i.arrays[0] if op == "copy-start" else i.arrays[1]
        return (target.bytes if source.space == 0 else 0.0) + target.hbm_bytes
    written = sum(array.hbm_bytes for array in i.arrays)
    if op in _SLICES:
        table = computation.operand(i, 0).arrays[0]
        return written + (i.arrays[0].bytes if table.space == 0 else 0.0)
    if op in ("dynamic-update-slice", "scatter"):
        update = computation.operand(i, 1 if op == "dynamic-update-slice" else 2).arrays[0]
        return update.hbm_bytes + (update.bytes if i.arrays[0].space == 0 else 0.0)
    if is_kernel(i):
        written += splash_extra_bytes(computation, i)
    if op.endswith("-start"):
        written = sum(array.hbm_bytes for array in i.arrays[len(i.operands) : 2 * len(i.operands)])
    return written + sum(computation.instructions[name].arrays[0].hbm_bytes for name in dict.fromkeys(i.operands))


def _fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> float:
    inner = module.computations[fusion.called[0]]
    total = 0.0
    for index, name in enumerate(fusion.operands):
        array = computation.instructions[name].arrays[0]
        if array.space == 0:
            total += min(array.bytes, _read(module, inner, inner.parameters[index]))
    return total + _written(module, inner, fusion)


def _read(module: Module, inner: Computation, parameter: Instruction) -> float:
    # What is read of a fusion's operand: all of it as soon as one user reads all. Fusions may hold fusions.
    total = 0.0
    for user in inner.users.get(parameter.name, []):
        if user.op in _RENAMES and not user.root:
            total += _read(module, inner, user)
        elif user.op == "fusion":
            nested = module.computations[user.called[0]]
            places = (place for place, name in enumerate(user.operands) if name == parameter.name)
            total += sum(_read(module, nested, nested.parameters[place]) for place in places)
        elif user.op in _SLICES and user.operands[0] == parameter.name:
            total += user.arrays[0].bytes
        elif _passes_on(user) or (user.op == "dynamic-update-slice" and user.operands[0] == parameter.name):
            continue
        else:
            return parameter.arrays[0].bytes
    return total


def _written(module: Module, inner: Computation, fusion: Instruction) -> float:
    root = inner.root
    leaves = [inner.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    if len(leaves) != len(fusion.arrays):
        return sum(array.hbm_bytes for array in fusion.arrays)
    total = 0.0
    for leaf, array in zip(leaves, fusion.arrays, strict=True):
        computation, leaf = _origin(module, inner, leaf)
        if array.space != 0 or leaf.op == "parameter" or (_passes_on(leaf) and root.op == "tuple"):
            continue
        updates = leaf.op == "dynamic-update-slice"
        total += computation.operand(leaf, 1).arrays[0].bytes if updates else array.bytes
    return total


def _origin(module: Module, computation: Computation, leaf: Instruction) -> tuple[Computation, Instruction]:
    # The instruction that makes a result, behind other names for it and inside fusions of one result.
    while True:
        if leaf.op in ("bitcast", "reshape"):
            leaf = computation.operand(leaf, 0)
        elif leaf.op == "fusion" and len(leaf.arrays) == 1:
            nested = module.computations[leaf.called[0]]
            if nested.root.op == "parameter":
                return computation, leaf
            computation, leaf = nested, nested.root
        else:
            return computation, leaf


def _passes_on(instruction: Instruction) -> bool:
    chained = instruction.op in _COLLECTIVES and "chain_id" in instruction.text
    return chained or instruction.op == "tuple" or any(name in instruction.text for name in _CHAIN)


def is_kernel(instruction: Instruction) -> bool:
    return instruction.op == "custom-call" and CALL in instruction.text


def kernel_flops(module: Module) -> tuple[float, list[str]]:
    """Flops of all flash kernels, and the names of kernels that are no such and count as nothing."""
    total, unknown = 0.0, []
    for computation, instruction, runs in module.walk():
        if not is_kernel(instruction):
            continue
        flops = splash_flops(computation, instruction)
        if flops is None:
            unknown.append(instruction.name)
        total += runs * (flops or 0.0)
    return total, unknown


def splash_flops(computation: Computation, call: Instruction) -> float | None:
    """2 · matmuls · rows · heads · computed (query, key) pairs · width; None for another kernel."""
    found = _SPLASH.search(call.name)
    if found is None:
        return None
    _, operands = _operands(computation, call)
    rows, heads, length, width = _four(operands[0])
    return 2.0 * _MATMULS[found[1]] * rows * heads * _blocks(computation, call) * length**2 * width


def splash_extra_bytes(computation: Computation, call: Instruction) -> float:
    """Bytes read from HBM beyond every operand once; 0 for another kernel."""
    found = _SPLASH.search(call.name)
    if found is None:
        return 0.0
    tables, operands = _operands(computation, call)
    heads = _four(operands[0])[1]
    total = 0.0
    for place in _READ_AGAIN[found[1]]:
        array = operands[place]
        repeats = _blocks(computation, call) * tables[0].dims[-1 if found[1] != "dkv" else -2]
        total += array.hbm_bytes * (repeats * heads / _four(array)[1] - 1)
    return total


def _operands(computation: Computation, call: Instruction) -> tuple[list[Array], list[Array]]:
    arrays = [computation.instructions[name].arrays[0] for name in call.operands]
    tables = [array for array in arrays if array.dtype == "s8"]
    return tables, arrays[len(tables) :]


def _four(array: Array) -> tuple[int, int, int, int]:
    dims = (1,) * (4 - len(array.dims)) + array.dims
    return dims[0], dims[1], dims[2], dims[3]


def _blocks(computation: Computation, call: Instruction) -> float:
    # The share of all blocks that is on or below the diagonal, from the shape [heads, query blocks, key blocks] of the
    # kernel's table (transposed for dkv, which changes nothing: blocks are square).
    table = _operands(computation, call)[0][0]
    rows, columns = table.dims[-2:]
    computed = sum(-(-(i + 1) * columns // rows) for i in range(rows))
    return computed / (rows * columns)
