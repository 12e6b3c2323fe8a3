"""A package beside kizu: its method, backbone and metric are used as kizu's own, without a fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import kizu
from kizu.testing import photograph
from processes import python

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example, installed."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "source"  # the build writes beside it
    source.mkdir()
    for name in ("pyproject.toml", "kizu_mean_image.py"):
        (source / name).write_text((EXAMPLE / name).read_text())
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder / "packages")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return folder / "packages"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, seeds, spot in (("good", range(12), False), ("bad", range(50, 53), True)):
        (folder / name).mkdir()
        for seed in seeds:
            Image.fromarray(photograph(seed, spot)).save(folder / name / f"{seed}.png")
    return folder


def run(packages, *words, folder=None, code=0):
    """The output of a Python that sees these packages too."""
    paths = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    done = python(*words, cwd=folder, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def command(packages, *words, **how):
    return run(packages, "-m", "kizu", *words, **how)


@pytest.mark.parametrize("name", ["pyproject.toml", "kizu_mean_image.py", "test_mean_image.py"])
def test_the_documents_show_the_example_as_it_is(name):
    text = (EXAMPLE / name).read_text()
    assert f"\n{text}```\n" in PAGE.read_text()
    assert len(text.splitlines()) <= 80


@pytest.mark.slow
def test_the_example_passes_its_own_test(installed, tmp_path):
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
    run(installed, "-m", "pytest", *options, EXAMPLE / "test_mean_image.py", folder=tmp_path)


def test_the_commands_know_the_method(installed, photos, tmp_path):
    assert "mean_image   Mean image: a pixel is compared" in command(installed, "train", "--help")
    assert "--floor" in command(installed, "train", "mean_image", "--help")
    command(installed, "train", "mean_image", photos, "--size", "64", "--name", "first", folder=tmp_path)
    results = tmp_path / "results" / "project" / "group" / "first"
    model = next(path for path in (results / "models").iterdir())
    header, row, *_ = (results / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["caught"] == "1.000000"
    assert "caught" in (results / "report.html").read_text()
    assert "mean_image" in command(installed, "info", model)
    command(installed, "export", model, "--to", "onnx", "--output", tmp_path / "exported")
    printed = command(installed, "predict", tmp_path / "exported", photos / "bad", "--json", "--quiet")
    assert [row["verdict"] for row in json.loads(printed)] == ["stop"] * 3


def test_an_exported_model_needs_no_plugin(installed, photos, tmp_path):
    code = (
        "import kizu, pathlib; from kizu.export import export; from kizu_mean_image import MeanImage; "
        f"export(MeanImage(size=64, floor=3).fit({str(photos)!r}), 'exported')"
    )
    run(installed, "-c", code, folder=tmp_path)
    model = kizu.load(tmp_path / "exported")
    assert model.predict(photograph(99, spot=True)).is_anomalous
    assert model.config.floor == 3 and model.config.size == (64, 64)


def test_a_model_whose_plugin_is_missing_says_so(installed, photos, tmp_path):
    code = f"from kizu_mean_image import MeanImage; MeanImage(size=64).fit({str(photos)!r}).save('model')"
    run(installed, "-c", code, folder=tmp_path)
    with pytest.raises(kizu.KizuError, match="mean_image is not a method that is installed"):
        kizu.load(tmp_path / "model")


@pytest.mark.slow
def test_a_backbone_from_outside(installed, photos, tmp_path):
    code = "import torch, kizu_mean_image as m; torch.save(m.shufflenet(False).state_dict(), 'weights.pth')"
    run(installed, "-c", code, folder=tmp_path)
    options = ["--size", "64", "--backbone", "shufflenet", "--weights", "weights.pth", "--coreset", "0.2"]
    command(installed, "train", "patchcore", photos, *options, "--name", "a", folder=tmp_path)
    model = next((tmp_path / "results" / "project" / "group" / "a" / "models").iterdir())
    command(installed, "export", model, "--to", "onnx", "--output", tmp_path / "exported")
    sentence = command(installed, "train", "patchcore", photos, *options, "--layers", "stage9", folder=tmp_path, code=2)
    assert "shufflenet has no layer stage9" in sentence and "stage3" in sentence


@pytest.fixture
def broken(tmp_path):
    """A package whose plug-ins cannot be used."""
    about = tmp_path / "packages" / "broken-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[kizu.detectors]\nfails = broken:Method\nno_detector = json:loads\n"
        "[kizu.backbones]\nfails = broken:network\n[kizu.metrics]\nfails = broken:metric\nno_number = json:loads\n"
    )
    (tmp_path / "packages" / "broken.py").write_text("raise ValueError('half\\nfinished')\n")
    return tmp_path / "packages"


def test_a_broken_plugin_is_a_sentence_and_stops_nothing_else(broken, photos, tmp_path):
    assert "fails" in command(broken, "train", "--help")
    sentence = command(broken, "train", "fails", photos, code=2)
    assert sentence == "kizu: The plug-in fails cannot be loaded from broken:Method (ValueError: half)\n"
    sentence = command(broken, "train", "no_detector", photos, code=2)
    assert "json:loads should be a class derived from kizu.Detector" in sentence and "Traceback" not in sentence
    options = ["--size", "64", "--coreset", "0.2", "--name", "a"]
    sentence = command(broken, "train", "patchcore", photos, *options, "--backbone", "fails", code=2)
    assert "broken:network (ValueError: half)" in sentence and "Traceback" not in sentence
    command(broken, "train", "patchcore", photos, *options, folder=tmp_path)
    results = tmp_path / "results" / "project" / "group" / "a"
    header, row, *_ = (results / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["fails"] == "n/a"
    report = (results / "report.html").read_text()
    assert "broken:metric (ValueError: half)" in report and "json:loads fails (TypeError" in report
