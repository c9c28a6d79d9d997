"""More tasks to train on: five data sets whose licenses let trained weights be shipped, as rows for data.files.

In: a directory with the original files of those you have, one folder a data set. Out: NAME.jsonl for each.

    commonsense_qa   train_rand_split.jsonl, dev_rand_split.jsonl                MIT         questions of daily life
    qasc             train.jsonl, dev.jsonl                                      CC BY 4.0   science by two facts
    csqa2            CSQA2_train.json, CSQA2_dev.json                            CC BY 4.0   true or not
    cosmos_qa        train.csv, valid.csv (alone, a part of it is held out)      CC BY 4.0   what a story leaves out
    metatool         all_clean_data.csv, plugin_des.json, big_tool_des.json      MIT         which of six tools

Command:  python scripts/more_tasks.py SOURCES --out DIR [--data.dir DIR]
          Rows whose question is scored or validated on in the reasoning tasks of --data.dir are left out.
"""

import argparse
import csv
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_gen_jax.data.jsonl import map_rows, read_rows, read_text
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.reasoning import REASONING_TASKS, folder_of
from lora_gen_jax.data.rows import labelled
from lora_gen_jax.data.tasks import normalize
from lora_gen_jax.errors import DataError, LoraGenError

# Five wordings a task, which its rows take in turns.
DESCRIPTIONS = {
    "commonsense_qa": (
        "Answer the question about everyday life with the word or phrase that common sense suggests.",
        "Each question names a thing, a place or a reason that most people would know. Reply with it, briefly.",
        "Use what everybody knows about things and their uses to answer in a few words.",
        "Say which thing, place or action fits the situation described.",
        "These are riddles of daily life: give the short answer that makes the most sense.",
    ),
    "qasc": (
        "Answer the science question by combining two facts; reply with a short phrase.",
        "Give the word or phrase that answers the question about nature correctly.",
        "Put together what you know of physics, biology and geography, and answer in a few words.",
        "Each question can be answered with one short scientific term or phrase. Write it.",
        "Name what the question asks for, as a science book would.",
    ),
    "csqa2": (
        "Judge whether the statement or question is right, and reply with yes or no.",
        "You are told something about the world, true or false. Answer yes if it holds and no if it does not.",
        "Check each claim against common sense. Reply with a single word, yes or no.",
        "Some of these sentences are tricks. Say yes or no.",
        "Is it so? Answer yes or no.",
    ),
    "cosmos_qa": (
        "Read what somebody wrote about their life and answer the question about it with a full sentence.",
        "The text tells of an ordinary day. Say what is most likely behind it or comes of it.",
        "Read between the lines of the story: give the cause, the effect or the motive that the question asks for.",
        "A diary entry is followed by a question. Reply with the most plausible explanation.",
        "Infer from the story what is not said outright, and answer in one sentence.",
    ),
}
# MetaTool's prompts list this many tools, each with so many characters of what it does, and ask so often for each.
TOOLS, TOOL_TEXT, QUERIES = 6, 90, 20
TOOL_WORDINGS = (
    "Which of these tools does the user need? Reply with its name.",
    "Name the tool that serves the request.",
)
HELD_OUT_EVERY = 20
T = TypeVar("T")


class Question(NamedTuple):
    """A row before it has a wording: `asked` is the question alone, by which copies are found."""

    split: str
    query: str
    options: list[str]
    gold: int
    asked: str


def as_in_arc(_: int, row: dict[str, Any], split: str, form: str) -> Question:
    """The schema of ARC, CommonsenseQA and QASC; `form` has {} where the question stands."""
    stem, (choices, gold) = row["question"]["stem"].strip(), labelled(row)
    return Question(split, form.format(stem), [choice.strip() for choice in choices], gold, stem)


def commonsense_qa(folder: Path) -> Iterator[Question]:
    for split, file in (("train", "train_rand_split.jsonl"), ("validation", "dev_rand_split.jsonl")):
        yield from json_rows(folder / file, partial(as_in_arc, split=split, form="Question: {}\nAnswer:"))


def qasc(folder: Path) -> Iterator[Question]:
    for split, file in (("train", "train.jsonl"), ("validation", "dev.jsonl")):
        yield from json_rows(folder / file, partial(as_in_arc, split=split, form="{}"))


def csqa2(folder: Path) -> Iterator[Question]:
    def claim(_: int, row: dict[str, Any], split: str) -> Question:
        text, options = row["question"].strip(), ["no", "yes"]
        return Question(split, f"{text}\nTrue?", options, options.index(row["answer"]), text)

    for split, file in (("train", "CSQA2_train.json"), ("validation", "CSQA2_dev.json")):
        yield from json_rows(folder / file, partial(claim, split=split))


