"""The page in Chromium: everything on it is clicked, and what it draws is read by the judge of bagel-shapes."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from reader import read

from bagel_demo import create_page
from tests.demo.conftest import SHAPES


sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested by playwright, of the extra `test`")
CHROMIUM = "/usr/bin/chromium"
if not os.path.exists(CHROMIUM):
    pytest.skip(f"the page is tested in Debian's chromium, which is not at {CHROMIUM}", allow_module_level=True)

CIRCLE = "a large red circle in the middle on a white background"
STEPS = "show the steps: a red circle at the top and a blue star at the left on yellow"
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    page = create_page(engine)
    _, url, _ = page.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    # Machines that test may be busy.
    sync_api.expect.set_options(timeout=30_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Somebody who has opened the page."""

    def __init__(self, browser: sync_api.Browser, url: str, **context):
        self.context = browser.new_context(**{"viewport": DESK} | context)
        self.context.set_default_timeout(30_000)
        self.requests: list[str] = []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#talk[data-ready]")

    def choose(self, steps: int = 12, output: str = "Picture", think: bool = False, seed: int = 0) -> None:
        self.page.get_by_label("number input for Steps of a picture").fill(str(steps))
        self.page.get_by_label(output, exact=True).check()
        self.page.get_by_label("Think first").set_checked(think)
        # The model is right on almost all seeds, and the tests are about the page.
        self.page.get_by_label("New one each time").uncheck()
        self.page.get_by_label("Seed", exact=True).fill(str(seed))

    def send(self, text: str) -> None:
        self.message.fill(text)
        self.page.get_by_text("Send", exact=True).click()

    def ask(self, text: str) -> None:
        """Send, and wait for the answer."""
        count = self.page.locator("section").count()
        self.send(text)
        self.wait(count + 1)

    def wait(self, turns: int) -> None:
        """Until there is an answer to so many messages."""
        sync_api.expect(self.page.locator("section")).to_have_count(turns)
        sync_api.expect(self.page.locator(".again")).to_be_visible(timeout=30_000)

    @property
    def message(self) -> sync_api.Locator:
        return self.page.locator("#composer textarea")

    @property
    def last(self) -> sync_api.Locator:
        return self.page.locator("section").last

    def drawn(self, picture: sync_api.Locator) -> PIL.Image.Image:
        source = picture.evaluate("image => image.src")
        return PIL.Image.open(io.BytesIO(self.context.request.get(source).body()))

    def things(self, picture: sync_api.Locator) -> list[tuple[str, str]]:
        return [thing.pair for thing in read(self.drawn(picture)).things]

    def last_things(self) -> list[tuple[str, str]]:
        return self.things(self.last.locator("figure img").last)

    def scrolls_sideways(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


@pytest.fixture
def visit(browser, url) -> Iterator:
    visitors: list[Visitor] = []

    def enter(**context) -> Visitor:
        visitors.append(Visitor(browser, url, **context))
        return visitors[-1]

    yield enter
    for visitor in visitors:
        visitor.context.close()


def test_an_example_is_drawn_as_it_forms(visit):
    visitor = visit()
    visitor.choose(steps=40)
    visitor.page.get_by_role("button", name=CIRCLE).click()
    preview = visitor.page.locator(".forming img")
    sync_api.expect(preview).to_have_attribute("src", re.compile("^data:image/jpeg"))
    progress = visitor.page.get_by_role("progressbar")
    sync_api.expect(progress).to_have_attribute("max", "40")
    sync_api.expect(visitor.page.locator(".progress")).to_have_text(re.compile(r"step \d+ of 40, \d+ s left"))
    visitor.wait(1)
    sync_api.expect(preview).to_have_count(0)
    sync_api.expect(progress).to_have_count(0)
    assert visitor.last_things() == [("red", "circle")]
    # Everything comes from this machine.
    assert [
        address for address in visitor.requests if not address.startswith((visitor.page.url, "data:", "blob:"))
    ] == []


def test_thoughts_are_folded_and_stay_as_somebody_left_them(visit):
    visitor = visit()
    visitor.choose()
    visitor.page.get_by_role("button", name="five points").click()
    visitor.wait(1)
    thought = visitor.last.locator("details p")
    sync_api.expect(thought).to_be_hidden()
    visitor.last.locator("summary").click()
    sync_api.expect(thought).to_have_text(re.compile("yellow star .* on a blue background"))
    assert visitor.last_things() == [("yellow", "star")]
    visitor.choose(output="Words")
    visitor.ask("how many things are there?")
    sync_api.expect(visitor.page.locator("details p").first).to_be_visible()


def test_a_picture_is_edited(visit):
    visitor = visit()
    visitor.choose()
    visitor.ask(CIRCLE)
    visitor.choose(output="Words")
    visitor.page.get_by_role("button", name="Edit this picture").click()
    sync_api.expect(visitor.page.locator("#composer img")).to_be_visible()
    sync_api.expect(visitor.page.get_by_label("Picture", exact=True)).to_be_checked()
    visitor.ask("make the red circle green")
    assert visitor.last_things() == [("green", "circle")]
    assert visitor.things(visitor.last.locator(".asked img")) == [("red", "circle")]


def test_a_picture_that_is_shown_is_seen(visit, tmp_path):
    visitor = visit()
    visitor.choose(output="Words")
    visitor.page.locator("#composer input[type=file]").set_input_files(
        SHAPES.parents[1] / "src/bagel_demo/example.png"
    )
    sync_api.expect(visitor.page.locator("#composer img")).to_be_visible()
    visitor.ask("what colour is the star?")
    sync_api.expect(visitor.last.locator(".words")).to_have_text("yellow")


def test_the_model_answers_in_words_and_pictures_in_turn(visit):
    visitor = visit()
    visitor.choose()
    visitor.page.get_by_role("button", name=STEPS).click()
    visitor.wait(1)
    kinds = visitor.last.locator(".answer > *").evaluate_all(
        "parts => parts.map(part => part.className || part.tagName)"
    )
    assert kinds == ["words", "FIGURE", "words", "FIGURE"]
    pictures = visitor.last.locator("figure img")
    assert visitor.things(pictures.nth(0)) == [("red", "circle")]
    assert sorted(visitor.things(pictures.nth(1))) == [("blue", "star"), ("red", "circle")]
    sync_api.expect(visitor.page.locator("#gallery .thumbnail-item")).to_have_count(2)


def test_stop_works_at_once(visit, engine):
    visitor = visit()
    visitor.choose(steps=100)
    visitor.send(CIRCLE)
    visitor.page.wait_for_selector(".forming")
    before = engine.stats()
    visitor.page.get_by_text("Stop", exact=True).click()
    began = time.monotonic()
    while engine.stats().running:
        time.sleep(0.002)
    assert time.monotonic() - began < 2
    assert engine.stats().pictures == before.pictures
    sync_api.expect(visitor.last.get_by_role("status")).to_have_text(re.compile("Stopped"))
    # It can be said again.
    sync_api.expect(visitor.message).to_have_value(CIRCLE)
    visitor.choose()
    visitor.page.get_by_text("Send", exact=True).click()
    visitor.wait(2)
    assert visitor.last_things() == [("red", "circle")]


def test_a_page_that_is_closed_frees_its_place(visit, engine):
    visitor = visit()
    visitor.choose(steps=100)
    visitor.send(CIRCLE)
    visitor.page.wait_for_selector(".forming")
    pictures = engine.stats().pictures
    visitor.page.close()
    until = time.monotonic() + 10
    while engine.stats().running and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.stats().running == 0
    assert engine.stats().pictures == pictures


def test_the_same_seed_draws_the_same_and_a_new_one_another(visit):
    visitor = visit()
    visitor.choose(seed=11)
    visitor.ask("a red circle")
    first = visitor.drawn(visitor.last.locator("figure img")).tobytes()
    again = visitor.page.get_by_role("button", name="Run again")
    again.click()
    sync_api.expect(visitor.page.locator("#gallery .thumbnail-item")).to_have_count(2)
    visitor.wait(1)
    assert visitor.drawn(visitor.last.locator("figure img")).tobytes() == first
    visitor.page.get_by_label("New one each time").check()
    again.click()
    sync_api.expect(visitor.page.locator("#gallery .thumbnail-item")).to_have_count(3)
    visitor.wait(1)
    assert visitor.drawn(visitor.last.locator("figure img")).tobytes() != first
    seed = visitor.last.locator("[data-act=seed]")
    number = seed.inner_text().removeprefix("Seed ")
    assert number != "11"
    visitor.choose(seed=3)
    seed.click()
    sync_api.expect(visitor.page.get_by_label("Seed", exact=True)).to_have_value(number)
    sync_api.expect(visitor.page.get_by_label("New one each time")).not_to_be_checked()


def test_a_preset_fills_the_settings_and_is_written_into_the_picture(visit):
    visitor = visit()
    visitor.choose()
    visitor.page.get_by_label("Preset").click()
    visitor.page.get_by_role("option", name="dpg").click()
    weight = visitor.page.get_by_label("number input for Weight of the text")
    steps = visitor.page.get_by_label("number input for Steps of a picture")
    # The page takes one setting after the other: what is typed before the last one would be written over.
    sync_api.expect(weight).to_have_value("3")
    sync_api.expect(steps).to_have_value("49")
    sync_api.expect(visitor.page.locator("#preset")).to_contain_text("DPG-Bench")
    visitor.choose()
    visitor.ask(CIRCLE)
    assert visitor.last_things() == [("red", "circle")]
    settings = json.loads(visitor.drawn(visitor.last.locator("figure img")).info["settings"])
    assert (settings["preset"], settings["guidance_scale"], settings["steps"]) == ("dpg", 3, 12)


def test_a_picture_is_downloaded_with_what_it_was_drawn_by(visit, tmp_path):
    visitor = visit()
    visitor.choose(seed=5)
    visitor.ask(CIRCLE)
    with visitor.page.expect_download() as download:
        visitor.last.get_by_role("link", name="Download").click()
    file = tmp_path / "got.png"
    download.value.save_as(file)
    assert download.value.suggested_filename == "bagel-1.png"
    with PIL.Image.open(file) as image:
        assert image.info["prompt"] == CIRCLE
        assert json.loads(image.info["settings"])["seed"] == 5
        assert [thing.pair for thing in read(image).things] == [("red", "circle")]


def test_the_gallery_holds_all_pictures_to_be_edited(visit):
    visitor = visit()
    visitor.choose()
    visitor.ask(CIRCLE)
    visitor.page.get_by_role("button", name="New conversation").click()
    sync_api.expect(visitor.page.locator("section")).to_have_count(0)
    visitor.ask("a large blue square in the middle on white")
    gallery = visitor.page.locator("#gallery .thumbnail-lg")
    sync_api.expect(gallery).to_have_count(2)
    assert [visitor.things(gallery.nth(number).locator("img")) for number in (0, 1)] == [
        [("red", "circle")],
        [("blue", "square")],
    ]
    gallery.first.click()
    visitor.page.get_by_role("button", name="Edit the chosen picture").click()
    sync_api.expect(visitor.page.locator("#composer img")).to_be_visible()
    visitor.ask("make the red circle green")
    assert visitor.last_things() == [("green", "circle")]


def test_what_cannot_be_drawn_is_told(visit):
    visitor = visit()
    visitor.send("a circle " * 3000)
    sync_api.expect(visitor.last.get_by_role("status")).to_have_text(re.compile("positions"))
    visitor.choose()
    visitor.ask(CIRCLE)
    assert visitor.last_things() == [("red", "circle")]


def test_it_fits_a_phone_in_the_dark(visit):
    visitor = visit(viewport=PHONE, color_scheme="dark", has_touch=True, is_mobile=True)
    background = visitor.page.locator("#talk").evaluate("talk => getComputedStyle(talk).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 150
    assert not visitor.scrolls_sideways()
    sync_api.expect(visitor.page.get_by_text("Send", exact=True)).to_be_in_viewport()
    visitor.choose()
    visitor.message.fill(CIRCLE)
    visitor.page.get_by_text("Send", exact=True).tap()
    visitor.wait(1)
    assert visitor.last_things() == [("red", "circle")]
    assert not visitor.scrolls_sideways()
    for name in ("Edit this picture", "Run again"):
        box = visitor.page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]


def test_it_works_by_keyboard_alone(visit):
    visitor = visit()
    keyboard = visitor.page.keyboard

    def walk_to(name: str, key: str = "Tab") -> None:
        for _ in range(80):
            keyboard.press(key)
            # The conversation itself scrolls, and so has the focus, too.
            element = "document.activeElement"
            if name in visitor.page.evaluate(
                f"{element}.id == 'talk' ? [] : [{element}.innerText, {element}.ariaLabel]"
            ):
                return
        raise AssertionError(f"no {key} leads to {name!r}")

    sync_api.expect(visitor.message).to_be_focused()
    keyboard.type(CIRCLE)
    keyboard.press("Enter")
    visitor.page.wait_for_selector(".forming")
    walk_to("Stop")
    keyboard.press("Enter")
    sync_api.expect(visitor.last.get_by_role("status")).to_have_text(re.compile("Stopped"))
    walk_to("number input for Steps of a picture")
    keyboard.press("Control+A")
    keyboard.type("12")
    walk_to("Run again", "Shift+Tab")
    keyboard.press("Enter")
    sync_api.expect(visitor.page.locator("figcaption")).to_have_count(1)
    assert visitor.last_things() == [("red", "circle")]
    walk_to("Edit this picture")
    keyboard.press("Enter")
    sync_api.expect(visitor.page.locator("#composer img")).to_be_visible()
    sync_api.expect(visitor.message).to_be_focused()
    keyboard.type("make the red circle green")
    keyboard.press("Enter")
    visitor.wait(2)
    assert visitor.last_things() == [("green", "circle")]


def test_two_users_at_once_have_their_own_conversations(visit):
    first, second = visit(), visit()
    for visitor in (first, second):
        visitor.choose(steps=25)
    first.send(CIRCLE)
    second.send("a large blue square in the middle on a white background")
    for visitor in (first, second):
        visitor.wait(1)
    assert first.last_things() == [("red", "circle")]
    assert second.last_things() == [("blue", "square")]
    assert "square" not in first.page.locator("#talk").inner_text()
    assert "red" not in second.page.locator("#talk").inner_text()
    for visitor, colour in ((first, "red"), (second, "blue")):
        visitor.choose(output="Words")
        visitor.ask("what colour is the thing in the middle?")
        sync_api.expect(visitor.last.locator(".words")).to_have_text(colour)


def test_the_screenshot_of_the_readme_shows_a_conversation(visit, tmp_path):
    """`BAGEL_SCREENSHOTS=docs` puts it there."""
    visitor = visit(viewport={"width": 1280, "height": 1000}, device_scale_factor=1.5)
    visitor.choose(steps=25, think=True, seed=4)
    visitor.ask("something with five points in the colour of a lemon on blue")
    visitor.page.get_by_role("button", name="Edit this picture").click()
    sync_api.expect(visitor.page.locator("#composer img")).to_be_visible()
    visitor.choose(steps=100, seed=4)
    visitor.send("make the yellow star red")
    visitor.page.wait_for_function("document.querySelector('.progress progress')?.value > 60")
    visitor.page.evaluate("window.scrollTo(0, 0)")
    file = Path(os.environ.get("BAGEL_SCREENSHOTS", tmp_path)) / "demo.png"
    visitor.page.screenshot(path=file)
    assert PIL.Image.open(file).width == 1920
    visitor.wait(2)
    assert visitor.last_things() == [("red", "star")]
