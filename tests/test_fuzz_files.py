"""The fuzzer of scripts/fuzz_files.py, small: damage ends in an error of this package, or changes nothing."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fuzzer():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import fuzz_files

        yield fuzz_files
    finally:
        sys.path.remove(str(ROOT / "scripts"))


KINDS = [
    ("specialization", 40),
    ("generator", 20),
    ("checkpoint", 6),
    ("GGUF model", 25),
    ("Hugging Face model", 20),
    ("config.json of a run", 30),
    ("JSONL data", 40),
]


@pytest.mark.parametrize(("name", "count"), KINDS)
def test_damaged_files_are_refused_in_words_or_read_as_what_they_were(fuzzer, tmp_path, monkeypatch, name, count):
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "cache"))
    (kind,) = (kind for kind in fuzzer.KINDS if kind.name == name)
    row = fuzzer.fuzz(kind, tmp_path / "files", count, seed=0)
    assert row.found == []
    assert row.outcomes["refused"] > count / 4  # what is damaged is really looked at
    assert sum(row.outcomes.values()) == count


def test_single_bits_of_a_checkpoint_are_noticed(fuzzer, tmp_path):
    row = fuzzer.fuzz(fuzzer.CHECKPOINT, tmp_path, 5, seed=0, flips=True)
    assert row.found == []


def test_every_kind_of_file_is_damaged_here(fuzzer):
    assert [kind.name for kind in fuzzer.KINDS] == [name for name, _ in KINDS]


def test_what_the_fuzzer_is_for_is_found(fuzzer, tmp_path):
    """A reader that lets everything through is caught: exceptions, other results, files left behind, and hangs."""
    import dataclasses
    import json

    def write(directory):
        (directory / "x.json").write_text(json.dumps({"a": 12345}))

    kind = fuzzer.Kind("x", write, {"x.json": "json"}, lambda d: (d / "x.json").read_bytes().decode("latin-1"))
    found = fuzzer.fuzz(kind, tmp_path / "other", 20, seed=0).found
    assert any("another result" in line for line in found)

    def careless(directory):
        return str(json.loads((directory / "x.json").read_text())["a"])

    found = fuzzer.fuzz(dataclasses.replace(kind, read=careless), tmp_path / "careless", 20, seed=0).found
    assert any("KeyError" in line or "JSONDecodeError" in line for line in found)
