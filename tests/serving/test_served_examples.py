"""A server that learns from examples: of a new specialization, and of a conversation that asks for it."""

import httpx
import pytest
from helpers import unsaid
from serving_tools import serving

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.serving.command import make_scheduler
from lora_gen_jax.serving.registry import Registry, Served
from lora_gen_jax.serving.service import Service
from lora_gen_jax.serving.stored import read_store
from lora_gen_jax.specialization.prompt import Prompt
from lora_gen_jax.specialization.settings import RefineConfig

ROWS = [{"input": "the sun is", "output": "red"}, {"input": "the moon is", "output": "green . blue"}]
PAIRS = [(row["input"], row["output"]) for row in ROWS]


@pytest.fixture(scope="module")
def roomy(specializer, tmp_path_factory):
    """A service whose rows have room for a LoRA."""
    scheduler = make_scheduler(specializer, rows=4, context=96, queue=64, rank=8)
    yield Service(scheduler, specializer, Registry(20, tmp_path_factory.mktemp("store")))
    assert scheduler.close(30)


@pytest.fixture(scope="module")
def wide(roomy):
    with serving(roomy) as address, httpx.Client(base_url=address, timeout=120) as client:
        yield client


def expected(specializer, prompt, config, text, length=6):
    """What merged weights say, refined without a server."""
    (made,) = specializer.specialize([prompt], refine=config)
    edge = specializer.pair.edge
    params = merge(edge.params, specializer.adapter(made))
    (found,) = generate(
        EdgeModel(edge.decoder, params),
        [edge.encoder.text(text)],
        GenerationSettings(max_new_tokens=length, stop_ids=[edge.encoder.end]),
    )
    return made, edge.encoder.decode(found.ids)


def complete(client, model, text, length=6):
    body = {"model": model, "prompt": text, "max_tokens": length, "temperature": 0}
    return client.post("/v1/completions", json=body).json()["choices"][0]["text"]


@pytest.mark.parametrize("kind", ["gates", "lora"])
@pytest.mark.parametrize("fields", [{"description": "say a color"}, {"prompt": "say a color"}, {}])
def test_examples_are_read_and_learned_from(wide, specializer, roomy, kind, fields):
    name = f"{kind}-{'-'.join(fields) or 'alone'}"
    body = {"name": name, "examples": ROWS, "refine": kind, "steps": 3, **fields}
    reply = wide.post("/v1/specializations", json=body)
    assert reply.status_code == 200, reply.text
    prompt = Prompt(next(iter(fields.values()), ""), PAIRS)
    made, text = expected(specializer, prompt, RefineConfig(kind, steps=3), "the star is")
    told = reply.json()["refined"]
    assert told | {"loss_before": 0, "loss_after": 0} == made.refined | {"loss_before": 0, "loss_after": 0}
    assert told["loss_after"] < told["loss_before"]
    assert complete(wide, name, "the star is") == text
    (kept,) = [x for x in read_store(roomy.registry.store, Served.of(specializer)) if x.name == name]
    assert (kept.made.refined, bool(kept.made.factors)) == (told, kind == "lora")


def test_without_steps_examples_are_only_read(wide):
    body = {"name": "only-read", "examples": ROWS, "steps": 0}
    assert wide.post("/v1/specializations", json=body).json()["refined"] is None


@pytest.mark.parametrize(
    ("fields", "param", "fact"),
    [
        ({"prompt": "x", "refine": "gates"}, "refine", "examples"),
        ({"prompt": "x", "steps": 3}, "steps", "examples"),
        ({"prompt": "x", "as_chat": True}, "as_chat", "examples"),
        ({"examples": ROWS, "shots": ROWS}, "examples", "description"),
        ({"examples": ROWS, "prompt": "x", "description": "y"}, "examples", "description"),
        ({"examples": ROWS, "messages": [{"role": "system", "content": "x"}]}, "examples", "description"),
        ({"examples": [*ROWS, {"input": "x"}]}, "examples.2.output", "example 3"),
        ({"examples": []}, "examples", 64),
        ({"examples": ROWS * 33}, "examples", 64),
        ({"examples": ROWS, "steps": 51}, "steps", 50),
        ({"examples": ROWS, "refine": "all"}, "refine", "lora"),
        ({"description": "x", "examples": [{"input": "red " * 200, "output": "x"}]}, None, "example 1"),
        ({"examples": ROWS, "refine": "lora"}, "refine", "--refined-rank 8"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(client, service, fields, param, fact):
    reply = client.post("/v1/specializations", json={"name": "refused", **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert unsaid(error["message"], [fact]) == [], error
    assert service.registry.get("refused") is None


def test_examples_have_a_limit_together(wide):
    rows = [{"input": "red " * 5000, "output": "x"}] * 4
    reply = wide.post("/v1/specializations", json={"name": "refused", "examples": rows})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "examples"
    assert unsaid(error["message"], [80004, 65536]) == []


TURNS = [
    {"role": "system", "content": "say a color"},
    {"role": "user", "content": "the sun is"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "the star is"},
]


def chat(client, **fields):
    body = {"model": "auto", "messages": TURNS, "max_tokens": 5, "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_a_conversation_is_learned_from_only_where_it_asks_for_it(wide, roomy, specializer):
    plain = chat(wide).json()
    assert roomy.registry.get(plain["model"]).made.refined is None
    assert chat(wide, turns_as_examples=False).json()["model"] == plain["model"]
    learned = chat(wide, turns_as_examples=True).json()
    assert learned["model"] != plain["model"]
    entry = roomy.registry.get(learned["model"])
    assert (entry.automatic, entry.made.refined["examples"]) == (True, 1)
    assert chat(wide, turns_as_examples=True).json()["model"] == learned["model"]
    # The turns that were learned from are not read again.
    assert learned["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]
    prompt = Prompt("say a color", [("the sun is", "red")], chat=True)
    (made,) = specializer.specialize([prompt], refine=RefineConfig())
    edge = specializer.pair.edge
    ids = edge.encoder.chat([{"role": "user", "content": "the star is"}])
    params = merge(edge.params, specializer.adapter(made))
    (found,) = generate(
        EdgeModel(edge.decoder, params), [ids], GenerationSettings(max_new_tokens=5, stop_ids=[edge.encoder.end])
    )
    assert learned["choices"][0]["message"]["content"] == edge.encoder.decode(found.ids)
    # Without a turn that is answered there is nothing to learn from: the plain specialization.
    assert chat(wide, messages=[TURNS[0], TURNS[3]], turns_as_examples=True).json()["model"] == plain["model"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [*TURNS[:3]]}, "messages"),
        ({"messages": [TURNS[0], TURNS[1], TURNS[1], TURNS[3]]}, "messages"),
        ({"model": "base"}, "turns_as_examples"),
        ({"messages": [TURNS[0], TURNS[1], {"role": "assistant", "content": ""}, TURNS[3]]}, "messages"),
    ],
)
def test_turns_that_are_no_examples_are_refused(wide, fields, param):
    reply = chat(wide, turns_as_examples=True, **fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
