"""Agent metrics against scores worked out by hand, and what holds of all outputs."""

import math
from dataclasses import astuple

import pytest
from helpers import raises
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gen_jax.data.pocket.agent import ROWS, agent_rows, toolsets
from lora_gen_jax.errors import DataError
from lora_gen_jax.lab.agent.scores import AgentScore, Call, compare, parse, summarize

ASK = "Thought: Do I need to use a tool?"
NO = f"{ASK} No\nAI: Hello there."


def call(action: str, inputs: str) -> str:
    return f"{ASK} Yes\nAction: {action}\nAction Input: {inputs}\nObservation:"


ONE = call("Add Text", "image/ab1.png, big red car")
DRAW, BLUR = call("Draw", "red fox"), call("Blur", "image/cd2.png")
TWO = f"{DRAW} image/cd2.png\n{BLUR}"
THREE_WORDS = call("Draw", "big red car")

PARSED = [
    (ONE, [Call("Yes", "Add Text", ("image/ab1.png", "big red car"), None)]),
    (NO, [Call("No", None, (), "Hello there.")]),
    (TWO, [Call("Yes", "Draw", ("red fox",), None), Call("Yes", "Blur", ("image/cd2.png",), None)]),
    # A full dialogue: what the tool wrote is skipped, even over several lines.
    (
        f"{ONE} image/x.png\nmore\n{NO}\nBye.\n",
        [Call("Yes", "Add Text", ("image/ab1.png", "big red car"), None), Call("No", None, (), "Hello there.\nBye.")],
    ),
    # Whitespace, Windows line ends, no Observation.
    (f"\r\n  {ASK}  Yes \r\n\tAction:Draw\r\nAction Input:  a ,b\r\n\r\n", [Call("Yes", "Draw", ("a", "b"), None)]),
    # Missing fields, alone and all together.
    (f"{ASK}", [Call("", None, (), None)]),
    ("Action: Draw", [Call(None, "Draw", (), None)]),
    ("Action Input: a", [Call(None, None, ("a",), None)]),
    ("AI:", [Call(None, None, (), "")]),
    ("Observation: 3", []),
    ("", []),
    ("Use Action: Draw, says AI: yes", []),
    ("Thought: Yes\naction: Draw", []),
    # Without its thought a second step begins where a field comes again.
    (
        f"{ASK} Yes\nAction: A\nAction Input: x\nAction: B\nAction Input: y, ",
        [Call("Yes", "A", ("x",), None), Call(None, "B", ("y", ""), None)],
    ),
    (f"{ASK} Yes\nAction: A\nAction Input:\nObservation: 1", [Call("Yes", "A", (), None)]),
    # An empty field does not take its value from the next line.
    ("Action:\nDraw", [Call(None, "", (), None)]),
]

