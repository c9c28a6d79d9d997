"""The embedded suite: what is held out stays out, and a query alone says nothing about the task."""

import hashlib
import importlib
import random
from collections import Counter
from pathlib import Path

import pytest
from helpers import raises, write_rows

from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.pocket.suite import GROUPS, combinations, find, make_task, split_of
from lora_gen_jax.data.pocket.wordings import FORMATS, all_requests, descriptions, held_out_requests, training_requests
from lora_gen_jax.data.pocket.world import ATTRIBUTES, THINGS, Attribute
from lora_gen_jax.data.prompts import few_shot_context
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.decoder.pretrained import load_tokenizer
from lora_gen_jax.errors import DataError

BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}


def test_the_world_by_hand():
    owl = {a.name: a.values["owl"] for a in ATTRIBUTES if "owl" in a.values}
    assert owl == {
        "young": "owlet",
        "sound": "hoot",
        "home": "barn",
        "group": "parliament",
        "class": "bird",
        "covering": "feathers",
        "diet": "mice",
        "plural": "owls",
        "kind": "animal",
        "initial": "O",
    }
    assert BY_NAME["capital"].values["Ghana"] == "Accra"
    assert BY_NAME["taste"].values["olive"] == "salty"
    assert BY_NAME["worker"].values["loom"] == "weaver"
    assert len(set(THINGS)) == len(THINGS) == 84
    assert len(BY_NAME) == len(ATTRIBUTES) == 24


def test_a_query_alone_does_not_tell_the_task():
    answers = {thing: {a.values[thing] for a in ATTRIBUTES if thing in a.values} for thing in THINGS}
    assert min(map(len, answers.values())) >= 7


def test_formats_by_hand_and_all_different():
    by_name = {form.name: form for form in FORMATS}
    assert by_name["plain"].render("owl", "hoot") == "hoot"
    assert by_name["it_is-quotes-dot"].render("owl", "hoot") == 'it is "hoot".'
    assert by_name["echo-twice-bang"].render("owl", "hoot") == "owl = hoot hoot!"
    assert by_name["brackets"].render("owl", "hoot") == "[hoot]"
    assert len({form.render("owl", "hoot") for form in FORMATS}) == len(by_name) == 36


def test_splits_of_a_task_are_disjoint_and_complete():
    for task in GROUPS["pocket"]():
        splits = [{e.query for e in split} for split in (task.train, task.validation, task.test)]
        attribute = BY_NAME[task.name.split("/")[1]]
        assert sum(map(len, splits)) == len(set().union(*splits)) == len(attribute.values)
        assert len(task.train) >= 6


def test_adding_a_thing_moves_no_other_between_splits():
    attribute = BY_NAME["sound"]
    larger = Attribute("sound", {"cuckoo": "cuckoo", **attribute.values}, attribute.phrases, attribute.questions)
    for form in FORMATS:
        old, new = make_task(attribute, form), make_task(larger, form)
        for split in ("train", "validation", "test"):
            before, after = ({e.query for e in getattr(t, split)} for t in (old, new))
            assert before == after - {"cuckoo:"}
            assert ("cuckoo:" in after) == (split_of(larger, form, "cuckoo") == split)
        assert old.descriptions == new.descriptions
        assert old.seen == new.seen


def test_held_out_pairs_are_in_no_training_task():
    trained = {task.name for task in GROUPS["pocket"]()}
    held_out = {task.name for task in (make_task(*pair) for pair in combinations(seen=False))}
    assert not trained & held_out
    assert len(trained) + len(held_out) == 24 * 36
    assert 0.15 < len(held_out) / (24 * 36) < 0.25
    assert {t.name for t in GROUPS["pocket_unseen"]()} <= held_out
    assert {t.name for t in GROUPS["pocket_seen"]()} <= trained
    # An attribute or a part of a format that training never meets could not be known.
    parts = [name.split("/")[2].split("-") for name in trained]
    assert {name.split("/")[1] for name in trained} == set(BY_NAME)
    assert {part for names in parts for part in names} == {"plain", "it_is", "echo", "quotes", "brackets", "twice"} | {
        "dot",
        "bang",
    }


def test_held_out_wordings_are_in_no_training_description():
    training: dict[str, str] = {}
    for task in GROUPS["pocket"]():
        name = task.name.split("/")[1]
        training[name] = training.get(name, "") + "\n".join(task.descriptions).lower()
    for attribute in ATTRIBUTES:
        kept, held_out = training_requests(attribute), held_out_requests(attribute)
        assert len(kept) > 50
        assert len(held_out) >= 5
        assert not set(kept) & set(held_out)
        assert set(kept) | set(held_out) <= set(all_requests(attribute))
        for request in held_out:
            assert request.lower() not in training[attribute.name]
        for form in FORMATS[::7]:
            for text in descriptions(attribute, form, held_out=True, count=4):
                assert any(request.lower() in text.lower() for request in held_out)
    for group in ("pocket_unseen_all", "pocket_reworded"):
        for task in GROUPS[group]():
            asked = [r.lower() for r in held_out_requests(BY_NAME[task.name.split("/")[1]])]
            assert all(any(request in text.lower() for request in asked) for text in task.descriptions)


