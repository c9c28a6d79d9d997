"""Tools for the embedded agent tasks. In: the tables below, written for this project. Out: `TOOLS` and their values.

Unseen tools are other verbs over the kinds of input that seen tools take. No request for one tool can be carried out
by another one, so that a request for a tool that is not listed has no right action.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_gen_jax.data.tasks import stable_hash

_TABLE = """
Paint Picture | thing | paint a thing | gives image
    Paint me a {thing}. | I want a picture of a {thing}. | Please draw a {thing} for me.
    Can you make an image with a {thing} in it? | Show me what a {thing} looks like in a picture.
Describe Picture | image | say what a picture shows
    What is in {image}? | Tell me what {image} shows. | Describe {image} in a few words.
    What can you see in {image}?
Recolor Picture | image, thing, color | give a thing a new color | needs Paint Picture
    Give the {thing} in {image} the color {color}. | Make the {thing} in that picture {color}.
    I want the {thing} in {image} to be {color}. | Can you turn the {thing} in that picture {color}?
Swap Thing | image, thing, new thing | replace a thing in a picture
    In {image} put a {new thing} in the place of the {thing}. | Swap the {thing} in {image} for a {new thing}.
    Take the {thing} out of {image} and put in a {new thing}. | Change the {thing} in {image} to a {new thing}.
Record Sound | seconds | record sound | gives sound
    Record {seconds} seconds of sound. | Please listen for {seconds} seconds and save it.
    Make a sound file of {seconds} seconds. | Turn on the microphone for {seconds} seconds.
Type Sound | sound | write what is said | needs Record Sound
    Write down what is said in {sound}. | Type out the words of {sound}. | What does the voice in {sound} say?
    Make text from {sound}, please.
Cut Sound | sound, start, end | keep a part of it | needs Record Sound
    Cut {sound} from second {start} to second {end}. | Keep only seconds {start} to {end} of that sound.
    I need the part of {sound} between second {start} and {end}.
    Cut that sound so that it goes from {start} to {end}.
Write Note | topic | write a note | gives note
    Write a note about the {topic}. | Make a note for me about the {topic}.
    I have to remember the {topic}. Write it down. | Please start a new note on the {topic}.
Read Note | note | read a note
    Read me {note}. | What did I write in {note}? | Open {note} and read it. | Please tell me what {note} says.
Send Note | note, person | send a note | needs Write Note
    Send {note} to {person}. | {person} should get {note}. | Please send that note to {person}.
    Let {person} have that note.
Copy File | note, folder | copy a file
    Copy {note} to the folder {folder}. | Put a copy of {note} in the folder {folder}.
    I need {note} in my {folder} folder too. | Add a copy of {note} to {folder}.
Send Mail | person, topic | write a mail
    Write a mail to {person} about the {topic}. | Mail {person} about the {topic}.
    Tell {person} about the {topic} in a mail. | {person} needs a mail about the {topic}.
Call | person | call a person
    Call {person}. | Please ring {person} for me. | I want to talk to {person} on the phone.
    Get me {person} on the phone.
Set Meeting | person, day, time | plan a meeting
    Set a meeting with {person} on {day} at {time}. | I meet {person} on {day} at {time}. Put it in my calendar.
    Plan a meeting at {time} on {day} with {person}. | Put {person} in my calendar for {day} at {time}.
Set Alarm | day, time | set an alarm
    Wake me on {day} at {time}. | Set an alarm for {day} at {time}. | I must get up at {time} on {day}.
    Ring the alarm at {time} on {day}.
Set Timer | minutes | set a timer
    Set a timer for {minutes} minutes. | Tell me when {minutes} minutes are over. | Count down {minutes} minutes.
    My tea needs {minutes} minutes. Start a timer.
Weather | city, day | tell the weather
    What is the weather in {city} on {day}? | Will it rain in {city} on {day}?
    Tell me the weather on {day} in {city}. | Is it warm in {city} on {day}?
Find Way | city, to city | find the way by car
    How do I drive from {city} to {to city}? | Show me the way from {city} to {to city}.
    I am in {city}. What is the way to {to city}? | Which road goes to {to city} from {city}?
Find Train | city, to city, day | find a train
    Find a train from {city} to {to city} on {day}. | Which train goes to {to city} from {city} on {day}?
    On {day} I take the train from {city} to {to city}. | I need a train on {day} from {city} to {to city}.
Play Song | song | play a song
    Play {song}. | I want to hear the song {song}. | Put on {song}, please. | Can you play the song {song} for me?
