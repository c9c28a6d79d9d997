"""What a compiled program costs on a chip: memory, flops, HBM bytes, collective bytes, and the time these must take.

In: a `jax.stages.Compiled`, its mesh and the chip's published figures. Out: `Costs`, all for one chip. Flops and bytes
are counted in the optimized program itself, its loops as often as they run; memory is the compiler's own figure.
"""

import dataclasses
import functools
from typing import Any

from lora_gen_jax.inference.hlo import parse
from lora_gen_jax.inference.matmuls import matmul_flops
from lora_gen_jax.lab.tpu.collectives import Collective, by_kind, find_collectives
from lora_gen_jax.lab.tpu.programs import Program
from lora_gen_jax.lab.tpu.topology import Chip
from lora_gen_jax.lab.tpu.traffic import hbm_bytes, kernel_flops


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM that a program needs on a chip.

    Attributes:
        arguments: weights, state and batch.
        outputs: results that are not written over an argument.
        temporaries: everything in between, at its largest.
        code: the program itself, which lies in HBM too.
    """

    arguments: float
    outputs: float
    temporaries: float
    code: float

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Costs:
    """A program's costs on one chip.

    Attributes:
        chip: published figures.
        memory: of HBM.
        model_flops: what the method needs, by formula; no recomputation.
        flops: what the program executes in matmuls.
        hbm_bytes: between HBM and core.
        collectives: all of them.
        uncounted: kernels whose flops are not known and count as none.
        compile_s: seconds to compile.
    """

    chip: Chip
    memory: Memory
    model_flops: float
    flops: float
    hbm_bytes: float
    collectives: list[Collective]
    uncounted: list[str]
    compile_s: float

    @property
    def compute_s(self) -> float:
        return self.flops / self.chip.flops

    @property
    def memory_s(self) -> float:
        return self.hbm_bytes / self.chip.hbm_rate

    @functools.cached_property
    def collective_bytes(self) -> dict[str, float]:
        return by_kind(self.collectives)

    @functools.cached_property
    def dcn_bytes(self) -> float:
        return sum((c.dcn_bytes for c in self.collectives), 0.0)

    @property
    def collective_s(self) -> float:
        """Over the interconnect and, one after the other, the network between slices."""
        ici = sum(self.collective_bytes.values()) - self.dcn_bytes
        return ici / self.chip.receive_rate + self.dcn_bytes / self.chip.dcn

    @property
    def bound(self) -> str:
        """Which of compute, memory and collective takes longest."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "collective": self.collective_s}
        return max(times, key=lambda name: times[name])

    @property
    def mfu_no_overlap(self) -> float:
        """Share of the peak if collectives run alone and memory runs beside the matmuls."""
        return self._share(max(self.compute_s, self.memory_s) + self.collective_s)

    @property
    def mfu_overlap(self) -> float:
        """Share of the peak if everything runs beside everything."""
        return self._share(max(self.compute_s, self.memory_s, self.collective_s))

    def _share(self, seconds: float) -> float:
        return self.model_flops / self.chip.flops / seconds if seconds else 0.0


def costs(compiled: Any, program: Program, chip: Chip, model_flops: float, compile_s: float) -> Costs:
    """Reads them off a compiled program; `model_flops` is one chip's."""
    module = parse(compiled.as_text())
    kernels, uncounted = kernel_flops(module)
    return Costs(
        chip=chip,
        memory=memory(compiled.memory_analysis(), program.shared_bytes),
        model_flops=model_flops,
        flops=matmul_flops(module) + kernels,
        hbm_bytes=hbm_bytes(module),
        collectives=find_collectives(module, program.mesh),
        uncounted=uncounted,
        compile_s=compile_s,
    )


def memory(analysis: Any, shared_bytes: float = 0.0) -> Memory:
    """From `compiled.memory_analysis()`."""
    return Memory(
        arguments=analysis.argument_size_in_bytes - shared_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )
