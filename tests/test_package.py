"""What somebody gets who installs kizu: its version, its files, its types."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import kizu

ROOT = Path(__file__).parents[1]

SCRIPT = """
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kizu
from kizu.export import export


def judge(detector: kizu.Detector, image: str | Path) -> tuple[float, bool, npt.NDArray[np.float32]]:
    prediction: kizu.Prediction = detector.predict(image)
    why = [evidence.region for evidence in prediction.why()]
    assert all(isinstance(number, int) for number in why)
    return prediction.score, prediction.is_anomalous, prediction.anomaly_map


def learn(folder: str) -> kizu.Inspector:
    methods: list[kizu.Detector] = [kizu.PatchCore(size=128), kizu.SimpleNet(), kizu.EfficientAD(), kizu.PUAD()]
    zones: tuple[kizu.Zone, ...] = kizu.read_zones(["all"], ["label=label.png"])
    fitted: kizu.PatchCore = kizu.PatchCore(coreset=0.1, zones=zones).fit(folder, skip_bad=True)
    choice: kizu.Choice = kizu.choose(folder, minutes=2)
    kizu.PatchCore(choice.config).fit(folder)
    print(choice.sentence, [trial.found for trial in choice.trials])
    judge(fitted, Path(folder) / "0.png")
    methods[0].save("model")
    exported: kizu.Inspector = export(fitted, "line", "onnx")
    for photo, outcome in exported.judge([kizu.Photo("a.png")]):
        name: str = photo.name
        if isinstance(outcome, kizu.BadImage):
            print(name, outcome.reason)
    return exported


def main() -> int:
    try:
        learn("parts")
        threshold: float = kizu.load("line").threshold.value
        print(kizu.__version__.split("."), threshold)
    except (kizu.OptionError, kizu.DataError, kizu.ModelError, kizu.MissingExtra, kizu.OutputError) as error:
        field: str | None = error.field
        print(error, field)
    except kizu.KizuError:
        return 2
    return 0
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that would be published."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, folder], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_version_is_written_once(wheel):
    assert wheel.name == f"kizu-{kizu.__version__}-py3-none-any.whl"
    assert f"\n## {kizu.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {kizu.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "kizu").rglob("*") if path.is_file()}
    package = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert package == {name for name in files if "__pycache__" not in name}
    assert "kizu/py.typed" in package


def test_the_script_has_every_public_name():
    assert set(re.findall(r"kizu\.(\w+)", SCRIPT)) - {"export"} == set(kizu.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("torch", ["skip", "normal"])
def test_a_users_strict_type_checker_understands_every_public_name(torch, wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\n[mypy-torch.*,torchvision.*]\nfollow_imports = {torch}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", tmp_path / "venv" / "bin" / "python", "script.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
    )
    assert "Success: no issues found" in done.stdout, done.stdout + done.stderr
