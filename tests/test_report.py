"""The report: its numbers, its edges, its size, and how it behaves in a browser."""

import base64
import html
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kizu.data import image
from kizu.errors import OutputError
from kizu.evaluation.evaluate import CategoryResult, ImageScore, Outlier, PatchPair, Picture
from kizu.evaluation.pages import report
from kizu.evaluation.pages.report import MAX_BYTES, RunSummary, render, write

KEYS = ("image_auroc", "image_ap", "image_f1max", "pg2", "pb2", "pixel_auroc", "pixel_ap", "pixel_f1max", "au_pro")
SUMMARY = RunSummary(
    title="Trial <1> & more",
    method="PatchCore",
    data="bottles",
    backbone="a network",
    size="256 × 256",
    settings={"neighbours": "9"},
    machine="two cores",
    versions={"kizu": "0.1.0"},
    command="kizu run --data bottles",
    seed=7,
    seconds=192.0,
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def uri(side: int = 24, seed: int | None = None) -> str:
    rgb = np.full((side, side, 3), 90, np.uint8)
    if seed is not None:
        rgb = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return "data:image/png;base64," + base64.b64encode(image.encode(rgb)).decode()


def judged(good: Sequence[float] = (), bad: Sequence[float] = (), broken: int = 0) -> list[ImageScore]:
    rows = [ImageScore(f"test/good/{i}.png", "good", score) for i, score in enumerate(good)]
    for i, score in enumerate(bad):
        defect = ("dent", "crack")[i % 2]
        rows.append(ImageScore(f"test/{defect}/{i}.png", defect, score))
    return rows + [ImageScore(f"test/good/broken{i}.png", "good", None, "is empty (0 bytes)") for i in range(broken)]


def result(rows: list[ImageScore], **changes: object) -> CategoryResult:
    both = len({row.defect == "good" for row in rows if row.score is not None}) == 2
    values = dict.fromkeys(KEYS, 0.75 if both else None)
    base = CategoryResult(
        category="metal_nut",
        train_images=209,
        scores=rows,
        metrics=values,
        reasons={} if both else dict.fromkeys(KEYS, "There are not both good and defective images."),
        threshold=2.0,
        statement="About 1 in 50 good parts will be stopped.",
        calibration_scores=[1.0, 1.2, 1.4, 1.9],
        heat_map_range=(0.0, 3.0),
        pixel_threshold=2.0,
        seconds={"training": 12.0, "per image": 0.085},
    )
    return replace(base, **changes)


def picture(row: ImageScore, why: str, side: int = 24, seed: int | None = None) -> Picture:
    return Picture(row.image, why, uri(side, seed), uri(side, seed), uri(side, seed))


class Page(HTMLParser):
    """Start tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
        self.text = " ".join(" ".join(self.pieces).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


MIXED = judged(good=[1.0, 1.1, 2.1, 1.3], bad=[1.5, 3.0, 4.0, 2.5, 2.0], broken=1)


def full(**changes: object) -> CategoryResult:
    pictures = [picture(MIXED[4], "miss"), picture(MIXED[2], "false alarm"), picture(MIXED[5], "sample")]
    return result(MIXED, pictures=pictures, **changes)


EDGES = {
    "nothing tested": [result([])],
    "no categories": [],
    "only good": [result(judged(good=[1.0, 1.5]))],
    "only defects": [result(judged(bad=[1.0, 2.5]))],
    "one good image": [result(judged(good=[1.0]))],
    "one defective image": [result(judged(bad=[1.0]))],
    "only unreadable files": [result(judged(broken=3))],
    "identical scores": [result(judged(good=[2.0, 2.0], bad=[2.0, 2.0]), calibration_scores=[2.0, 2.0])],
    "all zero": [result(judged(good=[0.0], bad=[0.0]), threshold=0.0, calibration_scores=[])],
    "negative scores": [result(judged(good=[-5.0, -4.0], bad=[-1.0]), threshold=-2.0, calibration_scores=[-4.5])],
    "tiny scores": [result(judged(good=[1e-9], bad=[2e-9]), threshold=1.5e-9, calibration_scores=[1.1e-9])],
    "huge scores": [result(judged(good=[1e12], bad=[3e12]), threshold=2e12, calibration_scores=[1e12])],
    "no threshold": [full(threshold=math.inf, calibration_scores=[])],
    "nothing at all": [result([], threshold=math.inf, calibration_scores=[], metrics={}, reasons={}, seconds={})],
    "flat colour scale": [full(heat_map_range=(1.0, 1.0), pixel_threshold=1.0)],
    "mixed": [full()],
    "several": [full(), result([], category="cable"), result(judged(good=[1.0]), category="grid")],
}


@pytest.mark.parametrize("results", EDGES.values(), ids=EDGES)
def test_every_edge_renders(results: list[CategoryResult]) -> None:
    page = render(SUMMARY, results)
    parsed = Page(page)
    assert parsed.text.count("Trial <1> & more") == 2
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"base64,[^\"]*", "", page))
    identifiers = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)) == len(results)


def test_the_verdict_agrees_with_the_rows() -> None:
    text = Page(render(SUMMARY, [full()])).text
    assert "Of 5 defective parts it stops 3. Of 4 good ones it stops 1." in text
    assert "3 of 5 60 % here" in text
    assert "1 of 4 25 % here" in text
    assert "1 file could not be read and is not counted." in text
    assert "Dent 3 1 2 " in text  # 1.5 missed and 2.0, which is on the threshold; 4.0 stopped
    assert "Crack 2 2 0 1.000 2.500" in text
    assert "All defects 5 3 2 0.750 1.500" in text
    assert "4 good parts, 5 defective parts; 1 file could not be read" in text


def test_the_summary_adds_counts_and_averages_measures() -> None:
    other = result(judged(good=[1.0, 1.0], bad=[3.0]), category="cable", metrics={"image_auroc": 0.25})
    untested = result([], category="grid")
    parsed = Page(render(SUMMARY, [full(), other, untested]))
    assert "Of 6 defective parts it stops 4. Of 6 good ones it stops 1." in parsed.text
    assert "Metal nut 209 3 of 5 2 1 of 4 0.750" in parsed.text
    assert "Cable 209 1 of 1 0 0 of 2 0.250" in parsed.text
    assert "Grid 209 – – – –" in parsed.text
    assert "Total, mean 627 4 of 6 2 1 of 6 0.500" in parsed.text
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    targets = ["#" + attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert links == targets


@pytest.mark.parametrize(
    ("edge", "known", "unknown"),
    [
        ("nothing tested", "It has not been tested yet.", ["defective", "good"]),
        ("only unreadable files", "3 files could not be read and are not counted.", ["defective", "good"]),
        ("only good", "Of 2 good parts it stops 0.", ["defective"]),
        ("only defects", "Of 2 defective parts it stops 1.", ["good"]),
        ("one defective image", "Of 1 defective part it stops 0.", ["good"]),
    ],
)
def test_what_is_not_known_is_said(edge: str, known: str, unknown: list[str]) -> None:
    page = render(SUMMARY, EDGES[edge])
    text = Page(page).text
    assert known in text
    assert "There are not both good and defective images." in text
    for kind in ("good", "defective"):
        assert (f"not known No {kind} parts were tested." in text) == (kind in unknown)
    assert "ROC curve" not in text
    assert 'class="held"' in page


def test_evidence_and_training_images_to_look_at_are_shown() -> None:
    rows = judged([1.0], [3.0])
    shown = replace(picture(rows[1], "sample"), pairs=[PatchPair(1, uri(), uri(), "good/7.png", 3.25)])
    outliers = [Outlier("good/9.png", 1.9, uri()), Outlier("good/8.png", 1.8, "")]
    text = Page(render(SUMMARY, [result(rows, pictures=[shown], outliers=outliers)])).text
    assert "the most similar place in any good photograph it learned from, good/ 7.png" in text
    assert "3.3 times as much" in text or "3.2 times as much" in text
    assert (
        "2 photographs that the model learned from look less like the others" in text
        and "good/ 8.png score 1.800" in text
    )
    assert "worth a second look" not in Page(render(SUMMARY, [result(rows)])).text


def test_pictures_say_what_happened_to_them() -> None:
    text = Page(render(SUMMARY, [full()])).text
    assert "missed score 1.500 at most 40 % of good parts score as high Dent test/ dent/ 0.png" in text
    assert "false alarm score 2.100 at most 20 % of good parts score as high Good test/ good/ 2.png" in text
    assert "stopped score 3.000 at most 20 % of good parts score as high Crack test/ crack/ 1.png" in text
    assert text.index("Missed defects") < text.index("False alarms Good") < text.index("Random sample")


def test_the_worst_pictures_come_first() -> None:
    rows = judged(good=[2.1, 9.0], bad=[1.5, 0.5])
    pictures = [picture(row, why) for row, why in zip(rows, ["false alarm"] * 2 + ["miss"] * 2, strict=True)]
    names = re.findall(r'alt="Photograph ([^"]*)"', render(SUMMARY, [result(rows, pictures=pictures)]))
    assert names == [rows[3].image, rows[2].image, rows[1].image, rows[0].image]


def test_a_score_is_told_from_the_threshold() -> None:
    section = report._section(result(judged(good=[1.0], bad=[1.99999])))
    assert section.score(1.99999) != section.score(2.0)
    assert report._section(result(judged(good=[1.0], bad=[3.0]))).score(2.0) == "2.000"


def test_no_bar_stands_on_both_sides_of_the_threshold() -> None:
    rng = np.random.default_rng(3)
    for threshold in (0.3, 1 / 3, 17.1):
        good, bad = rng.random(200), rng.random(300) * 30
        bad[:5] = threshold
        chart = report._histogram(good, bad, np.array([]), threshold)
        assert chart is not None and chart.threshold is not None
        for panel, scores in zip(chart.panels, (good, bad), strict=True):
            heights = dict.fromkeys((False, True), 0.0)
            for left, _, height in panel.bars:
                heights[left > chart.threshold - 1e-6] += height * panel.peak / 100
            assert round(heights[True]) == (scores >= threshold).sum()
            assert round(heights[False]) == (scores < threshold).sum()


def test_curves_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(4)
    good, bad = rng.integers(0, 12, 40) / 4, rng.integers(4, 20, 60) / 4
    labels, scores = np.repeat([0, 1], [40, 60]), np.concatenate([good, bad])
    roc, precision_recall = report._curves(good, bad, 2.0)
    assert roc is not None and precision_recall is not None
    x, y = np.array([point.split(",") for point in roc.points.split()], dtype=float).T
    assert np.trapezoid(y, x) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=2e-3)
    assert report._auroc(good, bad) == pytest.approx(metrics.roc_auc_score(labels, scores))
    x, y = np.array([point.split(",") for point in precision_recall.points.split()], dtype=float).T
    assert np.trapezoid(y, x) == pytest.approx(metrics.average_precision_score(labels, scores), abs=2e-3)
    assert roc.working_point == ((good >= 2).mean(), (bad >= 2).mean())
    assert precision_recall.working_point == ((bad >= 2).mean(), (bad >= 2).sum() / (scores >= 2).sum())


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.987, "98.7 %"), (0.5, "50 %"), (0.9999, "> 99.9 %"), (0.00001, "< 0.1 %")],
)
def test_percentages_never_round_to_all_or_nothing(fraction: float, text: str) -> None:
    assert report._percent(fraction).replace("\u00a0", " ") == text


def test_the_interval_is_wilsons() -> None:
    assert report._likely(0, 20).replace("\u00a0", " ") == "at most 16.1 %"
    assert report._likely(63, 63).replace("\u00a0", " ") == "at least 94.3 %"
    assert report._likely(35, 40).replace("\u00a0", " ") == "between 73.9 % and 94.5 %"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.085, "85 ms"), (12.34, "12.3 s"), (192, "3 min 12 s"), (3900, "1 h 05 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert report._duration(seconds) == text


def test_names_are_escaped() -> None:
    nasty = "<script>alert(1)</script>\"'&.png"
    rows = [
        ImageScore(nasty, nasty, 1.0, ""),
        ImageScore("x" + nasty, "good", 1.0),
        ImageScore("y" + nasty, "good", None, nasty),
    ]
    page = render(
        replace(SUMMARY, command=nasty, settings={nasty: nasty}, title=nasty),
        [result(rows, category=nasty, statement=nasty, pictures=[picture(rows[0], "miss")])] * 2,
    )
    assert "<script" not in page
    assert html.escape("<script>") in page
    assert not any(name.startswith("on") for _, attributes in Page(page).tags for name in attributes)


def test_nothing_is_loaded_from_anywhere() -> None:
    page = render(SUMMARY, EDGES["several"] + EDGES["mixed"])
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "url(" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page


def test_many_pictures_stay_below_the_limit() -> None:
    rows = judged(good=[3.0] * 40, bad=[1.0] * 40)
    noise = picture(rows[0], "sample", side=200, seed=1)
    pictures = [replace(noise, image=row.image, why="false alarm" if row.defect == "good" else "miss") for row in rows]
    page = render(SUMMARY, [result(rows, pictures=pictures + [noise] * 10)])
    assert len(page.encode()) < MAX_BYTES
    assert "The pictures were made smaller to keep this file below 10 MB." in page
    assert page.count('alt="Photograph ') == 90


@pytest.mark.parametrize(("share", "dropped"), [(0.8, r"\d × sample"), (0.5, r"8 × sample, \d × false alarm")])
def test_pictures_that_do_not_fit_are_left_out_samples_first(
    share: float, dropped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = judged(good=[3.0] * 4, bad=[1.0] * 4)
    noise = picture(rows[4], "miss", side=64, seed=1)
    results = [result(rows, pictures=[replace(noise, why=why) for why in report.PICTURE_KINDS for _ in range(4)])] * 2
    limit = round(len(render(SUMMARY, results)) * share)
    monkeypatch.setattr(report, "MAX_BYTES", limit)
    monkeypatch.setattr(report, "_smaller", lambda picture: picture)
    page = render(SUMMARY, results)
    assert 0.8 * limit < len(page.encode()) < limit
    assert re.search(f"some were left out to keep this file below 10 MB: {dropped}[.]", page)
    assert page.count("Missed defects") == 2


def test_long_lists_of_broken_files_are_cut() -> None:
    text = Page(render(SUMMARY, [result(judged(good=[1.0], broken=1234))])).text
    assert "1,234 files, not counted above." in text
    assert "… and 1,034 more." in text


def test_write_replaces_the_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "report.html"
    write(path, SUMMARY, [full()])
    page = path.read_text(encoding="utf-8")
    assert page == render(SUMMARY, [full()])
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OutputError, match="disk full"):
        write(path, SUMMARY, [])
    assert path.read_text(encoding="utf-8") == page
    assert list(path.parent.iterdir()) == [path]


WRAPPER = """<!DOCTYPE html><title>waiting</title>
<iframe src="report.html" style="width: 390px; height: 800px; border: 0"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const images = [...page.images];
  images.forEach(image => image.loading = "eager");
  Promise.all(images.map(image => image.decode())).then(() => {
    const root = page.documentElement;
    const wide = [...page.querySelectorAll("body *")].filter(
      element => !element.closest(".scroll, svg") && element.getBoundingClientRect().right > 391);
    const loads = page.defaultView.performance.getEntriesByType("resource").filter(
      load => !load.name.startsWith("data:"));
    document.title =
      `width ${root.scrollWidth} wide ${wide.length} images ${images.length} loads ${loads.length}`;
  });
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="chromium is not on PATH")
def test_a_phone_shows_it_without_scrolling_sideways(tmp_path: Path) -> None:
    long = "a_rather_long_name_for_a_folder_without_any_spaces"
    rows = [replace(row, image=f"{long}/{long}/{row.image}") for row in MIXED]
    pictures = [picture(row, why) for row, why in zip(rows[4:7], report.PICTURE_KINDS, strict=True)]
    summary = replace(SUMMARY, command=long * 5, settings={long: long}, title=long)
    first = result(rows, category=long, pictures=pictures, statement=long * 2)
    write(tmp_path / "report.html", summary, [first, result([], category="cable")])
    (tmp_path / "wrapper.html").write_text(WRAPPER)
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    flags += " disable-sync hide-scrollbars allow-file-access-from-files enable-logging=stderr v=0"
    flags += f" virtual-time-budget=5000 user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(BROWSER), *(f"--{flag}" for flag in flags.split()), "--dump-dom", (tmp_path / "wrapper.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "<title>width 390 wide 0 images 9 loads 0</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert "Refused to" not in done.stderr