Translate | word, language | say it in a language
    What is {word} in {language}? | Translate {word} into {language}. | How do you say {word} in {language}?
    I need the {language} word for {word}.
Add | number, other number | add two numbers
    What is {number} plus {other number}? | Add {number} and {other number}.
    How much is {number} and {other number} together? | What is the sum of {number} and {other number}?
Set Light | room, color | color a light
    Make the light in the {room} {color}. | Set the {room} light to {color}. | I want {color} light in the {room}.
    Turn the lamp in the {room} to {color}.
Order Food | count, food, person | order food
    Order {count} {food} for {person}. | {person} wants to eat {count} {food}. Order them.
    Get {count} {food} for {person} to eat. | Please order {person} {count} {food}.
Blur Picture | image | make a picture soft | unseen
    Blur {image}. | Make {image} soft. | Take the sharp lines out of {image}. | Please make {image} less sharp.
    I want {image} to look soft.
Write On Picture | image, word, color | write a word on a picture | unseen | needs Paint Picture
    Write {word} on {image} in {color}. | Put the word {word} in {color} on that picture.
    I want the {color} word {word} on {image}. | Can you write {word} in {color} on that picture?
Speed Sound | sound, count | make a sound faster | unseen | needs Record Sound
    Make {sound} {count} times as fast. | Play that sound {count} times faster. | Speed up {sound} by {count}.
    That sound should be {count} times as fast.
Spell | word | spell a word | unseen
    How do you spell {word}? | Spell the word {word}. | Which letters are in the word {word}?
    Give me the letters of {word}. | Tell me how to spell {word}.
Multiply | number, other number | multiply two numbers | unseen
    What is {number} times {other number}? | Multiply {number} by {other number}.
    How much is {number} times {other number}? | Give me the product of {number} and {other number}.
Book Room | city, day | book a hotel room | unseen
    Book a hotel room in {city} on {day}. | I need a bed in {city} on {day}. | Find me a hotel in {city} for {day}.
    I sleep in {city} on {day}. Book a room.
Heat Room | room, degrees, time | heat a room | unseen
    Heat the {room} to {degrees} degrees at {time}. | The {room} should be {degrees} degrees warm at {time}.
    At {time} make the {room} {degrees} degrees warm. | I want {degrees} degrees in the {room} at {time}.
Change Meeting | person, day, time | move a meeting | unseen
    Move my meeting with {person} to {day} at {time}. | Change the meeting with {person} to {time} on {day}.
    {person} can only meet later. Make it {day} at {time}. | My meeting with {person} is now on {day} at {time}.
"""
_VALUES = """
person: Anna Ben Carla David Emma Finn Grace Hugo Ida Jack Kim Leo Mia Nina Oscar Paul Rosa Sam Tina Tom
city: Paris Tokyo Rome Madrid Berlin Warsaw Athens Moscow Delhi Seoul Cairo Lima Ottawa Oslo London Vienna Rabat Accra
day: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
thing: hen cat dog cow horse sheep pig duck frog bee bear lion fox mouse snake crow boat house tree hammer spoon lemon
color: red blue green yellow orange pink purple brown black white
food: apples bananas lemons peaches carrots onions tomatoes olives pies salads noodles pizzas
language: French Spanish German Polish Greek Russian Italian Japanese Swedish Arabic Hindi Swahili
word: apple bread water friend school garden winter summer morning window river mountain kitchen letter sister flower
room: kitchen bedroom bathroom cellar attic garage office hall
topic: party trip test garden car game show school meeting dinner weather train market rent holiday book
folder: work home school family travel music old new
page: list plan page idea draft text log memo
song: Yesterday Hello Thunder Happy Halo Stay Fire Moonlight Sunrise Hurricane Dreams Roar Titanium Grace Angels Rain
      River Snowman Lovely Believe Perfect Waterloo Umbrella Lemonade
"""
_SAME = {"to city": "city", "new thing": "thing", "other number": "number"}
_SHOWS = re.compile(r"\{(.*?)\}")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Tool:
    """A tool the assistant may call.

    Attributes:
        name: what an action calls it; the same in every toolset.
        usage: what it does, as a short phrase.
        arguments: one to three names of `VALUES`, in the order of the action's inputs.
        requests: what a user says; every argument stands in it as "{name}", or, where only an earlier turn names the
            file, as "that picture", "that sound" or "that note".
        returns: the argument it makes a file of ("image"), or "" for tools that make none.
        prerequisite: the tool whose file it works on, or None.
        seen: whether training toolsets may hold it.
    """

    name: str
    usage: str
    arguments: tuple[str, ...]
    requests: tuple[str, ...]
    returns: str
    prerequisite: str | None
    seen: bool


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with every "{name}" replaced by its value."""
    return _SHOWS.sub(lambda match: values[match[1]], template)


