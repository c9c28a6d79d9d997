"""Token ids to text while they are generated.

In: ids, a few at a time. Out: text that no later id can change. Bytes of a character that is not complete and what may
be the beginning of a stop string are held back until it is clear what they become.
"""

from collections.abc import Sequence

from lora_gen_jax.data.encode import Encoder

# How bytes are written that are not a character, or not yet.
_MARK = "\ufffd"


class TextStream:
    """The text of one sequence, piece by piece. All pieces joined are the decoded sequence, up to a stop string.

    Each call decodes the new ids behind a few known ones, not the whole sequence: tokenizers write the first token of a
    text differently (without its space), and a character's bytes may lie in several tokens. The cost is linear in the
    number of ids as long as they spell characters. (Where single bytes are tokens and a model writes bytes that are no
    character right after bytes that are one, the latter stays; decoding the whole would replace both.)

    Attributes:
        stopped: a stop string was found; the text ends before it and nothing follows.
        length: characters that are known, those held back for a stop string among them.
    """

    def __init__(self, encoder: Encoder, stop: Sequence[str] = ()):
        self._encoder = encoder
        self._stop = tuple(text for text in stop if text)
        self._longest_stop = max(map(len, self._stop), default=0)
        # Ids since a place where a text can begin, how many of them are only context, and the characters of their text
        # that were said before.
        self._window: list[int] = []
        self._context, self._said = 0, 0
        self._held = ""
        self.stopped = False
        self.length = 0

    @property
    def final(self) -> int:
        """Characters that were returned."""
        return self.length - len(self._held)

    def push(self, ids: Sequence[int]) -> str:
        """Text that has become final with these ids; "" after a stop string.

        Args:
            ids: those that follow the ones of the last call; special tokens add no text.
        """
        if self.stopped or not ids:
            return ""
        self._window.extend(ids)
        text = self._encoder.decode(self._window)
        # All marks at the end: where bytes are tokens, one incomplete character turns those right before it into marks.
        final = len(text.rstrip(_MARK))
        new = text[self._said : final]
        self._said = max(self._said, final)
        if final == len(text):
            self._move(text)
        return self._until_stop(new)

    def finish(self) -> str:
        """The rest: the sequence ends here."""
        if self.stopped:
            return ""
        text = self._encoder.decode(self._window)[self._said :] if self._window else ""
        self._said += len(text)
        rest = self._until_stop(text)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _move(self, text: str) -> None:
        """Leaves the old context behind, where what has come since can stand in its place."""
        later = self._window[self._context :]
        alone = self._encoder.decode(later) if self._context else text
        # Special tokens have no text: by itself, what follows them would be written as the beginning of a text.
        if alone:
            self._window, self._said = later, len(alone)
        self._context = len(self._window)

    def _until_stop(self, new: str) -> str:
        """What can be said of the text held back and the new one."""
        self.length += len(new)
        text = self._held + new
        if not self._stop:
            return text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            self.length -= len(text) - min(found)
            return text[: min(found)]
        keep = self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text: str) -> int:
        """Characters at the end of the text that a stop string may begin with."""
        for place in range(max(0, len(text) - self._longest_stop + 1), len(text)):
            if any(stop.startswith(text[place:]) for stop in self._stop):
                return len(text) - place
        return 0
