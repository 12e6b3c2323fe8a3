"""A person's walk through the inspection page, in headless Chromium."""

import base64
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

import kizu
from kizu.serving.history import HISTORY, History
from processes import kizu as command
from services import encoded, serving, small_model
from test_detectors import part

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "the page's own key"

DROP = """([name, data]) => {
  const content = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const dragged = new DataTransfer();
  dragged.items.add(new File([content], name, { type: "image/png" }));
  for (const kind of ["dragover", "drop"])
    document.querySelector("#drop").dispatchEvent(new DragEvent(kind, { bubbles: true, dataTransfer: dragged }));
}"""
PIXELS = """() => {
  const small = new OffscreenCanvas(96, 96).getContext("2d");
  small.drawImage(document.querySelector("#canvas"), 0, 0, 96, 96);
  return Array.from(small.getImageData(0, 0, 96, 96).data);
}"""


LABELS = "(buttons) => buttons.map((button) => button.getAttribute('aria-label').split(', ')[0])"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright's Python package is not installed")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        yield started.chromium.launch(executable_path=CHROMIUM, args=flags)


def pixels(page):
    """What is on show, as large as the photograph was."""
    return np.array(page.evaluate(PIXELS)).reshape(96, 96, 4)[..., :3]


def test_a_walk_from_a_dropped_photograph_to_a_false_alarm(browser, tmp_path):
    folder = small_model(tmp_path / "disc", size=128)  # which sees a corner without what is in the middle
    model = kizu.load(folder)
    photograph = encoded(part(99, spot=True))
    seen = model.predict(photograph)
    complaints = []
    with serving(folder, "--keep", "9", "--api-key", KEY, "--store", tmp_path / "store", log=tmp_path / "log") as (
        _,
        url,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.set_default_timeout(15_000)
        page.goto(url)

        page.fill("#key", "not the key")  # the server asks again
        page.keyboard.press("Enter")
        page.wait_for_selector("#lock[open]")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.get_by_text(model.threshold.statement).wait_for()

        page.evaluate(DROP, ["spotted.png", base64.b64encode(photograph).decode()])
        page.wait_for_selector("h1:text-is('Stop')")
        assert f"This photograph scores {float(f'{seen.score:.4g}')}" in page.inner_text("#because")
        assert page.inner_text("#statement") == model.threshold.statement
        assert page.locator("#regions li").count() == len(seen.regions) >= 1
        assert page.locator("#pairs img").count() >= 2
        assert page.inner_text("#tally") == "1 of the 1 shown here stopped"

        glowing = pixels(page)
        page.locator("#outlines").uncheck()
        page.locator("#opacity").fill("0")
        change = np.abs(pixels(page) - glowing).sum(axis=2)
        left, top, width, height = seen.regions[0].box
        inside = change[top : top + height, left : left + width].mean()
        assert inside > 3 * change[:8, :8].mean() and inside > 50  # the defect glowed, the corner did not

        page.locator("#threshold").fill("1000")
        page.wait_for_selector("h1:text-is('Pass')")
        page.get_by_text("This threshold holds on this page only").wait_for()
        assert re.match(r"At most 1 in 13 good parts", page.inner_text("#statement"))  # no good score of 12 lies above
        size = page.inner_text("#regions li .what")
        page.locator("#threshold").fill("0")
        page.wait_for_selector("h1:text-is('Stop')")
        page.locator("#regions .what", has_text=size).wait_for(state="detached")  # more is marked at a lower threshold
        page.click("#reset")
        page.wait_for_selector("h1:text-is('Stop')")
        page.locator("#statement", has_text="on this page only").wait_for(state="detached")

        page.click("#good")
        page.get_by_text("A false alarm, noted. 1 good and 0 defective").wait_for()
        page.reload()  # the verdict is kept, and so is what was said of it
        page.locator("#strip button[aria-label='spotted.png: stop, marked good']").click()
        page.wait_for_selector("h1:text-is('Stop')")
        page.wait_for_selector("#good[aria-pressed='true']")

        page.set_input_files("#files", [{"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}])
        page.get_by_text("x.png is not an image").wait_for()
        page.click("#camera")
        page.wait_for_selector("#viewfinder:visible")
        page.click("#shoot")
        page.locator("#strip li").nth(1).wait_for()
        page.keyboard.press("ArrowRight")
        page.locator("#name", has_text="spotted.png").wait_for()
        page.close()
    (marked,) = (tmp_path / "store" / "feedback" / "disc" / "good").iterdir()
    assert marked.read_bytes() == photograph
    refused = ("401", "415")  # the wrong key, the file that is no image
    assert [text for text in complaints if not any(f"status of {code}" in text for code in refused)] == []


@contextmanager
def opened(browser, *arguments, log, env=None, **settings):
    """A page of a server of its own; whatever it complains of fails the test."""
    complaints = []
    with serving(*arguments, log=log, env=env) as (_, url):
        page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | settings))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.set_default_timeout(15_000)
        page.goto(url)
        yield page
        page.close()
    assert complaints == []


def judge(page, name, picture):
    page.set_input_files("#files", [{"name": name, "mimeType": "image/png", "buffer": encoded(picture)}])
    page.locator("#name", has_text=name).wait_for()


def tiles(page):
    """Name and verdict of each tile, from left to right."""
    return [tuple(label.split(": ")) for label in page.eval_on_selector_all("#strip button", LABELS)]


def test_the_page_has_one_truth_whatever_is_moved_chosen_or_dropped(browser, tmp_path):
    folders = [small_model(tmp_path / name, first) for name, first in (("disc", 0), ("other", 40))]
    spotted = part(99, spot=True)
    with opened(browser, *folders, "--keep", 2, "--store", tmp_path / "store", log=tmp_path / "log") as page:
        judge(page, "first.png", part(90))
        judge(page, "second.png", spotted)
        assert tiles(page) == [("second.png", "stop"), ("first.png", "pass")]

        page.locator("#threshold").fill("1000")  # a moved threshold is everybody's
        page.wait_for_selector("h1:text-is('Pass')")
        assert [verdict for _, verdict in tiles(page)] == ["pass", "pass"]
        assert page.inner_text("#tally") == "0 of the 2 shown here stopped, by the moved threshold"
        page.click("#reset")
        assert [verdict for _, verdict in tiles(page)] == ["stop", "pass"]
        assert page.inner_text("#tally") == "1 of the 2 shown here stopped"

        page.select_option("#model", "other")  # another model says for itself
        page.locator("#name", has_text="second.png, by other").wait_for()
        score = f"{kizu.load(folders[1]).predict(spotted).score:.4g}"
        page.locator("#because", has_text=f"This photograph scores {float(score)}").wait_for()
        page.select_option("#choice", "model: other")
        assert [name for name, _ in tiles(page)] == ["second.png"]

        page.select_option("#choice", "passed")
        assert tiles(page) == [("first.png", "pass")]
        page.select_option("#choice", "all")
        page.select_option("#order", "highest")
        assert [name for name, _ in tiles(page)] == ["second.png", "second.png", "first.png"]
        page.select_option("#order", "doubtful")
        assert tiles(page)[0] == ("first.png", "pass")
        page.select_option("#order", "latest")

        page.locator("#strip button").nth(2).click()  # the server keeps two and has dropped it: the mark is not lost
        page.locator("#name", has_text="first.png, by disc").wait_for()
        page.click("#bad")
        page.get_by_text("A missed defect, noted.").wait_for()
        (marked,) = (tmp_path / "store" / "feedback" / "disc" / "bad").iterdir()
        assert marked.read_bytes() == encoded(part(90))
        page.select_option("#choice", "marked")
        assert [name for name, _ in tiles(page)] == ["first.png"]


@pytest.mark.slow
def test_who_has_the_key_sets_the_threshold_for_everybody(browser, tmp_path):
    folder = small_model(tmp_path / "disc", size=128)
    before = kizu.load(folder)
    keys = {"env": {"KIZU_THRESHOLD_KEY": KEY}}
    with opened(browser, folder, "--keep", 9, "--store", tmp_path / "store", log=tmp_path / "log", **keys) as page:
        judge(page, "spotted.png", part(99, spot=True))
        assert page.locator("#set").is_hidden()  # nothing was moved
        page.locator("#threshold").fill("1000")
        page.wait_for_selector("h1:text-is('Pass')")
        page.click("#set")
        page.fill("#setting-name", "Ada Vogel")
        page.fill("#setting-key", "not the key")
        page.click("#setting-set")
        page.get_by_text("The key for thresholds is missing or wrong").wait_for()
        assert kizu.load(folder).threshold == before.threshold
        page.screenshot(path=tmp_path / "setting.png")
        page.fill("#setting-key", KEY)
        page.click("#setting-set")
        page.wait_for_selector("#setting", state="hidden")

        page.locator("#statement", has_text="by hand, by Ada Vogel").wait_for()
        page.locator("#because", has_text="When this photograph was judged, the part was stopped").wait_for()
        after = kizu.load(folder)
        assert after.threshold.value > before.threshold.value
        assert f"before, it was {before.threshold.value:.6g}" in after.threshold.statement
        assert page.locator("#reset").is_hidden()
        assert "Ada Vogel" in (tmp_path / "log").read_text()

        page.click("#set")  # and back to what the good parts give
        assert page.locator("#setting-set").is_hidden()
        page.fill("#setting-key", KEY)
        page.click("#setting-back")
        page.wait_for_selector("h1:text-is('Stop')")
        page.locator("#statement", has_text=before.threshold.statement).wait_for()
        assert page.locator("#regions li").count() >= 1
    assert kizu.load(folder).threshold == before.threshold
    assert kizu.load(folder).pixel_threshold == before.pixel_threshold


@pytest.mark.slow
def test_what_watch_judged_is_on_the_page_and_can_be_marked(browser, tmp_path):
    folder, strange = small_model(tmp_path / "disc"), small_model(tmp_path / "strange", 40)
    incoming, store = tmp_path / "incoming", tmp_path / "store"
    incoming.mkdir()
    with opened(browser, folder, "--keep", 99, "--store", store, log=tmp_path / "log") as page:
        judge(page, "mine.png", part(72))
        history = History(store / HISTORY)
        (mine,) = history.last(1)
        for _ in range(70):  # more than are fetched at a time, between two looks
            history.add(mine.time, "disc", "", mine.verdict, history.photograph(mine.id), history.thumbnail(mine.id))
        history.close()
        judge(page, "later.png", part(73))  # which the page knows before it hears of the others
        page.locator("#tally", has_text="of the 72 shown here stopped").wait_for()
        for name, model, picture in (("night.png", folder, part(99, spot=True)), ("far.png", strange, part(71))):
            (incoming / name).write_bytes(encoded(picture))
            command("watch", incoming, "--model", model, "--once", "--settle", 0, "--store", store, cwd=tmp_path)
        page.locator("#strip button[aria-label='night.png: stop']").click()  # without a reload
        page.wait_for_selector("h1:text-is('Stop')")
        assert page.locator("#regions li").count() >= 1
        page.click("#good")
        page.get_by_text("A false alarm, noted.").wait_for()
        page.locator("#strip button[aria-label='far.png: pass']").click()  # by a model that this server does not have
        page.get_by_text("This server does not have the model strange").wait_for()
        assert page.locator("#threshold").is_disabled()
    assert len(list((store / "feedback" / "disc" / "good").iterdir())) == 1


@pytest.mark.slow
def test_the_photograph_can_be_looked_at_pixel_by_pixel(browser, tmp_path):
    folder = small_model(tmp_path / "disc")
    with opened(browser, folder, log=tmp_path / "log", has_touch=True) as page:
        judge(page, "a.png", part(99, spot=True))
        whole = pixels(page)
        box = page.locator("#canvas").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def pressed():
            return page.get_attribute("#closer", "aria-pressed") == "true"

        page.mouse.move(*middle)
        page.mouse.wheel(0, -200)
        page.wait_for_selector("#canvas[data-zoomed]")
        near = pixels(page)
        assert pressed() and np.abs(near - whole).mean() > 2
        page.mouse.down()
        page.mouse.move(middle[0] - 60, middle[1] - 40)
        page.mouse.up()
        assert np.abs(pixels(page) - near).mean() > 1  # it moved with the hand
        page.keyboard.press("0")
        assert not pressed() and np.array_equal(pixels(page), whole)
        page.mouse.dblclick(*middle)
        assert pressed()
        page.mouse.dblclick(*middle)
        assert not pressed()
        page.click("#closer")
        assert pressed()
        page.keyboard.press("0")

        touch = page.context.new_cdp_session(page)
        for kind, apart in (("touchStart", 20), ("touchMove", 60), ("touchMove", 120), ("touchEnd", None)):
            points = (
                [] if apart is None else [{"x": middle[0] + s * apart, "y": middle[1], "id": s + 1} for s in (-1, 1)]
            )
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert pressed()
        page.keyboard.press("0")
        badge = page.locator("#badges li").first
        before = badge.bounding_box()
        page.evaluate("scrollTo(0, 0)")  # a click may have scrolled the page
        page.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5)
        for _ in range(6):
            page.mouse.wheel(0, -150)
        badge.wait_for(state="hidden")  # it stays with what it marks, on the other side
        page.keyboard.press("0")
        assert badge.bounding_box() == before


@pytest.mark.slow
def test_on_a_phone_nothing_sticks_out(browser, tmp_path):
    folder = small_model(tmp_path / "disc")
    with serving(folder, log=tmp_path / "log") as (_, url):
        page = browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
        page.goto(url)
        picture = {"name": "a.png", "mimeType": "image/png", "buffer": encoded(part(99, spot=True))}
        page.set_input_files("#files", [picture])
        page.wait_for_selector("h1:text-is('Stop')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = "[...document.querySelectorAll('button, .button')].filter((b) => b.offsetParent && b.offsetHeight < 40)"
        assert page.evaluate(f"{small}.map((b) => b.textContent)") == []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
        page.close()
