"""Errors a user can act on: each message names the field, file or value and the remedy."""

import signal


class LoraGenError(Exception):
    """Bad input. Entry points print its message without a traceback and exit with status 2."""


class ConfigError(LoraGenError):
    """A configuration field has a value that cannot work."""


class ModelError(LoraGenError):
    """A model's files are missing, truncated, of an unknown family, or do not match their config."""


class DataError(LoraGenError):
    """A task file, a prompt or a query is malformed, empty or too long."""


class CheckpointError(LoraGenError):
    """A checkpoint or a specialisation is missing or belongs to other models."""


class OutputError(LoraGenError):
    """An output path cannot be written, or already holds something."""


class EndpointError(LoraGenError):
    """The endpoint cannot be reached, refuses requests, or answers with something that is no chat completion."""


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
