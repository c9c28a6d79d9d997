"""Prompts under controls: what each one leaves of a task's own prompt, and that the shipped generator reads them so."""

import dataclasses

import numpy as np
import pytest
from helpers import raises, trained

from lora_gen_jax.config import EvalConfig, ModelConfig
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.controls import CONTROLS, check_controls, gibberish, prompts_under
from lora_gen_jax.evaluation.systems import make_systems
from lora_gen_jax.evaluation.task import task_prompt
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.models import load_model, load_pair
from lora_gen_jax.training.checkpoint import load_checkpoint

SETTINGS = EvalConfig(shots=2)


@pytest.fixture(scope="module")
def encoder():
    return load_model(ModelConfig("pocket-cloud"), weights=False).encoder


def make_task(name, source, descriptions=("Say its color.", "Which color?")):
    train = [Example(f"{name}{i}", f"{name} {i}:", f" answer{i}") for i in range(4)]
    return Task(name, descriptions, train, [Example("t", f"{name}:", " green")], source=source)


def own_of(task):
    prompt = task_prompt(task, SETTINGS)
    assert prompt is not None
    return prompt


def under(control, tasks, encoder):
    prompts = prompts_under(control, tasks, SETTINGS, encoder)

    def made(task):
        prompt = prompts(task)
        assert prompt is not None
        return prompt

    return made


def test_what_each_control_leaves_of_the_prompt(encoder):
    tasks = [make_task("sun", "sky"), make_task("moon", "sky", ("Say it.",)), make_task("cat", "animals")]
    own = {task.name: own_of(task) for task in tasks}
    made = {c: {t.name: under(c, tasks, encoder)(t) for t in tasks} for c in CONTROLS}
    shots = own["sun"].text.removeprefix("Say its color.\n\n")
    assert shots.count(":") == 2
    assert made["paraphrase"]["sun"] == own["sun"]._replace(text=f"Which color?\n\n{shots}")
    assert made["paraphrase"]["moon"] == own["moon"]
    assert made["description"]["sun"] == Prompt("Say its color.", (), False)
    assert made["shots"]["sun"] == own["sun"]._replace(text=shots)
    assert made["shuffled"] == {"sun": own["cat"], "moon": own["cat"], "cat": own["sun"]}
    assert made["empty"]["sun"].text == ""
    for name, prompt in made["gibberish"].items():
        assert len(encoder.prompt(prompt.text)) == len(encoder.prompt(own[name].text))
        assert prompt.shots == ()
    assert len({prompt.text for prompt in made["gibberish"].values()}) == 3


def test_nothing_may_be_left_of_a_prompt(encoder):
    task = make_task("sun", "sky", ())
    none = dataclasses.replace(SETTINGS, shots=0)
    for control, settings in (("description", SETTINGS), ("shots", none), ("gibberish", none)):
        assert prompts_under(control, [task], settings, encoder)(task) is None


@pytest.mark.parametrize("model", ["pocket-cloud", None])
def test_gibberish_is_as_long_as_the_text_and_depends_on_the_seed_alone(model):
    encoder = load_model(ModelConfig(model) if model else trained().cloud, weights=False).encoder
    for text in ("sun", "say the color of the sun", "what kind is the cat ? " * 20):
        one, again, other = (gibberish(encoder, text, seed) for seed in ("0/a", "0/a", "1/a"))
        assert one == again != other
        assert len(encoder.prompt(one)) == len(encoder.prompt(text))


def test_variants_of_a_task_do_not_lend_each_other_their_prompts(encoder):
    tasks = [make_task(f"s{i}", "sky") for i in range(3)] + [make_task(f"a{i}", "animals") for i in range(2)]
    prompts = under("shuffled", tasks, encoder)
    given = [prompts(task).shots[0].id[:2] for task in tasks]
    assert given == ["a0", "a1", "a0", "s0", "s1"]


def test_controls_that_the_tasks_have_nothing_for_are_refused():
    one = make_task("sun", "sky", ("Say it.",))
    with raises(ConfigError, "eval.tasks", "shuffled"):
        check_controls(["shuffled"], [one])
    with raises(ConfigError, "eval.methods", "paraphrase"):
        check_controls(["paraphrase"], [one])


def test_a_control_is_read_by_the_cloud_and_differs_from_the_own_prompt():
    config = trained()
    methods = ("lora_gen", *list(CONTROLS)[1:])
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, methods=methods))
    tasks = list(load_tasks(("warm", "count"), files=config.data.files).values())
    pair, loaded = load_pair(config), {"lora_gen": load_checkpoint(config.directory)}
    systems = make_systems(config, config.eval.methods, pair, loaded, tasks)
    kernels = {
        name: np.asarray(system.specialized_for(tasks[0]).params["layers"]["ffn"]["up"]["kernel"])
        for name, system in systems.items()
    }
    identities = {system.identity_for(tasks[0]) for system in systems.values() if system.identity_for}
    assert len(identities) == len(systems)
    names = list(kernels)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.any(kernels[one] != kernels[other]), (one, other)
