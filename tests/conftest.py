"""Where real images lie, and what else several test files share."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("KIZU_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inspection images (see KIZU_TEST_DATA)."""
    if not (DATA / "mvtec_ad").is_dir():
        pytest.skip(f"no real images at {DATA}: set KIZU_TEST_DATA to a folder with mvtec_ad/ in it")
    return DATA
