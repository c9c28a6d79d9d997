"""Tasks on one word, with frequent English words (wordfreq).

A description has a slot for what it is about: "the word" here, "the longest word of the list" in compositions.
"""

from collections.abc import Callable, Iterator
from random import Random

from wordfreq import top_n_list

from .base import Base, Maker

Words = list[str]
ROLES = ("a typesetter", "a spelling teacher", "a careful proofreader", "a program that edits words", "a crossword fan")
_RUDE = (
    "fuck",
    "shit",
    "sex",
    "porn",
    "nazi",
    "rape",
    "bitch",
    "nigg",
    "cunt",
    "dick",
    "puss",
    "slut",
    "whore",
    "cock",
)
VOWELS = "aeiou"


def frequent_words() -> Words:
    """Some 4,000 frequent words of 3 to 9 letters, without the very first, which are mostly function words."""
    fitting = (w for w in top_n_list("en", 6000) if w.isascii() and w.isalpha() and 3 <= len(w) <= 9)
    return [w for w in fitting if not any(part in w for part in _RUDE)][150:]


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


# What becomes of one word: function, then wordings. {} is the word.
TRANSFORMS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "upper": (str.upper, ("Write {} in capital letters.", "Uppercase {}.", "How does {} look in capitals?")),
    "title": (str.title, ("Write {} with a capital first letter.", "Begin {} with a capital.")),
    "third": (lambda w: w[2], ("Give the third letter of {}.", "Which letter stands in third place in {}?")),
    "first2": (lambda w: w[:2], ("Write the first two letters of {}.", "With which two letters does {} begin?")),
    "first3": (lambda w: w[:3], ("Write the first three letters of {}.", "Shorten {} to three letters.")),
    "last2": (lambda w: w[-2:], ("Write the last two letters of {}.", "With which two letters does {} end?")),
    "last3": (lambda w: w[-3:], ("Write the last three letters of {}.", "With which three letters does {} end?")),
    "ends": (lambda w: w[0] + w[-1], ("Write the first and the last letter of {}.", "Give the outer letters of {}.")),
    "hyphens": ("-".join, ("Spell {} with hyphens.", "Put a hyphen between the letters of {}.")),
    "spaces": (" ".join, ("Spell {}, letter by letter.", "Put a space between the letters of {}.")),
    "dots": (".".join, ("Put a dot between the letters of {}.", "Spell {} with dots.")),
    "twice": (lambda w: f"{w} {w}", ("Write {} twice.", "Say {} two times.")),
    "thrice": (lambda w: f"{w} {w} {w}", ("Write {} three times.", "Say {} three times.")),
    "headless": (
        lambda w: w[1:],
        ("Leave out the first letter of {}.", "What is left of {} without its first letter?"),
    ),
    "tailless": (lambda w: w[:-1], ("Leave out the final letter of {}.", "Write {} without its final letter.")),
    "core": (lambda w: w[1:-1], ("Take the first and the last letter away from {}.", "Write the inner part of {}.")),
    "consonants": (
        lambda w: "".join(c for c in w if c not in VOWELS),
        ("Write {} without its vowels.", "Drop the vowels of {}."),
    ),
    "masked": (
        lambda w: "".join("*" if c in VOWELS else c for c in w),
        ("Replace the vowels of {} with stars.", "Put a star for every vowel of {}."),
    ),
    "copy": (lambda w: w, ("Copy {}.", "Repeat {} exactly as it is.", "Echo {}.")),
    "ing": (lambda w: w + "ing", ('Add "ing" to {}.', "Append the letters ing to {}.")),
    "un": (lambda w: "un" + w, ('Put "un" in front of {}.', "Prefix {} with un.")),
    "the": (lambda w: "the " + w, ('Put "the" in front of {}.', "Write the definite article and {}.")),
    "shout": (lambda w: w.upper() + "!", ("Shout {}.", "Write {} in capitals with an exclamation mark.")),
    "ask": (lambda w: w.title() + "?", ("Turn {} into a question.", "Write {} as a question of one word.")),
    "hashtag": (lambda w: "#" + w, ("Make a hashtag of {}.", "Write {} as a hashtag.")),
    "handle": (lambda w: "@" + w, ("Mention {} as a user: with an @ in front.", "Put an at sign before {}.")),
    "file": (lambda w: w + ".txt", ("Make {} the name of a text file.", "Write {} with the ending .txt.")),
    "length": (lambda w: str(len(w)), ("Count the letters of {}.", "How many letters has {}?")),
    "initial": (
        lambda w: w[0].upper(),
        ("Give the initial of {} as a capital.", "Write the capital first letter of {}."),
    ),
    "vowel_start": (
        lambda w: yes(w[0] in VOWELS),
        ("Does {} start with a vowel?", "Say yes if {} begins with a vowel, else no."),
    ),
    "parity": (
        lambda w: "odd" if len(w) % 2 else "even",
        ("Is the number of letters of {} even or odd?", "Count the letters of {} and say even or odd."),
    ),
    "has_e": (lambda w: yes("e" in w), ("Does {} contain the letter e?", "Say yes if there is an e in {}, else no.")),
    "has_a": (lambda w: yes("a" in w), ("Is there an a in {}?", "Say yes if {} contains the letter a, else no.")),
    "size": (
        lambda w: "long" if len(w) > 5 else "short",
        ("Say long if {} has six or more letters, else short.", "Is {} long (six letters or more) or short?"),
    ),
    "half": (
        lambda w: "first" if w[0] < "n" else "second",
        (
            "Is {} in the first half of the dictionary (a to m) or in the second?",
            "Say first if {} begins with a to m, else second.",
        ),
    ),
    "backwards": (lambda w: w[::-1], ("Write {} backwards.", "Reverse the letters of {}.")),
}


