"""Where verdicts go besides the ledger: a CSV file, a webhook, an MQTT broker.

What a sink misses while it is down is delivered later.
"""

import csv
import io
import json
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from kizu.data import files
from kizu.errors import KizuError, OptionError, require
from kizu.serving.watch.ledger import Row, rows

__all__ = ["Courier", "CsvSink", "MqttSink", "Sink", "Undelivered", "WebhookSink"]

COLUMNS = ("number", "time", "image", "verdict", "score", "p_value", "threshold", "model", "error")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between tries
PATIENCE = 10.0  # seconds for an answer


class Undelivered(KizuError):
    """A row did not arrive; it is tried again."""


class Sink(Protocol):
    """Takes rows one after the other. `delivered` is the number of the last row that arrived."""

    name: str
    delivered: int

    def deliver(self, row: Row) -> None:
        """Return when the row has arrived. Raises `Undelivered`."""
        ...

    def close(self) -> None: ...


class Courier:
    """A thread that carries the ledger's rows to a sink, in order, from the first that it has not delivered."""

    def __init__(self, ledger: Path, sink: Sink, on_warning: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._sink = sink
        self._on_warning = on_warning
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=sink.name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that there are new rows."""
        self._news.set()

    def end(self, patience: float) -> bool:
        """Deliver what is left, for at most `patience` seconds; returns whether all of it arrived."""
        self._ending.set()
        self._news.set()
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _work(self) -> None:
        start, pause = 0, FIRST_PAUSE
        while True:
            self._news.clear()
            ending = self._ending.is_set()
            try:
                for row, end in rows(self._ledger, start):
                    if row["number"] > self._sink.delivered:
                        self._sink.deliver(row)
                        self._sink.delivered = row["number"]
                    start, pause = end, FIRST_PAUSE
            except (Undelivered, OSError) as error:
                self._on_warning(f"{error}; trying again in {pause:g} seconds")
                self._ending.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if ending:
                self._sink.close()
                return
            self._news.wait()


class CsvSink:
    """A CSV file with a line for each row."""

    name = "csv"

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        complete = text[: text.rfind(b"\n") + 1].decode()
        lines = list(csv.reader(io.StringIO(complete)))
        if lines and lines[0] != list(COLUMNS):
            raise OptionError(f"`csv={path}` is a table of something else: give another name")
        self.delivered = int(lines[-1][0]) if len(lines) > 1 else 0
        self._file = path.open("a", newline="", encoding="utf-8", errors="surrogateescape")
        self._file.truncate(len(complete.encode()))
        if not lines:
            self._write(COLUMNS)

    def deliver(self, row: Row) -> None:
        self._write([_cell(row.get(column)) for column in COLUMNS])

    def close(self) -> None:
        self._file.close()

    def _write(self, cells: Sequence[object]) -> None:
        self._file.write(files.csv_text([cells]))
        self._file.flush()


class _RemoteSink:
    """Base of sinks on other machines: what they have taken stands in a file beside the ledger."""

    name: str

    def __init__(self, ledger: Path, only: str | None) -> None:
        self._progress = ledger.with_name(f"{ledger.name}.{self.name}")
        self._only = only

    @property
    def delivered(self) -> int:
        try:
            return int(self._progress.read_text())
        except (OSError, ValueError):
            return 0

    @delivered.setter
    def delivered(self, number: int) -> None:
        files.write_text(self._progress, f"{number}\n")

    def _wanted(self, row: Row) -> bool:
        return self._only is None or row["verdict"] == self._only


class WebhookSink(_RemoteSink):
    """POSTs each row as JSON, with its number as Idempotency-Key."""

    name = "webhook"

    def __init__(self, url: str, ledger: Path, only: str | None = None) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise OptionError(f"`webhook={url}`: an address starts with http:// or https://")
        super().__init__(ledger, only)
        self._url = url

    def deliver(self, row: Row) -> None:
        if not self._wanted(row):
            return
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(row["number"]), "User-Agent": "kizu"}
        request = urllib.request.Request(self._url, json.dumps(row).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                response.read()
        except (OSError, ValueError) as error:  # URLError and HTTPError among them
            raise Undelivered(f"{self._url} did not take verdict {row['number']}: {error}") from None

    def close(self) -> None:
        pass


class MqttSink(_RemoteSink):
    """Publishes each row as JSON, at least once (QoS 1), to mqtt://user:password@host:1883/topic or mqtts://…"""

    name = "mqtt"

    def __init__(self, url: str, ledger: Path, only: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or len(parts.path) < 2:
            raise OptionError(f"`mqtt={url}`: an address is like mqtt://host:1883/topic")
        super().__init__(ledger, only)
        self._topic = unquote(parts.path[1:])
        self._where = f"{parts.scheme}://{parts.hostname}{parts.path}"
        paho = require("paho.mqtt.client")
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if parts.scheme == "mqtts":
            self._client.tls_set()
        self._address = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        self._running = False

    def deliver(self, row: Row) -> None:
        if not self._wanted(row):
            return
        try:
            if not self._running:
                self._client.connect(*self._address, keepalive=30)
                self._client.loop_start()
                self._running = True
            message = self._client.publish(self._topic, json.dumps(row), qos=1)
            message.wait_for_publish(PATIENCE)
            if not message.is_published():
                raise ValueError("no acknowledgement")
        except (OSError, ValueError, RuntimeError) as error:
            self.close()
            raise Undelivered(f"{self._where} did not take verdict {row['number']}: {error}") from None

    def close(self) -> None:
        if self._running:
            self._client.disconnect()
            self._client.loop_stop()
            self._running = False


def _cell(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
