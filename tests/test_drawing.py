"""Zones are drawn on a page: with the mouse, a finger or keys, and saved as the file that training takes."""

import json

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.data.geometry.zones import covered
from processes import kizu as command
from services import serving, small_model
from test_page import browser  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawing")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)).save(folder / "part.png")
    done = command("zones", folder / "part.png", "--output", folder / "zones.html")
    assert done.returncode == 0 and "--zones zones.json" in done.stdout
    return folder / "zones.html"


@pytest.fixture
def sheet(browser, page_file):  # noqa: F811
    """An open page, what it complained of, and where on the screen a place of the photograph is."""
    complaints = []

    def opened(address="", **options):
        page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        page.set_default_timeout(15_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address or page_file.as_uri())
        return page

    yield opened
    assert complaints == []


def place(page, x, y):
    frame = page.locator("#sheet").bounding_box()
    return frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]


def drag(page, *points):
    page.mouse.move(*place(page, *points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*place(page, *point))
    page.mouse.up()


def saved(page, folder):
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "zones.json"
    download.value.save_as(folder / "zones.json")
    return {zone.name: zone for zone in kizu.read_zones(file=str(folder / "zones.json"))}


def share(zone):
    return covered(zone.rings, (300, 400)).mean()


def test_a_walk_with_the_mouse_from_a_photograph_to_a_model(sheet, tmp_path):
    page = sheet()
    page.wait_for_selector("main[data-state=open]")
    assert page.is_disabled("#save")
    drag(page, (0.1, 0.1), (0.2, 0.3), (0.4, 0.5))
    assert "What is red is ignored" in page.inner_text("#meaning")
    page.get_by_label("Name").fill("label")
    page.keyboard.press("Tab")
    page.click("#inspect")
    page.get_by_text("Polygon", exact=True).click()
    for corner in ((0.6, 0.1), (0.9, 0.1), (0.9, 0.5), (0.6, 0.1)):
        page.mouse.click(*place(page, *corner))
    page.click("#inspect")
    page.get_by_text("Brush", exact=True).click()
    drag(page, (0.2, 0.8), (0.3, 0.8), (0.5, 0.8), (0.8, 0.8))
    zones = saved(page, tmp_path)
    assert list(zones) == ["elsewhere", "label", "zone 1", "zone 2"] and zones["label"].ignored
    assert share(zones["label"]) == pytest.approx(0.3 * 0.4, abs=0.005)
    assert share(zones["zone 1"]) == pytest.approx(0.3 * 0.4 / 2, abs=0.005)
    assert share(zones["zone 2"]) == pytest.approx(0.6 * 0.1 + 0.785 * 0.1 * 0.075, abs=0.01)  # a tenth of the height
    page.click("#undo")
    page.click("#undo")
    page.click("#redo")
    page.uncheck("#rest")
    assert "Only these zones" in page.inner_text("#meaning")
    assert list(saved(page, tmp_path)) == ["label", "zone 1"]
    good = [np.random.default_rng(n).integers(0, 255, (96, 128, 3), np.uint8) for n in range(6)]
    zones = kizu.read_zones(file=str(tmp_path / "zones.json"))
    assert kizu.PatchCore(size=96, coreset=0.2, zones=zones).fit(good).predict(good[0]).zone == "zone 1"


def test_zones_are_drawn_with_keys_alone(sheet, tmp_path):
    page = sheet()
    page.wait_for_selector("main[data-state=open]")
    page.focus("#sheet")
    page.keyboard.press("Enter")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert share(saved(page, tmp_path)["ignored 1"]) == pytest.approx(0.2 * 0.2, abs=0.005)
    page.keyboard.press("Control+z")
    assert page.is_disabled("#save")
    page.keyboard.press("Control+Shift+z")
    assert page.is_enabled("#save")


def test_a_finger_draws_on_a_phone(sheet, tmp_path):
    page = sheet(viewport={"width": 390, "height": 800}, has_touch=True)
    page.wait_for_selector("main[data-state=open]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    touch = page.context.new_cdp_session(page)

    def finger(kind, *point):
        points = [dict(zip("xy", place(page, *point), strict=True))] if point else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    finger("touchStart", 0.2, 0.2)
    finger("touchMove", 0.4, 0.4)
    finger("touchMove", 0.7, 0.6)
    finger("touchEnd")
    assert share(saved(page, tmp_path)["ignored 1"]) == pytest.approx(0.5 * 0.4, abs=0.01)


def test_what_was_saved_is_opened_again_and_nonsense_is_refused(sheet, tmp_path):
    page = sheet()
    page.wait_for_selector("main[data-state=open]")
    drag(page, (0.1, 0.1), (0.4, 0.5))
    before = saved(page, tmp_path)
    again = sheet()
    again.wait_for_selector("main[data-state=open]")
    again.set_input_files("#saved", tmp_path / "zones.json")
    again.wait_for_selector("#save:enabled")
    assert saved(again, tmp_path) == before
    ring = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.1]]
    flat = [{"name": "a", "rings": [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], "ignored": False}]
    for number, content in enumerate(({"a": 1}, [], flat, [{"name": "a", "rings": []}])):
        (tmp_path / f"other{number}.json").write_text(json.dumps(content))
        again.set_input_files("#saved", tmp_path / f"other{number}.json")
        again.get_by_text(f"other{number}.json holds no zones").wait_for()
        assert saved(again, tmp_path / "") == before
    (tmp_path / "odd.json").write_text(
        json.dumps(
            [{"name": "elsewhere", "rings": [ring], "ignored": True}, {"name": f" {'x' * 80}\t", "rings": [ring]}]
        )
    )
    again.set_input_files("#saved", tmp_path / "odd.json")
    again.get_by_text("Only these zones are inspected").wait_for()
    odd = saved(again, tmp_path)
    assert (
        list(odd) == ["elsewhere", "x" * 60]
        and odd["elsewhere"].ignored
        and odd["elsewhere"].rings[0] == tuple(map(tuple, ring))
    )
    again.get_by_label("Name").first.fill("text")
    again.keyboard.press("Control+z")
    assert list(saved(again, tmp_path)) != list(before)
    again.set_input_files("#saved", tmp_path / "zones.json")
    again.get_by_label("Name").first.fill("")
    again.keyboard.press("Tab")
    assert again.is_disabled("#save")


@pytest.mark.slow
def test_the_server_has_the_same_page(sheet, tmp_path, page_file):
    with serving(small_model(tmp_path / "disc"), log=tmp_path / "log") as (_, url):
        page = sheet(url)
        page.get_by_text("Zones", exact=True).click()
        page.wait_for_url("**/zones.html")
        page.set_input_files("#photograph", page_file.with_name("part.png"))
        page.wait_for_selector("main[data-state=open]")
        drag(page, (0.1, 0.1), (0.4, 0.5))
        assert share(saved(page, tmp_path)["ignored 1"]) == pytest.approx(0.12, abs=0.005)
