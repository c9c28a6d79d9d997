"""Prompts in the edge's context: one packed row is as many plain sequences, and what fits a row."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import EDGE, SAME, WORDS, logits, raises, random_params

from lora_gen_jax.config import Config, DataConfig, ModelConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.data.encode import Encoder, shared_row
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.pipeline import Group, GroupSampler, pack_groups
from lora_gen_jax.data.prompts import few_shot_context, system_prompt
from lora_gen_jax.data.reasoning import REASONING_TASKS as REASONING
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import load_tokenizer
from lora_gen_jax.errors import ConfigError, DataError, ModelError
from lora_gen_jax.evaluation import answers, choices
from lora_gen_jax.models import load_model
from lora_gen_jax.training.step import edge_loss

pytestmark = pytest.mark.float64
SHAPES = DataConfig(prompts_per_step=2, prompts_per_row=1, cloud_length=24, edge_length=32, response_slots=8)
DATA = DataConfig(
    prompts_per_step=1,
    cloud_length=128,
    edge_length=64,
    queries_per_prompt=4,
    response_slots=32,
    query_length=16,
    min_shots=2,
    max_shots=2,
    edge_reads_prompt=True,
)


def _groups(prefixed):
    rng, groups = np.random.default_rng(5), []
    for prefix, lengths in ((7, [(3, 2), (5, 1), (2, 3)]), (4, [(6, 3)])):
        ids = rng.integers(2, 53, prefix).tolist()
        queries = [tuple(rng.integers(2, 53, n).tolist() for n in pair) for pair in lengths]
        groups.append(Group("", (), ids, queries, ids if prefixed else []))
    return groups


def test_a_row_that_begins_with_its_prompt_has_the_loss_of_separate_rows():
    params, groups = random_params(EDGE, seed=3), _groups(prefixed=True)
    loss_of = jax.jit(lambda batch: edge_loss(Decoder(EDGE), params, None, batch, {}))
    separate = []
    for group in groups:
        for query, response in group.queries:
            ids = group.prefix + query + response
            row = np.asarray(logits(Decoder(EDGE), params, np.array([ids + [0] * (24 - len(ids))])), np.float64)[0]
            for i, target in enumerate(response):
                at = row[len(group.prefix) + len(query) + i - 1]
                separate.append(np.log(np.sum(np.exp(at - at.max()))) + at.max() - at[target])
    packed = pack_groups(groups, SHAPES, EDGE.num_layers)
    np.testing.assert_allclose(loss_of(packed), np.mean(separate), **SAME)
    without = loss_of(pack_groups(_groups(prefixed=False), SHAPES, EDGE.num_layers))
    assert abs(float(without) - np.mean(separate)) > 1e-2


def test_the_prompt_is_segment_0_and_queries_go_on_behind_it():
    batch = pack_groups(_groups(prefixed=True), SHAPES, EDGE.num_layers)
    assert batch.segments_PT[0].tolist()[:18] == [0] * 7 + [1] * 4 + [2] * 5 + [3] * 2
    assert batch.positions_PT[0].tolist()[:18] == [*range(7), *range(7, 11), *range(7, 12), 7, 8]
    assert batch.positions_PT[0].tolist()[20:] == [-1] * 12


@pytest.fixture(scope="module")
def encoder():
    return load_model(ModelConfig("pocket-edge")).encoder


@pytest.fixture
def draw(encoder):
    """A group drawn from one task with these changes to DATA."""

    def drawn(description="Say the color.", seed=0, **changes):
        rows = [Example(str(i), f"{thing}:", f" {color}") for i, (thing, color) in enumerate(_THINGS)]
        task = Task("colors", (description,), rows, rows, source="x")
        sampler = GroupSampler([task], encoder, encoder, dataclasses.replace(DATA, **changes), 4, "train")
        return sampler.draw(np.random.default_rng(seed))

    return drawn


def test_a_weight_may_name_a_source_without_validation_rows(encoder):
    rows = [Example(str(i), f"{thing}:", f" {color}") for i, (thing, color) in enumerate(_THINGS)]
    tasks = [Task("a", ("Say it.",), rows, (), rows[:2], source="a"), Task("b", ("Say it.",), rows, (), source="b")]

    def sampler(split, *weights):
        return GroupSampler(tasks, encoder, encoder, dataclasses.replace(DATA, source_weights=weights), 4, split)

    assert sampler("validation", "b=0.2").cumulative.tolist() == [1.0]
    np.testing.assert_allclose(sampler("train", "b=3").cumulative, [0.25, 1.0])
    with raises(ConfigError, "data.source_weights", "train.validation_batches", code="zero"):
        sampler("validation", "a=0")
    with raises(ConfigError, "data.source_weights", "'c'", "a, b", code="unknown"):
        sampler("validation", "c=1")


_THINGS = [("lemon", "yellow"), ("crow", "black"), ("milk", "white"), ("grass", "green"), ("sky", "blue")] + [
    (f"ball {i}", "red") for i in range(6)
]


def test_the_edge_reads_the_prompt_of_the_cloud(draw, encoder):
    group = draw()
    assert len(group.shots) == 2
    assert len(group.queries) == len(group.asked) == 4
    for example, (query, response) in zip(group.asked, group.queries, strict=True):
        text = few_shot_context(group.description, group.shots, example.query)
        assert group.prefix + query == encoder.text(text)
        assert response == [*encoder.text(text + example.response)[len(encoder.text(text)) :], encoder.end]
    plain = draw(edge_reads_prompt=False)
    assert (plain.prompt, plain.shots, plain.asked) == (group.prompt, group.shots, group.asked)
    assert [encoder.query(example, False)[0] for example in plain.asked] == [query for query, _ in plain.queries]
    assert plain.prefix == []


def test_queries_give_way_before_shots_and_shots_before_the_last_query(draw, encoder):
    whole = draw(edge_length=400, response_slots=64)
    rows = [encoder.query(one, False, system_prompt(whole.description, whole.shots)) for one in whole.asked]
    rows = [(context, [*response, encoder.end]) for context, response in rows]

    def needed(count):
        """Tokens of the first queries in one row, what all of them begin with counted once."""
        contexts = [context[:-1] for context, _ in rows[:count]]
        shared = next(n for n in range(min(map(len, contexts)), -1, -1) if len({tuple(c[:n]) for c in contexts}) == 1)
        return shared + sum(len(context) - shared + len(response) - 1 for context, response in rows[:count])

    assert whole.asked == draw(edge_length=400, response_slots=64).asked
    for room, queries, shots in ((needed(4), 4, 2), (needed(4) - 1, 3, 2), (needed(1), 1, 2), (needed(1) - 1, None, 1)):
        group = draw(edge_length=room, response_slots=64)
        assert (group.asked, len(group.shots)) == (whole.asked, shots)
        assert queries is None or len(group.queries) == queries
        assert len(group.prefix) + sum(len(q) + len(r) - 1 for q, r in group.queries) <= room


def test_a_prompt_that_leaves_no_room_is_an_error_that_names_the_row(draw):
    with raises(DataError, "data.query_length", "data.edge_length (30)"):
        draw(description="Say the color. " * 8, edge_length=30, min_shots=0, max_shots=0)


def test_a_row_holds_what_its_contexts_share_once_and_as_many_as_fit():
    pairs = [([1, 8, 5, 6], [7, 8]), ([1, 8, 9], [4]), ([1, 8], [2]), ([1, 3], [9])]

    def taken(room, slots=9):
        return shared_row(iter(pairs), room, slots)

    # One context is shared but for its last token, which predicts the answer.
    assert taken(5) == ([1, 8, 5], [([6], [7, 8])])
    assert taken(4) == ([], [])
    # Two tokens are shared, then 2 + 2 - 1, then 1 + 1 - 1.
    assert taken(6) == ([1, 8], [([5, 6], [7, 8]), ([9], [4])])
    assert taken(5, slots=3)[1] == taken(5)[1]
    assert taken(6, slots=2) == taken(5)
    # The third context is all that the first two share: it keeps a token of its own, and the row shares one less.
    assert taken(8) == ([1], [([8, 5, 6], [7, 8]), ([8, 9], [4]), ([8], [2])])
    # Nothing is read after what did not fit.
    rest = iter(pairs)
    shared_row(rest, 5, 9)
    assert list(rest) == pairs[2:]


def _llama_like() -> Any:
    """A tokenizer as Llama 2's: no pre-tokenizer, a space before the text, bytes for what it does not know, a BOS."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [f"{word} {word}: {other}" for word in WORDS for other in ("Question", "Answer", "passage", "Q", "A")]
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["smollm2-135m", "pocket-edge", "llama-like"])
def reader(request):
    """The edge's encoder with a shipped model's tokenizer, or with one of another kind."""
    try:
        tokenizer = _llama_like() if request.param == "llama-like" else load_tokenizer(request.param)
    except ModelError as error:
        pytest.skip(f"{request.param} cannot be fetched: {error}")
    return Encoder(tokenizer, len(tokenizer))


