"""The mistakes that `scripts/mutation_check.py` makes fit the package as it is; the script itself runs by hand."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutants():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("mutants").MUTANTS
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_every_mistake_is_one_place_of_a_file_that_still_compiles(mutants):
    assert len(mutants) >= 20
    assert len({one.title for one in mutants}) == len(mutants)
    for one in mutants:
        text = (ROOT / "lora_gen_jax" / one.file).read_text(encoding="utf-8")
        assert text.count(one.old) == 1, one.title
        compile(text.replace(one.old, one.new), one.file, "exec")


def test_every_mistake_names_tests_that_exist(mutants):
    for one in mutants:
        for test in one.tests:
            path, _, name = test.partition("[")[0].partition("::")
            assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test
