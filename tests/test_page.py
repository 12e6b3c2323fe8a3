"""A person's walk through the inspection page, in headless Chromium."""

import base64
import re
import shutil

import numpy as np
import pytest

import kizu
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
    folder = small_model(tmp_path / "disc")
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
        assert f"It scores {float(f'{seen.score:.4g}')}" in page.inner_text("#because")
        assert page.inner_text("#statement") == model.threshold.statement
        assert page.locator("#regions li").count() == len(seen.regions) >= 1
        assert page.locator("#pairs img").count() >= 2
        assert page.inner_text("#tally") == "1 of 1 stopped"

        glowing = pixels(page)
        page.locator("#outlines").uncheck()
        page.locator("#opacity").fill("0")
        change = np.abs(pixels(page) - glowing).sum(axis=2)
        left, top, width, height = seen.regions[0].box
        inside = change[top : top + height, left : left + width].mean()
        assert inside > 3 * change[:8, :8].mean() and inside > 50  # the defect glowed, the corner did not

        page.locator("#threshold").fill("1000")
        page.wait_for_selector("h1:text-is('Pass')")
        page.get_by_text("Moved on this page only").wait_for()
        assert re.match(r"At most 1 in 13 good parts", page.inner_text("#statement"))  # no good score of 12 lies above
        size = page.inner_text("#regions li .what")
        page.locator("#threshold").fill("0")
        page.wait_for_selector("h1:text-is('Stop')")
        page.locator("#regions .what", has_text=size).wait_for(state="detached")  # more is marked at a lower threshold
        page.click("#reset")
        page.wait_for_selector("h1:text-is('Stop')")
        page.locator("#statement", has_text="Moved").wait_for(state="detached")

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
