"""Damages every kind of file that this package reads, and looks at what reading it does.

python scripts/fuzz_files.py --mutations 3000 --flips 100 --seed 0

In: a number of mutations and a seed. Out: a table by kind of file, and status 1 where something was found: an exception
that is no `LoraGenError`, a read of more than 10 s or 2 GB, files left behind, or damage read as another result.

Files are damaged in two ways: by accident (bits, bytes, pieces of the file), which what is stored must give away, and
by an author, who changes fields and tensors and makes the digests anew: then anything may be said, but as an error.
"""

import argparse
import dataclasses
import faulthandler
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuzzing.damage import AUTHORS, mutate_bytes
from fuzzing.kinds import CHECKPOINT, KINDS, Kind

SECONDS, BYTES = 10, 2 * 2**30


class TooSlow(Exception):
    """A read took more than `SECONDS`."""


@dataclasses.dataclass
class Row:
    """What became of a kind's mutations."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    found: list[str] = dataclasses.field(default_factory=list)
    longest: float = 0.0


@contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of a block are bounded; beyond, it ends in TooSlow or MemoryError."""

    def ring(*_: Any) -> None:
        raise TooSlow

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # where not even the signal is looked at
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def outcome(kind: Kind, directory: Path, good: str, accident: bool) -> tuple[str, str]:
    """("refused", "same" or "other") and what was found, which is nothing as a rule."""
    from lora_gen_jax.errors import LoraGenError

    before = sorted(directory.rglob("*"))
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = kind.read(directory)
    except LoraGenError as error:
        whole = error.problem.strip() and (error.field or error.code)
        left = sorted(directory.rglob("*")) != before
        return "refused", "files left behind" if left else "" if whole else f"an error without a field: {error}"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {str(error)[:200]}"
    if read == good:
        return "same", ""
    return "other", "used, with another result" if accident and kind.bound else ""


def fuzz(kind: Kind, root: Path, count: int, seed: int, flips: bool = False) -> Row:
    """Damages a kind's files `count` times, one place at a time; `flips` are single bits alone."""
    row, good_files, work = Row(), root / "good", root / "work"
    good_files.mkdir(parents=True)
    kind.write(good_files)
    good = kind.read(good_files)
    for number in range(count):
        rng = random.Random(f"{kind.name} {seed} {number}")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good_files, work)
        patterns = sorted(kind.damaged)
        pattern = rng.choice(patterns)
        path = rng.choice(sorted(p for p in work.glob(pattern) if p.is_file() and p.stat().st_size))
        data, how = path.read_bytes(), kind.damaged[pattern]
        accident = flips or how == "bytes" or rng.random() < 0.5
        if flips:
            stored = bytearray(data)
            stored[rng.randrange(len(stored))] ^= 1 << rng.randrange(8)
            changed = bytes(stored)
        else:
            changed = mutate_bytes(data, rng) if accident else AUTHORS[how](data, rng)
        path.write_bytes(changed)
        if not accident and kind.seal is not None:
            kind.seal(work)
        began = time.monotonic()
        what, found = outcome(kind, work, good, accident)
        row.longest = max(row.longest, time.monotonic() - began)
        row.outcomes[what] += 1
        if found:
            row.found.append(f"{kind.name}, seed {seed}, mutation {number}, {path.relative_to(work)}: {found}")
    return row


def table(rows: dict[str, Row]) -> str:
    """Markdown: a line a kind."""
    lines = ["| files | mutations | refused | same result | another, of its author | longest | found |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        counts = [row.outcomes[what] for what in ("refused", "same", "other")]
        numbers = " | ".join(map(str, (sum(counts), *counts)))
        lines.append(f"| {name} | {numbers} | {row.longest:.1f} s | {len(row.found) or 'nothing'} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=3000, help="of all kinds of files together")
    parser.add_argument("--flips", type=int, default=100, help="of single bits in checkpoints, beside these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a kind of file")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    kinds = {kind.name: kind for kind in KINDS if flags.only in (None, kind.name)}
    each = -(-flags.mutations // len(kinds))
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, kind in kinds.items():
            rows[name] = fuzz(kind, Path(place) / name.replace(" ", "_"), each, flags.seed)
            print(f"{name}: {dict(rows[name].outcomes)}", file=sys.stderr, flush=True)
        if flags.flips:
            rows["checkpoint, one bit"] = fuzz(CHECKPOINT, Path(place) / "flips", flags.flips, flags.seed, flips=True)
    print(table(rows))
    found = [line for row in rows.values() for line in row.found]
    print("\n".join(found), file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
