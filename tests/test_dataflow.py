"""The journeys of docs/dataflow.md: every stop is a function that is there, and is named where an earlier one is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "dataflow.md").read_text(encoding="utf-8")
STOP = re.compile(r"^\d+\. `([\w/]+\.py):([\w.]+)`", re.MULTILINE)
MOST = {"From a prompt to weights": 12, "From a JSONL row to a gradient": 20, "From a document to results.json": 14}
# A training step knows the module as `TrainedModule`, an evaluation a method as its `Method`.
CALLED_BY_INTERFACE = {"LoRAGen", "GatedPool", "delta", "specializer"}


def source(path):
    return (ROOT / "lora_gen_jax" / path).read_text(encoding="utf-8")


def stops(title):
    return STOP.findall(PAGE.split(f"## {title}\n")[1].split("\n## ")[0])


@pytest.mark.parametrize("title", MOST)
def test_a_journey_is_short_and_leads_through_functions_that_are_there(title):
    found = stops(title)
    assert len(re.findall(r"^\d+\. ", PAGE.split(f"## {title}\n")[1].split("\n## ")[0], re.MULTILINE)) == len(found)
    assert 5 < len(found) <= MOST[title]
    for path, name in found:
        body = ast.parse(source(path)).body
        for part in name.split("."):
            (node,) = (one for one in body if isinstance(one, ast.FunctionDef | ast.ClassDef) and one.name == part)
            body = node.body
        assert isinstance(node, ast.FunctionDef), f"{path}:{name}"


@pytest.mark.parametrize("title", MOST)
def test_each_stop_is_reached_from_one_before_it(title):
    seen = []
    for path, name in stops(title):
        asked = name.removesuffix(".__call__").rpartition(".")[2]
        named = any(re.search(rf"\b{asked}\b", source(earlier)) for earlier in seen)
        assert not seen or named or asked in CALLED_BY_INTERFACE, f"{path}:{name}"
        seen.append(path)
