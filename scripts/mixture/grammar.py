"""Forms of English words, by lemminflect and inflect.

What is kept for evaluation is left out: superlatives, the past tense.
"""

from collections.abc import Callable, Iterator
from random import Random

import inflect
from lemminflect import getAllInflections, getInflection

from .base import Base, Maker
from .words import Words, on_word

ROLES = ("an English teacher", "a copy editor", "a patient language tutor", "the author of a grammar book")


def form(word: str, tag: str) -> str:
    """An inflected form of the word. Raises ValueError where it has none."""
    found = getInflection(word, tag=tag)
    if not found:
        raise ValueError(f"{word} has no form {tag}")
    return found[0]


VERBS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "ing": (lambda v: form(v, "VBG"), ("Write the -ing form of the verb.", "Write the present participle.")),
    "third": (
        lambda v: form(v, "VBZ"),
        ("Write the verb as he or she does it.", "Put the verb into the third person singular."),
    ),
    "will": (lambda v: f"will {v}", ("Put the verb into the future.", "Write the verb with will.")),
    "i_am": (lambda v: f"I am {form(v, 'VBG')}", ("Say that you are doing it.", 'Write "I am" and the -ing form.')),
    "is_she": (lambda v: f"Is she {form(v, 'VBG')}?", ("Ask whether she is doing it.", "Make a question about her.")),
    "she": (lambda v: f"She {form(v, 'VBZ')}.", ("Say that she does it.", "Make a sentence about her of the verb.")),
    "they_will_not": (lambda v: f"They will not {v}.", ("Say that they will not do it.", "Deny it for the future.")),
    "do_not": (lambda v: f"Don't {v}!", ("Tell somebody not to do it.", "Turn the verb into a prohibition.")),
    "please": (lambda v: f"Please {v}.", ("Ask politely for it.", "Turn the verb into a request with please.")),
    "lets": (lambda v: f"Let's {v}!", ("Suggest that we do it together.", "Make a suggestion with let's.")),
    "to": (lambda v: f"to {v}", ('Write the infinitive with "to".', 'Put "to" before the verb.')),
    "can_you": (lambda v: f"Can you {v}?", ("Ask somebody whether they can do it.", "Make a question with can you.")),
}  # fmt: skip
ADJECTIVES: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "comparative": (
        lambda a: form(a, "JJR"),
        ("Write the comparative of the adjective.", 'Give the form that is used with "than".'),
    ),
    "very": (lambda a: f"very {a}", ("Strengthen the adjective with very.", "Say that it is very much so.")),
    "not": (lambda a: f"not {a}", ("Deny the adjective.", "Say that it is not so.")),
    "as_as": (lambda a: f"as {a} as", ("Put the adjective between as and as.", "Begin a comparison of equals.")),
    "how": (lambda a: f"How {a}!", ("Exclaim about the adjective.", "Show surprise: how and the adjective.")),
}
NOUNS: dict[str, tuple[Callable[[inflect.engine, str], str], tuple[str, ...]]] = {
    "article": (lambda e, n: e.a(n), ("Write the word with a or an.", "Add the indefinite article.")),
    "plural": (lambda e, n: e.plural_noun(n), ("Write the plural.", "Say it of more than one.")),
    "many": (lambda e, n: f"many {e.plural_noun(n)}", ('Write "many" and the plural.', "Say that there are many.")),
    "two": (lambda e, n: f"two {e.plural_noun(n)}", ("Say that there are two of them.", 'Write "two" and the plural.')),
    "no": (lambda e, n: f"no {n}", ("Say that there is none.", 'Write "no" before the word.')),
    "this": (lambda e, n: f"this {n}", ("Point at it with this.", "Write the word with this.")),
    "these": (lambda e, n: f"these {e.plural_noun(n)}", ("Point at several of them.", "Write these and the plural.")),
    "my": (lambda e, n: f"my {n}", ("Say that it is yours.", "Write the word with my.")),
    "possessive": (lambda e, n: f"{n}'s", ("Write the possessive form.", "Add 's to the word.")),
    "where": (lambda e, n: f"Where is the {n}?", ("Ask where it is.", "Make a question with where of the word.")),
    "there_is": (lambda e, n: f"There is {e.a(n)}.", ("Say that there is one.", "Make a sentence with there is.")),
}  # fmt: skip


def grammar_tasks(words: Words, seed: int, count: int) -> Iterator[Base]:
    maker, engine = Maker("grammar", ROLES, seed, count), inflect.engine()
    common = words[:2500]
    verbs = [w for w in common if {"VB", "VBG"} <= getAllInflections(w, upos="VERB").keys()]
    adjectives = [w for w in common if "JJR" in getAllInflections(w, upos="ADJ")]
    nouns = [w for w in common if "NNS" in getAllInflections(w, upos="NOUN") and not engine.singular_noun(w)]
    for name, (function, wordings) in VERBS.items():
        yield maker.drawn(f"verb_{name}", wordings, one_of(verbs), on_word(function))
    for name, (function, wordings) in ADJECTIVES.items():
        yield maker.drawn(f"adjective_{name}", wordings, one_of(adjectives), on_word(function))
    for name, (of_noun, wordings) in NOUNS.items():
        yield maker.drawn(f"noun_{name}", wordings, one_of(nouns), on_word(lambda n, f=of_noun: f(engine, n)))


def one_of(words: Words) -> Callable[[Random], str]:
    return lambda rng: rng.choice(words)
