"""Answer formats, and descriptions of the embedded tasks: what to answer and in which format, in many wordings.

In: an attribute, a format, and whether the wording may be one that training uses. Out: descriptions. A fifth of each
attribute's requests ("say the animal's sound") is held out: they occur in no training prompt.

A format is what comes before the word, what stands around it, and what ends it: 3 leads × 4 wraps × 3 ends are 36
formats; because they are built from parts, a format that was held out for an attribute is made of parts that are known.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator

from lora_gen_jax.data.pocket.world import Attribute, table
from lora_gen_jax.data.tasks import stable_hash

FRAMES = (
    "give {}",
    "name {}",
    "write {}",
    "say {}",
    "tell me {}",
    "answer with {}",
    "reply with {}",
    "return {}",
    "find {}",
    "for each word give {}",
    "for every word write {}",
    "your task is to give {}",
    "I want to know {}",
    "I need {}",
)
INTRODUCTIONS = (
    "You will get a word.",
    "Read the word.",
    "You are a helpful assistant.",
    "You know a lot about the world.",
    "Here is your task.",
    "Please help me.",
)
HELD_OUT_PERCENT = 20
PLAIN_REQUESTS = ("answer with one word", "write the answer alone", "write nothing else", "one word is enough")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One way to fill a part of a format.

    Attributes:
        name: part of a task's name; empty for "nothing special".
        text: with {thing} and {answer} to fill in.
        requests: ways to ask for it, as imperatives.
    """

    name: str = ""
    text: str = "{answer}"
    requests: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
    """How an answer is written."""

    lead: Part
    wrap: Part
    end: Part

    @property
    def name(self) -> str:
        return "-".join(part.name for part in self.parts if part.name) or "plain"

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return (self.lead, self.wrap, self.end)

    def render(self, thing: str, value: str) -> str:
        """The answer: `owl = "hoot".`"""
        text = self.wrap.text.format(thing=thing, answer=value)
        return self.end.text.format(answer=self.lead.text.format(thing=thing, answer=text))


def _formats() -> tuple[Format, ...]:
    parts: dict[str, list[Part]] = {kind: [Part()] for kind in ("lead", "wrap", "end")}
    for line in table("formats").splitlines():
        kind, name, text, requests = line.split(" | ")
        parts[kind].append(Part(name, text, tuple(requests.split("; "))))
    return tuple(Format(*chosen) for chosen in itertools.product(*parts.values()))


FORMATS = _formats()


def descriptions(attribute: Attribute, form: Format, held_out: bool, count: int) -> tuple[str, ...]:
    """The first `count` different descriptions of a task, all with requests that are (not) held out for training."""
    rng = random.Random(stable_hash("wording", attribute.name, form.name, str(held_out)))
    requests = held_out_requests(attribute) if held_out else training_requests(attribute)
    found: dict[str, None] = {}
    while len(found) < count:
        found[describe(rng.choice(requests), form, rng)] = None
    return tuple(found)


def all_requests(attribute: Attribute) -> list[str]:
    """Every way to ask for an attribute: each frame with each phrase, and the questions."""
    return [frame.format(phrase) for frame in FRAMES for phrase in attribute.phrases] + list(attribute.questions)


def training_requests(attribute: Attribute) -> list[str]:
    """The requests that training prompts are made of."""
    return [request for request in all_requests(attribute) if not _drawn(attribute, request)]


def held_out_requests(attribute: Attribute) -> list[str]:
    """The requests whose words stand in no training prompt, not even inside a longer one ("your task is to give …")."""
    training = [request.lower() for request in training_requests(attribute)]
    drawn = [request for request in all_requests(attribute) if _drawn(attribute, request)]
    return [request for request in drawn if not any(request.lower() in longer for longer in training)]


def _drawn(attribute: Attribute, request: str) -> bool:
    return stable_hash("request", attribute.name, request) % 100 < HELD_OUT_PERCENT


def describe(request: str, form: Format, rng: random.Random) -> str:
    """One description: maybe an introduction, the request, and the format's parts in some order."""
    asked = [rng.choice(part.requests) for part in form.parts if part.requests]
    if not asked and rng.random() < 0.5:
        asked = [rng.choice(PLAIN_REQUESTS)]
    rng.shuffle(asked)
    text = " ".join(_sentences(request, asked, rng))
    if rng.random() < 0.2:
        text = f"{rng.choice(INTRODUCTIONS)} {text}"
    if _is_imperative(text) and rng.random() < 0.15:
        text = f"Please {text[0].lower()}{text[1:]}"
    # People type like this, too.
    return text.lower().rstrip(".") if rng.random() < 0.15 else text


def _sentences(request: str, asked: list[str], rng: random.Random) -> Iterator[str]:
    style = rng.choice(("separate", "joined", "first")) if asked else "separate"
    if style == "joined" and not request.endswith("?"):
        yield _sentence(_listed([request, *asked]))
        return
    if style == "first":
        yield _sentence(_listed(asked))
        yield _sentence(request)
        return
    yield _sentence(request)
    if len(asked) > 1 and rng.random() < 0.5:
        yield _sentence(_listed(asked))
        return
    yield from map(_sentence, asked)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _is_imperative(text: str) -> bool:
    return text.startswith(("Give", "Name", "Write", "Say", "Tell", "Answer", "Reply", "Return", "Find"))
