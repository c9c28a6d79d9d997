"""Tool lists: which tool serves the request, its name copied from the list. All names and texts are made here.

In: nothing. Out: base tasks of the group tools, one a list. Names are drawn anew for every list, so that they cannot be
known from another one.
"""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from .base import Base, Pair
from .texts import CITIES, NAMES, THINGS

SETS, NONE = 60, "none"


class Ability(NamedTuple):
    """What a tool does, nouns for its name, the name of its argument, and requests; {} is the argument."""

    about: str
    nouns: str
    argument: str
    requests: str


ABILITIES = (
    Ability("the weather in a city", "weather forecast sky", "city",
        "Will it rain in {}? | What is the weather like in {}? | "
        "Do I need a coat in {} tomorrow? | How warm is it in {}?"),
    Ability("hotels in a city", "hotel lodging room", "city",
        "Where can I sleep in {}? | Find me a room in {}. | "
        "I need a hotel in {} for two nights. | Is there a bed for me in {}?"),
    Ability("restaurants in a city", "restaurant dinner table", "city",
        "Where can one eat well in {}? | I am hungry and in {}. | "
        "Name a good restaurant in {}. | A table for two in {}, please."),
    Ability("trains to a city", "train rail departure", "city",
        "When does the next train to {} leave? | I want to go to {} by rail. | "
        "Is there a train to {} tonight? | How do I get to {} without a car?"),
    Ability("the local time in a city", "clock local_time zone", "city",
        "What time is it in {}? | Is it already morning in {}? | "
        "How late is it in {} now? | Which hour does the clock show in {}?"),
    Ability("sends a message to a person", "message text mail", "person",
        "Tell {} that I am late. | Write to {} that dinner is ready. | "
        "Let {} know that I have arrived. | Send {} my greetings."),
    Ability("calls a person", "call phone dial", "person",
        "Call {}. | I want to hear the voice of {}. | Ring {} up, please. | Get {} on the phone."),
    Ability("the birthday of a person", "birthday birth_date age", "person",
        "When was {} born? | How old is {}? | When is the birthday of {}? | Which day do I have to congratulate {}?"),
    Ability("the address of a person", "address home contact", "person",
        "Where does {} live? | I need the street and house number of {}. | "
        "To which address do I send the parcel for {}? | How do I find the home of {}?"),
    Ability("buys things", "shop order purchase", "item",
        "Buy some {}. | I need new {}. | Order {} for me, please. | Get me {}, the cheapest there are."),
    Ability("the price of things", "price cost offer", "item",
        "What do {} cost? | How much are {}? | Are {} cheaper this week? | Is there an offer for {}?"),
    Ability("how many things are in stock", "stock inventory warehouse", "item",
        "How many {} are left? | Do we still have {}? | Count the {} in the warehouse. | Are {} in stock?"),
    Ability("what a word means", "dictionary define meaning", "word",
        "What does {} mean? | Explain the word {}. | Define {}. | I have never heard of {}. What is it?"),
    Ability("translates a word", "translate foreign language", "word",
        "How do you say {} in Danish? | Translate {}. | What is {} called abroad? | I need the Polish word for {}."),
    Ability("words that rhyme", "rhyme verse poet", "word",
        "What rhymes with {}? | I am writing a poem and need a rhyme for {}. | "
        "Which words sound like {} at the end? | Find me a verse that ends like {}."),
    Ability("opens a file", "open view reader", "file",
        "Show me {}. | Open {}. | I want to read what is in {}. | Let me see {}, please."),
    Ability("deletes a file", "delete trash remove", "file",
        "Throw {} away. | Delete {}. | I do not need {} any more. | Get rid of {}."),
    Ability("prints a file", "print paper hardcopy", "file",
        "I need {} on paper. | Print {} twice. | Give {} to the printer. | Make a paper copy of {}."),
    Ability("sets an alarm", "alarm wake timer", "time",
        "Wake me at {}. | Set an alarm for {}. | I have to get up at {}. | Let it ring at {}."),
    Ability("enters a meeting into the calendar", "calendar meeting schedule", "time",
        "Plan a meeting for {}. | Put the interview into my calendar at {}. | "
        "Reserve an hour for the team at {}. | We meet at {}. Write that down."),
    Ability("converts dollars to euros", "exchange currency convert", "amount",
        "How many euros are {} dollars? | Change {} dollars into euros. | "
        "What do I get in euros for {} dollars? | Convert {} dollars."),
    Ability("pays a bill", "pay transfer bill", "amount",
        "Pay the bill of {} dollars. | Transfer {} dollars to the landlord. | "
        "I owe the dentist {} dollars. Settle it. | Send {} dollars for the electricity."),
)  # fmt: skip
ARGUMENTS: dict[str, list[str]] = {
    "city": CITIES,
    "person": NAMES,
    "item": THINGS,
    "word": ["harvest", "bridge", "courage", "lantern", "meadow", "thunder", "whisper", "anchor", "journey", "pepper"],
    "file": ["report.pdf", "photo.png", "notes.txt", "budget.csv", "song.mp3", "draft.docx", "backup.zip", "plan.md"],
    "time": ["7:30", "noon", "18:15", "5 pm", "9 o'clock", "6:45", "midnight", "11:20", "half past two", "16:00"],
    "amount": ["20", "35", "50", "75", "120", "240", "310", "999", "15", "88"],
}
# How a list of (name, what it does, argument) may look.
LISTINGS: tuple[Callable[[str, str, str], str], ...] = (
    "- {0}: {1} (argument: {2})".format,
    "{0}({2}): {1}".format,
    "* {0}, which takes the argument {2}: {1}".format,
    lambda name, about, argument: json.dumps({"name": name, "description": about, "argument": argument}),
)
# What is answered, and how that is asked for. A tool set has one of them.
ANSWERS: dict[str, tuple[Callable[[str, str, str], str], tuple[str, ...]]] = {
    "name": (
        "{0}".format,
        (
            "Which of these tools does the request need? Reply with its name.",
            "You can use the tools below. Name the one that helps.",
            "You are an assistant with tools. Choose one for every request and write its name, exactly as in the list.",
        ),
    ),
    "call": (
        '{0}({1}="{2}")'.format,
        (
            'Call the tool that the request needs, like this: tool(argument="value")',
            "You are an assistant with tools. Reply with one call: the tool's name and, in parentheses, argument, "
            "equals sign and value in double quotes.",
        ),
    ),
    "json": (
        lambda name, argument, value: json.dumps({"tool": name, argument: value}),
        (
            'Choose a tool and reply with JSON: {"tool": its name, its argument: the value}',
            "You are an assistant with tools. Write a JSON object with the key tool and the argument's name as keys.",
        ),
    ),
}
REFUSAL = f" If no tool fits, reply {NONE}."
_VERBS = ("get", "find", "fetch", "check", "run", "do", "query", "my", "quick", "auto", "open", "smart")
_ENDS = ("", "", "", "_v2", "_tool", "_api", "_pro", "_now", "_plus", "_7", "_x", "_hub")


