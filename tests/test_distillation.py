"""Teachers made from a backbone: the loss, the statistics, interruption."""

import csv

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch.nn import functional as F

import kizu
from kizu.cli.main import cli
from kizu.config import DistillationConfig
from kizu.data import image
from kizu.data.streams import Texture
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.distillation import Source, distill, distillation_loss
from kizu.detectors.efficientad.networks import PDN
from kizu.features import backbone
from kizu.features.patch_features import PatchFeatures

QUICK = {"side": 64, "batch_size": 2, "steps": 4, "measured": 8}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(6):
        image.write(folder / f"{number % 2}" / f"{number}.png", Texture(number).read()[0][: 200 + 20 * number])
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_the_loss_is_the_mean_squared_difference_to_the_pooled_layers_in_their_units():
    torch.manual_seed(0)
    network = backbone.create("efficientnet_lite2")
    source = Source(network, PatchFeatures(1, None, 384), torch.randn(384), torch.rand(384) + 0.5)
    photos = torch.randint(0, 256, (2, 3, 128, 128)).float()
    student = PDN("s").eval().requires_grad_(False)
    with torch.inference_mode():
        fine, coarse = network(photos)
        stacked = torch.cat([fine, F.interpolate(coarse, fine.shape[2:], mode="bilinear")], 1).numpy()
        channels = stacked.shape[1]
        target = np.empty((2, 384, 16, 16))
        for channel in range(384):
            start, stop = channel * channels // 384, -(-(channel + 1) * channels // 384)
            target[:, channel] = stacked[:, start:stop].mean(1)
        target = (target - source.mean.numpy()[:, None, None]) / source.std.numpy()[:, None, None]
        small = photos.reshape(2, 3, 64, 2, 64, 2).mean((3, 5)) / 255
        small = (small - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None, None
        ]
        answers = student(F.pad(small, (14, 18, 14, 18)))
        assert answers.shape == (2, 384, 16, 16)
        expected = ((answers.numpy() - target) ** 2).mean()
        assert float(distillation_loss(student, source, photos)) == pytest.approx(expected, rel=1e-4)


def test_a_killed_distillation_goes_on_to_the_same_teacher(photographs, tmp_path, monkeypatch):
    config = DistillationConfig(**QUICK, crops=True, cosine=True, average=0.9, learning_rate=1e-3)
    whole = distill(photographs, config, tmp_path / "whole")
    monkeypatch.setattr("kizu.features.training_state.EVERY", 0)

    def kill(stage, done, total):
        if (stage, done) == ("Distilling", 2):
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        distill(photographs, config, parts, progress=kill)
    with pytest.raises(kizu.OptionError, match="`resume` it"):
        distill(photographs, config, parts)
    with pytest.raises(kizu.ModelError, match="other steps"):
        distill(photographs, config.model_copy(update={"steps": 5}), parts, resume=True)
    resumed = distill(photographs, config, parts, resume=True)
    assert resumed.read_bytes() == whole.read_bytes()
    assert resumed.with_suffix(".csv").read_text() == whole.with_suffix(".csv").read_text()
    assert not resumed.with_suffix(".training").exists()
    with pytest.raises(kizu.OptionError, match="`overwrite` it"):
        distill(photographs, config, parts, resume=True)


def test_the_command_makes_a_teacher_of_either_size_and_measures_the_channels_once(photographs, tmp_path):
    def command(size, *more):
        settings = [word for key, value in QUICK.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        output = ["--output", str(tmp_path / "teachers")]
        arguments = ["distill", str(photographs), "--teacher-for", "efficientad", "--size", size, *settings, *output]
        return CliRunner().invoke(cli, [*arguments, "--from", "efficientnet_lite2", *more])

    done = command("s")
    assert done.exit_code == 0, done.output
    assert "step 4 of 4: loss" in done.output and "broken.jpg" in done.output
    assert command("m", "-q").exit_code == 0
    folder = tmp_path / "teachers"
    assert len(list(folder.glob("statistics-*.safetensors"))) == 1
    rows = list(csv.DictReader((folder / "efficientad-s.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and all(0 < float(row["loss"]) < 10 for row in rows)
    with safe_open(folder / "efficientad-s.safetensors", "pt") as file:
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
    for size in ("s", "m"):
        network, about = teacher.load(folder, size)
        assert network.size == size and network.dimension == 384 and about["backbone"] == "efficientnet_lite2"
    assert (folder / "efficientad-s.safetensors").stat().st_size < 8e6


@pytest.mark.slow
def test_distilling_brings_the_teacher_nearer_to_the_backbone(photographs, tmp_path):
    config = DistillationConfig(**{**QUICK, "steps": 40}, learning_rate=1e-3)
    target = distill(photographs, config, tmp_path)
    losses = [float(row["loss"]) for row in csv.DictReader(target.with_suffix(".csv").read_text().splitlines())]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])


def test_sentences_for_what_cannot_be(tmp_path):
    with pytest.raises(kizu.DataError, match="no folder"):
        distill(tmp_path / "nowhere", DistillationConfig(), tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(kizu.DataError, match="None of the 1 photographs"):
        distill(tmp_path, DistillationConfig(**QUICK), tmp_path)
    done = CliRunner().invoke(cli, ["distill", str(tmp_path), "--side", "100"])
    assert isinstance(done.exception, kizu.OptionError) and "`side=100`" in str(done.exception)
