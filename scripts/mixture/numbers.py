"""Tasks on numbers, with number words by num2words.

What is kept for evaluation is left out: Italian number words, the number before.
"""

from collections.abc import Callable, Iterator
from random import Random

from num2words import num2words

from .base import Base, Maker

ROLES = ("a math tutor", "an accountant", "a pocket calculator", "a clerk who is good with numbers")
LANGUAGES = {
    "id": "Indonesian", "hu": "Hungarian", "ro": "Romanian", "no": "Norwegian", "lt": "Lithuanian", "lv": "Latvian",
    "sl": "Slovenian", "pl": "Polish", "ca": "Catalan", "sv": "Swedish", "eo": "Esperanto", "is": "Icelandic",
}  # fmt: skip
_ROMAN = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
Draw = Callable[[Random], str]


def roman(number: int) -> str:
    text = ""
    for value, letters in _ROMAN:
        while number >= value:
            text, number = text + letters, number - value
    return text


def sign(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


# Tasks on one number: function, smallest and largest number, wordings.
ONE: dict[str, tuple[Callable[[int], object], int, int, tuple[str, ...]]] = {
    "half": (lambda n: None if n % 2 else n // 2, 2, 400, ("Halve the number.", "What is half of the number?")),
    "parity": (lambda n: "odd" if n % 2 else "even", 1, 999, ("Is the number even or odd?", "Say even or odd.")),
    "above_50": (
        lambda n: "yes" if n > 50 else "no",
        1,
        100,
        ("Is the number greater than 50?", "Say yes if the number is above fifty, else no."),
    ),
    "by_3": (
        lambda n: "no" if n % 3 else "yes",
        1,
        300,
        ("Can the number be divided by three?", "Say yes for multiples of 3, else no."),
    ),
    "last_digit": (lambda n: n % 10, 10, 9999, ("Write the last digit.", "What is the final digit of the number?")),
    "first_digit": (
        lambda n: str(n)[0],
        10,
        9999,
        ("Write the first digit.", "With which digit does the number begin?"),
    ),
    "digit_sum": (lambda n: sum(map(int, str(n))), 10, 9999, ("Add the digits.", "What is the sum of the digits?")),
    "digits": (lambda n: " ".join(str(n)), 10, 99999, ("Write the digits with spaces.", "Read out digit by digit.")),
    "rounded": (
        lambda n: (n + 5) // 10 * 10,
        1,
        999,
        ("Round the number to tens.", "Which multiple of ten is nearest? Round five up."),
    ),
    "square": (lambda n: n * n, 1, 60, ("Square the number.", "What is the number times itself?")),
    "to_100": (lambda n: 100 - n, 1, 99, ("How much is missing to 100?", "Subtract the number from one hundred.")),
    "ordinal": (
        lambda n: num2words(n, to="ordinal_num"),
        1,
        300,
        ("Write the number as an ordinal, such as 3rd.", "Turn the number into an ordinal in digits."),
    ),
    "ordinal_words": (
        lambda n: num2words(n, to="ordinal"),
        1,
        200,
        ("Write the ordinal in words.", "Spell out the ordinal of the number."),
    ),
    "words": (num2words, 1, 999, ("Write the number in words.", "Spell out the number.")),
    "year": (lambda n: num2words(n, to="year"), 1100, 2029, ("Say the year in words.", "How is this year read aloud?")),
    "percent": ("{}%".format, 1, 400, ("Write the number as a percentage.", "Add a percent sign.")),
    "dollars": ("${}.00".format, 1, 500, ("Write the amount in dollars.", "Turn the number into a price in dollars.")),
    "euros": ("{} euros".format, 2, 500, ("Write the amount in euros.", "Say how many euros that is.")),
    "kilometers": ("{} km".format, 1, 500, ("Write the distance in kilometers.", "Add km to the number.")),
    "degrees": ("{}°C".format, 1, 300, ("Write the temperature in degrees Celsius.", "Add °C to the number.")),
    "thousands": (
        "{:,}".format,
        1000,
        9999999,
        ("Put commas into the number.", "Write the number with thousands separators."),
    ),
    "padded": ("{:04d}".format, 1, 999, ("Pad the number to four digits.", "Write four digits, with zeros in front.")),
    "negative": ("-{}".format, 1, 999, ("Change the sign of the number.", "Write the number as a negative one.")),
    "decimal": ("{}.0".format, 1, 999, ("Write the number with one decimal place.", "Make it a decimal number.")),
    "fraction": ("1/{}".format, 2, 400, ("Write one over the number.", "Make a fraction: one part of so many.")),
    "roman": (roman, 1, 150, ("Write the number in Roman numerals.", "Convert to Roman numerals.")),
    "binary": (lambda n: f"{n:b}", 1, 127, ("Write the number in binary.", "Convert to base two.")),
    "hexadecimal": (lambda n: f"{n:x}", 10, 400, ("Write the number in hexadecimal.", "Convert to base sixteen.")),
    "hours": (
        lambda n: f"{n // 60}h {n % 60}m",
        61,
        900,
        ("Convert minutes to hours and minutes.", "How many hours and minutes are that?"),
    ),
    "clock": (
        lambda n: f"{n // 60}:{n % 60:02d}",
        60,
        1439,
        (
            "These are minutes after midnight: what does the clock show?",
            "Write the minutes of the day as a time, h:mm.",
        ),
    ),
    "weeks": (
        lambda n: f"{n // 7} weeks {n % 7} days",
        14,
        300,
        ("Convert days to weeks and days.", "How many weeks and days are that?"),
    ),
}
# Tasks on two numbers: function, largest number, wordings.
TWO: dict[str, tuple[Callable[[int, int], object], int, tuple[str, ...]]] = {
    "larger": (max, 999, ("Which of the two numbers is larger?", "Write the greater number.")),
    "smaller": (min, 999, ("Which of the two numbers is smaller?", "Write the lesser number.")),
    "compare": (sign, 99, ("Compare the two numbers: write <, > or =.", "Put the right sign between the numbers.")),
    "product": (lambda a, b: a * b, 12, ("Multiply the two numbers.", "What is the product?")),
    "sum": (lambda a, b: a + b, 50, ("Add the numbers.", "What do the two numbers make together?")),
    "distance": (
        lambda a, b: abs(a - b),
        60,
        ("How far apart are the numbers?", "Subtract the smaller number from the larger one."),
    ),
    "swap": ("{1} {0}".format, 999, ("Swap the two numbers.", "Write the second number first.")),
    "ratio": ("{}:{}".format, 99, ("Write the numbers as a ratio.", "Put a colon between the numbers.")),
    "sum_text": (
        "{} + {}".format,
        99,
        ("Write the sum of the numbers without working it out.", "Put a plus between them."),
    ),
    "series": (
        lambda a, b: 2 * b - a,
        60,
        ("The numbers are the start of a series with equal steps. Continue it.", "Which number comes next?"),
    ),
    "range": (
        "from {} to {}".format,
        999,
        ("Write the range in words: from … to …", "Say from which number to which."),
    ),
}


def number_tasks(seed: int, count: int) -> Iterator[Base]:
    maker = Maker("numbers", ROLES, seed, count)
    for name, (function, low, high, wordings) in (ONE | dict(shifted())).items():
        yield maker.drawn(name, wordings, between(low, high), on_numbers(function, 1))
    for name, (function, high, wordings) in TWO.items():
        yield maker.drawn(
            name, wordings, lambda r, h=high: f"{r.randint(1, h)} {r.randint(1, h)}", on_numbers(function, 2)
        )
    for code, language in LANGUAGES.items():
        wordings = (f"Write the number in {language} words.", f"Spell out the number in {language}.")
        yield maker.drawn(
            f"words_{code}", wordings, between(1, 999), on_numbers(lambda n, c=code: num2words(n, lang=c), 1)
        )
    numerals, spoken = ((make(n), str(n)) for n in range(1, 400) for make in (roman,)), range(1, 1000)
    yield maker.table(
        "from_roman", ("Which number do the Roman numerals stand for?", "Convert from Roman numerals."), numerals
    )
    yield maker.table(
        "from_words", ("Write the number in digits.", "Which number is that?"), ((num2words(n), str(n)) for n in spoken)
    )


def shifted() -> Iterator[tuple[str, tuple[Callable[[int], object], int, int, tuple[str, ...]]]]:
    """Tasks that add to the number, take from it, or multiply it."""
    for k in (1, 2, 3, 5, 10, 100):
        yield f"plus_{k}", (lambda n, k=k: n + k, 1, 400, (f"Add {k} to the number.", f"What is the number plus {k}?"))
    for k in (2, 3, 5, 10):
        wordings = (f"Subtract {k} from the number.", f"What is the number minus {k}?")
        yield f"minus_{k}", (lambda n, k=k: n - k, 11, 400, wordings)
        wordings = (f"Multiply the number by {k}.", f"What is the number times {k}?")
        yield f"times_{k}", (lambda n, k=k: n * k, 1, 200, wordings)


def between(low: int, high: int) -> Draw:
    return lambda rng: str(rng.randint(low, high))


def on_numbers(function: Callable[..., object], how_many: int) -> Callable[[str], str | None]:
    """The function of a text with so many numbers; a text with anything else raises ValueError."""

    def answer(text: str) -> str | None:
        numbers = [int(part) for part in text.split(" ")]
        found = function(*numbers) if len(numbers) == how_many else None
        return None if found is None else str(found)

    return answer
