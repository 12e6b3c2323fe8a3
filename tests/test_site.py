"""The documentation site: every public name is in it, the notebooks run, nothing is fetched from elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kizu
from kizu import config, export, testing

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES = 400_000  # of a notebook with its pictures


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(cell):
    return "".join(cell["source"])


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in kizu.__all__:
        assert name == "__version__" or f"\n::: kizu.{name}\n" in page, name
    for name in export.__all__:
        assert f"\n::: kizu.export.{name}\n" in page, name
    assert f"\n::: kizu.testing.{testing.check_detector.__name__}\n" in page


def test_the_settings_of_every_method_have_a_table():
    page = (ROOT / "docs" / "settings.md").read_text()
    for method in ("PatchCore", "SimpleNet", "EfficientAD", "PUAD", "Distillation"):
        assert f"\n## {method}\n" in page
        assert f"\n<!-- settings: {method}Config -->\n" in page
        assert hasattr(config, f"{method}Config")


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_shows_what_its_cells_gave(path):
    assert path.stat().st_size <= MAX_BYTES
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run make notebooks"
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    for cell in code:
        compile(re.sub(r"^[!%].*", "", text_of(cell), flags=re.MULTILINE), path.name, "exec")
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)", text_of(cell)):
            assert (path.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    commands = Path(sys.executable).parent
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", path, "--output-dir", tmp_path],
        env={**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_other_server(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        html = page.read_text()
        assert not re.search(r"<(script|link|img|iframe|source)\b[^>]*\b(src|href)=[\"']?(https?:)?//", html), page.name
        assert 'class="mermaid"' not in html, f"{page.name}: diagrams are drawn by a script from elsewhere"
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text()), style.name
    settings = (tmp_path / "settings.html").read_text()
    assert "false_alarms=0.02" in settings and "settings: " not in settings
    search = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert {"api.html", "examples/comparing-methods.html"} <= {entry["location"] for entry in search["docs"]}
