"""A task before it has a layout and an answer format, and how one is made from a function or from a table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

Pair = tuple[str, str]
_FRAMES = (
    "{} Write nothing else.",
    "Here is what to do with every input. {}",
    "Read the input carefully. {}",
    "{} Reply with the result alone, without an explanation.",
    "I need your help with a list of inputs. {} One answer for each.",
)


@dataclass(frozen=True)
class Base:
    name: str
    """GROUP/NAME; the rows of a group are one file."""
    wordings: tuple[str, ...]
    pairs: tuple[Pair, ...]
    answer: Callable[[str], str | None] | None = None
    """The answer to any input; None or a ValueError for inputs of another kind. None where only pairs are known."""

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Maker:
    """Makes the tasks of a group. A task's dice depend on the seed and its name: a new task changes no other."""

    group: str
    roles: Sequence[str]
    seed: int
    count: int

    def drawn(
        self, name: str, wordings: Sequence[str], draw: Callable[[Random], str], answer: Callable[[str], str | None]
    ) -> Base:
        """A task whose inputs are drawn until there are `count` different ones, or hardly a new one comes."""
        rng = Random(f"{self.seed}/{self.group}/{name}")
        pairs: dict[str, str] = {}
        for _ in range(8 * self.count):
            text = draw(rng)
            found = answer(text)
            if found:
                pairs[text] = found
            if len(pairs) == self.count:
                break
        return self._made(name, wordings, pairs.items(), answer, rng)

    def table(self, name: str, wordings: Sequence[str], pairs: Iterable[Pair]) -> Base:
        """A task of given pairs, the first of those that share their input, in a drawn order."""
        rng = Random(f"{self.seed}/{self.group}/{name}")
        known: dict[str, str] = {}
        for text, answer in pairs:
            if text and answer:
                known.setdefault(text, answer)
        rows = list(known.items())
        rng.shuffle(rows)
        return self._made(name, wordings, rows[: self.count], None, rng)

    def _made(self, name: str, wordings: Sequence[str], pairs: Iterable[Pair], answer, rng: Random) -> Base:
        return Base(f"{self.group}/{name}", framed(wordings, self.roles, rng), tuple(pairs), answer)


def framed(wordings: Sequence[str], roles: Sequence[str], rng: Random) -> tuple[str, ...]:
    """The wordings, one of them said to somebody in a role, and two of them among other sentences."""
    longer = [frame.format(rng.choice(wordings)) for frame in rng.sample(_FRAMES, 2)]
    return tuple(dict.fromkeys([*wordings, f"You are {rng.choice(roles)}. {rng.choice(wordings)}", *longer]))
