"""Tasks on short messages of several sentences: pick out, classify, count, answer. All texts are made here.

In: nothing. Out: base tasks of the group texts. A message is of a kind (an order, a trip, …) and tells of a person, a
city, a day and a number of things; which of them is asked for, the prompt says.
"""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from .base import Base, Maker

ROLES = ("a clerk who sorts the mail", "an assistant in an office", "a careful reader", "a secretary", "a dispatcher")
NAMES = [
    "Ada", "Ben", "Carla", "Dmitri", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kamala", "Lars", "Mira",
    "Nadia", "Omar", "Petra", "Quentin", "Rosa", "Samir", "Tessa", "Umar", "Vera", "Wanda", "Yusuf", "Zoe", "Bruno",
    "Chen", "Dalia", "Emeka", "Fiona", "Goran", "Hana", "Ivan", "Jamila", "Kofi", "Leila",
]  # fmt: skip
CITIES = [
    "Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Turin", "Bergen", "Quito", "Accra", "Dublin", "Hanoi", "Porto",
    "Tunis", "Vienna", "Perth", "Bogota", "Leeds", "Izmir", "Malmo", "Tartu", "Basel", "Ghent", "Split", "Bilbao",
    "Austin", "Denver", "Manila", "Dakar", "Riga", "Sofia", "Cork", "Toledo",
]  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = [
    "chairs", "lamps", "books", "tents", "bicycles", "carpets", "clocks", "mirrors", "plates", "pillows", "ladders",
    "radios", "baskets", "candles", "blankets", "vases", "shelves", "buckets", "kites", "drums", "flutes", "helmets",
    "maps", "stamps", "umbrellas", "violins", "cakes", "tulips",
]  # fmt: skip
KINDS = {
    "order": (
        ("{name} would like to buy {number} {things}.", "They go to {city}.", "{day} would be fine."),
        ("Please send {number} {things} to {city}.", "They are needed on {day}.", "The name is {name}."),
    ),
    "trip": (
        ("{name} is driving to {city} on {day}.", "There will be {number} {things} in the car."),
        ("The train to {city} leaves on {day}.", "{name} has a ticket.", "So there is room for {number} {things}."),
    ),
    "complaint": (
        ("On {day} a box with {number} {things} came to {city}.", "All were broken.", "{name} wants the money back."),
        ("{name} is not satisfied.", "The {number} {things} from {day} are too small.", "{city} needs a better shop."),
    ),
    "invitation": (
        ("{name} is giving a party in {city}.", "It begins on {day}.", "There will be {number} {things}."),
        ("You are invited to {city}.", "On {day} {name} turns forty.", "A gift is {number} {things}."),
    ),
}  # fmt: skip
FILLERS = (
    "The weather has been fine.", "Everybody is well here.", "The street is closed to cars.", "Nobody knows why.",
    "The phone is out of order.", "It was a long week.", "The dog sends greetings.", "The price is all right.",
)  # fmt: skip
URGENT = ("It is urgent.", "Please hurry.", "There is no time to lose.")
THANKS = ("Thank you very much.", "Many thanks in advance.", "Thanks for everything.")


class Message(NamedTuple):
    text: str
    sentences: list[str]
    kind: str
    name: str
    city: str
    day: str
    number: int
    things: str
    urgent: bool
    thanks: bool


def message(rng: Random) -> Message:
    """One with up to three more sentences, which may say that it is urgent or give thanks."""
    kind = rng.choice(list(KINDS))
    name, city, day, things = (rng.choice(options) for options in (NAMES, CITIES, DAYS, THINGS))
    number, urgent, thanks = rng.randint(2, 40), rng.random() < 0.5, rng.random() < 0.5
    sentences = [s.format(name=name, city=city, day=day, number=number, things=things) for s in rng.choice(KINDS[kind])]
    for more in (FILLERS, URGENT if urgent else (), THANKS if thanks else ()):
        if more and (more is not FILLERS or rng.random() < 0.5):
            sentences.insert(rng.randint(1, len(sentences)), rng.choice(more))
    return Message(" ".join(sentences), sentences, kind, name, city, day, number, things, urgent, thanks)


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


