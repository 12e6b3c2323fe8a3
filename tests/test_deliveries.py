"""Verdicts on their way to a table, a webhook, a broker: each arrives once, or is counted as not delivered."""

import base64
import json
import os
import shutil
import socket
import threading
import time
from contextlib import closing, contextmanager

import pytest

import kizu
from kizu.cli.faults import _without_secrets
from kizu.serving.watch import sinks
from kizu.serving.watch.incoming import Arrivals
from kizu.serving.watch.ledger import Ledger
from kizu.serving.watch.remote import MqttSink, WebhookSink
from kizu.serving.watch.sinks import Courier, CsvSink
from processes import kizu as command
from services import encoded, small_model
from test_detectors import part

ROW = {"image": "x", "bytes": 1, "modified": 2, "verdict": "stop", "time": "now", "score": 1.0}
OK = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
ANSWERS = {
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: /hook/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "permanent redirect": b"HTTP/1.1 308 Moved\r\nLocation: /hook/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "no HTTP": b"\x15\x03\x03\x00\x02\x02\x46",
    "nothing": b"",
    "half a header": b"HTTP/1.1 20",
    "an endless line": b"HTTP/1.1 " + 100_000 * b"x",
    "error": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "odd status": b"HTTP/1.1 999 What\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 0.01)


@pytest.fixture
def book(tmp_path):
    with closing(Ledger(tmp_path / "v.jsonl")) as ledger:
        yield ledger


@contextmanager
def receiver(answer, times):
    """A receiver that answers so the first `times`, and takes everything after; the heads and bodies that came."""
    listening = socket.create_server(("127.0.0.1", 0))
    heard = []

    def serve():
        while True:
            try:
                line = listening.accept()[0]
            except OSError:
                return
            with line, line.makefile("rb") as stream:
                head = []
                while (text := stream.readline().strip()) != b"":
                    head.append(text.decode())
                length = next((int(h.split(":")[1]) for h in head if h.lower().startswith("content-length")), 0)
                heard.append((head, stream.read(length)))
                line.sendall(answer if len(heard) <= times else OK)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}", heard
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


class Broken:
    """A file that writes half of what it is given and fails, so many times."""

    def __init__(self, file, failures):
        self.file, self.failures = file, failures

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        if self.failures:
            self.failures -= 1
            self.file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return self.file.write(content)


