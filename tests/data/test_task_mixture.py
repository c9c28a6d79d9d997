"""scripts/task_mixture.py: several hundred short tasks as rows, and tasks that are kept for measuring."""

import contextlib
import importlib
import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import unsaid

import lora_gen_jax
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.prompts import separator
from lora_gen_jax.data.records import load_records
from lora_gen_jax.decoder.pretrained import load_tokenizer
from lora_gen_jax.errors import DataError

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = [
    "apple",
    "brick",
    "candle",
    "dragon",
    "eagle",
    "forest",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "lemon",
]
WORDS += ["mirror", "needle", "orange", "pencil"]
# Neither their lengths nor their letters go with the alphabet.
LISTED = [
    "ant",
    "bridge",
    "cup",
    "daughter",
    "elk",
    "fireplace",
    "gem",
    "hill",
    "iron",
    "joy",
    "kitchen",
    "lamp",
    "moon",
]
LISTED += [
    "notebook",
    "oak",
    "pie",
    "quilt",
    "river",
    "sun",
    "telescope",
    "urn",
    "vase",
    "wolf",
    "xylem",
    "yard",
    "zoo",
]
GENERATED = {"words", "lists", "compositions", "numbers", "locale", "grammar", "texts", "tools"}


def write_task(folder, name, pairs, descriptions=("do it", "How is it done?"), **fields):
    folder.mkdir(exist_ok=True)
    cut = len(pairs) * 3 // 4
    task = {"name": name, "source": "made up", "license": "CC0-1.0", "descriptions": descriptions}
    task |= {"train": pairs[:cut], "test": pairs[cut:]} | fields
    (folder / f"{name.replace('/', '__')}.json").write_text(json.dumps(task))


def lists(size, answer, count=60):
    rng = random.Random(size)
    chosen = [rng.sample(LISTED, size) for _ in range(count)]
    return [(", ".join(words), answer(words)) for words in chosen]