def cosmos_qa(folder: Path) -> Iterator[Question]:
    whole = (folder / "train.csv").exists()

    def about_story(row: dict[str, Any], held_out: bool) -> Question:
        story, question = row["context"].strip(), row["question"].strip()
        options = [row[f"answer{k}"].strip() for k in range(4)]
        split = "validation" if held_out else "train"
        return Question(split, f"{story}\nQ: {question}\nA:", options, int(row["label"]), story)

    if whole:
        yield from csv_rows(folder / "train.csv", lambda _, row: about_story(row, False))
    yield from csv_rows(folder / "valid.csv", lambda i, row: about_story(row, whole or i % HELD_OUT_EVERY == 0))


def json_rows(path: Path, make: Callable[[int, dict[str, Any]], T]) -> list[T]:
    return map_rows(path, read_rows(path), make)


def csv_rows(path: Path, make: Callable[[int, dict[str, Any]], T]) -> list[T]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    return map_rows(path, [(reader.line_num, row) for row in reader], make)


def tool_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of MetaTool: every tool stands in two prompts, among others that the dice choose."""
    about: dict[str, str] = {}
    for file in ("big_tool_des.json", "plugin_des.json"):
        about |= {name.lower(): text for name, text in json.loads(read_text(folder / file)).items()}
    asked: dict[str, list[str]] = {}
    for tool, query in csv_rows(folder / "all_clean_data.csv", lambda _, row: (row["Tool"], row["Query"].strip())):
        asked.setdefault(tool, []).append(query)
    known = sorted(tool for tool in asked if tool.lower() in about and len(asked[tool]) >= QUERIES // 2)
    dice, made = random.Random(0), 0
    for turn, wording in enumerate(TOOL_WORDINGS):
        dice.shuffle(known)
        for i in range(0, len(known) - TOOLS + 1, TOOLS):
            tools = known[i : i + TOOLS]
            lines = [f"{tool}: {about[tool.lower()].strip()[:TOOL_TEXT]}" for tool in tools]
            for gold, tool in enumerate(tools):
                queries = asked[tool].copy()
                dice.shuffle(queries)
                for query in queries[:QUERIES]:
                    yield {
                        "task": f"metatool/{turn}-{i // TOOLS}",
                        "system": "\n".join([wording, *lines]),
                        "input": f"{query}\nTool:",
                        "options": tools,
                        "gold": gold,
                        "split": "train" if made % HELD_OUT_EVERY else "validation",
                    }
                    made += 1


READERS: dict[str, Callable[[Path], Iterator[Question]]] = {
    "commonsense_qa": commonsense_qa,
    "qasc": qasc,
    "csqa2": csqa2,
    "cosmos_qa": cosmos_qa,
}


def worded(name: str, questions: Iterator[Question], scored: set[str]) -> Iterator[dict[str, Any]]:
    """Rows with the task's wordings in turns, without questions that are scored and those with an option twice."""
    wordings, made = DESCRIPTIONS[name], 0
    for split, query, options, gold, asked in questions:
        if normalize(asked) in scored or len(set(options)) < len(options):
            continue
        system = wordings[made % len(wordings)]
        yield {"task": name, "system": system, "input": query, "options": options, "gold": gold, "split": split}
        made += 1


def scored_questions(directory: Path | None) -> set[str]:
    """The normalized questions that the reasoning tasks of a directory score and validate on."""
    if directory is None:
        return set()
    names = [name for name in REASONING_TASKS if folder_of(directory, name)]
    rows = [row for task in load_tasks(names, directory).values() for row in (*task.test, *task.validation)]
    bare = (row.query.rpartition("Question:")[2].removesuffix("Answer:") for row in rows)
    return {normalize(text) for text in (*(row.query for row in rows), *bare)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data.dir", type=Path, default=None, dest="data_dir")
    flags = parser.parse_args()
    try:
        scored = scored_questions(flags.data_dir)
        there = [name for name in (*READERS, "metatool") if (flags.sources / name).is_dir()]
        if not there:
            raise DataError(
                f"{flags.sources} has none of the folders {', '.join((*READERS, 'metatool'))}", field="--sources"
            )
        flags.out.mkdir(parents=True, exist_ok=True)
        for name in there:
            folder = flags.sources / name
            rows = list(worded(name, READERS[name](folder), scored) if name in READERS else tool_rows(folder))
            path = flags.out / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            print(f"{path}: {len(rows)} rows")
    except LoraGenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
