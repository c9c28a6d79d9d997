"""Text to token ids, with the conventions of lm-evaluation-harness.

In: a tokenizer, prompts, queries and answers. Out: lists of ids. Special tokens at the start (a BOS where the
tokenizer adds one) stay; a query and its answer are tokenized together and then split, so that the answer's
tokens are those the model would really read.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from lora_gen_jax.data.prompts import behind, separator
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import DataError, ModelError

_LONG_WORD = 32  # characters


class Encoder:
    """A tokenizer bound to the embedding it feeds.

    Raises ModelError when the tokenizer can emit ids beyond the embedding's rows. (An embedding with more rows
    than the tokenizer has ids is padded, which is fine.)
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        if len(tokenizer) > vocab_size:
            problem = f"the tokenizer has ids up to {len(tokenizer) - 1}, the model's embedding only {vocab_size} rows"
            raise ModelError(problem, field="tokenizer", remedy="use the tokenizer that belongs to the model")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    @cached_property
    def digest(self) -> str:
        """16 hex digits of what the tokenizer does, wherever its files lie."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        text = repr(sorted(self.tokenizer.get_vocab().items())) if fast is None else fast.to_str()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, and never less than unknown words and spaces usually are."""
        return max(_LONG_WORD, *map(len, self.tokenizer.get_vocab()))

    def exceeds(self, characters: int, tokens: int) -> bool:
        """Whether a text of so many characters must have more tokens than that: known without reading it."""
        return characters > tokens * self.longest_token

    @property
    def end(self) -> int | None:
        """Id of the token that ends an answer, None where the tokenizer has none."""
        return self.tokenizer.eos_token_id

    def text(self, text: str) -> list[int]:
        """Ids of a text, with the tokenizer's own special tokens.

        Raises DataError when nothing is left of the text.
        """
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not text.strip() or not ids:
            raise DataError("a text is empty: there is nothing to read", field="text")
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids of a system prompt and of the blank line that separates it from the first query.

        The meta tokens that follow stand where a query would: a language model gathers there what the prompt asks for.

        Raises DataError when nothing is left of the text.
        """
        if not text.strip():
            raise DataError("a text is empty: there is nothing to read", field="text")
        return self.text(text.rstrip() + "\n\n")

    @cached_property
    def line_break(self) -> int:
        """Id of the token that every prompt ends with."""
        return self.prompt("A")[-1]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it; trailing spaces of the context count as part of the latter.

        Raises DataError when the context or the continuation has no tokens.
        """
        stripped = context.rstrip()
        whole = self.text(stripped + context[len(stripped) :] + continuation)
        start = self.text(stripped)
        if len(whole) <= len(start):
            raise DataError(f"the answer {continuation!r} adds no tokens to its query", field="continuation")
        return start, whole[len(start) :]

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation that waits for the assistant's turn.

        Raises:
            ModelError: when the tokenizer has no chat template.
            jinja2.TemplateError: when the template refuses these turns.
        """
        if not self.tokenizer.chat_template:
            problem = "the edge model's tokenizer has no chat template"
            raise ModelError(problem, field="chat_template", remedy="use plain queries instead of messages")
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def query(self, example: Example, chat: bool, prompt: str = "") -> tuple[list[int], list[int]]:
        """Ids of an example's query as the edge model reads it, and of its response.

        Args:
            example: whose query it is.
            chat: through the tokenizer's template.
            prompt: that the edge model reads before the query, if it does. Both are one text (in a chat the prompt is
                the system turn): tokenized apart, they would meet in other tokens.

        Raises:
            DataError, ModelError: as `pair` and `chat`.
        """
        query, response = example.query, example.response
        if not chat:
            return self.pair(behind(prompt, query), separator(query, response) + response)
        answer = self.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        if not answer:
            raise DataError("a response is empty: there is nothing to learn", field="response")
        turns = example.turns or (("user", query),)
        if prompt.strip():
            turns = (("system", prompt), *turns)
        return self.chat([{"role": role, "content": content} for role, content in turns]), answer

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def shared_row(
    pairs: Iterable[tuple[list[int], list[int]]], room: float = math.inf, slots: float = math.inf
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """The first (context, response) pairs that fit a row together, cut into what they share and (query, response)s.

    A context is its row's shared beginning and its query, token for token: what stands on both sides of the seam may be
    one token, so the seam is where contexts first differ, and not where the prompt's text ends. Every query keeps a
    token, which predicts its answer's first.

    Args:
        pairs: no more of them are asked for than fit, and one.
        room: tokens of a row; any number, where it is left out. A response's last token is predicted and never read, so
            it takes none.
        slots: answer tokens of a row.
    """
    kept: list[tuple[list[int], list[int]]] = []
    shared: list[int] = []
    for context, response in pairs:
        begin = _common(shared, context[:-1]) if kept else context[:-1]
        more = [*kept, (context, response)]
        used = len(begin) + sum(len(c) - len(begin) + len(r) - 1 for c, r in more)
        if used > room or sum(len(r) for _, r in more) > slots:
            break
        kept, shared = more, begin
    return shared, [(context[len(shared) :], response) for context, response in kept]


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    same = (a == b for a, b in zip(one, other, strict=False))
    length = next((i for i, equal in enumerate(same) if not equal), min(len(one), len(other)))
    return list(one[:length])
