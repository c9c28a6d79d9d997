"""Results of requests, kept by what was asked: an evaluation that was stopped goes on where it was.

In: a directory and the identity of a model. Out: results by key, in memory and as lines of
``<directory>/requests-<identity>.jsonl``, which grows by one write for each piece of work that is done.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from lora_gen_jax.errors import OutputError

log = logging.getLogger(__name__)


class RequestCache:
    """Finished requests of one model.

    Args:
        directory: where to keep them; only in memory when None.
        identity: of the model: weights, what is merged into them, and their type; or of what is evaluated.
        remedy: what to do when the directory cannot be used, for errors.

    Raises:
        OutputError: when the directory cannot be written or its file cannot be read.
    """

    def __init__(self, directory: Path | None, identity: str, remedy: str = "give another cache=DIR"):
        self.identity, self.remedy = identity, remedy
        self.path = None if directory is None else directory / f"requests-{identity}.jsonl"
        self.results: dict[str, Any] = {}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes() if self.path.exists() else b""
            if text and not text.endswith(b"\n"):
                # What was being written when the run was stopped becomes a line of its own, which is passed over.
                with self.path.open("ab") as file:
                    file.write(b"\n")
        except OSError as error:
            problem = f"the file of finished requests {self.path} cannot be used: {error.strerror}"
            raise OutputError(problem, field="cache", code="unwritable", remedy=remedy) from error
        self._read(text.splitlines())

    def _read(self, lines: list[bytes]) -> None:
        broken = 0
        for line in lines:
            try:
                record = json.loads(line)
                self.results[record["key"]] = record["result"]
            except (ValueError, KeyError, TypeError):
                broken += 1
        if broken:
            log.warning("%s: %d incomplete lines were passed over; their requests run again", self.path, broken)

    def key(self, *content: Any) -> str:
        """64 hex digits of a request to this model.

        Args:
            content: everything the result depends on; what JSON can hold.
        """
        return hashlib.sha256(json.dumps([self.identity, *content]).encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def add(self, results: dict[str, Any]) -> None:
        """Keeps results, by key.

        Raises OutputError when the file cannot be written.
        """
        self.results |= results
        if self.path is None:
            return
        lines = "".join(json.dumps({"key": key, "result": result}) + "\n" for key, result in results.items())
        try:
            # Another process that evaluates the same may have finished, and removed it.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            problem = f"finished requests cannot be written to {self.path}: {error.strerror}"
            raise OutputError(problem, field="cache", code="unwritable", remedy=self.remedy) from error
