"""Answers in OpenAI's JSON: completions and chats, whole or in chunks.

In: pieces of text. Out: dictionaries.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_gen_jax.serving.answers import Piece, Token


@dataclass
class Choice:
    """One sequence, put together from its pieces."""

    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens += piece.tokens
        self.finish = piece.finish


@dataclass(frozen=True)
class Reply:
    """The head that an answer and all of its chunks share.

    Attributes:
        kind: of the request.
        model: that answers.
        prompt_tokens: of all prompts, each counted once.
        logprobs: whether they were asked for.
    """

    kind: Literal["completion", "chat"]
    model: str
    prompt_tokens: int
    logprobs: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, generated: int) -> dict[str, int]:
        """Tokens read and written."""
        read = self.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}

    def whole(self, choices: Sequence[Choice], generated: int) -> dict[str, Any]:
        """An answer that is not streamed."""
        listed = []
        for index, choice in enumerate(choices):
            text, common = "".join(choice.text), self._choice(index, choice.tokens, choice.finish)
            if self.kind == "chat":
                listed.append({**common, "message": {"role": "assistant", "content": text, "refusal": None}})
            else:
                listed.append({**common, "text": text})
        return self._head("text_completion", "chat.completion", listed) | {"usage": self.usage(generated)}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, whose turn it is."""
        if self.kind == "completion":
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{**self._choice(index, [], None), "delta": delta}]) for index in range(count)]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One piece of a stream."""
        common = self._choice(piece.index, piece.tokens, piece.finish)
        if self.kind == "completion":
            return self._chunk([{**common, "text": piece.text}])
        return self._chunk([{**common, "delta": {"content": piece.text} if piece.text else {}}])

    def last_chunk(self, generated: int) -> dict[str, Any]:
        """The one with the usage, if it was asked for."""
        return self._chunk([]) | {"usage": self.usage(generated)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("text_completion", "chat.completion.chunk", choices)

    def _head(self, completion: str, chat: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix, name = ("cmpl", completion) if self.kind == "completion" else ("chatcmpl", chat)
        head = {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}
        return head | {"choices": choices}

    def _choice(self, index: int, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        return {"index": index, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of the chosen tokens; other tokens' are not kept."""
        if not self.logprobs or not tokens:
            return None
        if self.kind == "completion":
            return {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": None,
                "text_offset": [token.offset for token in tokens],
            }
        content = [{"token": t.text, "logprob": t.logprob, "bytes": _bytes(t.text), "top_logprobs": []} for t in tokens]
        return {"content": content, "refusal": None}


def _bytes(text: str) -> list[int] | None:
    """A token's bytes; None where it is a part of a character, whose own bytes its text does not tell."""
    return None if "\ufffd" in text else list(text.encode())
