"""A finished run, logged with Weights & Biases or MLflow, beside TensorBoard.

Both follow their own environment variables. WANDB_MODE=offline keeps a run on this machine, in ./wandb; MLflow writes
to ./mlruns unless MLFLOW_TRACKING_URI names a server.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kizu.errors import require

__all__ = ["SERVICES", "RunRecord", "Service", "check_services", "log_run"]

log = logging.getLogger("kizu")
Service = Literal["wandb", "mlflow"]
SERVICES: tuple[Service, ...] = get_args(Service)


@dataclass(frozen=True)
class RunRecord:
    """What a service is given of a run."""

    project: str
    group: str
    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float | None]]  # of each category
    # of each category, a value a round
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


def check_services(services: Sequence[Service]) -> None:
    """Raise `MissingExtra` for a service whose package is not installed."""
    for service in services:
        require(service)


def log_run(services: Sequence[Service], record: RunRecord, key: str | None = None) -> None:
    """Write a run to each service. A service that fails is named in the log; the results are on disk all the same."""
    for service in services:
        try:
            if service == "wandb":
                _wandb(record, key)
            else:
                _mlflow(record)
        except Exception as error:  # their clients raise anything
            hint = "; WANDB_MODE=offline keeps the run on this machine" if service == "wandb" else ""
            log.warning("%s could not log the run (%s: %s)%s", service, type(error).__name__, error, hint)


def _wandb(record: RunRecord, key: str | None) -> None:
    wandb: Any = require("wandb")
    if key:
        os.environ["WANDB_API_KEY"] = key
    about = {"project": record.project, "group": record.group, "name": record.name, "config": dict(record.settings)}
    settings = wandb.Settings(silent=True)
    with wandb.init(**about, settings=settings) as run:
        for number in range(max((len(values) for values in _curves(record).values()), default=0)):
            run.log({name: values[number] for name, values in _curves(record).items() if number < len(values)})
        run.summary.update(_metrics(record))


def _mlflow(record: RunRecord) -> None:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = "file:./mlruns"
    if os.environ["MLFLOW_TRACKING_URI"].startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow: Any = require("mlflow")
    mlflow.set_experiment(record.project)
    with mlflow.start_run(run_name=record.name, tags={"group": record.group}):
        mlflow.log_params(dict(record.settings))
        for name, values in _curves(record).items():
            for number, value in enumerate(values, 1):
                mlflow.log_metric(name, value, step=number)
        mlflow.log_metrics(_metrics(record))


def _curves(record: RunRecord) -> dict[str, Sequence[float]]:
    return {f"{category}/{name}": v for category, curves in record.curves.items() for name, v in curves.items()}


def _metrics(record: RunRecord) -> dict[str, float]:
    pairs = ((f"{category}/{name}", v) for category, values in record.metrics.items() for name, v in values.items())
    return {name: value for name, value in pairs if value is not None}
