"""What a server does: a line of JSON an event in its log, and counters in Prometheus' text format."""

import json
import logging
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate

__all__ = ["CONTENT_TYPE", "Counters", "Sample", "log", "log_to_stderr"]

log = logging.getLogger("kizu.serving.service")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

# name → type, help, and of histograms the upper ends of the buckets
METRICS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "kizu_requests_total": ("counter", "Requests answered.", ()),
    "kizu_request_seconds": ("histogram", "Time from a request to its answer.", SECONDS),
    "kizu_verdicts_total": ("counter", "Photographs answered, by verdict; error where one could not be judged.", ()),
    "kizu_cannot_judge_total": ("counter", "Photographs that no promise covers, by reason.", ()),
    "kizu_feedback_total": ("counter", "Photographs that people marked good or bad.", ()),
    "kizu_verdicts_not_kept_total": ("counter", "Verdicts that the history could not take.", ()),
    "kizu_reloads_total": ("counter", "Times that a model was read again, or could not be.", ()),
    "kizu_batch_size": ("histogram", "Photographs that went through a model at once.", SIZES),
    "kizu_queue_length": ("gauge", "Photographs that wait.", ()),
    "kizu_model_loaded_seconds": ("gauge", "When the model was read, in seconds since 1970.", ()),
    "kizu_memory_bytes": ("gauge", "Resident memory of the server.", ()),
}

Labels = tuple[tuple[str, str], ...]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(quiet: bool) -> None:
    """Write a line an event to standard error; with `quiet`, warnings and errors alone.

    Warnings of every package, and what ends a thread, become such lines too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _on_dead_thread


def _on_dead_thread(about: threading.ExceptHookArgs) -> None:
    facts = {"thread": about.thread.name if about.thread else None}
    error = about.exc_value
    log.error("a thread ended", exc_info=error if error is not None else True, extra={"facts": facts})


@dataclass(frozen=True)
class Sample:
    """The value of a gauge when it was asked for."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class _Histogram:
    counts: list[int]
    total: float = 0.0


class Counters:
    """Counters and histograms that threads may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], _Histogram] = {}

    def add(self, name: str, **labels: str) -> None:
        """Count one more."""
        key = name, tuple(labels.items())
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count a value of a histogram."""
        ends = METRICS[name][2]
        with self._lock:
            empty = _Histogram([0] * (len(ends) + 1))
            histogram = self._histograms.setdefault((name, tuple(labels.items())), empty)
            histogram.counts[bisect_left(ends, value)] += 1
            histogram.total += value

    def text(self, gauges: Iterable[Sample]) -> str:
        """Counters, histograms and the gauges, in Prometheus' text format."""
        with self._lock:
            lines = {
                name: [f"# HELP {name} {help}", f"# TYPE {name} {type}"] for name, (type, help, _) in METRICS.items()
            }
            for (name, labels), count in self._counts.items():
                lines[name].append(f"{name}{_braced(labels)} {count:.17g}")
            for (name, labels), histogram in self._histograms.items():
                lines[name] += _buckets(name, labels, histogram)
        for gauge in gauges:
            lines[gauge.name].append(f"{gauge.name}{_braced(tuple(gauge.labels.items()))} {gauge.value:.17g}")
        return "\n".join(line for section in lines.values() for line in section) + "\n"


def _buckets(name: str, labels: Labels, histogram: _Histogram) -> list[str]:
    ends: Sequence[str] = [f"{end:g}" for end in METRICS[name][2]] + ["+Inf"]
    counts = list(accumulate(histogram.counts))
    lines = [f"{name}_bucket{_braced((*labels, ('le', end)))} {n}" for end, n in zip(ends, counts, strict=True)]
    return [*lines, f"{name}_sum{_braced(labels)} {histogram.total:.9g}", f"{name}_count{_braced(labels)} {counts[-1]}"]


def _braced(labels: Labels) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in labels) + "}" if labels else ""
