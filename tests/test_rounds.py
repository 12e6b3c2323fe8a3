"""Runs of a method that learns in rounds: curves, the oracle, a kill in the middle of training, one-class CIFAR-10."""

import signal
import subprocess
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kizu.config import PatchCoreConfig, SimpleNetConfig
from kizu.data import image
from kizu.data.dataset import find
from kizu.errors import OptionError
from kizu.evaluation.experiment import RunOptions, train
from kizu.evaluation.metrics import image_metrics, pixel_metrics
from kizu.evaluation.oracle import Oracle
from processes import kizu
from test_cli import KIZU, factory, table

TINY = (
    "--size",
    "64",
    "--sampled",
    "1",
    "--batch_size",
    "2",
    "--gan_epochs",
    "1",
    "--dsc_hidden",
    "64",
    "--dsc_lr",
    "2e-3",
)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    data = factory(folder / "data") / "disc"
    options = ("--meta_epochs", "6", "--oracle", "--save_segmentation_images", "--gpu", "-1", "--num_workers", "1")
    output = kizu("train", "simplenet", data, "--output", folder / "results", "--name", "x", *TINY, *options)
    return folder / "results" / "project" / "group" / "x", output.stdout


def test_loss_p_true_and_p_fake_go_to_the_log_and_to_tensorboard(watched):
    run, _ = watched
    events = EventAccumulator(str(run / "tensorboard" / "disc")).Reload()
    for name in ("loss", "p_true", "p_fake"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        assert all(np.isfinite(point.value) for point in points)
    assert "round 6: loss" in (run / "log.txt").read_text()


def test_what_an_oracle_chose_stands_beside_the_rest_and_is_marked(watched):
    run, printed = watched
    row = table(run / "results.csv")[0]
    assert 1 <= int(row["oracle_round"]) <= 6
    assert float(row["oracle_image_auroc"]) >= float(row["image_auroc"])
    page = (run / "report.html").read_text()
    assert "Chosen on the test images (oracle)" in page and "Oracle: of 6 rounds" in page and "Oracle" in printed
    assert len(list((run / "segmentation_images" / "disc").glob("*.png"))) == 8
    assert image.read(next((run / "segmentation_images" / "disc").glob("*.png"))).shape == (96, 96, 3)


def test_an_oracle_changes_nothing_of_the_model(tmp_path):
    data = factory(tmp_path / "data")
    config = SimpleNetConfig(size=64, meta_epochs=4, sampled=1, gan_epochs=1, dsc_hidden=64)
    options = [RunOptions(name=str(oracle), oracle=oracle) for oracle in (False, True)]
    runs = [train("simplenet", config, find(data), tmp_path, each)[0] for each in options]
    for name in ("model.safetensors", "model.json"):
        one, two = (run.model("disc") / name for run in runs)
        assert one.read_bytes() == two.read_bytes()
    assert "oracle" not in (runs[0].folder / "results.csv").read_text()


def test_the_oracle_keeps_the_round_with_the_best_image_and_then_pixel_auroc(tmp_path):
    import kizu as package

    data = find(factory(tmp_path / "data"))
    test = data.select(split="test")
    detector = package.SimpleNet(size=64, meta_epochs=5, sampled=1, gan_epochs=1, dsc_hidden=64)
    oracle = Oracle(detector, test)
    seen = []

    def look(graph, number):
        oracle.measure_round(graph, number)
        judged = list(detector.judge(test))
        labels = [sample.is_anomalous for sample, _ in judged]
        image_value = image_metrics([p.score for _, p in judged], labels)[0]["image_auroc"]
        masks = [sample.mask((96, 96)) for sample, _ in judged]
        seen.append((image_value, pixel_metrics([p.anomaly_map for _, p in judged], masks)[0]["pixel_auroc"]))

    detector.fit(data.select(split="train"), after_round=look)
    assert oracle.round == 1 + max(range(5), key=lambda number: (seen[number], -number))
    assert oracle.best == pytest.approx(max(seen))


def test_methods_without_rounds_have_no_oracle(tmp_path):
    data = find(factory(tmp_path / "data"))
    with pytest.raises(OptionError, match="does not learn in rounds"):
        train("patchcore", PatchCoreConfig(), data, tmp_path / "results", RunOptions(oracle=True))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("options", [("--mix_noise", "0"), ("--mix-noise", "0"), ("--gpu", "7")])
def test_wrong_values_are_one_sentence(options, tmp_path):
    data = factory(tmp_path / "data") / "disc"
    done = kizu("train", "simplenet", data, *TINY, *options, code=2, cwd=tmp_path)
    assert options[0].replace("_", "-") in done.stderr and len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_training_that_was_killed_goes_on_to_the_same_model(ending, tmp_path):
    data = factory(tmp_path / "data") / "disc"
    command = ["train", "simplenet", data, "--output", tmp_path / "results", *TINY, "--meta_epochs", "60"]
    run = tmp_path / "results" / "project" / "group" / "killed"
    process = subprocess.Popen(
        [KIZU, *map(str, command), "--name", "killed"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint, log = run / "unfinished" / "disc.checkpoint", run / "log.txt"
    while not (checkpoint.exists() and "round 1:" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors and not (run / "models").exists()
    kizu(*command, "--name", "killed", "--resume")
    told = log.read_text()
    assert told.count("round 1:") == told.count("round 60:") == 1 and not (run / "unfinished").exists()
    config = SimpleNetConfig(size=64, sampled=1, gan_epochs=1, batch_size=2, dsc_hidden=64, dsc_lr=2e-3, meta_epochs=60)
    whole, _ = train("simplenet", config, find(data), tmp_path / "whole")
    one, two = (folder / "models" / "disc" / "model.safetensors" for folder in (run, whole.folder))
    assert one.read_bytes() == two.read_bytes()


def test_one_class_cifar_10_runs_from_its_files(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "batches.meta.txt").write_text("airplane\nautomobile\nbird\ncat\n")
    for name, count in (*((f"data_batch_{number}", 8) for number in range(1, 6)), ("test_batch", 20)):
        labels = np.arange(count) % 2 * 3  # airplanes are dark, cats are bright
        pixels = rng.integers(0, 60, (count, 3072)) + 150 * (labels[:, None] > 0)
        records = np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8)
        (tmp_path / "cifar" / f"{name}.bin").write_bytes(records.tobytes())
    data = find(tmp_path / "cifar", categories=("airplane",))
    config = SimpleNetConfig(size=32, meta_epochs=10, sampled=1, gan_epochs=1, dsc_hidden=64, batch_size=4, hflip=0.5)
    _, results = train("simplenet", config, data, tmp_path / "results")
    assert results[0].train_images == 20 and results[0].metrics["image_auroc"] > 0.85