def tool_tasks(seed: int, count: int) -> Iterator[Base]:
    for number in range(SETS):
        yield tool_set(f"tools/{number:02}", Random(f"{seed}/tools/{number}"), count)


def tool_set(task: str, rng: Random, count: int) -> Base:
    """A list of 3 to 6 tools, in several listings and wordings, and requests for one of them each.

    In every third list or so a fifth of the requests, on average, needs a tool that is not there.
    """
    chosen = rng.sample(ABILITIES, rng.randint(3, 6))
    names = [tool_name(ability, rng) for ability in chosen]
    form, orders = ANSWERS[rng.choice(list(ANSWERS))]
    refuses = rng.random() < 0.3
    wordings: list[str] = []
    for listing in rng.sample(LISTINGS, 3):
        lines = [listing(name, ability.about, ability.argument) for name, ability in zip(names, chosen, strict=True)]
        wordings += ["\n".join([order + REFUSAL * refuses, *lines]) for order in orders]
    pairs: dict[str, str] = {}
    for _ in range(4 * count):
        if refuses and rng.random() < 0.2:
            pairs.setdefault(asked(rng.choice([a for a in ABILITIES if a not in chosen]), rng)[0], NONE)
            continue
        i = rng.randrange(len(chosen))
        request, value = asked(chosen[i], rng)
        pairs[request] = form(names[i], chosen[i].argument, value)
        if len(pairs) >= count:
            break
    return Base(task, tuple(wordings), tuple(pairs.items())[:count])


def asked(ability: Ability, rng: Random) -> Pair:
    """A request and the argument in it."""
    value = rng.choice(ARGUMENTS[ability.argument])
    return rng.choice(ability.requests.split(" | ")).format(value), value


def tool_name(ability: Ability, rng: Random) -> str:
    """A name for the tool, such as find_forecast_v2, ForecastNow or my.sky."""
    words = f"{rng.choice(_VERBS)}_{rng.choice(ability.nouns.split())}{rng.choice(_ENDS)}".split("_")
    if rng.random() < 0.3:
        del words[0]
    style = rng.choice(("camel", "title", "_", ".", "-"))
    titles = "".join(map(str.title, words))
    return titles[0].lower() + titles[1:] if style == "camel" else titles if style == "title" else style.join(words)
