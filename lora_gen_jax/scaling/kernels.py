"""Flops and HBM bytes of the flash kernel, which the compiler sees as a call without a cost.

In: an `hlo.Module`. Out: flops and bytes of one chip. The kernels are those of JAX's splash attention with a causal
mask: blocks above the diagonal are skipped, blocks on it are computed whole.

| kernel | matmuls a block | read again for every block |
|---|---|---|
| fwd | scores, mixing | keys, values |
| dq  | scores, dP = dO·V, dQ = dS·K | keys, values |
| dkv | scores, dV = P·dO, dP, dK = dS·Q | queries, dO and a row's two statistics |
"""

import re

from lora_gen_jax.scaling.hlo import Array, Computation, Instruction, Module

CALL = 'custom_call_target="tpu_custom_call"'
_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)_")
# Operands are block tables (s8), then queries, keys, values, two of segments and, in backward kernels, statistics and
# dO; by kernel, the places that are read again, the first of queries being 0.
_READ_AGAIN = {"fwd": (1, 2), "dq": (1, 2), "dkv": (0, 5, 6, 7)}


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
