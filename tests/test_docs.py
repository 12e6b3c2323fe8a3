"""Every snippet in the README and the documents runs."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from test_detectors import part

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def snippets(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workshop(tmp_path):
    """The folders that the documents speak of."""
    for number in range(10):
        for folder in ("photos/good", "parts/good"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(part(number)).save(tmp_path / folder / f"{number}.png")
    for number in range(3):
        for folder in ("photos/bad", "new"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(part(50 + number, spot=True)).save(tmp_path / folder / f"{number}.png")
    Image.fromarray(part(90)).save(tmp_path / "part.png")
    return tmp_path


LONG = {"verdicts.md", "metrics.md", "efficientad.md", "runtime.md"}  # commands that are for `make test-all`


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG else ())
        for page in PAGES
        if snippets(page, "console")
    ],
)
def test_commands_run(page, workshop):
    for block in snippets(page, "console"):
        for line in block.splitlines():
            assert line.startswith("$ kizu "), line
            command = [Path(sys.executable).with_name("kizu"), *shlex.split(line)[2:]]
            done = subprocess.run(command, cwd=workshop, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, workshop):
    for block in snippets(page, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=workshop, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_are_named_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for module in re.findall(r"^  {0,4}(\w+\.py)", text, re.MULTILINE):
        assert list((ROOT / "src").rglob(module)), module


def test_the_drawing_shows_every_room():
    drawing = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "kizu").glob("*.py"):
        assert path.name in drawing, f"{path.name} is not in docs/architecture.md"


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_published_table_is_the_measured_one(page):
    text = (ROOT / page).read_text()
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / "accuracy.csv").read_text().splitlines()):
        values = (row[key] for key in ("image_auroc", "pixel_auroc", "au_pro"))
        cells = " | ".join(value if value == "n/a" else f"{float(value):.4f}" for value in values)
        assert f"| {row['category'].replace('_', ' ')} | {cells} |" in text, row["category"]