# Made, gold, then the scores: thought, action, arguments, success, IoU.
CASES = {
    "equal": (ONE, ONE, 1, 1, 1, 1, 1),
    "equal, two steps": (TWO, TWO, 1, 1, 1, 1, 1),
    "equal, no tool": (NO, NO, 1, 1, 1, 1, 1),
    "another reply": (f"{ASK} No\nAI: Good bye.", NO, 1, 1, 1, 1, 1),
    # The thoughts Yes, No have one more entry than the actions.
    "surplus No": (f"{ONE} done\n{NO}", ONE, 1, 1, 1, 1, 1),
    "surplus No without AI": (f"{ONE}\n{ASK} No", ONE, 1, 1, 1, 1, 1),
    "gold ends with No": (ONE, f"{ONE} done\n{NO}", 1, 1, 1, 1, 1),
    "both end with No": (f"{ONE} done\n{NO}", f"{ONE} done\n{NO}", 1, 1, 1, 1, 1),
    # Thoughts Yes, No, No against one action: none is forgiven, 1/3. IoU: (1 + 1 + 1) / 3.
    "two surplus Nos": (f"{ONE}\n{NO}\n{NO}", ONE, 1 / 3, 1, 1, 0, 1),
    # Thoughts 1/2; one action.
    "surplus Yes": (f"{ONE}\n{ASK} Yes", ONE, 1 / 2, 1, 1, 0, 1),
    # Each list is (1, 0); IoU does not see the surplus: 3 / 3.
    "surplus call": (f"{ONE}\n{BLUR}", ONE, 1 / 2, 1 / 2, 1 / 2, 0, 1),
    # Only the thought is wrong. IoU: (0 + 1 + 1) / 3.
    "lower case thought": (ONE.replace("Yes", "yes"), ONE, 0, 1, 1, 0, 2 / 3),
    "thought with a full stop": (ONE.replace("Yes", "Yes."), ONE, 0, 1, 1, 0, 2 / 3),
    "lower case action": (ONE.replace("Add Text", "add text"), ONE, 1, 0, 1, 0, 2 / 3),
    "whitespace": (f"\n\n {ASK}   Yes  \n  Action:  Draw \n Action Input:red   fox \n\n", DRAW, 1, 1, 1, 1, 1),
    "wrong action, right arguments": (ONE.replace("Add Text", "Blur"), ONE, 1, 0, 1, 0, 2 / 3),
    # The flag of the only call is 0: below a half. IoU: (1 + 1 + 0) / 3.
    "too few arguments": (call("Add Text", "image/ab1.png"), ONE, 1, 1, 0, 0, 2 / 3),
    "too many arguments": (call("Add Text", "image/ab1.png, big red car, now"), ONE, 1, 1, 0, 0, 2 / 3),
    "comma within a text": (call("Add Text", "image/ab1.png, big, red car"), ONE, 1, 1, 0, 0, 2 / 3),
    "comma lost from a text": (call("Draw", "cat on a mat"), call("Draw", "cat, on a mat"), 1, 1, 0, 0, 2 / 3),
    # "[1" is right and "3]" wrong: (1 + 0) / 2, less what BLEU lacks of 1, is not enough. IoU: (1 + 1 + 1/2) / 3.
    "commas in brackets": (call("Crop", "[1, 3]"), call("Crop", "[1, 2]"), 1, 1, 1 / 2, 0, 5 / 6),
    "missing input": (f"{ASK} Yes\nAction: Add Text", ONE, 1, 1, 0, 0, 2 / 3),
    "no input on either side": (f"{ASK} Yes\nAction: Stop", call("Stop", ""), 1, 1, 1, 1, 1),
    "input where none is wanted": (call("Stop", "now"), call("Stop", ""), 1, 1, 0, 0, 2 / 3),
    "another png": (call("Blur", "other.png"), BLUR, 1, 1, 1, 1, 1),
    "png in words": (call("Blur", "the file other.png please"), BLUR, 1, 1, 1, 1, 1),
    "jpg for png": (call("Blur", "image/cd2.jpg"), BLUR, 1, 1, 0, 0, 2 / 3),
    # No word in common.
    "png for a text": (call("Draw", "fox.png"), DRAW, 1, 1, 0, 0, 2 / 3),
    # The right text cannot make up for the lost file: 0, not a half.
    "no png beside the right text": (call("Add Text", "image, big red car"), ONE, 1, 1, 0, 0, 2 / 3),
    # File 1, text 0: a half is enough. IoU: (1 + 1 + 1/2) / 3.
    "png with a wrong text": (call("Add Text", "image/ab1.png, blue"), ONE, 1, 1, 1 / 2, 1, 5 / 6),
    # BLEU-1: 2 of 3 words, as long as gold. IoU: (1 + 1 + 2/3) / 3 = 8/9.
    "two words of three": (call("Draw", "big blue car"), THREE_WORDS, 1, 1, 2 / 3, 1, 8 / 9),
    "one word of three": (call("Draw", "my blue car"), THREE_WORDS, 1, 1, 1 / 3, 0, 7 / 9),
    # (1/3 + 2/3) / 2 is a half, less what BLEU lacks. IoU: (1 + 1 + 1/2) / 3.
    "thirds": (call("Mix", "my blue car, my red car"), call("Mix", "big red car, big red car"), 1, 1, 1 / 2, 0, 5 / 6),
    "words in another order": (call("Draw", "car red big"), THREE_WORDS, 1, 1, 1, 1, 1),
    # All 2 words are right, but 3 are wanted: exp(1 - 3/2) = 0.6065; exp(1 - 3/1) = 0.1353.
    "a word too few": (call("Draw", "red car"), THREE_WORDS, 1, 1, math.exp(-1 / 2), 1, (2 + math.exp(-1 / 2)) / 3),
    "two words too few": (call("Draw", "car"), THREE_WORDS, 1, 1, math.exp(-2), 0, (2 + math.exp(-2)) / 3),
    # "a" counts once: 1 of 2 words, as long as gold. Just not enough. IoU: (1 + 1 + 1/2) / 3.
    "a word twice": (call("Draw", "a a"), call("Draw", "a cat"), 1, 1, 1 / 2, 0, 5 / 6),
    # 3 of 6 words; a longer text has no other penalty.
    "words added": (call("Draw", "please draw a big red car"), THREE_WORDS, 1, 1, 1 / 2, 0, 5 / 6),
    # 4 of 6 words.
    "two words added": (call("Draw", "draw a big red car now"), call("Draw", "a big red car"), 1, 1, 2 / 3, 1, 8 / 9),
    # "Red" is not "red": 2 of 3.
    "case in a text": (call("Draw", "big Red car"), THREE_WORDS, 1, 1, 2 / 3, 1, 8 / 9),
    # Each list is (1, 0). IoU: 3 / 6.
    "first step of two": (DRAW, TWO, 1 / 2, 1 / 2, 1 / 2, 0, 1 / 2),
    # The last No is forgiven, the missing step is not: the same.
    "first step of two, then No": (f"{DRAW}\n{NO}", TWO, 1 / 2, 1 / 2, 1 / 2, 0, 1 / 2),
    # Thoughts 1, 1; actions 0, 0; arguments: image for "red fox" 0, "red fox" for an image 0. IoU: 2 / 6.
    "steps in the wrong order": (f"{BLUR}\n{DRAW}", TWO, 1, 0, 0, 0, 1 / 3),
    # Actions 1, 0. IoU: (2 + 1 + 2) / 6.
    "second action wrong": (TWO.replace("Blur", "Crop"), TWO, 1, 1 / 2, 1, 0, 5 / 6),
    # Arguments 1, 0, the 1 a text's: not enough over calls either. IoU: (2 + 2 + 1) / 6.
    "second arguments wrong": (f"{DRAW}\n{call('Blur', 'fox')}", TWO, 1, 1, 1 / 2, 0, 5 / 6),
    # Arguments 0, 1, the 1 a file's: a half.
    "first arguments wrong": (TWO.replace("Input: red fox", "Input: red, fox"), TWO, 1, 1, 1 / 2, 1, 5 / 6),
    # The second thought alone is missing: (1, 0). IoU: (1 + 2 + 2) / 6.
    "second thought missing": (TWO.replace(f"\n{ASK} Yes\nAction: Blur", "\nAction: Blur"), TWO, 1 / 2, 1, 1, 0, 5 / 6),
    # The second action stays second: actions 0, 1. IoU: (2 + 1 + 2) / 6.
    "first action missing": (TWO.replace("Action: Draw\n", ""), TWO, 1, 1 / 2, 1, 0, 5 / 6),
    "no tool where one is needed": (NO, ONE, 0, 0, 0, 0, 0),
    "No before the right call": (ONE.replace("Yes", "No"), ONE, 0, 1, 1, 0, 2 / 3),
    "a tool where none is needed": (ONE, NO, 0, 0, 0, 0, 0),
    # All four are 0; IoU is that of the thought.
    "No without AI": (f"{ASK} No\nHello there.", NO, 0, 0, 0, 0, 1),
    "No with an empty AI": (f"{ASK} No\nAI:", NO, 1, 1, 1, 1, 1),
    "AI within a line": (f"{ASK} No\nI am the AI: hello.", NO, 0, 0, 0, 0, 1),
    "AI without No": ("AI: Hello there.", NO, 0, 0, 0, 0, 0),
    "AI before No": (f"AI: Hello there.\n{ASK} No", NO, 0, 0, 0, 0, 0),
    "Yes and AI": (f"{ASK} Yes\nAI: Hello there.", NO, 0, 0, 0, 0, 0),
    "No, then a call": (f"{NO}\n{ONE}", NO, 0, 0, 0, 0, 1),
    "No twice": (f"{NO}\n{NO}", NO, 0, 0, 0, 0, 1),
    "lower case no": (NO.replace("No", "no"), NO, 0, 0, 0, 0, 0),
    "nothing, for a call": ("", ONE, 0, 0, 0, 0, 0),
    "nothing, for no tool": (" \n", NO, 0, 0, 0, 0, 0),
    "garbage, for a call": ("Yes Yes Action Draw ,,, .png \x00 😀", ONE, 0, 0, 0, 0, 0),
    "garbage, for no tool": ("No. AI says: Thought: none", NO, 0, 0, 0, 0, 0),
    # "Yes Action: Add Text ..." is no Yes, and there is nothing else.
    "all in one line": (ONE.replace("\n", " "), ONE, 0, 0, 0, 0, 0),
}

