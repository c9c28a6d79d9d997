"""The embedded task suite: attribute × answer format × kind.

In: the tables of `world` and `wordings`. Out: `Task`s, by group or by name. A fifth of all pairs of
attribute and format is held out: these tasks are unseen by the models' pretraining and by the generators' training.

Names: ``pocket/sound/it_is-quotes-dot`` is answered in free form, ``pocket/sound/it_is-quotes-dot/choice`` chosen from
four options; ``…/reworded`` is a seen task in held-out wordings. Nothing here is random: splits, wordings and options
follow from hashes of the names.
"""

import random
from functools import cache

from lora_gen_jax.data.pocket.agent import agent_tasks
from lora_gen_jax.data.pocket.wordings import FORMATS, Format, descriptions
from lora_gen_jax.data.pocket.world import ATTRIBUTES, Attribute
from lora_gen_jax.data.tasks import Example, Task, stable_hash

SOURCE = "pocket"
HELD_OUT_PERCENT = 20
_TEST_PERCENT, _VALIDATION_PERCENT = 25, 10
_WORDINGS, _SHOTS_ALONE = 24, 6
"""Descriptions of a training task, and how many more of its prompts have none, the shots speaking for themselves."""
_DISTRACTORS_OF_THING = 2


def is_unseen(attribute: Attribute, form: Format) -> bool:
    """Whether no training may use this pair."""
    return stable_hash("combination", attribute.name, form.name) % 100 < HELD_OUT_PERCENT


def split_of(attribute: Attribute, form: Format, thing: str) -> str:
    """The split of one query of one task; every attribute of a thing is a training query in most formats."""
    place = stable_hash("split", attribute.name, form.name, thing) % 100
    if place < _TEST_PERCENT:
        return "test"
    return "validation" if place < _TEST_PERCENT + _VALIDATION_PERCENT else "train"


@cache
def make_task(attribute: Attribute, form: Format, choice: bool = False, reworded: bool = False) -> Task:
    """One task.

    Args:
        attribute, form: what is answered and how it is written.
        choice: test queries have options and are scored by log-likelihood.
        reworded: a seen task described in wordings that no training prompt uses. Unseen tasks always are.
    """
    seen = not is_unseen(attribute, form)
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for thing, value in attribute.values.items():
        splits[split_of(attribute, form, thing)].append(_example(attribute, form, thing, value, choice))
    own = reworded or not seen
    texts = descriptions(attribute, form, held_out=own, count=4 if own else _WORDINGS)
    return Task(
        name=task_name(attribute, form) + "/choice" * choice + "/reworded" * (reworded and seen),
        descriptions=texts if own else (*texts, *("",) * _SHOTS_ALONE),
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        source=SOURCE,
        seen=seen,
    )


def task_name(attribute: Attribute, form: Format) -> str:
    return f"{SOURCE}/{attribute.name}/{form.name}"


def _example(attribute: Attribute, form: Format, thing: str, value: str, choice: bool) -> Example:
    response = f" {form.render(thing, value)}"
    key = f"{attribute.name}/{form.name}/{thing}"
    if not choice:
        return Example(key, f"{thing}:", response)
    values = [value, *_distractors(attribute, thing, value)]
    random.Random(stable_hash("options", key)).shuffle(values)
    options = tuple(f" {form.render(thing, v)}" for v in values)
    lengths = tuple(len(option) - 1 for option in options)
    return Example(f"{key}/choice", f"{thing}:", response, options, values.index(value), option_lengths=lengths)


def _distractors(attribute: Attribute, thing: str, value: str) -> list[str]:
    """Two other facts about the thing, and the same fact about another thing: neither half of the task is enough."""
    rng = random.Random(stable_hash("distractors", attribute.name, thing))
    own = sorted({a.values[thing] for a in ATTRIBUTES if thing in a.values} - {value})
    others = sorted(set(attribute.values.values()) - {value} - set(own))
    return [*rng.sample(own, _DISTRACTORS_OF_THING), rng.choice(others)]


def find(name: str) -> list[Task]:
    """The tasks of a group, or the one task of this name; none where neither exists."""
    if name in GROUPS:
        return GROUPS[name]()
    source, *rest = name.split("/")
    kinds: dict[tuple[str, ...], dict[str, bool]] = {
        (): {},
        ("choice",): {"choice": True},
        ("reworded",): {"reworded": True},
    }
    kind = kinds.get(tuple(rest[2:]))
    if source != SOURCE or kind is None:
        return [task for task in agent_tasks() if task.name == name] if source == "agent" else []
    pairs = [(a, f) for a in ATTRIBUTES for f in FORMATS if [a.name, f.name] == rest[:2]]
    return [make_task(*pair, **kind) for pair in pairs if not kind.get("reworded") or not is_unseen(*pair)]


def combinations(seen: bool) -> list[tuple[Attribute, Format]]:
    """All seen or all unseen pairs of attribute and format."""
    return [(a, f) for a in ATTRIBUTES for f in FORMATS if is_unseen(a, f) != seen]


@cache
def _one_each(seen: bool) -> tuple[tuple[Attribute, Format], ...]:
    """For every attribute the seen or unseen pair that a hash puts first."""
    pairs = []
    for attribute in ATTRIBUTES:
        own = [form for a, form in combinations(seen) if a == attribute]
        own = [form for form in own if make_task(attribute, form).test]
        pairs.append((attribute, min(own, key=lambda f: stable_hash("evaluated", attribute.name, f.name))))
    return tuple(pairs)


GROUPS = {
    "pocket": lambda: [make_task(*pair) for pair in combinations(seen=True)],
    "pocket_seen": lambda: [make_task(*pair) for pair in _one_each(seen=True)],
    "pocket_unseen": lambda: [make_task(*pair) for pair in _one_each(seen=False)],
    "pocket_unseen_all": lambda: [t for pair in combinations(seen=False) if (t := make_task(*pair)).test],
    "pocket_reworded": lambda: [make_task(*pair, reworded=True) for pair in _one_each(seen=True)],
    "pocket_seen_choice": lambda: [make_task(*pair, choice=True) for pair in _one_each(seen=True)],
    "pocket_unseen_choice": lambda: [make_task(*pair, choice=True) for pair in _one_each(seen=False)],
    "pocket_agent": lambda: [task for task in agent_tasks() if task.seen],
    "pocket_agent_unseen": lambda: [task for task in agent_tasks() if not task.seen],
}
"""Tasks that are named together: "pocket" is what generators are trained on, the others are for evaluation."""