def test_a_table_has_each_row_once_whatever_the_disk_does(book, tmp_path):
    table = CsvSink(tmp_path / "v.csv", book.path)
    table._file._file = Broken(table._file._file, 3)
    warnings = []
    courier = Courier(book.path, table, warnings.append)
    for _ in range(3):
        book.append([ROW])
        courier.wake()
    assert courier.end(10) == 0 and len(warnings) == 3 and "No space left" in warnings[0]
    lines = (tmp_path / "v.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["number", "1", "2", "3"]


def test_the_ledger_has_whole_rows_whatever_the_disk_does(book):
    book.append([ROW])
    book._file._file = Broken(book._file._file, 1)
    with pytest.raises(kizu.OutputError, match="No space left"):
        book.append([ROW])
    book.append([ROW])
    assert [json.loads(line)["number"] for line in book.path.read_text().splitlines()] == [1, 2]


def test_a_table_belongs_to_one_ledger_and_one_watch(book, tmp_path):
    book.append([ROW, {**ROW, "image": "a\nb"}])
    table = CsvSink(tmp_path / "v.csv", book.path)
    assert Courier(book.path, table, print).end(10) == 0
    with closing(CsvSink(tmp_path / "v.csv", book.path)) as again:
        assert again.delivered == 2
        with pytest.raises(kizu.OptionError, match="another kizu watch"):
            CsvSink(tmp_path / "v.csv", book.path)
    with closing(Ledger(tmp_path / "other.jsonl")) as other, pytest.raises(kizu.OptionError, match="other verdicts"):
        CsvSink(tmp_path / "v.csv", other.path)


@pytest.mark.parametrize("content", [b"no newline", b"\xff\xd8\xff a photograph \n and more", b'{"a": 1}\n{"b', b"{"])
@pytest.mark.parametrize("kind", ["ledger", "table"])
def test_files_of_other_kinds_stay_as_they_are(kind, content, book, tmp_path):
    path = tmp_path / "mine"
    path.write_bytes(content)
    if kind == "ledger" and content == b"{":
        pytest.skip("this is how a row begins")
    with pytest.raises((kizu.OptionError, kizu.DataError)):
        Ledger(path) if kind == "ledger" else CsvSink(path, book.path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_what_is_not_taken_is_tried_again_and_arrives_by_post(answer, book):
    warnings = []
    with receiver(answer, 2) as (address, heard):
        courier = Courier(
            book.path, WebhookSink(f"http://user:pass@{address}/hook?token=t", book.path), warnings.append
        )
        book.append([ROW, ROW])
        courier.wake()
        assert courier.end(10) == 0
    assert [head[0] for head, _ in heard] == ["POST /hook?token=t HTTP/1.1"] * 4
    assert [json.loads(body)["number"] for _, body in heard] == [1, 1, 1, 2]
    secret = base64.b64encode(b"user:pass").decode()
    assert all(f"Authorization: Basic {secret}" in head for head, _ in heard)
    assert len(warnings) == 2 and address in warnings[0]
    assert not any(word in warning for word in ("user", "pass", "token") for warning in warnings)


def test_at_the_end_tries_are_few_and_what_is_left_is_counted(book, monkeypatch):
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 0.1)
    warnings = []
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    sink = WebhookSink(f"http://127.0.0.1:{port}/", book.path, only="stop")
    courier = Courier(book.path, sink, warnings.append)
    book.append([ROW, {**ROW, "verdict": "pass"}, ROW])
    courier.wake()
    start = time.monotonic()
    assert courier.end(2) == 2
    assert time.monotonic() - start < 3 and len(warnings) < 10


def test_a_row_that_arrived_is_not_sent_again_when_that_cannot_be_noted(book, monkeypatch):
    def full(*_, **__):
        raise kizu.OutputError("v.jsonl.webhook", "No space left on device")

    monkeypatch.setattr("kizu.serving.watch.remote.files.write_text", full)
    warnings = []
    with receiver(OK, 0) as (address, heard):
        courier = Courier(book.path, WebhookSink(f"http://{address}/", book.path), warnings.append)
        book.append([ROW, ROW])
        courier.wake()
        assert courier.end(10) == 0
    assert [json.loads(body)["number"] for _, body in heard] == [1, 2] and warnings


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://", "http://host:port/", "http://a b/", "host/x", "http://[/"]
)
def test_addresses_are_checked_at_the_start_and_not_repeated(url, book):
    pytest.importorskip("paho.mqtt", reason="paho-mqtt is not installed (extra mqtt)")
    for kind, address in ((WebhookSink, url), (MqttSink, url.replace("http", "mqtt"))):
        with pytest.raises(kizu.OptionError, match="one is like") as caught:
            kind(address, book.path)
        assert address in ("http://", "mqtt://") or address not in str(caught.value)
    for topic in ("", "a/+/b", "a/%23"):
        with pytest.raises(kizu.OptionError, match="topic"):
            MqttSink(f"mqtt://user:pass@host/{topic}", book.path)
    assert _without_secrets(["kizu", "--webhook", "http://u:p@h", "--mqtt=mqtt://u:p@h"]) == (
        "kizu --webhook '…' '--mqtt=…'"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("deliveries") / "disc")


def test_the_command_says_how_many_were_not_delivered(model, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(part(number)))
    words = ("watch", "in", "--model", model, "--once", "--settle", 0)
    with receiver(ANSWERS["redirect"], 10**6) as (address, heard):
        done = command(*words, "--webhook", f"http://u:secret@{address}/hook", cwd=tmp_path, code=1)
    assert "3 deliveries were not made" in done.stderr and "secret" not in done.stderr and len(heard) < 20
    with receiver(OK, 0) as (address, heard):
        command(*words, cwd=tmp_path, env={**os.environ, "KIZU_WEBHOOK": f"http://{address}/hook"})
    assert [json.loads(body)["image"] for _, body in heard] == ["0.png", "1.png", "2.png"]


def test_a_watched_folder_that_goes_away_and_comes_back_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    warnings = []
    arrivals = Arrivals(tmp_path / "in", lambda _: False, settle=0, on_warning=warnings.append)
    arrivals.take()
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    for _ in range(3):
        assert arrivals.take() == []
    assert len(warnings) == 1 and "cannot be opened (No such file" in warnings[0]
    shutil.move(tmp_path / "elsewhere", tmp_path / "in")
    arrivals.take()
    assert len(warnings) == 2 and "again" in warnings[1]
