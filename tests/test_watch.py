"""kizu watch as a line uses it: files that come slowly, kills, receivers that are down, a video."""

import csv
import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import kizu
from kizu.data import image
from kizu.serving.history import HISTORY, History
from kizu.serving.watch.camera import FrameFolder
from kizu.serving.watch.sinks import HistorySink
from processes import kizu as command
from services import KIZU, encoded, small_model
from test_detectors import part


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("watching") / "disc")


@contextmanager
def watching(*arguments, model, cwd):
    """A watcher; killed at the end if it still runs."""
    command = [KIZU, "watch", *map(str, arguments), "--model", str(model)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def finished(*arguments, model, cwd, code=0):
    return command("watch", *arguments, "--model", model, cwd=cwd, code=code)


def ledger(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextmanager
def receiver(fails):
    """An HTTP receiver that fails when `fails(n)` says so of its n-th request; what arrived."""
    arrived, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            row = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(row["number"])
            failing = fails(len(asked))
            if not failing:
                assert self.headers["idempotency-key"] == str(row["number"])
                arrived.append((row["number"], row["image"]))
            self.send_response(500 if failing else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/verdicts", arrived
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_nothing_is_lost_or_judged_twice_across_kills(folder, tmp_path):
    """A camera drops files, some of them in two halves, while the watcher is killed again and again."""
    incoming, out, aside = tmp_path / "in", tmp_path / "verdicts.jsonl", tmp_path / "aside"
    incoming.mkdir()
    model, rng = kizu.load(folder), random.Random(3)
    sent = {f"{number:03}.png": encoded(part(500 + number, spot=number % 3 == 0)) for number in range(90)}
    over = threading.Event()

    def camera():
        for name, content in sent.items():
            with (incoming / name).open("wb") as file:
                if rng.random() < 0.3:
                    file.write(content[: len(content) // 2])
                    file.flush()
                    time.sleep(0.3)
                    file.write(content[len(content) // 2 :])
                else:
                    file.write(content)
            time.sleep(0.03)
        over.set()

    dropping = threading.Thread(target=camera)
    with receiver(lambda number: number % 7 == 3) as (url, arrived):
        options = [
            "in",
            "--output",
            out,
            "--csv",
            "table.csv",
            "--webhook",
            url,
            "--move-bad",
            aside,
            "--settle",
            "0.1",
        ]
        dropping.start()
        for _ in range(2):
            before = len(ledger(out))
            with watching(*options, model=folder, cwd=tmp_path) as process:
                until(lambda before=before: len(ledger(out)) > before + 3)
                time.sleep(rng.random() / 5)
                process.send_signal(signal.SIGKILL)
        until(over.is_set)
        dropping.join()
        finished(*options, "--once", model=folder, cwd=tmp_path)
    rows = ledger(out)
    assert sorted(row["image"] for row in rows) == sorted(sent)
    assert [row["number"] for row in rows] == list(range(1, len(sent) + 1))
    for row in rows:
        assert row["score"] == pytest.approx(model.predict(sent[row["image"]]).score, rel=1e-5)
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(int(row["number"]), row["image"]) for row in table] == [(row["number"], row["image"]) for row in rows]
    assert list(dict.fromkeys(arrived)) == [(row["number"], row["image"]) for row in rows]
    stopped = {row["image"] for row in rows if row["verdict"] == "stop"}
    assert len(stopped) >= 30 and {path.name for path in aside.iterdir()} == stopped
    assert {path.name for path in incoming.iterdir()} == set(sent) - stopped


def test_a_file_is_judged_when_it_is_whole_and_again_when_it_is_another(folder, tmp_path):
    incoming, out = tmp_path / "in", tmp_path / "out.jsonl"
    incoming.mkdir()
    whole, other = encoded(part(1)), encoded(part(2, spot=True))
    (incoming / "broken.png").write_bytes(whole[:700])
    (incoming / "half.png.part").write_bytes(whole)
    options = ["in", "--output", out, "--settle", "0.1", "--patience", "1.5", "--interval", "0.05"]
    with watching(*options, model=folder, cwd=tmp_path) as process:
        (incoming / "slow.png").write_bytes(whole[:500])
        time.sleep(1.0)  # longer than it must rest, shorter than patience
        with (incoming / "slow.png").open("ab") as file:
            file.write(whole[500:])
        until(lambda: len(ledger(out)) == 2)
        (incoming / "slow.png").write_bytes(other)
        until(lambda: len(ledger(out)) == 3)
        second = command("watch", "in", "--model", folder, "--output", out, cwd=tmp_path, code=2)
        assert "another kizu watch writes to it" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    rows = ledger(out)
    assert {row["image"]: row["verdict"] for row in rows[:2]} == {"broken.png": "error", "slow.png": "pass"}
    assert (rows[2]["image"], rows[2]["verdict"]) == ("slow.png", "stop")
    finished(*options, "--once", model=folder, cwd=tmp_path)
    assert ledger(out) == rows


class Mosquito(threading.Thread):
    """As little of an MQTT 3.1.1 broker as takes publications at QoS 1; it hangs up on the first of them once."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.published, self.hung_up = [], False
        self.start()

    def run(self):
        while True:
            try:
                line = self.listening.accept()[0]
            except OSError:
                return
            with line, line.makefile("rb") as stream:
                self.talk(line, stream)

    def talk(self, line, stream):
        while head := stream.read(1):
            length, shift = 0, 0
            while True:
                (byte,) = stream.read(1)
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            body = stream.read(length)
            if head[0] >> 4 == 1:  # CONNECT
                line.sendall(b"\x20\x02\x00\x00")
            elif head[0] >> 4 == 3:  # PUBLISH
                if not self.hung_up:
                    self.hung_up = True
                    return
                topic = int.from_bytes(body[:2])
                self.published.append((body[2 : 2 + topic].decode(), json.loads(body[4 + topic :])))
                line.sendall(b"\x40\x02" + body[2 + topic : 4 + topic])
            elif head[0] >> 4 == 12:  # PINGREQ
                line.sendall(b"\xd0\x00")


@pytest.mark.slow
def test_what_was_judged_overnight_is_in_the_servers_history_once(folder, tmp_path):
    """With --move-bad, over an end and a new beginning, and with a ledger that was begun anew."""
    incoming, store = tmp_path / "incoming", tmp_path / "store"
    incoming.mkdir()
    options = ["--once", "--settle", 0, "--store", store, "--keep", 5, "--move-bad", tmp_path / "aside"]
    pictures = [encoded(part(60 + number, spot=number == 2)) for number in range(4)]

    def names():
        kept = History(store / HISTORY, 5)
        entries = kept.last(9)
        content = [kept.photograph(entry.id) for entry in entries]
        assert all(kept.thumbnail(entry.id) for entry in entries)
        kept.close()
        pairs = zip((entry.verdict for entry in entries), content, strict=True)
        return [(verdict.image, verdict.verdict, file) for verdict, file in pairs]

    for number, content in enumerate(pictures):
        (incoming / f"{number}.png").write_bytes(content)
        finished(incoming, *options, model=folder, cwd=tmp_path)
    verdicts = ["pass", "pass", "stop", "pass"]
    assert names() == [(f"{n}.png", verdicts[n], pictures[n]) for n in (3, 2, 1, 0)]
    (incoming / "damaged.png").write_bytes(b"no photograph")
    (incoming / "4.png").write_bytes(pictures[0])
    finished(incoming, *options, "--output", "anew.jsonl", "--patience", 0, model=folder, cwd=tmp_path, code=1)
    assert sorted(name for name, *_ in names()) == ["0.png", "1.png", "3.png", "3.png", "4.png"]
    (incoming / "4.png").unlink()
    (tmp_path / "anew.jsonl").unlink()
    (incoming / "5.png").write_bytes(pictures[1])
    finished(incoming, *options, "--output", "anew.jsonl", "--patience", 0, model=folder, cwd=tmp_path, code=1)
    assert "5.png" in [name for name, *_ in names()]


def test_a_photograph_is_kept_only_if_it_is_the_one_that_was_judged(folder, tmp_path):
    """Files of equal sizes under one name, as cameras write them; and what --move-bad gives another name."""
    incoming, aside = tmp_path / "incoming", tmp_path / "aside"
    incoming.mkdir()
    options = ["--once", "--settle", 0, "--move-bad", aside]
    pictures = [encoded(part(60 + number, spot=number > 0), "BMP") for number in range(3)]
    assert len({len(picture) for picture in pictures}) == 1
    for picture in pictures:
        (incoming / "part.bmp").write_bytes(picture)
        finished(incoming, *options, model=folder, cwd=tmp_path)
    (incoming / "part.bmp").write_bytes(encoded(part(70), "BMP"))  # of a part that nobody judged
    history = History(tmp_path / "verdicts.sqlite", 9)
    sink = HistorySink(history, tmp_path / "verdicts.jsonl", [incoming, aside])
    for row in ledger(tmp_path / "verdicts.jsonl"):
        sink.deliver(row)
    entries = history.last(9)[::-1]
    assert [history.photograph(entry.id) for entry in entries] == [None, pictures[1], pictures[2]]
    sink.close()
    assert HistorySink(History(tmp_path / "verdicts.sqlite", 2), tmp_path / "verdicts.jsonl", [incoming]).delivered == 3
    other = HistorySink(History(tmp_path / "other.sqlite", 2), tmp_path / "verdicts.jsonl", [incoming])
    assert other.delivered == 1  # what would be dropped at once is not brought
    assert History(tmp_path / "other.sqlite").keep == 2


def test_a_video_goes_to_a_broker_frame_by_frame_and_on_after_an_end(folder, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (extra camera)")
    pytest.importorskip("paho.mqtt", reason="paho-mqtt is not installed (extra mqtt)")
    film = cv2.VideoWriter(str(tmp_path / "line.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 96))
    for number in range(40):
        film.write(part(number // 5, spot=number // 5 == 4)[:, :, ::-1].copy())
    film.release()
    broker = Mosquito()
    options = ["--camera", "line.avi", "--every", "0.5", "--output", "film.jsonl", "--move-bad", "aside"]
    options += ["--mqtt", f"mqtt://127.0.0.1:{broker.port}/line/1", "--once"]
    finished(*options, model=folder, cwd=tmp_path)
    rows = ledger(tmp_path / "film.jsonl")
    assert [row["seconds"] for row in rows] == [0.5 * number for number in range(8)]
    assert [row["image"] for row in rows if row["score"] == max(row["score"] for row in rows)] == ["line.avi-000020"]
    assert (tmp_path / "aside" / "line.avi-000020.png").exists()
    assert [message for _, message in broker.published] == rows and broker.published[0][0] == "line/1"

    kept = (tmp_path / "film.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "film.jsonl").write_text("".join(kept[:5]) + kept[5][:40])  # as a kill leaves it
    finished(*options, model=folder, cwd=tmp_path)
    again = ledger(tmp_path / "film.jsonl")
    assert again[:5] == rows[:5] and [row["image"] for row in again] == [row["image"] for row in rows]
    broker.listening.close()


def test_the_frames_of_a_camera_are_in_the_history_too(folder, tmp_path):
    """Also those whose rows were written before a kill and delivered after it; nothing is left beside the output."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (extra camera)")
    film = cv2.VideoWriter(str(tmp_path / "line.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 96))
    for number in range(40):
        film.write(part(number // 5, spot=number // 5 == 4)[:, :, ::-1].copy())
    film.release()
    options = ["--camera", "line.avi", "--every", "0.5", "--output", "film.jsonl", "--once"]
    finished(*options, "--store", "served", model=folder, cwd=tmp_path)

    def kept(store):
        history = History(tmp_path / store / HISTORY)
        entries = history.last(20)[::-1]
        pictures = [image.read(history.photograph(entry.id)) for entry in entries]
        assert all(history.thumbnail(entry.id) for entry in entries)
        history.close()
        return [entry.verdict.verdict for entry in entries], pictures

    verdicts, pictures = kept("served")
    assert verdicts == [row["verdict"] for row in ledger(tmp_path / "film.jsonl")] and len(verdicts) == 8
    assert verdicts[4] == "stop" and pictures[4].shape == (96, 96, 3)
    assert np.abs(pictures[4].astype(int) - part(4, spot=True)).mean() < 20  # as the video has it
    assert not list(tmp_path.glob("film.frames*"))

    frames = FrameFolder(tmp_path / "film.jsonl")  # as a kill leaves it: rows without deliveries, a frame without a row
    for number, row in enumerate(ledger(tmp_path / "film.jsonl")):
        frames.write(row["image"], pictures[number])
    frames.write("line.avi-000099", pictures[0])
    finished(*options, "--store", "anew", model=folder, cwd=tmp_path)
    again, same = kept("anew")
    assert again == verdicts and all(map(np.array_equal, pictures, same))
    assert not list(tmp_path.glob("film.frames*"))


def test_what_watch_is_told_wrongly_it_says(folder, tmp_path):
    shutil.copy(folder / "model.json", tmp_path / "foreign.jsonl")
    for arguments, sentence in [
        ([], "either a folder or --camera"),
        (["nowhere"], "is not a folder"),
        ([".", "--move-bad", "../" + tmp_path.name], "is the folder that is watched"),
        ([".", "--output", "foreign.jsonl"], "is no verdict of kizu watch"),
        ([".", "--webhook", "file:///etc/passwd"], "one is like http://host"),
        (["--camera", "none.avi"], "there is no such file"),
    ]:
        assert sentence in command("watch", *arguments, "--model", folder, "--once", cwd=tmp_path, code=2).stderr