_GOLD = [
    row["output"] for each in (*toolsets(True), *toolsets(False)) for split in ROWS for row in agent_rows(each, split)
]
_PERFECT = AgentScore(1, 1, 1, 1, 1)
# What BLEU lacks of 1 for a text of a single word: 1e-9 of its precision and as much of its length (`published_bleu`).
LACKS = 2.1e-9
# Outputs with some structure: lines of fields, of values and of noise, in any order.
_LINES = st.one_of(
    st.sampled_from([f"{ASK} Yes", f"{ASK} No", "Action: Draw", "Action: Blur", "Observation:", "AI: Hello", ASK]),
    st.text("ab ,.png", max_size=12).map(lambda text: f"Action Input: {text}"),
    st.text(max_size=12),
)
_OUTPUTS = st.lists(_LINES, max_size=12).map("\n".join)


@pytest.mark.parametrize(("text", "steps"), PARSED)
def test_parse(text: str, steps: list[Call]) -> None:
    assert parse(text) == steps


@pytest.mark.parametrize(
    ("made", "gold", "thought", "action", "arguments", "success", "iou"), CASES.values(), ids=CASES
)
def test_compare(made: str, gold: str, thought: float, action: float, arguments: float, success: int, iou: float):
    expected = (thought, action, arguments, success, iou)
    score = compare(made, gold)
    assert astuple(score) == pytest.approx(expected, rel=0, abs=LACKS)
    assert score.success == success


