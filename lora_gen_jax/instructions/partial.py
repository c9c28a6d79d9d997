"""Finished rows while the work goes on. In: outcomes by the row's number. Out: a file that the same command continues.

The first line says what the rows come from; every other line is a finished row, on disk before the next is asked for.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_gen_jax.errors import DataError, OutputError
from lora_gen_jax.instructions.rows import Outcome


class Partial:
    """Finished rows in `path`, which is created with the first of them.

    Args:
        path: of the file.
        identity: what outcomes depend on, in words and JSON values; a file of another identity is refused.
        count: of all rows.

    Raises:
        DataError: when the file is of other rows, another model or prompt, or is damaged elsewhere than at its end.
        OutputError: when it cannot be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], count: int):
        self.path, self.identity, self.count = path, dict(identity), count
        self.done: dict[int, Outcome] = {}
        self._lock = threading.Lock()
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise self._unusable(error) from error
        # What was being written when the work was ended is no whole line; its rows are asked for again.
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].decode("utf-8", "replace").split("\n")[:-1]
        if lines or not json.dumps(self.identity).encode().startswith(data):
            self._check(lines[0] if lines else "")
        for number, line in enumerate(lines[1:], start=2):
            self._read(number, line)
        self._begun = bool(lines)
        if whole < len(data):
            try:
                os.truncate(path, whole)
            except OSError as error:
                raise self._unusable(error) from error

    def add(self, outcomes: Mapping[int, Outcome]) -> None:
        """Keeps outcomes, by the row's number from 0; from any thread.

        Raises:
            OutputError: when the file cannot be written.
        """
        rows = [json.dumps({"row": row} | dataclasses.asdict(outcome)) for row, outcome in outcomes.items()]
        with self._lock:
            self.done |= outcomes
            lines = rows if self._begun else [json.dumps(self.identity), *rows]
            try:
                with self.path.open("ab") as file:
                    file.write("".join(line + "\n" for line in lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._unusable(error) from error
            self._begun = True

    def remove(self) -> None:
        """When the work is complete."""
        self.path.unlink(missing_ok=True)

    def _check(self, line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.keys() != self.identity.keys():
            raise DataError(
                f"{self.path} is not a file of finished rows",
                field="--out",
                code="no partial",
                remedy="choose another --out, or remove it",
            )
        other = [name for name, value in self.identity.items() if found[name] != value]
        if other:
            raise DataError(
                f"{self.path} holds finished rows of another {' and another '.join(other)}",
                field="--out",
                code="another run",
                remedy="give the command that wrote it to go on, choose another --out, or remove it to begin anew",
            )

    def _read(self, number: int, line: str) -> None:
        try:
            values = json.loads(line)
            row = values.pop("row")
            outcome = Outcome(**values)
            good = isinstance(row, int) and 0 <= row < self.count
            good = good and all(isinstance(value, str) for value in values.values())
            if not good or not (outcome.rejected or (outcome.abstract and outcome.query)):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}:{number}: damaged",
                field=f"{self.path.name}:{number}",
                code="damaged",
                remedy="remove this line, and its row is asked again",
            ) from error
        self.done[row] = outcome

    def _unusable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be used: {error.strerror}",
            field="--out",
            code="unwritable",
            remedy="choose another --out",
        )