def _one_text(reader, shots, document):
    """The prompt and the query as one text, written out here, and its ids."""
    shown = [shot.query + ("" if shot.response[0] == " " else "\n") + shot.response for shot in shots]
    return reader.tokenizer("\n\n".join(["Answer the question.", *shown, document.query]))["input_ids"]


@pytest.mark.parametrize("name", [*REASONING, "free form"])
def test_training_reads_the_ids_that_scoring_reads(reader, release, name):
    """Of the reasoning tasks and one whose queries and answers are lines of their own."""
    if name == "free form":
        rows = [Example(str(i), f"{thing}?\nSay its color.", color) for i, (thing, color) in enumerate(_THINGS)]
    else:
        rows = list(load_tasks([name], release)[name].train[:12])
    task = Task("one", ("Answer the question.",), rows, rows, source="x")
    shapes = {"cloud_length": 4000, "edge_length": 4000, "query_length": 900, "response_slots": 900}
    config = dataclasses.replace(DATA, **shapes, min_shots=1, max_shots=3)
    sampler, edge, read = GroupSampler([task], reader, reader, config, 4, "train"), SimpleNamespace(), 0
    edge.encoder = reader
    for seed in range(4):
        group = sampler.draw(np.random.default_rng(seed))
        scored = choices.pairs_of(edge, group.asked, group.description, group.shots) if name != "free form" else None
        alone = answers.contexts(edge, group.asked, group.description, group.shots)
        for number, ((query, response), document) in enumerate(zip(group.queries, group.asked, strict=True)):
            context = group.prefix + query
            assert context == alone[number] == _one_text(reader, group.shots, document)
            if scored is not None:
                assert (tuple(context), tuple(response[:-1])) == scored[number][document.gold]
            read += 1
    assert read >= 8