def pick(options: Sequence[_Item], *salt: str) -> _Item:
    """The option that the hash of `salt` points at."""
    return options[stable_hash(*salt) % len(options)]


def choose_values(names: Sequence[str], salt: str, given: Mapping[str, str]) -> dict[str, str]:
    """A value for every name, all different; those in `given` stay."""
    values = dict(given)
    for name in names:
        if name not in values:
            values[name] = pick([value for value in VALUES[name] if value not in values.values()], salt, name)
    return values


def small_talk(salt: str) -> tuple[str, str]:
    """Something a user says that needs no tool, and the answer."""
    request, answer = pick(SMALL_TALK, salt, "small talk")
    values = choose_values(_SHOWS.findall(request), salt, {})
    return fill(request, values), fill(answer, values)


def _tool(block: str) -> Tool:
    """Reads one tool: its head line, then its requests."""
    head, requests = block.split("\n", 1)
    name, arguments, usage, *marks = head.split(" | ")
    marked = dict(f"{mark} ".split(" ", 1) for mark in marks)
    return Tool(
        name=name,
        usage=usage,
        arguments=tuple(arguments.split(", ")),
        requests=tuple(map(str.strip, re.split(r"[|\n]", requests))),
        returns=marked.get("gives", "").strip(),
        prerequisite=marked["needs"].strip() if "needs" in marked else None,
        seen="unseen" not in marked,
    )


def _values() -> dict[str, tuple[str, ...]]:
    """All that may stand for an argument, by its name."""
    lines = re.sub(r"\n ", " ", _VALUES).strip().splitlines()
    values = {name: tuple(words.split()) for name, words in (line.split(":") for line in lines)}
    stems = [_stem(i) for i in range(96)]
    values["image"] = tuple(f"image/{stem}.png" for stem in stems[:48])
    values["sound"] = tuple(f"sound/{stem}.wav" for stem in stems[48:])
    values["note"] = tuple(f"notes/{name}{i}.txt" for name in values.pop("page") for i in range(1, 8))
    values["time"] = tuple(f"{hour}:{part}" for hour in range(7, 22) for part in ("00", "30"))
    values["count"] = tuple(map(str, range(2, 13)))
    values["degrees"] = tuple(map(str, range(15, 29)))
    values["number"] = tuple(map(str, range(2, 60)))
    values["minutes"] = values["seconds"] = tuple(map(str, range(3, 60)))
    values["start"] = tuple(map(str, range(1, 20)))
    values["end"] = tuple(map(str, range(20, 60)))
    return values | {name: values[same] for name, same in _SAME.items()}


def _stem(index: int) -> str:
    """A short file name such as a1b2: letter, digit, letter, digit."""
    code = stable_hash("stem", str(index))
    letters = "abcdefghkmnprstu"
    return f"{letters[code % 16]}{code // 16 % 10}{letters[code // 160 % 16]}{code // 2560 % 10}"


TOOLS = tuple(map(_tool, re.split(r"\n(?=\S)", _TABLE.strip())))
VALUES = _values()
SMALL_TALK = (
    ("Hello, I am {person}.", "Hello {person}!"),
    ("Good morning, my name is {person}.", "Good morning {person}!"),
    ("Hi, here is {person} again.", "Welcome back, {person}!"),
    ("My friend is called {person}.", "{person} is a nice name."),
    ("I like to eat {food}.", "Yes, {food} are good."),
    ("I ate too many {food}.", "Then rest a little."),
    ("I live in {city}.", "I hear {city} is nice."),
    ("My holiday in {city} was great.", "I am glad you liked {city}."),
    ("I learn {language} at school.", "Have fun with {language}!"),
    ("I like {color} best.", "Yes, {color} is a fine color."),
    ("My new car is {color}.", "Your {color} car must look good."),
    ("I have a {thing} at home.", "Take care of the {thing}."),
    ("I am free on {day}.", "Enjoy your {day}!"),
    ("I was sad on {day}.", "I hope you feel better now."),
    ("Thank you, it is all done by {time}.", "You are welcome."),
    ("I go to bed at {time}.", "Sleep well!"),
    ("The {topic} was fun.", "I am glad the {topic} was fun."),
)
REFUSALS = ("Sorry, I cannot do that.", "I have no tool for that.", "That is not possible here.")
