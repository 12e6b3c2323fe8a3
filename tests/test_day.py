"""kizu report: the verdicts that other commands keep, on a page."""

import json
import re
import shutil
from datetime import datetime, timedelta

import numpy as np
import pytest

import kizu
from kizu.evaluation.pages.day import Judged, day_page, drift_of, finding
from kizu.inference.verdict import Verdict
from processes import kizu as command
from services import encoded, small_model
from test_detectors import part


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where nine good parts, a defective one and a damaged file were judged in every way."""
    place = tmp_path_factory.mktemp("day")
    model = small_model(place / "disc")
    (place / "new").mkdir()
    for seed in range(9):
        (place / "new" / f"{seed}.png").write_bytes(encoded(part(100 + seed)))
    (place / "new" / "odd.png").write_bytes(encoded(part(1, spot=True)))
    (place / "new" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    watch = ("watch", "new", "--model", model, "--once", "--settle", "0", "--patience", "0", "-q")
    command(*watch, "--store", "kept", "--csv", "watched.csv", "--move-bad", "aside", code=1, cwd=place)
    shutil.copytree(place / "aside", place / "new", dirs_exist_ok=True)
    said = command("predict", model, "new", "--csv", "predicted.csv", "--json", code=1, cwd=place).stdout
    (place / "predicted.json").write_text(said)
    return place


SOURCES = ["verdicts.jsonl", "kept", "kept/verdicts.sqlite", "watched.csv", "predicted.csv", "predicted.json"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_record_of_verdicts_gives_the_same_page(place, source):
    said = command("report", source, "--photos", "new", "--photos", "aside", "--output", "day.html", cwd=place).stdout
    page = (place / "day.html").read_text()
    verdicts = [json.loads(line) for line in (place / "verdicts.jsonl").read_text().splitlines()]
    stopped = [verdict["image"] for verdict in verdicts if verdict["verdict"] == "stop"]
    assert "odd.png" in stopped
    assert f"{len(stopped)} of 10 parts w" in said
    assert ("1 photograph could not be judged" in said) is not source.startswith("kept")  # errors are not kept there
    assert all(name in page for name in stopped)
    assert page.count("<img src=") == 10  # those stopped and those that are doubtful
    assert "no photograph any more" not in page


def test_photographs_that_are_gone_or_others_are_not_shown(place, tmp_path):
    shutil.copy(place / "verdicts.jsonl", tmp_path)
    for seed in range(9):
        (tmp_path / f"{seed}.png").write_bytes(encoded(part(500 + seed)))  # the names of those judged
    command("report", "verdicts.jsonl", cwd=tmp_path)
    page = (tmp_path / "day.html").read_text()
    assert page.count("<img src=") == 0
    assert "Of 10 parts there is no photograph any more" in page


def test_a_model_adds_its_promise_and_the_drift(place):
    command("report", "kept", "--model", "disc", "--output", "day.html", cwd=place)
    page = (place / "day.html").read_text()
    assert kizu.load(place / "disc").threshold.statement in page
    assert "Do the parts still look the same?" in page


def test_days(place):
    today = datetime.now().astimezone()
    earlier = f"{today - timedelta(days=9):%Y-%m-%d}"
    assert "no verdicts between" in command("report", "kept", "--day", earlier, code=2, cwd=place).stderr
    said = command("report", "kept", "--day", f"{today + timedelta(days=1):%Y-%m-%d}", "--days", "9", cwd=place).stdout
    assert "in the days to" in said
    assert "of 10 parts" in said


@pytest.mark.parametrize(
    ("source", "content", "words"),
    [
        ("gone.csv", None, "No such file"),
        ("other.csv", "a,b\n1,2\n", "no table of verdicts"),
        ("cut.csv", "image,verdict,score,p_value,threshold\nx.png,maybe,1,1,1\n", "no table of verdicts"),
        ("other.json", "[1, 2]", "nothing that kizu predict prints"),
        ("deep.json", "[" * 100_000, "nothing that kizu predict prints"),
        ("other.jsonl", '{"a": 1}\n', "no verdict of kizu watch"),
        ("empty.jsonl", "", "no verdicts yet"),
        ("other.sqlite", "SQLite format 3\0" + "x" * 4096, "no file of verdicts"),
        (".", None, "no verdicts.sqlite"),
    ],
)
def test_what_holds_no_verdicts_is_told(tmp_path, source, content, words):
    if content is not None:
        (tmp_path / source).write_text(content)
    assert words in " ".join(command("report", source, code=2, cwd=tmp_path).stderr.split())


def test_many_pictures_leave_the_page_small(monkeypatch):
    monkeypatch.setattr("kizu.evaluation.pages.day.MAX_PICTURE_BYTES", 50_000)
    noise = [np.random.default_rng(seed).integers(0, 256, (200, 200, 3), np.uint8) for seed in range(4)]
    verdict = Verdict(image="x.png", verdict="stop", score=2.0, p_value=0.1, threshold=1.0)
    judged = [Judged(verdict, photograph=lambda picture=picture: encoded(picture)) for picture in noise]
    page = day_page(judged, "today", "kizu report")
    pictures = [figure.source for section in page.sections for figure in section.figures if figure.source]
    assert sum(map(len, pictures)) <= 50_000
    assert any(re.match(r"\d pictures were left out", caveat) for caveat in page.caveats)


def test_marks_counts_and_drift_of_nothing():
    verdict = Verdict(image="x.png", verdict="stop", score=2.0, p_value=0.1, threshold=1.0)
    page = day_page([Judged(verdict, mark="good")], "today", "", drift=drift_of([], [1.0, 2.0]))
    assert page.finding == "1 of 1 part was stopped."
    assert "1 of the stopped parts were good" in page.lead
    assert finding([]) == "0 photographs could not be judged."
