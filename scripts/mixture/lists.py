"""Tasks on lists of words, and compositions: choose a word of a list, then do something with it.

What is kept for evaluation is left out: the last of a list, the last in the alphabet.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random

from .base import Base, Maker
from .words import ROLES, TRANSFORMS, VOWELS, Words, yes

COMPOSITIONS = 160
ORDINALS = ("first", "second", "third", "fourth")


def single(words: Words, longest: bool) -> str | None:
    """The longest or shortest word, None where two are."""
    ranked = sorted(words, key=len, reverse=longest)
    return None if len(ranked[0]) == len(ranked[1]) else ranked[0]


def one(words: Words) -> str | None:
    return words[0] if len(words) == 1 else None


# Which word of a list: function, then what it is called.
CHOICES: dict[str, tuple[Callable[[Words], str | None], tuple[str, ...]]] = {
    "longest": (lambda ws: single(ws, True), ("the longest word of the list", "the word with the most letters")),
    "shortest": (lambda ws: single(ws, False), ("the shortest word of the list", "the word with the fewest letters")),
    "alphabet": (min, ("the word that a dictionary lists first", "the word that comes first in the alphabet")),
    "with_vowel": (
        lambda ws: one([w for w in ws if w[0] in VOWELS]),
        ("the only word that starts with a vowel", "the word whose first letter is a vowel"),
    ),
} | {
    name: (lambda ws, i=i: ws[i], (f"the {name} word of the list", f"the word in {name} place"))
    for i, name in enumerate(ORDINALS)
}

# What becomes of a whole list. All of these take any number of words.
LISTS: dict[str, tuple[Callable[[Words], str], tuple[str, ...]]] = {
    "sort": (
        lambda ws: ", ".join(sorted(ws)),
        ("Sort the words alphabetically.", "Put the words into alphabetical order."),
    ),
    "sort_length": (
        lambda ws: ", ".join(sorted(ws, key=len)),
        ("Sort the words by length, the shortest first.", "Order the words by their number of letters."),
    ),
    "reverse": (
        lambda ws: ", ".join(ws[::-1]),
        ("Write the list in reverse order.", "Turn the order of the words around."),
    ),
    "and": (" and ".join, ('Join the words with "and".', "Write the words with and between them.")),
    "or": (" or ".join, ('Join the words with "or".', "Write the words with or between them.")),
    "hyphen": ("-".join, ("Join the words with hyphens.", "Make one hyphenated word of the list.")),
    "slash": ("/".join, ("Join the words with slashes.", "Write the words as a path.")),
    "snake": ("_".join, ("Join the words with underscores.", "Make a name in snake case of the words.")),
    "camel": (
        lambda ws: ws[0] + "".join(map(str.title, ws[1:])),
        ("Make a name in camel case of the words.", "Join the words; every one but the first gets a capital."),
    ),
    "json": (
        lambda ws: "[" + ", ".join(f'"{w}"' for w in ws) + "]",
        ("Write the list as JSON.", "Turn the words into a JSON array."),
    ),
    "numbered": (
        lambda ws: " ".join(f"{i}. {w}" for i, w in enumerate(ws, 1)),
        ("Number the words.", "Write 1., 2. and so on in front of the words."),
    ),
    "titles": (
        lambda ws: ", ".join(map(str.title, ws)),
        ("Capitalize every word.", "Begin every word with a capital letter."),
    ),
    "initials": (
        lambda ws: "".join(w[0] for w in ws).upper(),
        ("Make an acronym of the words.", "Write the first letters of the words in capitals."),
    ),
    "lengths": (
        lambda ws: ", ".join(str(len(w)) for w in ws),
        ("Count the letters of every word.", "Write how many letters each word has."),
    ),
    "drop_first": (
        lambda ws: ", ".join(ws[1:]),
        ("Leave out the first word.", "Write the list without its first word."),
    ),
    "swap": (
        lambda ws: ", ".join([ws[1], ws[0], *ws[2:]]),
        ("Swap the first two words.", "Exchange the first and the second word."),
    ),
    "count": (lambda ws: str(len(ws)), ("How many words are in the list?", "Count the words.")),
    "letters": (
        lambda ws: str(sum(map(len, ws))),
        ("How many letters do the words have together?", "Count all letters of the list."),
    ),
    "same_start": (
        lambda ws: yes(ws[0][0] == ws[1][0]),
        (
            "Do the first two words begin with the same letter?",
            "Say yes if the first two words share their first letter, else no.",
        ),
    ),
    "first_longer": (
        lambda ws: yes(len(ws[0]) > len(ws[1])),
        (
            "Is the first word longer than the second?",
            "Say yes if the first word has more letters than the second, else no.",
        ),
    ),
    "in_order": (
        lambda ws: yes(ws == sorted(ws)),
        ("Is the list in alphabetical order?", "Say yes if the words are sorted, else no."),
    ),
}
# Words of a list with a property: what is asked of a word, how that is called, whether all of the others are asked for.
FILTERS: dict[str, tuple[Callable[[str], bool], str]] = {
    "vowel": (lambda w: w[0] in VOWELS, "start with a vowel"),
    "long": (lambda w: len(w) > 5, "have more than five letters"),
    "early": (lambda w: w[0] < "n", "begin with a letter from a to m"),
} | {f"with_{c}": (lambda w, c=c: c in w, f"contain the letter {c}") for c in "aeionrst"}


SIZES = ((3,), (4,), (5,), (6,), (3, 4, 5, 6))
SMALL = ((3,), (4,), (2, 3, 4))


def listed(text: str, sizes: Sequence[int]) -> Words:
    """The words of a list. Raises ValueError for one that has another number of words."""
    words = text.split(", ")
    if len(words) not in sizes or not all(0 < len(word) < 20 for word in words):
        raise ValueError(f"not a list of {sizes} words")
    return words


def joined(words: Words, sizes: Sequence[int]) -> Callable[[Random], str]:
    return lambda rng: ", ".join(rng.sample(words, rng.choice(sizes)))


def list_tasks(words: Words, seed: int, count: int) -> Iterator[Base]:
    maker = Maker("lists", ROLES, seed, count)

    def task(name: str, wordings: Sequence[str], function: Callable[[Words], str | None], sizes: Sequence[int]) -> Base:
        size = sizes[0] if len(sizes) == 1 else "any"
        return maker.drawn(f"{name}_{size}", wordings, joined(words, sizes), lambda t: function(listed(t, sizes)))

    for name, (choose, nouns) in CHOICES.items():
        wordings = [form.format(noun) for form in ("Write {}.", "Which is {}?", "Copy {}.") for noun in nouns]
        for sizes in SIZES:
            if usable(name, sizes):
                yield task(name, wordings, choose, sizes)
    for name, (change, wordings) in LISTS.items():
        for sizes in SMALL:
            yield task(name, wordings, change, sizes)
    for name, (holds, noun) in FILTERS.items():
        few, all_sizes = (3, 4, 5), (3, 4, 5, 6)
        yield task(
            f"count_{name}",
            [f"How many of the words {noun}?", f"Count the words that {noun}."],
            counted(holds),
            all_sizes,
        )
        yield task(f"keep_{name}", [f"Keep the words that {noun}.", f"Which of the words {noun}?"], kept(holds), few)
        yield task(
            f"any_{name}",
            [f"Does any of the words {noun}?", f"Say yes if some of the words {noun}, else no."],
            found(holds),
            few,
        )


def usable(choice: str, sizes: Sequence[int]) -> bool:
    """A place that some of the lists have not, or that is their last, is no choice."""
    return choice not in ORDINALS or ORDINALS.index(choice) < min(sizes) - 1


def composed_tasks(words: Words, seed: int, count: int) -> Iterator[Base]:
    """Tasks that choose a word of a list and change it: a drawn part of all pairs, lists of 3 to 5 words."""
    maker, rng = Maker("compositions", ROLES, seed, count), Random(f"{seed}/compositions")
    pairs = [(choice, change, size) for choice in CHOICES for change in TRANSFORMS for size in (3, 4, 5)]
    for choice, change, size in rng.sample(
        [p for p in pairs if p[1] != "copy" and usable(p[0], (p[2],))], COMPOSITIONS
    ):
        (choose, nouns), (transform, forms) = CHOICES[choice], TRANSFORMS[change]
        wordings = [form.format(noun) for form, noun in zip(forms, nouns, strict=False)]
        wordings += [
            f"First find {nouns[-1]}. {forms[0].format('it')}",
            f"Take {nouns[0]}. {forms[-1].format('that word')}",
        ]

        def answer(text: str, choose=choose, transform=transform, size=size) -> str | None:
            chosen = choose(listed(text, (size,)))
            return transform(chosen) if chosen and len(chosen) > 2 else None

        yield maker.drawn(f"{choice}_{change}_{size}", wordings, joined(words, (size,)), answer)


def counted(holds: Callable[[str], bool]) -> Callable[[Words], str]:
    return lambda words: str(sum(map(holds, words)))


def kept(holds: Callable[[str], bool]) -> Callable[[Words], str]:
    return lambda words: ", ".join(filter(holds, words)) or "none"


def found(holds: Callable[[str], bool]) -> Callable[[Words], str]:
    return lambda words: yes(any(map(holds, words)))