def perfect(score: AgentScore) -> bool:
    """Whether nothing is wrong; texts are equal to within what BLEU lacks of 1."""
    return (score.thought, score.action, score.success) == (1, 1, 1) and min(score.arguments, score.iou) >= 1 - LACKS


def published_bleu(made: str, wanted: str) -> float:
    """BLEU-1 of one text as pycocoevalcap's `BleuScorer.compute_score` has it, word by word."""
    words, right, correct, tiny, small = made.split(), wanted.split(), 0, 1e-15, 1e-9
    left = list(right)
    for word in words:
        if word in left:
            left.remove(word)
            correct += 1
    bleu = (float(correct) + tiny) / (float(len(words)) + small)
    ratio = (len(words) + tiny) / (len(right) + small)
    return bleu * math.exp(1 - 1 / ratio) if ratio < 1 else bleu


_TEXTS = st.lists(st.sampled_from(["red", "fox", "a", "big", "Red"]), min_size=1, max_size=6).map(" ".join)


@settings(deadline=None, max_examples=200)
@given(made=_TEXTS, wanted=_TEXTS)
def test_texts_have_the_published_bleu_to_the_bit(made: str, wanted: str) -> None:
    assert compare(call("Draw", made), call("Draw", wanted)).arguments == published_bleu(made, wanted)


