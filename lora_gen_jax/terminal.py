"""A bar on a terminal, for commands that work through many of the same.

In: a title and a total. Out: a function that is told how far it is; where standard error is no terminal nothing is
shown.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Shown while the block runs; call what it gives with the number done (and their total, which is known)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, _: progress.update(task, completed=done)
