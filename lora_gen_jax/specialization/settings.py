"""How a specialization is refined: a frozen dataclass, checked when it is made."""

import dataclasses
import math
from typing import Literal, get_args

from lora_gen_jax.errors import ConfigError

Kind = Literal["gates", "lora", "both"]
Stopping = Literal["fixed", "folds", "held_out"]
STEPS: dict[Kind, int] = {"gates": 10, "lora": 4, "both": 10}
RATES: dict[Kind, float] = {"gates": 0.2, "lora": 1e-3, "both": 0.2}
AFTER_GATES = 2
"""Steps of factors, where gates have learned before them."""
MOST_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """A few steps of Adam on a prompt's examples; expert pool and edge model stay as they are.

    Attributes:
        kind: gates, which keep a specialization as small as it is; lora: factors beside the generated update, which
            stays as it is; or both: first gates, then two steps of factors beside them.
        steps: at most so many; left out, 10 for gates and 4 for lora. 0 leaves the specialization as it was read. Of
            both, those of gates.
        learning_rate: of Adam; left out, 0.2 for gates and 1e-3 for lora. Gates of linear routing are trained in units
            of 1/√E, so that a rate means the same for any number of experts. Of both, that of gates.
        pull: after every step a value goes back by learning_rate · pull of its distance to where it started.
        stopping: fixed takes all steps. folds: the examples are dealt out into folds, each of which is held out once,
            and the step with the lowest held-out loss counts. held_out: every fifth example, or the last of fewer, is
            held out, and only the others are learned from.
        folds: number of folds, at most one for every example.
        rank: of factors, where there are none yet.
    """

    kind: Kind = "gates"
    steps: int | None = None
    learning_rate: float | None = None
    pull: float = 0.0
    stopping: Stopping = "fixed"
    folds: int = 4
    rank: int = 8

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(Kind)), ("stopping", get_args(Stopping))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"refine.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}",
                    field=f"refine.{name}",
                )
        _whole("steps", self.steps, 0, MOST_STEPS)
        _whole("folds", self.folds, 2, 64)
        _whole("rank", self.rank, 1, 256)
        _number("learning_rate", self.learning_rate, 0.0)
        _number("pull", self.pull, 0.0)
        if self.rate * self.pull > 1:
            raise ConfigError(
                f"refine.pull is {self.pull}: times the learning rate {self.rate} it exceeds 1, and a step would"
                " overshoot the start",
                field="refine.pull",
                remedy="lower it",
            )

    @property
    def stages(self) -> tuple["RefineConfig", ...]:
        """What is done one after the other: of both, gates and factors."""
        if self.kind != "both":
            return (self,)
        after = dataclasses.replace(
            self, kind="lora", steps=min(AFTER_GATES, self.most_steps), learning_rate=None, pull=0.0
        )
        return dataclasses.replace(self, kind="gates"), after

    @property
    def trains_gates(self) -> bool:
        """Whether gates are among what learns."""
        return self.kind != "lora"

    @property
    def trains_factors(self) -> bool:
        """Whether factors are among what learns."""
        return self.kind != "gates"

    @property
    def most_steps(self) -> int:
        """Steps that are taken at most; of both, those of gates."""
        return STEPS[self.kind] if self.steps is None else self.steps

    @property
    def rate(self) -> float:
        """Adam's."""
        return RATES[self.kind] if self.learning_rate is None else self.learning_rate


def _whole(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise ConfigError(
            f"refine.{name} is {value!r}; it must be a whole number from {least} to {most}", field=f"refine.{name}"
        )


def _number(name: str, value: float | None, least: float) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (fits and least <= value < math.inf):
        raise ConfigError(
            f"refine.{name} is {value!r}; it must be a number of at least {least:g}", field=f"refine.{name}"
        )
