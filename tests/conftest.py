"""Where real images lie, and what else several test files share."""

import os
import shutil
from pathlib import Path

import pytest

import kizu
from teachers import TEACHER, tiny

DATA = Path(os.environ.get("KIZU_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


LONGEST = (
    "docs",
    "ray",
    "watch",
    "page",
    "export",
    "captures",
    "choice",
    "writing",
    "zones",
    "alignment",
    "embedded",
    "cli",
    "drawing",
)


def pytest_collection_modifyitems(items):
    """The files that take longest begin first, so that nobody waits for them at the end."""
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.fixture(scope="session", autouse=True)
def a_teacher():
    """EfficientAD needs one wherever all methods are tested."""
    TEACHER.parent.mkdir()
    yield tiny(TEACHER)
    shutil.rmtree(TEACHER.parent)


@pytest.fixture(scope="session")
def patchcore():
    """A small fitted PatchCore."""
    from test_detectors import GOOD, SETTINGS

    return kizu.PatchCore(**SETTINGS["patchcore"]).fit(GOOD)


@pytest.fixture(scope="session")
def exported_folder(patchcore, tmp_path_factory):
    """The same, exported: tests that change it copy it first."""
    pytest.importorskip("onnxscript")
    from kizu.export import export

    return export(patchcore, tmp_path_factory.mktemp("shared") / "exported").folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inspection images (see KIZU_TEST_DATA)."""
    if not (DATA / "mvtec_ad").is_dir():
        pytest.skip(f"no real images at {DATA}: set KIZU_TEST_DATA to a folder with mvtec_ad/ in it")
    return DATA
