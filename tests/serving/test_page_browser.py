"""The playground in a real browser, without a window: it specializes, answers, is corrected, and says what is wrong.

Chromium from the distribution's packages (`apt-get install chromium chromium-driver`), or Chrome with its driver; the
server is the command itself, with the shipped pair.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import httpx
import pytest
from before_jax import COMPILE_QUICKLY
from serving_tools import KEY

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    _BROWSER is None or _DRIVER is None,
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)

pytest.importorskip("selenium", reason="needs selenium: pip install -e '.[test]'")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

PROMPT = "Tell me what a baby of this animal is called and put it in square brackets."
SECONDS = 150  # refining compiles first, beside whatever else the machine does


def wait_until(true):
    """Looks ten times a second: a look at a browser costs more than one at a variable."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


class Command:
    """`lora-gen serve` on one port, again and again."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        flags = ["--checkpoint", "quickstart", "--port", str(self.port), "--rows", "4", "--no-warm-up"]
        command = [sys.executable, "-m", "lora_gen_jax", "serve", *flags, "--shutdown-timeout", "5"]
        environment = {**os.environ, "LORA_GEN_API_KEY": KEY, **COMPILE_QUICKLY}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        assert "serving" in self.process.stdout.readline()

    def stop(self):
        assert self.process is not None
        self.process.terminate()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def command():
    command = Command()
    command.start()
    yield command
    assert command.process is not None
    command.process.kill()
    command.process.communicate()


class Page:
    """The page, as its tests look at it."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def find(self, name):
        return self.browser.find_element(By.ID, name)

    def text(self, name):
        return self.find(name).text

    def press(self, name):
        self.find(name).click()

    def type(self, name, text):
        self.find(name).clear()
        self.find(name).send_keys(text)

    def wait_for(self, name, pattern):
        try:
            wait_until(lambda: re.search(pattern, self.text(name)))
        except AssertionError:
            raise AssertionError(f"{name} says {self.text(name)!r}, not {pattern!r}") from None
        return self.text(name)

    def ask(self, question):
        """The three answers."""
        self.type("question", question + Keys.ENTER)
        wait_until(lambda: self.find("ask-button").get_attribute("aria-disabled") is None)
        assert self.text("ask-note") == ""
        return [self.text(f"{column}-answer") for column in ("base", "prompted", "special")]

    @property
    def names(self):
        # At once: the page may draw its list anew between two looks at it.
        return self.browser.execute_script(
            "return [...document.getElementsByName('specialization')].map((x) => x.value)"
        )

    @property
    def pictures(self):
        return self.browser.find_elements(By.TAG_NAME, "canvas")


@pytest.fixture(scope="module")
def page(command):
    options = ChromeOptions()
    options.binary_location = _BROWSER or ""
    own = "--no-first-run --disable-background-networking --disable-component-update --disable-sync"
    for flag in f"--headless=new --no-sandbox --disable-dev-shm-usage --window-size=1280,1000 {own}".split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})  # pyright: ignore
    browser = Chrome(options, Service(_DRIVER))
    browser.get(command.url)
    yield Page(browser, command.url)
    browser.quit()


def test_a_key_is_asked_for_and_a_wrong_one_is_told_in_words(page):
    wait_until(lambda: page.find("key-dialog").is_displayed())
    assert page.text("key-note") == "This server answers only with its API key."
    page.type("key", "wrong" + Keys.ENTER)
    page.wait_for("key-note", "refused this key")
    page.type("key", "two words" + Keys.ENTER)
    page.wait_for("key-note", "no spaces")
    page.type("key", KEY + Keys.ENTER)
    wait_until(lambda: not page.find("key-dialog").is_displayed())
    page.wait_for("edge", "edge model pocket-edge")
    assert page.text("connection") == "connected"
    assert page.text("ask-note") == ""


def test_it_specializes_and_answers_with_the_keyboard_alone(page):
    page.type("prompt", PROMPT)
    page.type("name", "young")
    page.find("prompt").send_keys(Keys.CONTROL + Keys.ENTER)
    page.wait_for("teach-note", "“young”: read 19 tokens. It took .* m?s")
    base, prompted, special = page.ask("owl")
    assert (prompted, special) == ("[owlet]", "[owlet]")
    assert base not in ("", special)
    assert [page.text(f"{column}-read") for column in ("base", "prompted", "special")] == ["2", "21", "2"]
    for column in ("base", "prompted", "special"):
        for measure in ("first", "total"):
            assert re.fullmatch(r"[\d.]+ m?s", page.text(f"{column}-{measure}"))


