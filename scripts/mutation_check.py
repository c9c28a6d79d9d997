"""Breaks the package one line at a time and sees whether its tests notice.

In: the working tree, and the mistakes of `mutants.py`. Out: a table in Markdown: which test caught which mistake.
Command: python scripts/mutation_check.py --out docs/mutations.md
Each mistake is made in a copy of the tree, in which only the tests run that are meant to catch it, up to the first that
fails. It ends with 1 when one is not caught. Before the first, the same tests must pass in a copy without any.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
HEADER = """# Mutations

Does the suite notice a mistake? `scripts/mutation_check.py` makes one at a time: a sign, an axis, a scale, a mask, a
base that is given away. Each row is a line of the package that was broken, and the first test that failed. A line whose
tests do not notice ends the script with an error, and wants a test.

Printed by `python scripts/mutation_check.py --out docs/mutations.md`, {machine}, {minutes:.0f} minutes.

| mistake | file | caught by |
|---|---|---|
"""


def main() -> int:
    """Runs the mistakes that the flags name; 1 when one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the title or of the file of the mistakes to make")
    parser.add_argument("--out", type=Path, help="where the table is written, too")
    flags = parser.parse_args()
    chosen = [one for one in MUTANTS if flags.only in one.title or flags.only in one.file]
    if not chosen:
        parser.error(f"--only {flags.only!r} is part of no title and no file; leave it out to make all mistakes")
    began = time.monotonic()
    failed = first_failure(None, sorted({test for one in chosen for test in one.tests}))
    if failed is not None:
        raise SystemExit(f"{failed} fails without any mistake: mend that first")
    rows = []
    for one in chosen:
        caught = first_failure(one, one.tests)
        rows.append(f"| {one.title} | `{one.file}` | {f'`{caught}`' if caught else '**not caught**'} |")
        print(rows[-1], flush=True)
    if flags.out is not None:
        minutes = (time.monotonic() - began) / 60
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        flags.out.write_text(HEADER.format(machine=machine, minutes=minutes) + "\n".join(rows) + "\n", encoding="utf-8")
    return int(any("**not caught**" in row for row in rows))


def first_failure(mutant: Mutant | None, tests: Iterable[str]) -> str | None:
    """The first of the tests that fails in a copy of the tree with this mistake; None when all pass."""
    with tempfile.TemporaryDirectory(prefix="mutant") as directory:
        copy = Path(directory) / "tree"
        ignore = shutil.ignore_patterns(".git", "__pycache__", ".venv", "runs", "build", "*.egg-info", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignore)
        if mutant is not None:
            apply(mutant, copy)
        # What is not broken was compiled by the run before.
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "d" / "jax"))
        environment = os.environ | {"PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": cache}
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "-rfE", "--tb", "no"]
        ran = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)], cwd=copy, env=environment, capture_output=True, text=True
        )
    if ran.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", ran.stdout, re.MULTILINE)
    if ran.returncode != 1 or found is None:
        raise SystemExit(f"pytest did not run the tests (exit {ran.returncode}):\n{ran.stdout}{ran.stderr}")
    return found[1]


def apply(mutant: Mutant, tree: Path) -> None:
    """Makes the mistake in a tree.

    Raises:
        ValueError: when the line is not there, or there twice: then `mutants.py` must follow the package.
    """
    path = tree / "lora_gen_jax" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.file} has {text.count(mutant.old)} places with {mutant.old!r}: mend scripts/mutants.py"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
