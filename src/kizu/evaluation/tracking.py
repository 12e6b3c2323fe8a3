"""A finished run, told to Weights & Biases or MLflow, beside TensorBoard.

Both follow their own environment variables. WANDB_MODE=offline keeps a run on this machine, in ./wandb; MLflow writes
to ./mlruns unless MLFLOW_TRACKING_URI names a server.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kizu.errors import require

__all__ = ["SERVICES", "Service", "Told", "check", "tell"]

log = logging.getLogger("kizu")
Service = Literal["wandb", "mlflow"]
SERVICES: tuple[Service, ...] = get_args(Service)


@dataclass(frozen=True)
class Told:
    """What there is to tell of a run."""

    project: str
    group: str
    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float | None]]  # of each category
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(
        default_factory=dict
    )  # of each category, a value a round


def check(services: Sequence[Service]) -> None:
    """Raise `MissingExtra` for a service whose package is not installed."""
    for service in services:
        require(service)


def tell(services: Sequence[Service], told: Told, key: str | None = None) -> None:
    """Write a run to each service. A service that fails is named in the log; the results are on disk all the same."""
    for service in services:
        try:
            if service == "wandb":
                _wandb(told, key)
            else:
                _mlflow(told)
        except Exception as error:  # their clients raise anything
            hint = "; WANDB_MODE=offline keeps the run on this machine" if service == "wandb" else ""
            log.warning("%s could not be told of the run (%s: %s)%s", service, type(error).__name__, error, hint)


def _wandb(told: Told, key: str | None) -> None:
    wandb: Any = require("wandb")
    if key:
        os.environ["WANDB_API_KEY"] = key
    about = {"project": told.project, "group": told.group, "name": told.name, "config": dict(told.settings)}
    settings = wandb.Settings(silent=True)
    with wandb.init(**about, settings=settings) as run:
        for number in range(max((len(values) for values in _curves(told).values()), default=0)):
            run.log({name: values[number] for name, values in _curves(told).items() if number < len(values)})
        run.summary.update(_metrics(told))


def _mlflow(told: Told) -> None:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = "file:./mlruns"
    if os.environ["MLFLOW_TRACKING_URI"].startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow: Any = require("mlflow")
    mlflow.set_experiment(told.project)
    with mlflow.start_run(run_name=told.name, tags={"group": told.group}):
        mlflow.log_params(dict(told.settings))
        for name, values in _curves(told).items():
            for number, value in enumerate(values, 1):
                mlflow.log_metric(name, value, step=number)
        mlflow.log_metrics(_metrics(told))


def _curves(told: Told) -> dict[str, Sequence[float]]:
    return {f"{category}/{name}": v for category, curves in told.curves.items() for name, v in curves.items()}


def _metrics(told: Told) -> dict[str, float]:
    pairs = ((f"{category}/{name}", v) for category, found in told.metrics.items() for name, v in found.items())
    return {name: value for name, value in pairs if value is not None}
