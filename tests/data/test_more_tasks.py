"""scripts/more_tasks.py: rows of five data sets from files in their original schemas."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_gen_jax.data.records import load_records

SCRIPT = Path(__file__).parents[2] / "scripts" / "more_tasks.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, fields, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([fields, *rows])


def question(stem, choices, answer):
    labelled = [{"text": text, "label": label} for text, label in zip(choices, "ABCDEFGH", strict=False)]
    return {"question": {"stem": stem, "choices": labelled}, "answerKey": answer}


@pytest.fixture
def sources(tmp_path):
    """A few made-up rows of every data set."""
    root = tmp_path / "sources"
    root.mkdir()
    everyday = [
        question("Where does a kettle stand?", ["stove ", "roof"], "A"),
        question("What opens a tin?", ["a key", "a key"], "A"),
    ]
    write_lines(root / "commonsense_qa" / "train_rand_split.jsonl", everyday)
    write_lines(root / "commonsense_qa" / "dev_rand_split.jsonl", [question("Who bakes?", ["a baker", "a bus"], "A")])
    for file in ("train.jsonl", "dev.jsonl"):
        write_lines(root / "qasc" / file, [question(f"What melts in {file}?", ["ice", "sand", "salt"], "A")])
    claims = [{"question": f"Is {n} more than four?", "answer": "yes" if n > 4 else "no"} for n in range(7)]
    write_lines(root / "csqa2" / "CSQA2_train.json", claims)
    write_lines(root / "csqa2" / "CSQA2_dev.json", [{"question": "Fish fly.", "answer": "no"}])
    (root / "cosmos_qa").mkdir()
    story = ["I ran,\nand fell.", "Why?", "ice", "sun", "joy", "none", "0"]
    fields = ["context", "question", "answer0", "answer1", "answer2", "answer3", "label"]
    write_csv(root / "cosmos_qa" / "valid.csv", fields, [[f"{k}. {story[0]}", *story[1:]] for k in range(25)])
    (root / "metatool").mkdir()
    tools = [f"Tool{k}" for k in range(13)]
    (root / "metatool" / "big_tool_des.json").write_text(json.dumps({t.lower(): f"does {t}" for t in tools[:5]}))
    (root / "metatool" / "plugin_des.json").write_text(json.dumps({t: f"does {t}" for t in tools[5:]}))
    asked = [[f"Please, {tool}, number {k}", tool] for tool in tools for k in range(12)]
    write_csv(root / "metatool" / "all_clean_data.csv", ["Query", "Tool"], [*asked, ["Anything?", "Unknown"]])
    return root


@pytest.fixture
def tasks(sources, tmp_path):
    done = run(sources, "--out", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    return {task.name: task for task in load_records(tmp_path / "rows")}


def test_questions_keep_their_splits_and_options(tasks):
    (everyday,) = tasks["commonsense_qa"].train  # the one with an option twice is left out
    assert everyday.query == "Question: Where does a kettle stand?\nAnswer:"
    assert (everyday.options, everyday.gold) == ((" stove", " roof"), 0)
    assert [e.query for e in tasks["qasc"].train] == ["What melts in train.jsonl?"]
    assert [e.query for e in tasks["qasc"].validation] == ["What melts in dev.jsonl?"]
    claims = tasks["csqa2"].train
    assert [e.response for e in claims] == [" no"] * 5 + [" yes"] * 2
    assert claims[0].query == "Is 0 more than four?\nTrue?"


def test_every_task_has_all_its_wordings(tasks):
    assert len(set(tasks["csqa2"].descriptions)) == 5


def test_a_story_keeps_its_lines_and_one_in_twenty_is_held_out(tasks):
    stories = tasks["cosmos_qa"]
    assert (len(stories.train), len(stories.validation)) == (23, 2)
    assert stories.train[0].query == "1. I ran,\nand fell.\nQ: Why?\nA:"


def test_a_training_file_leaves_the_other_to_validation(sources, tmp_path):
    text = (sources / "cosmos_qa" / "valid.csv").read_text()
    (sources / "cosmos_qa" / "train.csv").write_text(text.replace("fell", "slept"))
    assert run(sources, "--out", tmp_path / "rows").returncode == 0
    (stories,) = load_records(tmp_path / "rows" / "cosmos_qa.jsonl")
    assert (len(stories.train), len(stories.validation)) == (25, 25)


def test_every_tool_stands_in_its_prompt_with_its_description(tasks):
    prompts = [task for name, task in tasks.items() if name.startswith("metatool/")]
    assert len(prompts) == 4  # two of six tools, twice; the thirteenth stays over
    for task in prompts:
        (description,) = task.descriptions
        for example in (*task.train, *task.validation):
            tool = example.response.strip()
            assert f"\n{tool}: does {tool}" in description
            assert example.query.startswith(f"Please, {tool}, number")
            assert len(example.options) == 6


def test_questions_that_are_scored_are_left_out(sources, tmp_path):
    data = tmp_path / "data" / "openbookqa"
    data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        write_lines(data / f"{split}.jsonl", [question(f"what  melts in {split}.JSONL", ["ice", "sand"], "A")])
    write_lines(data / "test.jsonl", [question("What melts in train.jsonl", ["ice", "sand"], "A")])
    done = run(sources, "--out", tmp_path / "rows", "--data.dir", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    (task,) = load_records(tmp_path / "rows" / "qasc.jsonl")
    assert [e.query for e in (*task.train, *task.validation)] == ["What melts in dev.jsonl?"]


def test_errors_name_the_file_and_the_line(sources, tmp_path):
    def error(directory):
        done = run(directory, "--out", tmp_path / "rows")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        return done.stderr

    assert "none of the folders commonsense_qa" in error(tmp_path / "nothing")
    with (sources / "qasc" / "train.jsonl").open("a") as file:
        file.write(json.dumps(question("What melts?", ["ice", "sand"], "C")) + "\n")
    assert "train.jsonl:2: malformed row" in error(sources)
    (sources / "qasc" / "train.jsonl").unlink()
    assert "train.jsonl: cannot be read" in error(sources)