# What is made of a message: function, then wordings.
TASKS: dict[str, tuple[Callable[[Message], str], tuple[str, ...]]] = {
    "name": (lambda m: m.name, ("Which person is named in the message?", "Write the name of the person.")),
    "city": (lambda m: m.city, ("Which city is named in the message?", "You sort letters by place. Write the city.")),
    "day": (lambda m: m.day, ("On which day is it?", "Write the day of the week that the text names.")),
    "number": (
        lambda m: str(m.number),
        ("How many things are there?", "Write the number that stands there in digits."),
    ),
    "things": (lambda m: m.things, ("Which things is the message about?", "Write the goods, without their number.")),
    "kind": (
        lambda m: m.kind,
        (
            "Is this an order, a trip, a complaint or an invitation?",
            "You work at a reception. Label every message: order, trip, complaint or invitation.",
        ),
    ),
    "urgent": (lambda m: yes(m.urgent), ("Is the message urgent?", "Say yes if there is a hurry, else no.")),
    "priority": (
        lambda m: "high" if m.urgent else "normal",
        ("Give the priority: high if it is urgent, else normal.", "Sort the message by priority, high or normal."),
    ),
    "thanks": (lambda m: yes(m.thanks), ("Does the writer say thanks?", "Say yes if the text gives thanks, else no.")),
    "happy": (
        lambda m: yes(m.kind != "complaint"),
        ("Is the person content?", "Say no if somebody complains, else yes."),
    ),
    "weekend": (
        lambda m: yes(m.day in DAYS[5:]),
        ("Is it on a weekend?", "Say yes for Saturdays and Sundays, else no."),
    ),
    "many": (
        lambda m: yes(m.number > 20),
        ("Are there more than twenty things?", "Say yes if the number is above 20, else no."),
    ),
    "sentences": (lambda m: str(len(m.sentences)), ("How many sentences are these?", "Count the sentences.")),
    "first": (lambda m: m.sentences[0], ("Copy the first sentence.", "Write what the text begins with, one sentence.")),
    "second": (lambda m: m.sentences[1], ("Copy the second sentence.", "Which sentence stands in second place?")),
    "amount": (lambda m: f"{m.number} {m.things}", ("What, and how many?", "Write number and things, as in: 3 cups")),
    "short_day": (lambda m: m.day[:3], ("Write the day with three letters.", "Abbreviate the day that is named: Mon.")),
    "label": (
        lambda m: f"{m.name} ({m.city})",
        ("Write the name, and the city in parentheses.", "Make a label: name (city)."),
    ),
    "place_time": (
        lambda m: f"{m.city}, {m.day}",
        ("Where and when? City, comma, day.", "Write the city and the day with a comma between them."),
    ),
    "greeting": (
        lambda m: f"Dear {m.name},",
        ("You answer the message. Write the first line of your letter, with Dear.", "Greet the person as in a letter."),
    ),
    "apology": (
        lambda m: f"Sorry about the {m.things}, {m.name}.",
        (
            "You work for a shop. Apologize for the things, and name the person at the end.",
            "Say sorry about the things to the person, in one sentence.",
        ),
    ),
    "subject": (
        lambda m: f"{m.kind.title()}: {m.number} {m.things}",
        (
            "Write a subject line: kind (order, trip, complaint or invitation), a colon, number and things.",
            "Make a title of the kind of message, with a capital, a colon and what it is about, such as Order: 3 cups.",
        ),
    ),
    "headline": (
        lambda m: f"{m.number} {m.things} in {m.city}",
        ("Make a headline: how many things in which city.", "Sum it up as: number things in city"),
    ),
    "record": (
        lambda m: json.dumps({"name": m.name, "city": m.city}),
        ("Write name and city as a JSON object.", 'Fill in: {"name": ..., "city": ...}'),
    ),
    "fields": (
        lambda m: f"day={m.day}; count={m.number}",
        ("Write the day and the number as: day=...; count=...", "Fill in day= and count=, with a semicolon between."),
    ),
    "next_day": (
        lambda m: DAYS[(DAYS.index(m.day) + 1) % 7],
        ("Which day comes after the one that is named?", "Everything is a day late. Write the new day."),
    ),
    "doubled": (
        lambda m: str(2 * m.number),
        ("Write twice the number of things.", "There are two such messages. How many things are that together?"),
    ),
}


def text_tasks(seed: int, count: int) -> Iterator[Base]:
    maker = Maker("texts", ROLES, seed, count)
    for name, (function, wordings) in TASKS.items():
        rng = Random(f"{seed}/texts/{name}/messages")
        yield maker.table(name, wordings, ((m.text, function(m)) for m in (message(rng) for _ in range(count))))
