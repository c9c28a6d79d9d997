"""Flops of the matrix multiplications of a compiled program.

In: an `hlo.Module`. Out: flops of one chip; a multiply-add is two. Elementwise work is not counted: it does not run on
the matrix unit, whose peak the flops are held against.

The TPU compiler writes every matmul as a convolution. A batch of matmuls is a convolution over the batch axis with
dilation or padding such that each place meets one matrix; places that meet nothing cost nothing.
"""

import math

from lora_gen_jax.inference.hlo import Computation, Instruction, Module


def matmul_flops(module: Module) -> float:
    """Flops of all convolutions and dots, loops counted as often as they run."""
    total = 0.0
    for computation, instruction, runs in module.walk():
        if instruction.op == "convolution":
            total += runs * convolution_flops(computation, instruction)
        elif instruction.op == "dot":
            total += runs * dot_flops(computation, instruction)
    return total


def dot_flops(computation: Computation, dot: Instruction) -> float:
    """2 · outputs · contracted sizes."""
    left = computation.operand(dot, 0).arrays[0].dims
    contracted = [left[int(axis)] for axis in (dot.attribute("lhs_contracting_dims") or "").split(",") if axis]
    return 2.0 * dot.arrays[0].size * math.prod(contracted)


def convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """2 · batch · output features · input features · places of the window that meet an element of the input."""
    labels = convolution.attribute("dim_labels")
    assert labels is not None
    inputs, rest = labels.split("_", 1)
    kernels, outputs = rest.split("->")
    left = dict(zip(inputs, computation.operand(convolution, 0).arrays[0].dims, strict=True))
    right = dict(zip(kernels, computation.operand(convolution, 1).arrays[0].dims, strict=True))
    out = dict(zip(outputs, convolution.arrays[0].dims, strict=True))
    groups = int(convolution.attribute("batch_group_count") or 1)
    flops = 2.0 * left["b"] / groups * right["o"] * right["i"]
    window = _window(convolution.attribute("window") or "")
    for place, axis in enumerate(sorted(set(inputs) - {"b", "f"})):
        settings = {name: values[place] for name, values in window.items() if len(values) > place}
        flops *= _meetings(left[axis], right[axis], out[axis], settings)
    return flops


def _window(text: str) -> dict[str, list[str]]:
    return {name: value.split("x") for name, _, value in (part.partition("=") for part in text.split())}


def _meetings(inputs: int, kernel: int, outputs: int, settings: dict[str, str]) -> int:
    # Pairs (output place, window place) over an element of the input: not over padding, nor between dilated elements.
    stride, left, right = (int(settings.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    pad = int(settings.get("pad", "0_0").split("_")[0])
    extent, count = (inputs - 1) * left + 1, 0
    for place in range(kernel):
        # Positions o·stride + place·right - pad in [0, extent) that are multiples of `left`.
        offset = place * right - pad
        period = left // math.gcd(left, stride)
        first = next((o for o in range(period) if (o * stride + offset) % left == 0), None)
        if first is None:
            continue
        low = max(0, math.ceil(-offset / stride))
        high = min(outputs - 1, (extent - 1 - offset) // stride)
        start = low + (first - low) % period
        count += max(0, (high - start) // period + 1)
    return count
