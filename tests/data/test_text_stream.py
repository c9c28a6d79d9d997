"""Text while it is generated equals the whole text decoded at once."""

import random

import pytest
from helpers import WORDS, write_tokenizer
from transformers import PreTrainedTokenizerFast

from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.text_stream import TextStream
from lora_gen_jax.decoder.pretrained import load_tokenizer

TEXTS = [
    "owl: “hoot” — naïve café, 東京タワー 🦉🏳️‍🌈👩‍👩‍👧‍👦 end",
    "line one\n\n  line two\t\ttab   spaces ",
    "ﷺ \u0301combining Ω≈ç√ \U0001f9d1\u200d\U0001f680",
    " leading space and trailing newline\n",
]


@pytest.fixture(scope="module")
def byte_level():
    """The pocket pair's tokenizer: byte-level BPE, in which rare characters are several tokens."""
    from tokenizers import Tokenizer

    import lora_gen_jax

    path = f"{lora_gen_jax.__path__[0]}/pocket/edge/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(path), eos_token="<|endoftext|>")
    return Encoder(tokenizer, len(tokenizer))


@pytest.fixture(scope="module")
def word_level(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    size = write_tokenizer(directory)
    return Encoder(load_tokenizer(str(directory)), size)


@pytest.fixture(scope="module")
def metaspace():
    """As Llama's: a space is part of the token, the text's first is left out, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "▁b", "a", "b", "▁ab"]
    tokenizer = Tokenizer(BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), len(pieces))


def streamed(encoder, ids, sizes=None, stop=()):
    """(text, pieces) with this many ids a call."""
    stream, pieces, place = TextStream(encoder, stop), [], 0
    sizes = iter(sizes or [1] * len(ids))
    while place < len(ids):
        size = next(sizes)
        pieces.append(stream.push(ids[place : place + size]))
        place += size
    pieces.append(stream.finish())
    return "".join(pieces), pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_bytes_of_characters_join_to_the_whole_text(byte_level, text, size):
    ids = byte_level.text(text)
    assert len(ids) > len(text.split())
    assert streamed(byte_level, ids, [size] * len(ids))[0] == byte_level.decode(ids) == text


def test_no_piece_holds_half_a_character(byte_level):
    ids = byte_level.text("🦉 owl 東京")
    _, pieces = streamed(byte_level, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == ""
    assert "🦉" in pieces


def test_random_ids_join_to_the_whole_text(byte_level):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(byte_level.vocab_size) for _ in range(rng.randrange(1, 30))]
        sizes = [rng.randrange(1, 4) for _ in ids]
        assert streamed(byte_level, ids, sizes)[0] == byte_level.decode(ids)


def test_words_keep_their_spaces(word_level):
    rng = random.Random(1)
    for _ in range(50):
        # Special tokens among them, which have no text.
        ids = [rng.choice([1, 2, *range(3, 7 + len(WORDS))]) for _ in range(rng.randrange(1, 12))]
        assert streamed(word_level, ids)[0] == word_level.decode(ids)


def test_the_first_space_is_left_out_once(metaspace):
    rng = random.Random(2)
    first = metaspace.tokenizer.convert_tokens_to_ids("▁")
    euro = metaspace.tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
    for _ in range(100):
        groups = [euro if (k := rng.randrange(8)) == 7 else [1] if k == 6 else [first + k] for _ in range(8)]
        ids = [i for group in groups for i in group]
        assert streamed(metaspace, ids)[0] == metaspace.decode(ids)


def test_invalid_bytes_are_said_in_the_end(byte_level):
    broken = [i for i in byte_level.text("🦉") if i][:1]
    for ids in (broken, broken * 9, [*byte_level.text("a"), *broken]):
        assert streamed(byte_level, ids)[0] == byte_level.decode(ids)
        assert "\ufffd" in byte_level.decode(ids)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("\n\n",), "one two. Three"),
        (("wo. Th",), "one t"),
        (("Three", "two"), "one "),
        (("never", "four!!"), None),
        (("e",), "on"),
        (("🦉",), "one two. Three\n\nfour "),
    ],
)
def test_a_stop_string_ends_the_text_before_it(byte_level, stop, expected):
    text = "one two. Three\n\nfour 🦉!"
    ids = byte_level.text(text)
    for size in (1, 3, len(ids)):
        assert streamed(byte_level, ids, [size] * len(ids), stop)[0] == (text if expected is None else expected)


def test_what_may_begin_a_stop_string_is_held_back(byte_level):
    stream = TextStream(byte_level, ["abcd"])
    said = [stream.push([i]) for i in [*byte_level.text("xa"), *byte_level.text("b")]]
    assert "".join(said) == "x"
    assert not stream.stopped
    assert stream.finish() == "ab"
    stopped = TextStream(byte_level, ["ab"])
    assert stopped.push(byte_level.text("xaab")) == "xa"
    assert stopped.stopped
    assert (stopped.push(byte_level.text("more")), stopped.finish(), stopped.length) == ("", "", 2)


def test_a_stop_string_in_bytes_held_back_until_the_end_counts(byte_level):
    broken = byte_level.text("🦉")[:1]
    text, _ = streamed(byte_level, [*byte_level.text("a"), *broken], stop=["\ufffd"])
    assert text == "a"


def test_the_cost_of_a_token_does_not_grow_with_the_text(byte_level):
    decoded = []

    class Counting(Encoder):
        def decode(self, ids):
            decoded.append(len(ids))
            return super().decode(ids)

    ids = byte_level.text("the owl says hoot and 🦉 " * 100)
    streamed(Counting(byte_level.tokenizer, byte_level.vocab_size), ids)
    assert max(decoded) < 20
    assert sum(decoded) < 8 * len(ids)
