"""Runs told to Weights & Biases and MLflow, without a network."""

import os
import sys
from pathlib import Path

import pytest

import kizu
from kizu.evaluation import experiment
from kizu.evaluation.tracking import RunRecord, log_run
from processes import kizu as command
from test_cli import factory, table


def test_a_run_is_told_to_both_and_kept_on_this_machine(tmp_path):
    data = factory(tmp_path / "data") / "disc"
    words = ["train", "simplenet", data, "--size", "64", "--meta-epochs", "2", "--dsc-hidden", "32", "-q"]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = command(*words, "--track", "wandb", "--track", "mlflow", cwd=tmp_path, env=environment)
    assert "could not log" not in done.stderr, done.stderr
    finished = tmp_path / "results" / "project" / "group" / "run"
    value = table(finished / "results.csv")[0]["image_auroc"]
    kept = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 1 and b"disc/image_auroc" in kept[0].read_bytes()
    metrics = next((tmp_path / "mlruns").rglob("metrics/disc"))
    assert float((metrics / "image_auroc").read_text().split()[1]) == pytest.approx(float(value), abs=1e-6)
    assert len((metrics / "loss").read_text().splitlines()) == 2
    assert (metrics.parents[1] / "params" / "meta_epochs").read_text() == "2"


def test_a_service_that_fails_costs_no_results(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    log_run(["mlflow"], RunRecord("project", "group", "run", {}, {"disc": {"image_auroc": 1.0, "pixel_auroc": None}}))
    assert "mlflow could not log the run" in caplog.text


def test_a_missing_service_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(kizu.KizuError, match=r"pip install 'kizu\[wandb\]'"):
        experiment.train(
            "patchcore", kizu.PatchCore().config, None, Path(tmp_path), experiment.RunOptions(track=["wandb"])
        )