@pytest.fixture(scope="module")
def modules():
    """The script and its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        names = ("base", "files", "forms", "locales", "numbers", "overlap", "texts", "tools")
        parts = {name: importlib.import_module(f"mixture.{name}") for name in names}
        yield SimpleNamespace(script=importlib.import_module("task_mixture"), **parts)


@pytest.fixture(scope="module")
def write(modules):
    """Runs the script as the command line does; returns what it prints."""

    def call(out, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["task_mixture.py", "--out", str(out), "--rows", "16", *map(str, arguments)])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                modules.script.main()
        return printed.getvalue()

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory, write):
    """A mixture with one task file to train on, another to measure, and its twin among those to train on."""
    root = tmp_path_factory.mktemp("mixture")
    backwards, rows = [(w, w[::-1]) for w in WORDS], [(f"{w} tea", f"hot {w}") for w in WORDS]
    write_task(root / "seen", "toy/tea", rows)
    write_task(root / "seen", "toy/warm", [(text, f"{answer}\nserved long after dinner") for text, answer in rows])
    write_task(root / "unseen", "kept/backwards", backwards)
    write_task(root / "unseen", "kept/cold", [(text, answer.replace("hot", "cold")) for text, answer in rows])
    write_task(root / "seen", "toy/cold", [(text, answer.replace("hot", "cold")) for text, answer in rows])
    write_task(root / "unseen", "kept/triple", [(str(n), str(3 * n)) for n in range(500, 540)])
    printed = write(root / "out", "--tasks", root / "seen", "--evaluate", root / "unseen")
    return SimpleNamespace(root=root, out=root / "out", seen=root / "seen", unseen=root / "unseen", printed=printed)


@pytest.fixture(scope="module")
def rows(made):
    files = sorted((made.out).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tasks(modules):
    """The generated tasks by name."""
    return {task.name: task for task in modules.script.generated(seed=1, count=40)}


def test_one_file_a_group_that_loads(made):
    files = {path.stem for path in (made.out).glob("*.jsonl")}
    assert files == GENERATED | {"toy"}
    tasks = load_records(made.out)  # with LICENSES.json beside the rows
    assert {task.source for task in tasks} == files
    bases = {task.name.split("+")[0] for task in tasks}
    assert len(bases) > 450
    assert all(len(task.train) >= 6 for task in tasks)
    # Many wordings, of which training draws one a prompt.
    assert all(len(task.descriptions) >= 4 for task in tasks if task.source in GENERATED)


ANSWERS = {
    "words/hyphens": ("garden", "g-a-r-d-e-n"),
    "words/consonants": ("orange", "rng"),
    "words/masked": ("orange", "*r*ng*"),
    "words/half": ("needle", "second"),
    "lists/longest_3": ("pear, banana, fig", "banana"),
    "lists/shortest_4": ("pear, banana, fig, plum", "fig"),
    "lists/second_4": ("pear, banana, fig, plum", "banana"),
    "lists/with_vowel_3": ("pear, apple, fig", "apple"),
    "lists/sort_length_3": ("pear, banana, fig", "fig, pear, banana"),
    "lists/camel_3": ("pear, banana, fig", "pearBananaFig"),
    "lists/count_with_a_any": ("pear, banana, fig", "2"),
    "lists/keep_long_any": ("pear, fig, plum", "none"),
    "lists/in_order_3": ("banana, fig, pear", "yes"),
    "numbers/plus_10": ("95", "105"),
    "numbers/roman": ("49", "XLIX"),
    "numbers/clock": ("605", "10:05"),
    "numbers/series": ("4 7", "10"),
    "numbers/compare": ("9 12", "<"),
    "numbers/words_sv": ("21", "tjugoett"),
    "locale/date_us": ("2021-03-05", "03/05/2021"),
    "locale/date_british": ("2021-03-05", "5 March 2021"),
    "locale/date_century": ("2000-03-05", "20th"),
    "locale/date_de": ("2021-03-05", "5. März 2021"),
    "locale/time_12": ("13:05", "1:05 PM"),
    "locale/decimal_de": ("1234.5", "1.234,5"),
    "grammar/verb_is_she": ("run", "Is she running?"),
    "grammar/verb_third": ("carry", "carries"),
    "grammar/adjective_comparative": ("big", "bigger"),
    "grammar/noun_article": ("hour", "an hour"),
    "grammar/noun_two": ("child", "two children"),
}
PAIRS = {
    "country_de": ("Germany", "Deutschland"),
    "from_country_de": ("Deutschland", "Germany"),
    "language_de": ("Swedish", "Schwedisch"),
    "calendar_de": ("March", "März"),
    "code": ("Kenya", "KE"),
    "from_code": ("KE", "Kenya"),
    "currency": ("CHF", "Swiss Franc"),
    "language_code": ("Basque", "eu"),
}


def test_answers_are_right(modules, tasks):
    answers = {name: tasks[name].answer(text) for name, (text, _) in ANSWERS.items()}
    assert answers == {name: answer for name, (_, answer) in ANSWERS.items()}
    for task in tasks.values():
        assert task.answer is None or all(task.answer(text) == answer for text, answer in task.pairs)
    maker, english = modules.base.Maker("locale", ("somebody",), 0, 10**6), modules.locales.Locale("en")
    german = modules.locales.names(maker, english, modules.locales.Locale("de"), "de", "German")
    tables = {
        task.name.removeprefix("locale/"): dict(task.pairs)
        for task in (*german, *modules.locales.codes(maker, english))
    }
    assert {name: tables[name][text] for name, (text, _) in PAIRS.items()} == {n: a for n, (_, a) in PAIRS.items()}
    roman, written = modules.numbers.roman, modules.numbers.num2words
    assert all(text == roman(int(answer)) for text, answer in tasks["numbers/from_roman"].pairs)
    assert all(text == written(int(answer)) for text, answer in tasks["numbers/from_words"].pairs)


def test_a_composition_chooses_and_changes(tasks):
    composed = [task for task in tasks.values() if task.group == "compositions"]
    assert len(composed) == 160 + 50
    by_change = {task.name.split("/")[1]: task for task in composed}
    found = next(task for name, task in by_change.items() if name.startswith("longest_") and name.endswith("_3"))
    change = found.name.removeprefix("compositions/longest_").removesuffix("_3")
    assert found.answer("pear, banana, fig") == tasks[f"words/{change}"].answer("banana")
    with pytest.raises(ValueError, match="not a list"):
        found.answer("pear, banana")


def test_two_changes_of_a_word(modules, tasks):
    chained = [task for task in tasks.values() if "_then_" in task.name]
    for task in chained:
        first, then = task.name.removeprefix("compositions/").split("_then_")
        text, answer = task.pairs[0]
        between = tasks[f"words/{first}"].answer(text)
        assert answer == tasks[f"words/{then}"].answer(between)
        # The first change is needed for at least one of the answers.
        assert any(answer != tasks[f"words/{then}"].answer(text) for text, answer in task.pairs)


def test_messages_are_asked_about(modules, tasks):
    sentences = ["Rosa has a ticket to Oslo.", "Please hurry."]
    message = modules.texts.Message(
        " ".join(sentences), sentences, "trip", "Rosa", "Oslo", "Sunday", 30, "kites", True, False
    )
    expected = {
        "name": "Rosa",
        "kind": "trip",
        "urgent": "yes",
        "thanks": "no",
        "weekend": "yes",
        "many": "yes",
        "sentences": "2",
        "second": "Please hurry.",
        "short_day": "Sun",
        "subject": "Trip: 30 kites",
        "record": '{"name": "Rosa", "city": "Oslo"}',
        "next_day": "Monday",
        "doubled": "60",
    }
    assert {name: modules.texts.TASKS[name][0](message) for name in expected} == expected
    for name in ("name", "city", "day", "number", "things", "first", "second"):
        assert all(answer in text for text, answer in tasks[f"texts/{name}"].pairs)
    counts = {answer for _, answer in tasks["texts/sentences"].pairs}
    assert all(text.count(".") == int(answer) for text, answer in tasks["texts/sentences"].pairs)
    assert len(counts) >= 3


def test_tools_are_in_the_list_and_arguments_in_the_request(tasks):
    sets = [task for task in tasks.values() if task.group == "tools"]
    assert len(sets) == 60
    kinds = set()
    for task in sets:
        for request, answer in task.pairs:
            kind = "json" if answer[0] == "{" else "call" if answer.endswith('")') else "name"
            if answer == "none":
                assert all("If no tool fits, reply none." in wording for wording in task.wordings)
                kinds.add("none")
                continue
            kinds.add(kind)
            if kind == "json":
                name, value = json.loads(answer).values()
            elif kind == "call":
                name, value = answer[:-2].split("(")[0], answer[:-2].split('="')[1]
            else:
                name, value = answer, ""
            assert all(name in wording for wording in task.wordings)
            assert value in request
        # The same list in several forms.
        assert len(task.wordings) >= 6
    assert kinds == {"name", "call", "json", "none"}


def test_an_answer_follows_its_query_as_in_training(rows):
    """No separator comes between them, and a query without its trailing whitespace has the same tokens."""
    folder = Path(lora_gen_jax.__file__).parent / "pocket" / "edge"
    encoder = Encoder(load_tokenizer(str(folder)), 2048)
    for row in random.Random(0).sample(rows, 300):
        query, answer = row["input"], row["output"]
        assert query == query.rstrip()
        assert answer[0].isspace()
        assert not separator(query, answer)
        start, rest = encoder.pair(query, answer)
        assert start == encoder.text(query)
        assert start + rest == encoder.text(query + answer)


def test_layouts(modules, rows):
    layouts = modules.forms.LAYOUTS
    assert len(layouts) == 12
    assert not any(row["input"].startswith("Problem: ") for row in rows)

    # "line" and "colon" fit almost any text, so they come last.
    order = sorted(layouts, key=lambda name: -len(layouts[name].query))

    def kinds(task):
        texts = [row["input"] for row in rows if row["task"] == task]
        return {next(name for name in order if matches(layouts[name].query, text)) for text in texts}

    found = [kinds(task) for task in sorted({row["task"] for row in rows if row["task"].startswith("words/")})]
    alone = sum(len(kind) == 1 for kind in found) / len(found)
    assert 0.3 < alone < 0.7
    assert set().union(*found) == set(layouts)


def matches(form, text):
    head, tail = form.split("{}")
    return text.startswith(head) and text.endswith(tail)


def test_answer_formats(modules, rows):
    by_task = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    formats = modules.forms.FORMATS
    assert {task.split("+")[1] for task in by_task if "+" in task} == set(formats)
    for task, members in by_task.items():
        base, _, name = task.partition("+")
        if name == "json":
            answers = [row["output"].strip().removesuffix("</output>") for row in members]
            assert all(json.loads(answer).keys() == {"answer"} for answer in answers)
        if name:
            assert all(any(row["system"].endswith(ask) for ask in formats[name].requests) for row in members)
            plain = {row["system"] for row in by_task[base]}
            assert any(members[0]["system"].startswith(wording) for wording in plain)
    assert sum(task.startswith("toy/tea+") for task in by_task) == 2
    # Long answers stay as they are.
    assert not any(task.startswith("toy/warm+") for task in by_task)


def test_a_format_is_left_out_where_it_would_not_be_clear(modules):
    def suitable(*answers):
        pairs = tuple((str(i), answer) for i, answer in enumerate(answers))
        return set(modules.forms.suitable_formats(modules.base.Base("a/b", ("c",), pairs)))

    every = set(modules.forms.FORMATS)
    assert suitable("red", "blue") == every
    assert suitable("RED", "12", "blue") == every - {"upper"}
    assert suitable("Stop!", "go") == every - {"period", "sentence"}
    assert suitable('a "b"', "[c]", "(d)", "<e>", "*f*") == every - {
        "json",
        "quotes",
        "brackets",
        "parentheses",
        "angles",
        "stars",
    }
    assert suitable("word " * 9 + "end", "go") == every
    assert not suitable("word " * 12)


def test_short_layouts_are_left_out_for_long_inputs(modules):
    def inputs(text):
        base = modules.base.Base("a/b", ("c",), ((text, "d"),))
        return {
            name for name, layout in modules.forms.LAYOUTS.items() if layout in modules.forms.suitable_layouts(base)
        }

    assert len(inputs("short")) == 12
    assert inputs("short") - inputs("two\nlines") == {"arrow", "colon", "equals", "xy"}
    assert inputs("x" * 61) == inputs("two\nlines")


def test_evaluation_rows(made):
    tasks = {task.name: task for task in load_records(made.out / "evaluate")}
    assert set(tasks) == {
        f"kept/{name}@{layout}" for name in ("backwards", "cold", "triple") for layout in ("qa", "held_out")
    }
    held_out, qa = tasks["kept/cold@held_out"], tasks["kept/cold@qa"]
    assert (len(qa.train), len(qa.validation), len(qa.test)) == (12, 0, 4)
    assert qa.descriptions == ("do it", "How is it done?")
    assert (qa.test[0].query, qa.test[0].response) == (f"Q: {WORDS[12]} tea\nA:", f" cold {WORDS[12]}")
    assert held_out.test[0].query == f"Problem: {WORDS[12]} tea\nSolution:"


def test_twins_of_evaluated_tasks_are_left_out(made, rows):
    tasks = {row["task"].split("+")[0] for row in rows}
    assert {"words/copy", "numbers/times_2", "toy/tea", "toy/warm"} <= tasks
    assert not {"words/backwards", "numbers/times_3", "toy/cold"} & tasks
    lines = [line for line in made.printed.splitlines() if line.startswith("left out")]
    # Generated tasks by their functions, on inputs that none of their own pairs has; a file's task by its pairs.
    assert sorted(lines) == [
        f"left out: {ours} answers as kept/{theirs} does ({n} of {n} inputs that both know), which is evaluated"
        for ours, theirs, n in (
            ("numbers/times_3", "triple", 40),
            ("toy/cold", "cold", 12),
            ("words/backwards", "backwards", 16),
        )
    ]


KEPT = {
    "last_of_3": lists(3, lambda words: words[-1]),
    "last_of_5": lists(5, lambda words: words[-1]),
    "alphabetically_last_3": lists(3, max),
    "alphabetically_last_5": lists(5, max),
    "second_letter": [(word, word[1]) for word in WORDS],
    "last_letter": [(word, word[-1]) for word in WORDS],
    "last_letter_of_capitals": [(word.upper(), word[-1]) for word in WORDS],
    "previous": [(str(n), str(n - 1)) for n in range(20, 60)],
    "superlative": [
        ("wide", "widest"),
        ("small", "smallest"),
        ("cold", "coldest"),
        ("rich", "richest"),
        ("new", "newest"),
    ],
    "past": [("walk", "walked"), ("go", "went"), ("take", "took"), ("play", "played"), ("call", "called")],
    "italian": [("3", "tre"), ("16", "sedici"), ("40", "quaranta"), ("100", "cento"), ("8", "otto"), ("21", "ventuno")],
    "spanish": [
        ("March", "marzo"),
        ("Monday", "lunes"),
        ("German", "alemán"),
        ("Latin", "latín"),
        ("French", "francés"),
    ],
    "swedish": [("Germany", "Tyskland"), ("France", "Frankrike"), ("Greece", "Grekland"), ("Spain", "Spanien")],
}


def test_nothing_that_is_kept_for_evaluation_is_generated(modules, tasks):
    for name, pairs in KEPT.items():
        kept = [modules.files.TaskFile(f"kept/{name}", ("a",), tuple(pairs), (), "b", "c")]
        assert not [task.name for task in tasks.values() if modules.overlap.twin(task, kept)], name
    # The check sees what is there.
    there = [modules.files.TaskFile("kept/third", ("a",), tuple((w, w[2]) for w in WORDS), (), "b", "c")]
    assert [task.name for task in tasks.values() if modules.overlap.twin(task, there)] == ["words/third"]


def test_kappa(modules):
    kappa = modules.overlap.kappa
    assert kappa([("a", "a"), ("b", "b")]) == 1
    # By hand: 3 of 4 agree; by chance (3·2 + 1·2) / 16 = 1/2.
    assert kappa([("a", "a"), ("a", "a"), ("a", "b"), ("b", "b")]) == pytest.approx(0.5)
    assert kappa([("yes", "yes")] * 9) == 0  # both always say yes, which shows nothing


def test_licenses_name_every_group(made):
    found = json.loads((made.out / "LICENSES.json").read_text())
    assert set(found) == GENERATED | {"toy", "kept"}
    assert found["toy"] == [{"source": "made up", "license": "CC0-1.0"}]
    assert {entry["source"] for entry in found["grammar"]} == {"wordfreq", "lemminflect", "inflect"}
    assert all(entry["license"] for entries in found.values() for entry in entries)
    assert all(entry["version"] for group in GENERATED for entry in found[group])


def test_the_same_seed_writes_the_same_and_a_further_task_moves_no_other(made, write, tmp_path):
    def texts(folder):
        return {path.name: path.read_text() for path in folder.glob("*.jsonl")}

    write(tmp_path / "same", "--tasks", made.seen, "--evaluate", made.unseen)
    assert texts(tmp_path / "same") == texts(made.out)
    write(tmp_path / "alone", "--evaluate", made.unseen)
    assert texts(tmp_path / "alone") == {name: text for name, text in texts(made.out).items() if name != "toy.jsonl"}
    write(tmp_path / "other", "--seed", "1", "--evaluate", made.unseen)
    assert all(text != texts(made.out)[name] for name, text in texts(tmp_path / "other").items())


def ended(field, fact, call):
    """The call ends in one line about this field that says the fact."""
    with pytest.raises(SystemExit) as stop:
        call()
    error = stop.value.__context__
    assert isinstance(error, DataError)
    assert (error.field, str(stop.value)) == (field, f"error: {error}")
    assert unsaid(str(error), [fact]) == []


@pytest.mark.parametrize(
    ("fields", "field", "fact"),
    [
        ({"descriptions": []}, "toy__x.json:descriptions", "toy__x.json"),
        ({"name": "alone"}, "toy__x.json:name", "toy__x.json"),
        ({"train": [["a"]]}, "toy__x.json", "toy__x.json"),
        ({"source": None}, "toy__x.json:source", "toy__x.json"),
        ({"name": "words/copy"}, "name", "'words/copy'"),
    ],
)
def test_a_malformed_task_file_is_named(write, tmp_path, fields, field, fact):
    write_task(tmp_path / "tasks", "toy/x", [(w, w.upper()) for w in WORDS])
    path = tmp_path / "tasks" / "toy__x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    ended(field, fact, lambda: write(tmp_path / "out", "--tasks", tmp_path / "tasks"))


def test_bad_flags_say_what_to_do(write, tmp_path):
    ended("--rows", 12, lambda: write(tmp_path / "out", "--rows", "5"))
    ended("--tasks", tmp_path, lambda: write(tmp_path / "out", "--tasks", tmp_path))