def test_evaluation_groups_have_each_attribute_once():
    for name, tasks in (
        (name, make())
        for name, make in GROUPS.items()
        if name not in ("pocket", "pocket_unseen_all", "pocket_agent", "pocket_agent_unseen")
    ):
        assert [task.name.split("/")[1] for task in tasks] == list(BY_NAME), name
        assert all(task.test and task.seen != ("unseen" in name) for task in tasks)


def test_options_need_the_task():
    places = Counter()
    for task in [*GROUPS["pocket_unseen_choice"](), *GROUPS["pocket_seen_choice"]()]:
        _, name, form, _ = task.name.split("/")
        render = next(f for f in FORMATS if f.name == form).render
        for e in task.test:
            thing = e.query[:-1]
            assert len(set(e.options)) == 4
            assert e.options[e.gold] == e.response == " " + render(thing, BY_NAME[name].values[thing])
            assert e.option_lengths == tuple(len(option.strip()) for option in e.options)
            own = {" " + render(thing, a.values[thing]) for a in ATTRIBUTES if thing in a.values}
            assert len(own & set(e.options)) == 3
            places[e.gold] += 1
    assert min(places[i] for i in range(4)) > 0.15 * sum(places.values())


def test_tasks_are_loaded_by_name_and_by_group():
    names = ("pocket/sound/it_is-quotes-dot", "pocket_unseen", "pocket/sound/plain/choice")
    tasks = load_tasks(names)
    assert next(iter(tasks)) == names[0]
    assert list(tasks)[-1] == names[-1]
    assert len(tasks) == 26
    assert tasks[names[0]].test[0].response.startswith(' it is "')
    assert tasks[names[2]].test[0].options
    assert find("pocket/sound/plain")[0] is find("pocket/sound/plain")[0]
    # The same tasks in other words keep names of their own.
    assert len(load_tasks(("pocket_seen", "pocket_reworded"))) == 48
    assert len(load_tasks(("pocket_agent", "pocket_agent_unseen", "agent/seen-07"))) == 75


def test_a_file_may_not_take_an_embedded_name(tmp_path):
    write_rows(tmp_path / "pocket.jsonl", [{"system": "a", "input": "b", "output": "c"}])
    with raises(DataError, "data.files", "'pocket'", code="taken"):
        load_tasks(("pocket",), files=[tmp_path / "pocket.jsonl"])


def test_pretraining_reads_nothing_that_is_held_out(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    text = importlib.import_module("pocket_text")
    tasks, rng = text.pretraining_tasks(), random.Random(0)
    assert all(task.seen for task in tasks)
    held_out = {r.lower(): a.name for a in ATTRIBUTES for r in held_out_requests(a)}
    for task in rng.sample(tasks, 200):
        pieces = text.document([task], rng)
        read = [piece for piece, answer in pieces if not answer]
        queries = {piece.removeprefix("\n\n") for piece in read if piece.removeprefix("\n\n") not in task.descriptions}
        queries = {query for query in queries if query.removesuffix("\n\n") not in task.descriptions}
        assert queries <= {example.query for example in task.train}
        if task.source == "pocket" and len(queries) < len(read):
            own = [r for r, name in held_out.items() if name == task.name.split("/")[1]]
            assert not any(request in read[0].lower() for request in own)


@pytest.mark.parametrize("name", ["pocket_unsene", "pocket/sound", "pocket/sound/loud", "pocket/sound/plain/chose"])
def test_an_unknown_name_is_refused(name):
    with raises(DataError, "data.tasks", repr(name), code="unknown"):
        load_tasks((name,))


def test_the_suite_is_the_one_that_the_shipped_models_were_made_with():
    """A change of any text, split or name would leave the shipped pair and generator behind: train them again."""
    fields = ("id", "query", "response", "options", "gold", "contexts", "option_lengths")
    digest = hashlib.blake2b(digest_size=8)
    for group in GROUPS:
        for task in GROUPS[group]():
            for value in (task.name, task.descriptions, task.seen):
                digest.update(repr(value).encode())
            for example in (*task.train, *task.validation, *task.test):
                assert not example.turns
                digest.update(repr(tuple(getattr(example, field) for field in fields)).encode())
    assert digest.hexdigest() == "5d1d32ec25ddadef"


def test_a_conversation_reads_as_a_prompt_with_shots():
    shots = [Example("", "owl:", " [owlet]"), Example("", "dog:", " [puppy]")]
    turns = [{"role": "system", "content": "Give the animal's young."}]
    for shot in shots:
        turns += [{"role": "user", "content": shot.query}, {"role": "assistant", "content": shot.response}]
    turns.append({"role": "user", "content": "cat:"})
    for name in ("cloud", "edge"):
        tokenizer = load_tokenizer(f"pocket-{name}")
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert text == few_shot_context("Give the animal's young.", shots, "cat:")
