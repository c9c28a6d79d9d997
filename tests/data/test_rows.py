"""The eight tasks' texts against lm-evaluation-harness's own task code, run on made-up rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_gen_jax.data.prompts import few_shot_context
from lora_gen_jax.data.reasoning import DESCRIPTIONS, REASONING_TASKS
from lora_gen_jax.data.rows import split_context

# The harness and the libraries it imports warn at import; that is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

_YAML = {
    "arc_challenge": "arc/arc_easy.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
}


def _hub_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The columns the Hugging Face hub's copy of a data set has for an original row."""
    if name in ("arc_challenge", "arc_easy", "openbookqa"):
        choices = row["question"]["choices"]
        stem = "question_stem" if name == "openbookqa" else "question"
        columns = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
        return {stem: row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}
    if name == "boolq":
        return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}
    return row


def _harness_task(name: str, train: list[dict[str, Any]], scored: list[dict[str, Any]], description: str = "") -> Any:
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / _YAML[name])
    scored_docs = datasets.Dataset.from_list([_hub_row(name, row) for row in scored])
    train_docs = datasets.Dataset.from_list([_hub_row(name, row) for row in train])
    splits: Any = {"train": train_docs, "validation": scored_docs, "test": scored_docs}
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(splits)
    config["description"] = description
    config["fewshot_split"] = "train"
    config["fewshot_config"] = {"sampler": "first_n", "split": "train"}
    return ConfigurableTask(config=config)


def _docs(task: Any) -> Any:
    return task.test_docs() if task.has_test_docs() else task.validation_docs()


@pytest.mark.parametrize("name", REASONING_TASKS)
def test_requests_equal_the_harness(name: str, make_row: Callable[[str, int], Any]) -> None:
    train = [make_row(name, i) for i in range(3)]
    scored = [make_row(name, i) for i in range(10, 18)]
    description = DESCRIPTIONS[name][0]
    task = _harness_task(name, train, scored, description + "\n\n")
    shots = [REASONING_TASKS[name].example(str(i), row) for i, row in enumerate(train)]
    for row, doc in zip(scored, _docs(task), strict=True):
        example = REASONING_TASKS[name].example("x", row)
        for k in (0, 3):
            context = task.fewshot_context(doc, k)
            requests = task.construct_requests(doc, context, metadata=(name, 0, 1))
            theirs = [request.args for request in requests]
            queries = example.contexts or (example.query,) * len(example.options)
            ours = [
                (few_shot_context(description, shots[:k], query), option)
                for query, option in zip(queries, example.options, strict=True)
            ]
            assert ours == theirs


@pytest.mark.parametrize("name", REASONING_TASKS)
def test_scoring_equals_the_harness(name: str, make_row: Callable[[str, int], Any]) -> None:
    scored = [make_row(name, i) for i in range(8)]
    task = _harness_task(name, scored, scored)
    # boolq's and social_iqa's YAML report acc alone; the lengths are there for all.
    task._metric_fn_list = {"acc": None, "acc_norm": None}
    rng = np.random.default_rng(0)
    for row, doc in zip(scored, _docs(task), strict=True):
        example = REASONING_TASKS[name].example("x", row)
        for _ in range(10):
            scores = rng.normal(-20, 8, len(example.options))
            result = task.process_results(doc, [(score, False) for score in scores])
            assert result["acc"] == float(np.argmax(scores) == example.gold)
            normalized = scores / np.array(example.option_lengths, float)
            assert result["acc_norm"] == float(np.argmax(normalized) == example.gold)


def test_texts_written_out(make_row: Callable[[str, int], Any]) -> None:
    def made(name: str, i: int) -> Any:
        return REASONING_TASKS[name].example("x", make_row(name, i))

    wino = made("winogrande", 3)
    assert wino.contexts == ("Ann gave Eve 3 pears because Ann", "Ann gave Eve 3 pears because Eve")
    assert (wino.query, wino.response, wino.gold) == (wino.contexts[1], " was  hungry .", 1)
    assert wino.options == (" was  hungry .",) * 2
    video = made("hellaswag", 2)
    assert video.query == "Crate stacking: A man stands on 2 crates. He waves! The tall man"
    article = made("hellaswag", 3)
    assert article.query == "Hobbies: How to fold 3 maps. Lay them flat. Use a table. Mind the edges."
    assert article.options[1] == " [title] Add more crates.".replace(" [title]", " ")
    assert made("boolq", 4).options == (" no", " yes")
    assert made("boolq", 4).query.endswith("frogs).\nQuestion: is the elm longer than 2 km?\nAnswer:")
    assert made("arc_easy", 1).response == " none"
    assert made("social_iqa", 1).query == "Q: Mo cooked for 1 guests. How would Mo feel as a result?\nA:"
    assert made("social_iqa", 1).option_lengths == (4, 17, 8)


def test_five_wordings_each_and_all_different() -> None:
    assert set(DESCRIPTIONS) == set(REASONING_TASKS)
    texts = [text for wordings in DESCRIPTIONS.values() for text in wordings]
    assert all(len(wordings) >= 4 for wordings in DESCRIPTIONS.values())
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and text for text in texts)


@pytest.mark.parametrize(
    ("ctx", "source", "parts"),
    [
        ("A man runs. he", "activitynet~v_1", ("A man runs.", "he")),
        ('A sign says "Stop!" then  a dog', "activitynet~v_1", ('A sign says "Stop!"', "then  a dog")),
        ("no sentence before", "activitynet~v_1", ("no sentence before", "")),
        ("A man runs. he", "wikihow~1", ("A man runs. he", "")),
    ],
)
def test_split_context(ctx: str, source: str, parts: tuple[str, str]) -> None:
    assert split_context(ctx, source) == parts


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("arc_easy", {"answerKey": "Z"}),
        ("arc_easy", {"question": {"stem": None, "choices": []}}),
        ("boolq", {"answer": "perhaps"}),
        ("boolq", {"passage": None}),
        ("social_iqa", {"label": "0"}),
        ("hellaswag", {"label": ""}),
        ("hellaswag", {"endings": ["a", None, "b", "c"]}),
        ("winogrande", {"sentence": "nothing to fill in"}),
        ("winogrande", {"answer": "3"}),
        ("piqa", {"sol2": 7}),
    ],
)
def test_malformed_rows_are_refused(name: str, change: dict[str, Any], make_row: Callable[[str, int], Any]) -> None:
    row = {**make_row(name, 0), **change}
    with pytest.raises((AttributeError, TypeError, ValueError)):
        REASONING_TASKS[name].example("x", row)
