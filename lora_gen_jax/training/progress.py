"""What a run shows and records: a progress bar, ``metrics.jsonl`` and TensorBoard.

In: metrics of finished steps. Out: lines and files in the work directory, from process 0 only.
"""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_gen_jax.files import write_text, writing


def summary_writer(directory: Path, purge_step: int) -> Any:
    """A TensorBoard writer whose events from `purge_step` on replace older ones.

    tensorboardX imports torch wherever it is installed, which takes seconds and hundreds of megabytes for nothing that
    is used here: it is kept from doing so.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(directory), purge_step=purge_step)


class Recorder:
    """Records the metrics of a run that starts, or goes on, at a step.

    Lines of `metrics.jsonl` from steps that a resumed run repeats are dropped, so that each step appears once.
    On a terminal there is a live bar; elsewhere (a log file) a line every `every` steps. In the other processes of a
    job it shows and writes nothing.
    """

    def __init__(self, directory: Path, start: int, steps: int, every: int = 10):
        self.path, self.start, self.steps, self.every = directory / "metrics.jsonl", start, steps, every
        self.file, self.board, quiet = None, None, jax.process_index() > 0
        if not quiet:
            self._drop_repeated(start)
            self.file = self.path.open("a", encoding="utf-8")
            self.board = summary_writer(directory / "tensorboard", start + 1 if start else 0)
        self.console = Console(file=sys.stderr, quiet=quiet)
        columns = (
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.progress = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self.bar = self.progress.add_task("compiling", total=steps, completed=start)
        self.began = self.step_end = time.monotonic()

    def __enter__(self) -> "Recorder":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.file is not None and self.board is not None:
            # What could not be written stays in the file's buffer, and closing tries again. The error that ended the
            # block is the one to be told.
            for opened in (self.file, self.board):
                with writing(self.path, "--workdir") if error is None else suppress(OSError, ValueError):
                    opened.close()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes one step's metrics and moves the bar. Raises OutputError for a full disk."""
        if self.file is None or self.board is None:
            return
        with writing(self.path, "--workdir"):
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        if "loss" not in metrics:
            return
        text = " ".join(f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics)
        self.progress.update(self.bar, completed=step, description=text)
        if not self.console.is_terminal and (step % self.every == 0 or step in (self.start + 1, self.steps)):
            left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {text}  eta {left / 60:.1f} min")

    def _drop_repeated(self, start: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if start and json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):  # the line that a kill cut short, or damage
                continue
        # Replaced at once: a kill at this moment loses nothing.
        write_text(self.path, "".join(kept), "--workdir")


# Short enough for a terminal of 80 columns.
SHOWN = {"loss": "loss", "cv": "cv", "gate_entropy": "entropy", "tokens_per_second": "tok/s"}
