"""Answer formats, built from three parts: what comes before the word, what stands around it, and what ends it.

In: a thing and a value. Out: the answer's text. 3 leads × 4 wraps × 3 ends are 36 formats; because they are built from
parts, a format that was held out for an attribute is made of parts that are known.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One way to fill a part of a format.

    Attributes:
        name: part of a task's name; empty for "nothing special".
        text: with {thing} and {answer} to fill in.
        requests: ways to ask for it, as imperatives.
    """

    name: str
    text: str
    requests: tuple[str, ...] = ()


LEADS = (
    Part("", "{answer}"),
    Part(
        "it_is",
        "it is {answer}",
        (
            'start with "it is"',
            "begin the answer with the words it is",
            'say "it is" before the answer',
            'put "it is" first',
        ),
    ),
    Part(
        "echo",
        "{thing} = {answer}",
        (
            "repeat the word and an equals sign first",
            "start with the word that was given and an equals sign",
            "write the given word, then =, then the answer",
            "put the word and = before the answer",
        ),
    ),
)
WRAPS = (
    Part("", "{answer}"),
    Part(
        "quotes",
        '"{answer}"',
        (
            "use double quotes",
            "put the answer in double quotes",
            "write the answer between quotation marks",
            "put quotes around it",
        ),
    ),
    Part(
        "brackets",
        "[{answer}]",
        (
            "use square brackets",
            "put the answer in square brackets",
            "write the answer between brackets",
            "put brackets around it",
        ),
    ),
    Part(
        "twice",
        "{answer} {answer}",
        ("say it twice", "repeat the answer", "write the answer two times", "give the answer twice"),
    ),
)
ENDS = (
    Part("", "{answer}"),
    Part(
        "dot",
        "{answer}.",
        ("end with a full stop", "finish with a period", "put a dot at the end", "end with a period"),
    ),
    Part(
        "bang",
        "{answer}!",
        (
            "end with an exclamation mark",
            "finish with an exclamation mark",
            "put an exclamation mark at the end",
            "put ! at the end",
        ),
    ),
)
PLAIN_REQUESTS = ("answer with one word", "write the answer alone", "write nothing else", "one word is enough")


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


FORMATS = tuple(Format(*parts) for parts in itertools.product(LEADS, WRAPS, ENDS))