@pytest.mark.parametrize("reader", ["smollm2-135m", "llama-like"], indirect=True)
def test_what_is_read_apart_meets_in_other_tokens(reader):
    """The reason for all this: had these ids been equal, the test above could not fail."""
    prompt, query = "Answer the question.\n\nQ: Is a crow black?\nA: yes", "Question: Is milk white?\nAnswer:"
    apart = reader.prompt(prompt) + reader.text(query)[reader.tokenizer.bos_token_id == reader.text(query)[0] :]
    assert apart != reader.text(f"{prompt}\n\n{query}")


TEMPLATE = (
    "{% if refused and messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_in_a_chat_the_prompt_is_the_system_turn(encoder, monkeypatch):
    rows = [Example(str(i), f"{thing}:", f" {color}") for i, (thing, color) in enumerate(_THINGS)]
    task = Task("colors", ("Say the color.",), rows, rows, source="x", chat=True)
    monkeypatch.setattr(encoder.tokenizer, "chat_template", TEMPLATE.replace("refused", "false"))
    group = GroupSampler([task], encoder, encoder, dataclasses.replace(DATA, edge_length=200), 4, "train").draw(
        np.random.default_rng(0)
    )
    for example, (query, _) in zip(group.asked, group.queries, strict=True):
        system = {"role": "system", "content": system_prompt(group.description, group.shots)}
        assert group.prefix + query == encoder.chat([system, {"role": "user", "content": example.query}])
    monkeypatch.setattr(encoder.tokenizer, "chat_template", TEMPLATE.replace("refused", "true"))
    with raises(ModelError, "data.edge_reads_prompt", "colors"):
        GroupSampler([task], encoder, encoder, DATA, 4, "train")
    GroupSampler([task], encoder, encoder, dataclasses.replace(DATA, edge_reads_prompt=False), 4, "train")


@pytest.mark.parametrize("config", [Config(data=DATA), Config(method="lora", compare=("lora", "lora_gen"), data=DATA)])
def test_what_cannot_work(config):
    with raises(ConfigError, "data.edge_reads_prompt", "lora, lora_moe, mixlora"):
        check(config)
    for method in ("lora", "lora_moe", "mixlora"):
        assert check(Config(method=method, compare=("base", "icl", method), data=DATA)).data.edge_reads_prompt
