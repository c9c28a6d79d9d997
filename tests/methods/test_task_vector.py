"""Task vectors: what is read behind the prompt, where it is put, and that nothing else changes."""

import dataclasses

import numpy as np
import pytest
from helpers import SAME, logits, raises

from lora_gen_jax.config import Config, EvalConfig, ModelConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.data.pocket.suite import find
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.evaluation.systems import make_systems
from lora_gen_jax.evaluation.task import FURTHER_QUERIES, System, evaluate_task, task_prompt
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.methods.task_vector import METHOD, task_vector
from lora_gen_jax.models import Pair, load_model

pytestmark = pytest.mark.float64
SETTINGS = EvalConfig(shots=3, latency=False)


@pytest.fixture(scope="module")
def edge():
    return load_model(ModelConfig("pocket-edge"))


@pytest.fixture(scope="module")
def prompt():
    made = task_prompt(find("pocket/sound/quotes")[0], SETTINGS)
    assert made is not None
    return made


def last_logits(edge, ids, adapter=None):
    return np.asarray(logits(edge.decoder, edge.params, np.array([ids], np.int32), adapter=adapter))[0]


def test_a_prompt_brings_rows_that_are_none_of_its_shots(prompt):
    rows = [*prompt.shots, *prompt.queries]
    assert (len(prompt.shots), len(prompt.queries)) == (3, FURTHER_QUERIES)
    assert len({row.query_key for row in rows}) == len(rows)
    assert not any(row.query in prompt.text for row in prompt.queries)


def test_behind_the_last_layer_the_vector_of_a_query_says_what_the_prompted_model_says(edge, prompt):
    """So the state is that of the prompted query's last token, and stands at the unprompted one's."""
    one = prompt._replace(queries=prompt.queries[:1])
    query = edge.encoder.text(one.queries[0].query)
    prompted = edge.encoder.text(f"{one.text}\n\n{one.queries[0].query}")
    got = last_logits(edge, query, task_vector(edge, one, 1.0))
    np.testing.assert_allclose(got[-1], last_logits(edge, prompted)[-1], **SAME)
    np.testing.assert_array_equal(got[:-1], last_logits(edge, query)[:-1])


def test_the_vector_is_the_mean_over_queries_at_every_layer(edge, prompt):
    each = [task_vector(edge, prompt._replace(queries=(one,)), 0.5).scanned["vector"] for one in prompt.queries]
    both = task_vector(edge, prompt, 0.5).scanned
    np.testing.assert_allclose(both["vector"], np.mean(each, axis=0), **SAME)
    (at,) = np.flatnonzero(both["here"])
    assert at + 1 == round(0.5 * edge.config.num_layers)
    assert np.flatnonzero(task_vector(edge, prompt, 0.01).scanned["here"]).tolist() == [0]


def test_a_query_with_its_own_state_stays_as_it_is(edge, prompt):
    """In the middle of the model, too: what stands there is the state of that layer and no other."""
    query = prompt.queries[0]
    alone = edge.encoder.text(query.query)
    own, behind = (task_vector(edge, one, 0.5) for one in (Prompt("", (), False, (query,)), prompt))
    np.testing.assert_allclose(last_logits(edge, alone, own), last_logits(edge, alone), **SAME)
    assert np.abs(last_logits(edge, alone, behind)[-1] - last_logits(edge, alone)[-1]).max() > 0.01


def test_generation_scoring_and_read_ahead_tokens_agree(edge, prompt):
    """Generation puts it before decoding begins, scoring in one pass where options follow the same context."""
    model = edge.plain.replace(adapter=task_vector(edge, prompt, 0.5))
    queries = [edge.encoder.text(row.query) for row in prompt.queries[:3]]
    made = generate(model, queries, GenerationSettings(max_new_tokens=5))
    requests = [Request(query, [one.ids, one.ids[:2]]) for query, one in zip(queries, made, strict=True)]
    whole = score(model, requests, batch_tokens=64)
    for one, scored in zip(made, whole, strict=True):
        assert scored.is_greedy == (True, True)
        np.testing.assert_allclose(scored.logprobs, (sum(one.logprobs), sum(one.logprobs[:2])), **SAME)
    ahead = [edge.encoder.line_break, *queries[0]]
    prefix = encode_prefix(model, ahead[:-1])
    parts = (score(model, [Request(ahead, [made[0].ids])], batch_tokens=64),)
    parts += (score(model.replace(prefix=prefix), [Request(ahead[-1:], [made[0].ids])], batch_tokens=64),)
    np.testing.assert_allclose(parts[0][0].logprobs, parts[1][0].logprobs, **SAME)


def test_it_is_a_method_of_an_evaluation(edge):
    task = find("pocket/sound/quotes")[0]
    pair, last = Pair(edge, edge), dataclasses.replace(SETTINGS, vector_layer=1.0)
    systems = [make_systems(Config(eval=s), ["task_vector"], pair, {}, [task])["task_vector"] for s in (SETTINGS, last)]
    assert len({system.identity_for(task) for system in systems if system.identity_for}) == 2
    assert all(system.prompted for system in systems)
    base = System(lambda task: edge.plain)
    got, plain = (evaluate_task(edge, task, system, last) for system in (systems[1], base))
    assert got["context_tokens"] == plain["context_tokens"]
    # All answers begin alike, so the mean state of the last layer says how: with the quote that the prompt asks for.
    model = systems[1].specialized_for(task)
    queries = [edge.encoder.text(document.query) for document in task.test]
    made, base = (generate(one, queries, GenerationSettings(max_new_tokens=1)) for one in (model, edge.plain))
    assert {edge.encoder.decode(one.ids).strip() for one in made} == {'"'}
    assert '"' not in {edge.encoder.decode(one.ids).strip() for one in base}


def test_what_it_needs(edge, prompt):
    with raises(DataError, "eval.shots", "task_vector"):
        task_vector(edge, prompt._replace(queries=()), 0.5)
    with raises(ConfigError, "eval.vector_layer", 0):
        check(Config(eval=EvalConfig(vector_layer=0)))
    assert METHOD.specialize(Config(), Pair(edge, edge), None)(None).adapter is None
