"""Sinks on other machines: a webhook, an MQTT broker. Addresses may hold secrets, and are never printed whole."""

import base64
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from kizu.data import files
from kizu.errors import OptionError, require
from kizu.serving.watch.ledger import Row
from kizu.serving.watch.sinks import Undelivered

__all__ = ["MqttSink", "WebhookSink"]

PATIENCE = 10.0  # seconds for an answer
MAX_TOPIC = 65535  # bytes
EXAMPLES = {"webhook": "http://host:8080/path", "mqtt": "mqtt://host:1883/topic"}


class _RemoteSink:
    """Base of sinks on other machines: what they have taken stands in a file beside the ledger."""

    name: str

    def __init__(self, ledger: Path, only: Sequence[str] | None) -> None:
        self._progress = ledger.with_name(f"{ledger.name}.{self.name}")
        self._only = only
        try:
            self._delivered = int(self._progress.read_text())
        except (OSError, ValueError):
            self._delivered = 0

    @property
    def delivered(self) -> int:
        return self._delivered

    @delivered.setter
    def delivered(self, number: int) -> None:
        self._delivered = number
        files.write_text(self._progress, f"{number}\n", durable=False)  # what the power takes is delivered again

    def wants(self, row: Row) -> bool:
        return self._only is None or row["verdict"] in self._only


class WebhookSink(_RemoteSink):
    """POSTs each row as JSON, with its number as Idempotency-Key; taken is what is answered with a status of 2xx."""

    name = "webhook"

    def __init__(self, url: str, ledger: Path, only: Sequence[str] | None = None) -> None:
        """Raises `OptionError` for what is no address."""
        parts = _split("webhook", url, ("http", "https"))
        super().__init__(ledger, only)
        self._where = _origin(parts)
        self._url = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        self._headers = {"Content-Type": "application/json", "User-Agent": "kizu"}
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def deliver(self, row: Row) -> None:
        headers = {**self._headers, "Idempotency-Key": str(row["number"])}
        request = urllib.request.Request(self._url, files.json_text(row, ascii_only=True).encode(), headers)
        try:
            with self._opener.open(request, timeout=PATIENCE):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            hint = ", which is not followed" if 300 <= error.code < 400 else ""
            reason = f"status {error.code}{hint}"
            raise Undelivered(f"{self._where} did not take verdict {row['number']}: {reason}") from None
        except (OSError, ValueError, HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error).strip() or type(error).__name__
            raise Undelivered(f"{self._where} did not take verdict {row['number']}: {reason[:200]}") from None

    def close(self) -> None:
        pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect of a POST is asked for again without what was posted: it is an answer like any other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class MqttSink(_RemoteSink):
    """Publishes each row as JSON, at least once (QoS 1), to mqtt://user:password@host:1883/topic or mqtts://…"""

    name = "mqtt"

    def __init__(self, url: str, ledger: Path, only: Sequence[str] | None = None) -> None:
        """Raises `OptionError` for what is no address, and `MissingExtra`."""
        parts = _split("mqtt", url, ("mqtt", "mqtts"))
        self._topic = unquote(parts.path[1:])
        if not self._topic or re.search(r"[+#\0]", self._topic) or len(self._topic.encode()) > MAX_TOPIC:
            raise OptionError("`mqtt`: after the host comes a topic without + and #, as in mqtt://host:1883/topic")
        super().__init__(ledger, only)
        self._where = _origin(parts)
        self._parts = parts
        self._paho = require("paho.mqtt.client")
        self._client: Any = None

    def deliver(self, row: Row) -> None:
        try:
            if self._client is None:
                self._client = self._connected()
            message = self._client.publish(self._topic, files.json_text(row, ascii_only=True), qos=1)
            message.wait_for_publish(PATIENCE)
            if not message.is_published():
                raise ValueError("no acknowledgement")
        except (OSError, ValueError, RuntimeError) as error:
            self.close()
            raise Undelivered(f"{self._where} did not take verdict {row['number']}: {error}") from None

    def close(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def _connected(self) -> Any:
        """A new client, in whose queue nothing waits from before."""
        client = self._paho.Client(self._paho.CallbackAPIVersion.VERSION2)
        if self._parts.username:
            client.username_pw_set(unquote(self._parts.username), unquote(self._parts.password or ""))
        secure = self._parts.scheme == "mqtts"
        if secure:
            client.tls_set()
        client.connect(self._parts.hostname, self._parts.port or (8883 if secure else 1883), keepalive=30)
        client.loop_start()
        return client


def _split(setting: str, url: str, schemes: tuple[str, str]) -> SplitResult:
    """The parts of an address. Raises `OptionError`, in which nothing of it stands."""
    try:
        parts = urlsplit(url)
        complete = parts.scheme in schemes and parts.hostname and parts.port != 0
    except ValueError:
        complete = False
    if not complete or not re.fullmatch(r"[!-~]+", url):
        example = EXAMPLES[setting]
        raise OptionError(f"`{setting}`: this is no address; one is like {example}")
    return parts


def _origin(parts: SplitResult) -> str:
    """Scheme, host and port: what follows may be secret."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
