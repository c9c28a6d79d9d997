"""A prompt with its solved examples kept apart: they are read as shots, and a specialization can be refined on them."""

import dataclasses
from collections.abc import Callable, Sequence

from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.prompts import system_prompt
from lora_gen_jax.data.record_rows import check_text
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import DataError
from lora_gen_jax.specialization.rows import ExampleIds


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a specialization is made of.

    Attributes:
        description: what the task is; may be empty where there are examples.
        examples: (input, output) pairs, or `Example`s.
        chat: the edge model will be asked in its chat template, so that examples stand in it, too.

    Raises:
        DataError: for an example that is not a pair of texts, or an empty prompt; the message says which example.
    """

    description: str = ""
    examples: Sequence[tuple[str, str] | Example] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        check_text(self.description, "description")
        object.__setattr__(self, "examples", solved(self.examples))
        if not self.description.strip() and not self.examples:
            raise DataError("the prompt is empty", field="prompt", remedy="give a description, examples, or both")

    @property
    def shots(self) -> tuple[Example, ...]:
        """The examples."""
        return tuple(example for example in self.examples if isinstance(example, Example))

    def text(self, fits: Callable[[str], bool] = lambda text: True) -> str:
        """What is read: the description and as many of the examples, from the first on, as fit."""
        shots = self.shots
        least = 0 if self.description.strip() else 1
        if fits(whole := system_prompt(self.description, shots)):
            return whole
        low, high = least, max(least, len(shots) - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if fits(system_prompt(self.description, shots[:middle])):
                low = middle
            else:
                high = middle - 1
        return system_prompt(self.description, shots[:low])


def solved(examples: Sequence[tuple[str, str] | Example]) -> tuple[Example, ...]:
    """Pairs of input and output as `Example`s.

    Raises:
        DataError: naming the example that is none, is empty or holds what is no text.
    """
    if isinstance(examples, str):
        raise DataError(
            "examples is one text", field="examples", code="type", remedy="give a list of (input, output) pairs"
        )
    return tuple(_example(number, example) for number, example in enumerate(examples, start=1))


def _example(number: int, example: tuple[str, str] | Example) -> Example:
    if isinstance(example, Example):
        return example
    texts = tuple(example) if isinstance(example, Sequence) and not isinstance(example, str) else ()
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"example {number} must be a pair of texts, (input, output); found {str(example)[:80]!r}",
            field=f"examples.{number - 1}",
            code="type",
        )
    for name, text in zip(("input", "output"), texts, strict=True):
        if not text.strip():
            raise DataError(
                f"the {name} of example {number} is empty",
                field=f"examples.{number - 1}.{name}",
                code="empty",
                remedy="give both",
            )
        check_text(text, f"examples.{number - 1}.{name}")
    return Example("", *texts)


def pairs_of(encoder: Encoder, examples: Sequence[Example], chat: bool) -> list[ExampleIds]:
    """Token ids as in training: an answer ends with the end token."""
    end = [] if encoder.end is None else [encoder.end]
    return [(query, [*answer, *end]) for query, answer in (encoder.query(example, chat) for example in examples)]
