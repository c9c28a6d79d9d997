"""A file of requests for many specializations: each answered as alone; bad lines are named before anything is read."""

import json

import pytest
from helpers import refused, write_rows

from lora_gen_jax.cli import main

PROMPTS = [
    {"name": "young", "prompt": "Give the animal's young, in square brackets."},
    {"name": "sound", "prompt": "Which sound does this animal make? In double quotes."},
    {"name": "capital", "prompt": "What is the capital of this country?"},
]
REQUESTS = [
    {"id": 7, "input": "owl:", "specialization": "young"},
    {"input": "owl:", "specialization": "sound"},
    {"input": "owl:"},
    {"input": "dog:", "specialization": "young"},
]


@pytest.fixture(scope="module")
def specials(tmp_path_factory):
    """Three specializations of the shipped pocket pair, in one directory."""
    root = tmp_path_factory.mktemp("specials")
    write_rows(root / "prompts.jsonl", PROMPTS)
    main(
        [
            "specialize",
            "--checkpoint",
            "quickstart",
            "--prompts",
            str(root / "prompts.jsonl"),
            "--out",
            str(root / "all"),
        ]
    )
    return root / "all"


def answered(tmp_path, specials, name, *flags):
    requests = write_rows(tmp_path / "requests.jsonl", REQUESTS)
    out = tmp_path / f"{name}.jsonl"
    common = ["--requests", str(requests), "--specialization", str(specials), "--max-new-tokens", "8"]
    main(["generate", *common, "--out", str(out), *flags])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_requests_are_answered_as_each_alone_in_either_way(tmp_path, specials, capsys):
    mixed = answered(tmp_path, specials, "mixed", "--how", "mixed")
    assert [{k: v for k, v in row.items() if k not in ("answer", "finish")} for row in mixed] == REQUESTS
    assert answered(tmp_path, specials, "merged", "--how", "merged") == mixed
    capsys.readouterr()
    for row in mixed:
        if "specialization" in row:
            place = str(specials / row["specialization"])
            main(["generate", "--specialization", place, "--input", row["input"], "--max-new-tokens", "8"])
        else:
            place = str(specials / "young")
            main(["generate", "--specialization", place, "--input", row["input"], "--max-new-tokens", "8", "--base"])
        assert capsys.readouterr().out == row["answer"] + "\n"
    assert len({row["answer"] for row in mixed}) == 4


@pytest.mark.parametrize(
    ("flags", "rows", "facts"),
    [
        (["--input", "owl:", "--requests", "FILE"], None, ["--input and --requests", "input and requests"]),
        ([], None, ["--input and --requests", "neither"]),
        (["--input", "owl:"], None, ["--specialization"]),
        (["--input", "owl:", "--rows", "3"], None, ["--rows", "--requests"]),
        (["--requests", "FILE"], [{"input": "owl:"}], ["--out"]),
        (["--requests", "FILE", "--out", "OUT"], [{"input": "owl:"}], ["--specialization"]),
        (["--requests", "FILE", "--out", "OUT"], [{"input": "a"}, {"input": " "}], ["requests.jsonl:2", '"input"']),
        (["--requests", "FILE", "--out", "FILE"], [{"input": "a"}], ["--out", "requests.jsonl"]),
        (
            ["--requests", "FILE", "--out", "OUT"],
            [{"input": "owl:", "specialization": "nowhere"}],
            ["requests.jsonl:1", "specialization", "nowhere"],
        ),
        (
            ["--requests", "FILE", "--out", "OUT"],
            [{"input": "a", "specialization": 3}],
            ["requests.jsonl:1", '"specialization"', 3],
        ),
        (
            ["--requests", "FILE", "--out", "OUT"],
            [{"input": "a", "specialization": "x" * 300}],
            ["requests.jsonl:1", "specialization", "x" * 200],
        ),
        (["--requests", "FILE", "--out", "OUT"], [{"input": "a", "answer": "b"}], ["requests.jsonl:1", '"answer"']),
        (["--requests", "FILE", "--out", "OUT"], [{"input": "a", "id": "\ud800"}], ["requests.jsonl:1", "UTF-8"]),
        (["--requests", "FILE", "--out", "OUT"], [{"input": "a", "score": float("nan")}], ["requests.jsonl:1", "NaN"]),
        (["--requests", "FILE", "--out", "OUT"], [{"input": "a", "a": [{"b": float("inf")}]}], ["requests.jsonl:1"]),
        (["--requests", "FILE", "--out", "OUT", "--specialization", "no/such"], None, ["--specialization no/such"]),
        (["--requests", "FILE", "--out", "FILE/out.jsonl"], None, ["--out", "requests.jsonl/out.jsonl"]),
    ],
)
def test_what_cannot_be_answered_is_named(tmp_path, capsys, flags, rows, facts):
    path = write_rows(tmp_path / "requests.jsonl", rows or [{"input": "owl:"}])
    places = {"FILE": str(path), "OUT": str(tmp_path / "out.jsonl")}
    args = [places.get(flag, flag.replace("FILE/", f"{path}/")) for flag in flags]
    refused(capsys, main, ["generate", *args], *facts)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_specialization_of_another_pool_is_named(tmp_path, specials, capsys):
    import shutil

    from safetensors import safe_open
    from safetensors.numpy import save_file

    other = tmp_path / "other"
    shutil.copytree(specials / "young", other)
    with safe_open(other / "specialization.safetensors", "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in ("index", "weight")}, file.metadata()
    save_file(tensors, other / "specialization.safetensors", metadata | {"pool": "0" * 16})
    readable = json.loads((other / "specialization.json").read_text())
    del readable["sha256"]  # as older versions wrote it
    (other / "specialization.json").write_text(json.dumps(readable))
    rows = [{"input": "owl:", "specialization": str(specials / "sound")}, {"input": "a", "specialization": str(other)}]
    path = write_rows(tmp_path / "requests.jsonl", rows)
    refused(capsys, main, ["generate", "--requests", path, "--out", tmp_path / "out.jsonl"], other, "0" * 16)
