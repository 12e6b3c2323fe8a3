"""The pictures in the documents: what a detector that saw only good parts says of rendered defects, and where.

python benchmarks/picture.py
python benchmarks/picture.py --page CHROMIUM         the page in that browser; needs playwright's Python package
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import kizu
from kizu.data import demo, image

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CHOICE = {"scratch": 9, "dent": 2, "stain": 1, "missing_hole": 0}
WINDOW = {"width": 1280, "height": 900}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", metavar="CHROMIUM")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = demo.render(scratch)
        detector = kizu.PatchCore(thumbnails=True).fit(folder / "train" / "good")
        files = [folder / "test" / defect / f"{index:03d}.jpg" for defect, index in CHOICE.items()]
        if options.page:
            page(detector.save(Path(scratch, "flange-line")), files, options.page)
            return
        photos = np.concatenate([image.read(file) for file in files], axis=1)
        overlays = np.concatenate([detector.predict(file).overlay() for file in files], axis=1)
    image.write(IMAGES / "flange.jpg", np.concatenate([photos, overlays]))


def page(model: Path, files: list[Path], chromium: str) -> None:
    """The inspection page after these files."""
    from playwright.sync_api import sync_playwright

    command = [Path(sys.executable).with_name("kizu"), "serve", model, "--port", "0", "--store", model.parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as started:
        try:
            assert server.stdout is not None
            url = next(word for word in server.stdout.readline().split() if word.startswith("http"))
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            shown = browser.new_page(viewport=WINDOW)
            shown.goto(url)
            for number, file in enumerate(files, 1):
                shown.locator("#files").set_input_files(file)
                shown.locator("#strip li").nth(number - 1).wait_for()
            shown.wait_for_timeout(1000)
            shown.screenshot(path=str(IMAGES / "page.jpg"), type="jpeg", quality=85)
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
