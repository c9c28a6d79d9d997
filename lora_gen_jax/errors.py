"""Errors a user can act on: each names the field, file or value that is wrong, and the remedy."""

import signal
from typing import Self


class LoraGenError(Exception):
    """Bad input. Entry points print its message without a traceback and exit with status 2.

    `str()` is the problem and its remedy, so that a message reads as one text: a remedy that begins with a capital is
    a sentence of its own, any other follows the problem after a colon.

    Attributes:
        field: what is wrong, as a program or a test can ask for it: a config's field ("data.source_weights"), a flag
            ("--out"), a key of a file ("config.json:num_layers") or a function's argument ("prompts").
        code: which of the things that can be wrong with that field, where there are several: "missing", "empty", ….
        problem: what is wrong, for people.
        remedy: what to do about it; None where nothing can be said.
    """

    def __init__(self, problem: str, *, field: str | None = None, code: str | None = None, remedy: str | None = None):
        super().__init__(_joined(problem, remedy))
        self.problem, self.field, self.code, self.remedy = problem, field, code, remedy

    def within(self, place: str, at: str = "", remedy: str | None = None) -> Self:
        """The same error said of a place: "rows.jsonl:3: …", "run lora: …".

        Args:
            place: put in front of the problem.
            at: put in front of the field, as "rows.jsonl:3:" or "messages.0.".
            remedy: where the error has none.
        """
        field = f"{at}{self.field or ''}".rstrip(":.") or None
        return type(self)(f"{place}: {self.problem}", field=field, code=self.code, remedy=self.remedy or remedy)


def _joined(problem: str, remedy: str | None) -> str:
    if not remedy:
        return problem
    if remedy[0].isupper():
        return f"{problem}. {remedy}"
    return f"{problem}{'; ' if ': ' in problem else ': '}{remedy}"


class ConfigError(LoraGenError):
    """A configuration field has a value that cannot work."""


class ModelError(LoraGenError):
    """A model's files are missing, truncated, of an unknown family, or do not match their config."""


class DataError(LoraGenError):
    """A task file, a prompt or a query is malformed, empty or too long."""


class CheckpointError(LoraGenError):
    """A checkpoint or a specialization is missing or belongs to other models."""


class OutputError(LoraGenError):
    """An output path cannot be written, or already holds something."""


class Stopped(Exception):
    """A run ended early by a signal, its checkpoint saved.

    Attributes:
        signal: that was received.
        step: of the checkpoint.
    """

    def __init__(self, received: int, step: int):
        self.signal, self.step = signal.Signals(received), step
        saved = "the checkpoint is saved, " if step else ""
        super().__init__(f"stopped by {self.signal.name} at step {step}: {saved}the same command goes on")
