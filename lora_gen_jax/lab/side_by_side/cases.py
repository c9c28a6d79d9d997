"""The built-in prompts of side_by_side. In: a generator's config. Out: a tool request and a role, in words it can read.

The pocket models know only the words of the embedded suite, so they get a row of its tool sets and a role of its kind.
"""

import dataclasses

from lora_gen_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked.

    Attributes:
        name: title of its table.
        prompt: what the cloud model reads; the base model reads it before the input.
        input: what both edge models read.
        remark: what to know before judging the answers.
    """

    name: str
    prompt: str
    input: str
    remark: str = ""


_TOOL_REQUEST = """\
You are Iris, an assistant that works on pictures and documents with tools. You cannot see a picture yourself.
TOOLS:
> Describe Picture: tells what a picture shows. One input: the file of the picture.
> Remove Background: cuts the main thing out of a picture. One input: the file of the picture. Gives: a new file.
> Turn Into Painting: paints a picture in a style. Two inputs, with a comma: the file, the style. Gives: a new file.
> Translate Text: puts a text into another language. Two inputs, with a comma: the language, the text.
> Weather Forecast: tells tomorrow's weather. One input: the place.
To use a tool, write:
Thought: Do I need to use a tool? Yes
Action: the name of the tool
Action Input: its inputs, with commas
Observation: what the tool said
If no tool is needed, write:
Thought: Do I need to use a tool? No
AI: your answer
Write file names exactly as they are given, and never invent one.
Previous conversation:
Human: I have put a photo of my garden into pictures/garden.png.
AI: Thank you, I have received pictures/garden.png.
New input: Please tell me what can be seen on pictures/garden.png.
Now write the next lines."""
_ROLE = """\
You are Mirabel Thorne, captain of the mail boat between three small islands. You are seventy, warm and a little proud,
you speak in short sentences, you call everybody "my dear", and you bring every talk back to your boat, the Blue Heron.
You have never left the islands and know nothing of computers. Answer as Mirabel would, in at most three sentences."""
_GUEST = "Guest: Captain, were you never afraid of a storm?\nMirabel Thorne:"
_ZOO_ROLE = "You are a zoo guide. Name the baby of each animal, in square brackets."


def built_in_cases(config: Config) -> list[Case]:
    """A tool request and a role-play prompt for the models of this config."""
    from lora_gen_jax.data.pocket.agent import agent_rows, split_instruction, toolsets

    pocket = config.edge.source.startswith("pocket-")
    # The first row that any test scores: not chosen by what the models make of it.
    row = agent_rows(toolsets(seen=True)[0], "test", 1)[0]
    instruction = row["instruction"] if pocket else _TOOL_REQUEST
    tools = Case("a tool request", *split_instruction(instruction), remark=remark(config))
    role = Case("a role", _ZOO_ROLE, "owl:") if pocket else Case("a role", _ROLE, _GUEST)
    return [tools, dataclasses.replace(role, remark=remark(config, tools=False))]


def remark(config: Config, tools: bool = True) -> str:
    """What the generator was trained on, and whether tool calls were among it."""
    names = [*config.data.tasks, *(path.name for path in config.data.files)]
    text = f"The generator was trained on {', '.join(names)} in {config.train.steps} steps."
    called = config.data.files or any("agent" in name for name in names)
    return text if called or not tools else f"{text} None of these calls tools: a right call would be a surprise."
