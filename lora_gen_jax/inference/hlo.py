"""The compiler's optimized program as data: computations, instructions, and how often each runs.

In: the text of a program, compiled (`compiled.as_text()`, one chip's) or before optimization. Out: a `Module`.

A scanned model's layers are the body of a while loop, which XLA's own cost analysis counts once whatever its length.
Here every computation has its number of runs: a loop's body runs as often as the loop's condition says (a counter that
starts at a constant and is compared with a constant, which is what scans, maps and counted loops become).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from lora_gen_jax.errors import LoraGenError

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0, "bf16": 16}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|async_execution_thread_calls)=%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^  (ROOT )?%([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
        dtype: XLA's name of it.
        dims: its sizes on one chip.
        space: memory space; 0 is HBM, the others are on the core (1 is VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(digits[0]) if digits else 8
        return self.size * bits / 8

    @property
    def hbm_bytes(self) -> float:
        return self.bytes if self.space == 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, op: its name and operation.
        arrays: results; several for a tuple, nested ones in a row.
        operands: names of the instructions it reads.
        text: attributes and metadata, as printed.
        root: whether it is the computation's result.
        arguments: what stands in the parentheses, for constants and parameters.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool
    arguments: str

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        names = _CALLED.findall(self.text)
        for several in _BRANCHES.findall(self.text):
            names += _NAME.findall(several)
        return names

    def attribute(self, name: str) -> str | None:
        """The value of ``name=value`` or ``name={value}`` in the attributes."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.text)
        return None if found is None else found[1] if found[1] is not None else found[2]

    @property
    def op_name(self) -> str:
        """Where in the source program it is from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A program of one chip.

    Attributes:
        computations: by name; one stands before those that call it.
        entry: name of the one that runs first.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside a fusion: they read and write no memory of their own."""
        names: set[str] = set()
        for computation in reversed(self.computations.values()):
            for i in computation.instructions.values():
                if i.op == "fusion" or computation.name in names:
                    names.update(i.called)
        return frozenset(names)

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs.

        A loop whose end is data counts once; of a conditional every branch counts once; what only combines two
        elements (the addition of a sum) counts once for each instruction that names it.
        """
        runs = dict.fromkeys(self.computations, 0.0)
        runs[self.entry] = 1.0
        for computation in reversed(self.computations.values()):
            for i in computation.instructions.values():
                times = (self.trips(computation, i) or 1) if i.op == "while" else 1
                for name in i.called:
                    runs[name] += times * runs[computation.name]
        return runs

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Iterations of a while loop; None where they depend on data."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        name = re.search(r"condition=%([\w.\-]+)", loop.text)
        if name is None:
            return None
        condition = self.computations[name[1]]
        compare = condition.root
        if compare.op != "compare" or compare.attribute("direction") not in ("LT", "LE", "GT", "GE"):
            return None
        first, last = (self._value(condition, name, computation, loop) for name in compare.operands)
        if first is None or last is None:
            return None
        return abs(last - first) + (compare.attribute("direction") in ("LE", "GE"))

    def _value(self, inner: Computation, name: str, outer: Computation, loop: Instruction) -> int | None:
        # A side of the comparison: a constant, or a part of the loop's state, which starts as a constant.
        instruction = _source(inner, inner.instructions[name])
        if instruction.op == "get-tuple-element":
            index = instruction.attribute("index")
            state = _source(outer, outer.operand(loop, 0))
            if index is None or state.op != "tuple":
                return None
            instruction = _source(outer, outer.operand(state, int(index)))
        found = re.fullmatch(r"-?\d+", instruction.arguments) if instruction.op == "constant" else None
        return None if found is None else int(found[0])

    def walk(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that runs, with its computation and how often."""
        for computation in self.computations.values():
            times = self.runs[computation.name]
            if times:
                for instruction in computation.instructions.values():
                    yield computation, instruction, times


def _source(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.op in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"):
        instruction = computation.operand(instruction, 0)
    return instruction


def parse(text: str) -> Module:
    """A module from its text.

    Raises:
        LoraGenError: when the text is no HLO module.
    """
    computations: dict[str, Computation] = {}
    entry, name, instructions = "", "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, instructions = header[2], {}
            computations[name] = Computation(name, instructions)
            entry = name if header[1] else entry
        elif name and (found := _LINE.match(line)):
            instruction = _instruction(line, found)
            instructions[instruction.name] = instruction
    if not entry:
        raise LoraGenError(
            "the compiler's program could not be read: it has no entry computation", field="program", code="no entry"
        )
    return Module(computations, entry)


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=found[2],
        op=rest[:opening],
        arrays=arrays(result),
        operands=tuple(_NAME.findall(arguments)),
        text=rest[closing + 1 :],
        root=found[1] is not None,
        arguments=arguments,
    )


def arrays(text: str) -> tuple[Array, ...]:
    """Arrays of a printed shape."""
    result = []
    for dtype, dims, layout in _SHAPE.findall(_COMMENT.sub("", text)):
        space = _SPACE.search(layout)
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        result.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(result)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise LoraGenError(
        f"the compiler's program could not be read: unbalanced parentheses in {text[:80]!r}",
        field="program",
        code="unbalanced",
    )
