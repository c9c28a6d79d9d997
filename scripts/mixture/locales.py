"""Names of countries, languages, months and currencies, and dates, by the Unicode CLDR (babel).

What is kept for evaluation is left out: country names in Spanish and Swedish, English words in Spanish.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator
from random import Random

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_decimal

from .base import Base, Maker, Pair

ROLES = ("an interpreter", "a translator", "a travel agent", "a geography teacher", "a clerk at an embassy")
LANGUAGES = {
    "de": "German", "fr": "French", "it": "Italian", "pt": "Portuguese", "nl": "Dutch", "da": "Danish", "pl": "Polish",
    "cs": "Czech", "fi": "Finnish", "hu": "Hungarian", "ro": "Romanian", "tr": "Turkish", "ca": "Catalan",
    "hr": "Croatian", "sk": "Slovak", "sl": "Slovenian", "lt": "Lithuanian", "lv": "Latvian", "et": "Estonian",
    "id": "Indonesian", "vi": "Vietnamese", "nb": "Norwegian", "is": "Icelandic", "sw": "Swahili", "af": "Afrikaans",
    "eu": "Basque", "gl": "Galician", "cy": "Welsh", "ga": "Irish", "sv": "Swedish",
}  # fmt: skip
BACK = ("de", "fr", "fi", "hu", "pl", "tr", "nl", "cs")
"""Languages that are also translated from."""
WRITTEN = ("de", "fr", "it", "pt", "nl", "da", "pl", "fi", "tr", "nb", "id", "ca", "sv")
"""Languages in which dates and large numbers are written."""
DATES = {
    "us": ("%m/%d/%Y", "Write the date in American style, month first.", "Use the American date format."),
    "dots": ("%d.%m.%Y", "Write the date with dots, day first.", "Use the format day.month.year."),
    "long": ("%B {d}, %Y", "Write out the date in English, month first.", "Write the month as a word, day and year."),
    "british": ("{d} %B %Y", "Write out the date in English, day first.", "Write day, name of the month and year."),
    "short": ("%d %b %Y", "Write the date with a three-letter month.", "Use the format 05 Mar 2020."),
    "slashes": ("%Y/%m/%d", "Write the date with slashes, year first.", "Use slashes in the date."),
    "compact": ("%Y%m%d", "Write the date as eight digits.", "Take the hyphens out of the date."),
    "year": ("%Y", "Write the year of the date.", "In which year is that?"),
    "month": ("%B", "Write the month of the date.", "In which month is that?"),
    "day": ("{d}", "Write the day of the month.", "Which day of the month is that?"),
    "no_year": ("%B {d}", "Leave out the year: write month and day.", "On which month and day is that?"),
    "century": ("{c}", "In which century is that? Write it as 20th or 21st.", "Write the century of the date."),
}  # fmt: skip
_NAME_LIMIT = 24


def locale_tasks(seed: int, count: int) -> Iterator[Base]:
    maker, english = Maker("locale", ROLES, seed, count), Locale("en")
    for code, language in LANGUAGES.items():
        yield from names(maker, english, Locale(code), code, language)
    yield from codes(maker, english)
    for name, (form, *wordings) in DATES.items():
        yield maker.drawn(f"date_{name}", wordings, a_date, on_date(lambda d, f=form: dated(d, f)))
    for code in WRITTEN:
        language = LANGUAGES[code]
        wordings = (f"Write the date in {language}.", f"How is this date written in {language}?")
        yield maker.drawn(f"date_{code}", wordings, a_date, on_date(lambda d, c=code: format_date(d, "long", c)))
    wordings = ("Write the time with AM or PM.", "Turn the time of day into the twelve-hour clock.")
    yield maker.drawn("time_12", wordings, a_time, on_time)
    wordings = ("Write the number as in German.", "Use a decimal comma and dots between thousands.")
    yield maker.drawn("decimal_de", wordings, a_decimal, on_decimal)


def names(maker: Maker, english: Locale, local: Locale, code: str, language: str) -> Iterator[Base]:
    """English names of countries, languages, months and days in a language, and some of them back."""
    countries = [(english.territories[k], local.territories.get(k, "")) for k in country_codes(english)]
    countries = [(a, b) for a, b in countries if b and len(a) < _NAME_LIMIT]
    if code != "sv":
        wordings = (f"Write the name of the country in {language}.", f"What is this country called in {language}?")
        yield maker.table(f"country_{code}", wordings, countries)
    if code in BACK:
        wordings = (
            f"The country is named in {language}. Write its English name.",
            f"Translate the country name from {language} to English.",
        )
        yield maker.table(f"from_country_{code}", wordings, swapped(countries))
    languages = [(english.languages[k], local.languages.get(k, "")) for k in language_codes(english)]
    wordings = (f"Write the name of the language in {language}.", f"What is this language called in {language}?")
    yield maker.table(f"language_{code}", wordings, languages)
    wordings = (f"Write the day or month in {language}.", f"Translate the name of the day or month to {language}.")
    yield maker.table(f"calendar_{code}", wordings, calendar(english, local))


def codes(maker: Maker, english: Locale) -> Iterator[Base]:
    """Codes of countries, languages and currencies, and what they stand for."""
    countries = [(english.territories[k], k) for k in country_codes(english)]
    yield maker.table(
        "code", ("Write the two-letter code of the country.", "Which ISO code has this country?"), countries
    )
    wordings = ("Which country has this code?", "Name the country of the two-letter code.")
    yield maker.table("from_code", wordings, swapped(countries))
    currencies = [(k, name) for k, name in english.currencies.items() if len(name) < _NAME_LIMIT]
    wordings = ("Name the currency of this code.", "What does this currency code stand for?")
    yield maker.table("currency", wordings, currencies)
    wordings = ("Write the three-letter code of the currency.", "Which ISO code has this currency?")
    yield maker.table("currency_code", wordings, swapped(currencies))
    languages = [(english.languages[k], k) for k in language_codes(english)]
    wordings = ("Write the two-letter code of the language.", "Which ISO code has this language?")
    yield maker.table("language_code", wordings, languages)


def country_codes(english: Locale) -> list[str]:
    """Two letters each, without pseudo-codes and unions of countries."""
    two_letters = (k for k in map(str, english.territories) if len(k) == 2 and k.isalpha())
    return [k for k in two_letters if k not in ("ZZ", "XA", "XB", "EU", "EZ", "UN", "QO")]


def language_codes(english: Locale) -> list[str]:
    return [k for k in map(str, english.languages) if len(k) == 2]


def calendar(english: Locale, local: Locale) -> list[Pair]:
    months, days = (locale.months["stand-alone"]["wide"] for locale in (english, local)), (english.days, local.days)
    here, there = months
    weekdays = [(days[0]["format"]["wide"][i], days[1]["format"]["wide"][i]) for i in range(7)]
    return [(here[i], there[i]) for i in range(1, 13)] + weekdays


def swapped(pairs: Iterable[Pair]) -> list[Pair]:
    return [(b, a) for a, b in pairs]


def a_date(rng: Random) -> str:
    return datetime.date(rng.randint(1950, 2035), rng.randint(1, 12), rng.randint(1, 28)).isoformat()


def on_date(function: Callable[[datetime.date], str]) -> Callable[[str], str]:
    return lambda text: function(datetime.date.fromisoformat(text))


def dated(date: datetime.date, form: str) -> str:
    century = (date.year + 99) // 100
    return date.strftime(form).format(d=date.day, c=f"{century}{'st' if century == 21 else 'th'}")


def a_time(rng: Random) -> str:
    return datetime.time(rng.randint(0, 23), rng.randint(0, 59)).isoformat("minutes")


def on_time(text: str) -> str:
    time = datetime.time.fromisoformat(text)
    return f"{time.hour % 12 or 12}:{time.minute:02d} {'AM' if time.hour < 12 else 'PM'}"


def a_decimal(rng: Random) -> str:
    return f"{rng.randint(1000, 99999)}.{rng.randint(1, 9)}"


def on_decimal(text: str) -> str:
    return format_decimal(text, locale="de")
