"""Made-up rows in the original schemas of the eight reasoning tasks, and releases of them on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]


def _question(row_id: str, stem: str, choices: list[str], answer: int, labels: str = "ABCDE") -> Row:
    options = [{"text": text, "label": label} for text, label in zip(choices, labels, strict=False)]
    return {"id": row_id, "question": {"stem": stem, "choices": options}, "answerKey": labels[answer]}


def _arc(i: int) -> Row:
    # Real rows have three to five choices, and New York's are labelled 1 to 4.
    if i % 3 == 1:
        return _question(
            f"NY_{i}", f"Which of {i} magnets pulls hardest?", ["one", "a “big” one", "none", "all"], 2, "1234"
        )
    choices = ["It melts.", "It freezes.", "It is naïve — no change.", "It sinks.", "It rusts."][: 3 + i % 3]
    return _question(f"Q_{i}", f"What happens to {i} ice cubes in  the sun?", choices, i % len(choices))


def _openbookqa(i: int) -> Row:
    return _question(f"7-{i}", f"A kettle with {i} cups of water", ["boils", "sings", "flies away", "reads"], i % 4)


def _boolq(i: int) -> Row:
    passage = f"The river Elm is {i} km long. It has ``many'' fish (and frogs)."
    return {"question": f"is the elm longer than {i // 2} km", "title": "Elm", "answer": i % 3 > 0, "passage": passage}


def _social_iqa(i: int) -> Row:
    answers = {"answerA": "glad", "answerB": f"tired of {i} guests", "answerC": "go  home"}
    question = "How would Mo feel as a result?"
    return {"context": f"Mo cooked for {i} guests.", "question": question, **answers, "label": str(i % 3 + 1)}


def _hellaswag(i: int) -> Row:
    if i % 2:
        ctx_a = f"[header] How to fold {i} maps [title] Lay them flat. [step] Use a table.  Mind the edges."
        row = {"activity_label": "Hobbies", "ctx_a": ctx_a, "ctx_b": "", "ctx": ctx_a, "source_id": f"wikihow~{i}"}
    else:
        ctx_a, ctx_b = f"A man stands on {i} crates. He waves!", "the tall Man"
        ids = {"source_id": f"activitynet~v_{i}"}
        row = {"activity_label": "Crate  stacking", "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}", **ids}
    domain = "indomain" if i % 4 < 2 else "zeroshot"
    endings = ["jumps down. [substeps] Rest.", " [title] Add more crates.", "sings.", f"counts to {i}."]
    return {"ind": i, "endings": endings, "label": i % 4, "split": "val", **row, "split_type": domain}


def _winogrande(i: int) -> Row:
    sentence = f"Ann gave Eve {i} pears because _ was  hungry ."
    return {"qID": f"W{i}-1", "sentence": sentence, "option1": "Ann", "option2": "Eve", "answer": str(i % 2 + 1)}


def _piqa(i: int) -> Row:
    goal = f"How do I open {i} jars?"
    return {"id": f"p{i}", "goal": goal, "sol1": "Twist the lid.", "sol2": "Shout: “open!”", "label": i % 2}


_MAKERS: dict[str, Callable[[int], Row]] = {
    "arc_challenge": _arc,
    "arc_easy": lambda i: _arc(i + 3000),
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "social_iqa": _social_iqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "piqa": _piqa,
}
TRAIN, VALIDATION, TEST = range(60), range(100, 124), range(200, 230)


@pytest.fixture(scope="session")
def make_row() -> Callable[[str, int], Row]:
    """(task name, number) → a row in the task's original schema; different numbers give different queries."""
    return lambda name, i: _MAKERS[name](i)


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _write_labelled(path: Path, rows: list[Row]) -> None:
    write_jsonl(path, [_without(row, "label") for row in rows])
    path.with_name(f"{path.stem}-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows))


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight data sets laid out as their archives are, one folder a task."""
    root = tmp_path_factory.mktemp("release")

    def rows(name: str, numbers: range) -> list[Row]:
        return [_MAKERS[name](i) for i in numbers]

    for name, folder in (("arc_challenge", "ARC-Challenge"), ("arc_easy", "ARC-Easy")):
        base = root / name / "ARC-V1-Feb2018-2" / folder
        for part, numbers in (("Train", TRAIN), ("Dev", VALIDATION), ("Test", TEST)):
            write_jsonl(base / f"{folder}-{part}.jsonl", rows(name, numbers))
    for part, numbers in (("train", TRAIN), ("dev", VALIDATION), ("test", TEST)):
        data = root / "openbookqa" / "OpenBookQA-V1-Sep2018" / "Data"
        write_jsonl(data / "Main" / f"{part}.jsonl", rows("openbookqa", numbers))
        extra = {"fact1": "Water boils.", "humanScore": 1.0, "clarity": 2.0, "turkIdAnonymized": "t"}
        full = [{**row, **extra} for row in rows("openbookqa", numbers)]
        write_jsonl(data / "Additional" / f"{part}_complete.jsonl", full)
    for part, numbers in (("train", TRAIN), ("dev", VALIDATION)):
        write_jsonl(root / "boolq" / f"{part}.jsonl", rows("boolq", numbers))
        _write_labelled(root / "social_iqa" / "socialiqa-train-dev" / f"{part}.jsonl", rows("social_iqa", numbers))
        _write_labelled(root / "piqa" / "physicaliqa-train-dev" / f"{part}.jsonl", rows("piqa", numbers))
    for part, numbers in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        write_jsonl(root / "hellaswag" / f"hellaswag_{part}.jsonl", rows("hellaswag", numbers))
    wino = root / "winogrande" / "winogrande_1.1"
    for size, count in (("xs", 4), ("s", 8), ("m", 16), ("l", 32), ("xl", 60)):
        write_jsonl(wino / f"train_{size}.jsonl", rows("winogrande", range(count)))
    write_jsonl(wino / "dev.jsonl", rows("winogrande", VALIDATION))
    write_jsonl(wino / "test.jsonl", rows("winogrande", TEST))
    return root