SHORTENING = ("headless", "tailless", "core", "consonants", "backwards")
NOT_AFTER = (*SHORTENING, "third", "copy", "initial", "has_a", "has_e", "vowel_start")
"""Their inverse, what says little of the first step, or a letter that is kept for evaluation."""
CHAINED = 50


def word_tasks(words: Words, seed: int, count: int) -> Iterator[Base]:
    maker = Maker("words", ROLES, seed, count)
    for name, (function, wordings) in TRANSFORMS.items():
        about = [wording.format("the word") for wording in wordings]
        yield maker.drawn(name, about, lambda rng: rng.choice(words), on_word(function))


def on_word(function: Callable[[str], str]) -> Callable[[str], str | None]:
    return lambda text: function(text) if text.isalpha() and len(text) > 2 else None


def chained_tasks(words: Words, seed: int, count: int) -> Iterator[Base]:
    """Two changes of a word, one after the other: a drawn part of the possible pairs."""
    maker, rng = Maker("compositions", ROLES, seed, count), Random(f"{seed}/chained")
    pairs = [(a, b) for a in SHORTENING for b in TRANSFORMS if b not in NOT_AFTER and both_count(a, b, words[:20])]
    for first, then in rng.sample(pairs, CHAINED):
        (change, forms), (transform, second) = TRANSFORMS[first], TRANSFORMS[then]
        steps = list(zip(forms, second, strict=False))
        wordings = [f"{a.format('the word')} Then: {lowered(b.format('the result'))}" for a, b in steps]
        wordings.append(f"Change the word in two steps. {wordings[0]}")

        def answer(text: str, change=change, transform=transform) -> str | None:
            changed = change(text) if text.isalpha() and len(text) > 4 else ""
            return transform(changed) if len(changed) > 2 else None

        yield maker.drawn(f"{first}_then_{then}", wordings, lambda r: r.choice(words), answer)


def both_count(first: str, then: str, words: Words) -> bool:
    """Whether the first change makes a difference to what the second one gives."""
    (change, _), (transform, _) = TRANSFORMS[first], TRANSFORMS[then]
    return any(transform(change(word)) != transform(word) for word in words if len(word) > 4)


def lowered(text: str) -> str:
    return text[0].lower() + text[1:]