def test_gates_are_a_picture_that_is_read_with_the_arrow_keys(page):
    (picture,) = page.pictures
    assert picture.accessible_name.startswith("Gates of young: 4 layers × 16 experts, 4 gates a layer")
    made = httpx.get(f"{page.url}/v1/specializations/young", headers={"Authorization": f"Bearer {KEY}"}).json()
    picture.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    for layer, gates in enumerate(made["gate_weights"], start=1):
        for expert, gate in enumerate(gates, start=1):
            said = f"{gate:.3f}" if gate else "not chosen"
            assert page.text("cell") == f"layer {layer}, expert {expert}: {said}"
            picture.send_keys(Keys.ARROW_RIGHT)
        picture.send_keys(Keys.ARROW_DOWN)
    # A chosen expert's square has another color than an empty one.
    pixels = """
        const [canvas, row] = arguments, {width, height} = canvas, side = width / 16;
        const line = canvas.getContext("2d").getImageData(0, (row + .5) * height / 4, width, 1).data;
        const color = (x) => [...line.slice(4 * x, 4 * x + 4)].join();
        return [...Array(16).keys()].map((column) => color(Math.round((column + .5) * side)));
    """
    first = made["gate_weights"][0]
    colors = page.browser.execute_script(pixels, picture, 0)
    empty = {color for color, gate in zip(colors, first, strict=True) if not gate}
    assert len(empty) == 1
    assert not empty & {color for color, gate in zip(colors, first, strict=True) if gate}


def test_a_correction_becomes_an_example_of_a_new_specialization(page):
    page.ask("dog")
    page.type("right", "[whelp]" + Keys.ENTER)
    page.wait_for("corrections", re.escape("dog → [whelp]"))
    page.ask("fox")
    page.type("right", "[kit]" + Keys.ENTER)
    assert page.text("refine") == "Refine with 2 corrections"
    page.press("refine")
    page.wait_for("ask-note", "“young-2”: read .* learned from 2 examples")
    assert page.names == ["young", "young-2"]
    made = httpx.get(f"{page.url}/v1/specializations/young-2", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert made["prompt"] == f"{PROMPT}\n\ndog: [whelp]\n\nfox: [kit]"
    assert made["refined"]["examples"] == 2
    assert made["refined"]["loss_after"] < made["refined"]["loss_before"]
    assert len(page.pictures) == 2  # before and after
    asked = {"model": "young-2", "prompt": "dog:", "temperature": 0, "max_tokens": 32, "stop": "\n"}
    body = httpx.post(
        f"{page.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ).json()
    assert page.ask("dog")[2] == body["choices"][0]["text"].strip()


def test_one_can_switch_back_and_examples_are_read_from_lines(page):
    page.browser.find_element(By.CSS_SELECTOR, "#list [value=young]").click()
    wait_until(lambda: len(page.pictures) == 1)
    assert page.ask("cow")[2] == "[calf]"
    page.type("prompt", "")
    page.type("examples", 'cow => "moo"\nno answer')
    page.press("specialize")
    page.wait_for("teach-note", "Example line 2 needs a question and an answer")
    page.type("examples", 'cow => "moo"\n{"input": "dog:", "output": " \\"woof\\""}')
    page.press("learn")
    page.type("name", "sounds")
    page.press("specialize")
    page.wait_for("teach-note", "“sounds”: read")
    made = httpx.get(f"{page.url}/v1/specializations/sounds", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert (made["prompt"], made["refined"]) == ('cow: "moo"\n\ndog: "woof"', None)
    page.type("name", "sounds")
    page.press("specialize")
    page.wait_for("teach-note", "There is already a specialization 'sounds': choose another name")
    page.browser.find_element(By.CSS_SELECTOR, '[aria-label="Delete sounds"]').click()
    wait_until(lambda: page.names == ["young", "young-2"])


def test_a_narrow_screen_has_everything_in_reach_and_in_order(page):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        width = "return document.scrollingElement.scrollWidth"
        assert page.browser.execute_script(width) == 360
        controls = page.browser.find_elements(By.CSS_SELECTOR, "button, input, textarea, select, canvas")
        seen = [control for control in controls if control.is_displayed()]
        assert len(seen) > 15
        for control in seen:
            assert control.accessible_name, control.get_attribute("outerHTML")
            assert 0 <= control.rect["x"] <= control.rect["x"] + control.rect["width"] <= 360
        page.browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        reached = []
        for _ in range(2 * len(seen)):
            ActionChains(page.browser).send_keys(Keys.TAB).perform()
            reached.append(page.browser.switch_to.active_element)
        order = [seen.index(element) for element in reached if element in seen][: len(seen)]
        start = order.index(min(order))
        order = order[start:] + order[:start]
        assert order == sorted(order)
        missed = [control.get_attribute("id") for control in seen if control not in reached]
        # One stop for a group of radio buttons, none for a button that does nothing yet.
        assert set(missed) <= {"", "refine"}
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_survives_a_restart_of_the_server(page, command):
    command.stop()
    page.wait_for("connection", "no answer from the server")
    page.type("question", "owl" + Keys.ENTER)
    page.wait_for("ask-note", "The server does not answer. Start it again with lora-gen serve")
    command.start()
    page.wait_for("connection", "connected again")
    page.wait_for("ask-note", "The server no longer has “young”: it was started again without keeping it")
    page.press("again")
    page.wait_for("ask-note", "“young”: read 19 tokens")
    assert page.ask("owl")[2] == "[owlet]"


def test_no_request_left_the_machine_and_the_policy_stopped_nothing(page):
    sent = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 20
    assert {url for url in urls if not url.startswith((page.url + "/", "data:"))} == set()
    told = [entry["message"] for entry in page.browser.get_log("browser")]
    # The refused key, the taken name and the stopped server are in the log; nothing else is.
    expected = r"status of (400|401|404|409)|ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY_RESPONSE"
    assert [message for message in told if not re.search(expected, message)] == []