def test_exactly_one_half_is_what_files_reach_and_texts_do_not() -> None:
    """Published: arguments < 0.5 fail. A text that is right gives less than 1, a file 1."""
    assert published_bleu("red fox on a", "red fox on a") == pytest.approx(1 - 5e-10, rel=0, abs=1e-15)
    for right, success in (("red fox on a", 0), ("image/ab1.png", 1)):
        gold = call("Mix", f"{right}, cat")
        score = compare(call("Mix", f"{right}, dog"), gold)
        mean = (1.0 if ".png" in right else published_bleu(right, right)) + published_bleu("dog", "cat")
        assert (score.arguments, score.success) == (mean / 2, success)
        assert success == (mean / 2 >= 0.5)


@pytest.mark.parametrize(
    "gold",
    ["", "Hello.", f"{ASK} No", "AI: Hello.", f"{ASK} Yes\nAI: Hello.", "Action: Draw", f"{ONE}\n{NO}\nAction: Draw"],
)
def test_gold_that_cannot_be_scored(gold: str) -> None:
    with raises(DataError, "gold_text", repr(gold)):
        compare(NO, gold)


def test_summarize() -> None:
    scores = [AgentScore(1, 1, 1, 1, 1), AgentScore(0.5, 1, 0.25, 0, 0.75), AgentScore(0, 0, 0, 0, 0), _PERFECT]
    # The successes 1, 0, 0, 1 deviate by a half each: variance 4 * 0.25 / 3 = 1/3, error sqrt(1/3) / sqrt(4).
    expected = {
        "sr_t": 2.5 / 4,
        "sr_act": 3 / 4,
        "sr_args": 2.25 / 4,
        "sr": 2 / 4,
        "iou": 2.75 / 4,
        # 2.5 + 3 + 2.25 + 2 + 2.75 = 12.5, over 4 rows and 5 metrics.
        "average": 12.5 / 20,
        "stderr": math.sqrt(1 / 3) / 2,
        "n": 4,
    }
    assert summarize(scores) == pytest.approx(expected)
    means = dict.fromkeys(["sr_t", "sr_act", "sr_args", "sr", "iou", "average"], 1)
    assert summarize([_PERFECT]) == means | {"stderr": 0, "n": 1}
    with raises(DataError, "scores"):
        summarize([])


def test_embedded_gold_against_itself() -> None:
    assert len(_GOLD) == 75 * sum(ROWS.values())
    for gold in _GOLD:
        assert perfect(compare(gold, gold))
        # What follows when generation goes on past the call.
        if "Action:" in gold:
            assert perfect(compare(f"{gold} done\n{NO}", gold))


@settings(deadline=None, max_examples=300)
@given(made=_OUTPUTS, gold=st.sampled_from([*_GOLD[:10], ONE, TWO, NO, call("Draw", "")]))
def test_scores_are_fractions(made: str, gold: str) -> None:
    score = compare(made, gold)
    assert all(0 <= value <= 1 for value in astuple(score))
    assert score.success in (0, 1)
    assert not score.success or (score.thought == score.action == 1 and score.arguments >= 0.5)
    assert score.success or score.arguments < 0.5 or min(score.thought, score.action) < 1


_WORD = st.text("abcdeXYZ019", min_size=1, max_size=6)
_INPUTS = st.lists(st.one_of(st.lists(_WORD, min_size=1, max_size=4).map(" ".join), _WORD.map(lambda w: f"{w}.png")))


@settings(deadline=None, max_examples=100)
@given(steps=st.lists(st.tuples(_WORD, _INPUTS), min_size=1, max_size=4), files=st.sampled_from([".png", "2.png"]))
def test_any_calls_against_themselves(steps: list[tuple[str, list[str]]], files: str) -> None:
    gold = "\n".join(call(action, ", ".join(inputs)) for action, inputs in steps)
    assert perfect(compare(gold, gold))
    assert [(step.action, list(step.arguments)) for step in parse(gold)] == steps
    # Other files do as well.
    assert perfect(compare(gold.replace(".png", files), gold))
    # Every call that is left out costs as much in all lists.
    score = compare("\n".join(gold.split("\n")[: 4 * (len(steps) - 1)]), gold)
    expected = (*[1 - 1 / len(steps)] * 3, 0, 1 - 1 / len(steps))
    assert astuple(score) == pytest.approx(expected, rel=0, abs=LACKS)
