"""kizu serve under load: nothing lost, nothing crossed, memory flat; reloaded and stopped in the middle.

python benchmarks/serve.py DATA      two minutes on two cores; writes benchmarks/results/serve.csv

Two exported PatchCore models learn from different halves of DATA's good images. Clients send its test images, each
under a name of its own, and compare each answer with what the model of that version says of that image; 5 % of the
bodies are bad, each in a way that has one right status. Half-way the one model's folder is replaced by the other.
A second run is told to stop in the middle.
"""

import argparse
import http.client
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kizu
from kizu.cli.terminal import print_table
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.evaluation.experiment import machine
from kizu.export.onnx import export

TARGET = Path(__file__).parent / "results" / "serve.csv"
RAW = "application/octet-stream"
BAD_SHARE = 0.05
LARGEST = 1_000_000  # bytes, the server's --max-mb 1
OFF = 1e-5  # relative, that a score may be off: a batch of another size adds up in another order


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    wrong_score: int = 0
    wrong_name: int = 0
    wrong_status: int = 0
    unanswered: int = 0  # the connection ended where an answer should have come
    bad: int = 0
    versions: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What is sent, and what is right."""

    photographs: list[bytes]
    scores: dict[str, list[float]]  # by version of the model
    bad: list[tuple[int, str, bytes]]  # status, content type, body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kizu") as scratch:
        folder = Path(scratch)
        models, load = prepare(options.data, options.size, folder)
        rows = [steady(models, load, options.requests, options.clients, folder)]
        rows.append(stopped(models, load, options.requests // 5, options.clients, folder))
    print_table([{"measured": name, **{r["run"]: r.get(name, "") for r in rows}} for name in rows[0] if name != "run"])
    print(machine()["summary"])
    write_csv(TARGET, rows[0], [[row.get(name, "") for name in rows[0]] for row in rows])


def prepare(data: str, size: int, folder: Path) -> tuple[list[Path], Load]:
    """Two exported models, and the photographs with what each says of them."""
    found = dataset.find(Path(data))
    good = found.select(found.categories[0], "train")
    photographs = [sample.path.read_bytes() for sample in found.select(found.categories[0], "test")]
    models, scores = [], {}
    for number in range(2):
        detector = kizu.PatchCore(size=size).fit(good[number::2])
        target = folder / f"model-{number}"
        export(detector, target, "onnx")
        model = kizu.load(target)
        from kizu.serving.hosted_model import read_model

        scores[read_model(target)[0].version] = [model.predict(photograph).score for photograph in photographs]
        models.append(target)
    spoilt = [
        (415, RAW, b"this is no photograph"),
        (415, "application/json", b"{}"),
        (422, RAW, b""),
        (422, RAW, photographs[0][: len(photographs[0]) // 2]),
        (422, "multipart/form-data", b"--x"),
        (413, RAW, b"\0" * (LARGEST + 1)),
    ]
    return models, Load(photographs, scores, spoilt)


def steady(models: list[Path], load: Load, requests: int, clients: int, folder: Path) -> dict[str, Any]:
    """All requests; the model is replaced half-way."""
    duty = folder / "duty"
    shutil.copytree(models[0], duty)
    memory: list[tuple[float, float]] = []  # answers so far as a share of all, megabytes
    with Server(duty, folder) as server:
        tally, done = Tally(), threading.Event()

        def follow() -> None:
            replaced = False
            while not done.wait(0.25):
                memory.append((tally.answered / requests, server.memory()))
                if not replaced and tally.answered >= requests / 2:
                    replace(models[1], duty)
                    replaced = True

        following = threading.Thread(target=follow)
        following.start()
        start = time.perf_counter()
        drive(server, load, tally, requests, clients)
        spent = time.perf_counter() - start
        done.set()
        following.join()
        accepted, answered = server.stop()
    assert tally.versions == set(load.scores), "the model was not replaced in time"
    row = summary("all answered", tally, accepted, answered, requests, clients, spent)
    parts = {"10_to_20": (0.1, 0.2), "40_to_50": (0.4, 0.5), "60_to_70": (0.6, 0.7), "90_to_100": (0.9, 1.01)}
    for name, (first, last) in parts.items():  # the reload lies between the second and the third
        row[f"memory_mb_{name}_percent"] = round(statistics.median(mb for at, mb in memory if first <= at < last))
    row["told_apart"] = told_apart(load)
    return row


def stopped(models: list[Path], load: Load, after: int, clients: int, folder: Path) -> dict[str, Any]:
    """Told to stop after so many answers; the clients go on until there is no server."""
    tally = Tally()
    with Server(models[0], folder) as server:

        def end() -> None:
            while tally.answered < after:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)

        ending = threading.Thread(target=end)
        ending.start()
        start = time.perf_counter()
        drive(server, load, tally, None, clients)
        spent = time.perf_counter() - start
        ending.join()
        accepted, answered = server.stop()
    return summary("stopped in the middle", tally, accepted, answered, None, clients, spent)


def told_apart(load: Load) -> str:
    """How many photographs have a score that an answer about no other photograph could be taken for."""
    alone = 0
    for scores in load.scores.values():
        values = np.array(scores)
        alone += int((np.sort(np.abs(values[:, None] / values - 1))[:, 1] > 2 * OFF).sum())
    return f"{alone} of {len(load.scores) * len(load.photographs)}"


def summary(
    run: str, tally: Tally, accepted: int, answered: int, requests: int | None, clients: int, spent: float
) -> dict[str, Any]:
    milliseconds = 1000 * np.array(tally.seconds)
    return {
        "run": run,
        "clients": clients,
        "sent": requests or tally.answered + tally.unanswered,
        "bad_bodies": tally.bad,
        "accepted": accepted,
        "answered_by_server": answered,
        "answered_at_clients": tally.answered,
        "lost": accepted - tally.answered,
        "wrong_score": tally.wrong_score,
        "wrong_name": tally.wrong_name,
        "wrong_status": tally.wrong_status,
        "requests_per_second": f"{tally.answered / spent:.1f}",
        "p50_ms": f"{np.quantile(milliseconds, 0.5):.0f}",
        "p99_ms": f"{np.quantile(milliseconds, 0.99):.0f}",
    }


def drive(server: "Server", load: Load, tally: Tally, requests: int | None, clients: int) -> None:
    """Clients side by side, each with one connection, until all requests were sent or the server has gone."""
    numbers, lock = iter(range(requests if requests is not None else 10**9)), threading.Lock()

    def client(seed: int) -> None:
        rng, line = random.Random(seed), server.connect()
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                ask(line, load, tally, lock, number, rng)
            except (OSError, http.client.HTTPException):
                with lock:
                    tally.unanswered += 1
                return

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ask(
    line: http.client.HTTPConnection, load: Load, tally: Tally, lock: threading.Lock, number: int, rng: random.Random
) -> None:
    """One request, and whether its answer is right."""
    which, spoilt = rng.randrange(len(load.photographs)), rng.random() < BAD_SHARE
    expected, kind, body = rng.choice(load.bad) if spoilt else (200, RAW, load.photographs[which])
    start = time.perf_counter()
    line.request("POST", f"/v1/predict?name=r{number}", body, {"Content-Type": kind})
    response = line.getresponse()
    answer = json.loads(response.read())
    seconds = time.perf_counter() - start
    with lock:
        tally.answered += 1
        tally.bad += spoilt
        tally.wrong_status += response.status != expected
        if not spoilt:
            tally.seconds.append(seconds)
        if response.status == 200:
            (result,) = answer["results"]
            right = load.scores[answer["version"]][which]
            tally.wrong_score += abs(result["score"] - right) > OFF * right
            tally.wrong_name += result["image"] != f"r{number}"
            tally.versions.add(answer["version"])


def replace(new: Path, duty: Path) -> None:
    """Put another model's folder in the place of the one that is served."""
    from kizu.data.files import new_folder

    with new_folder(duty) as temporary:
        shutil.copytree(new, temporary, dirs_exist_ok=True)


class Server:
    """A `kizu serve` process."""

    def __init__(self, model: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "kizu", "serve", f"part={model}", "--port", "0"]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [*command, "--max-mb", str(LARGEST / 1e6)], stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=folder
        )
        assert self.process.stdout is not None
        self.port = int(re.findall(r":(\d+)/", self.process.stdout.readline())[0])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def memory(self) -> float:
        """Resident megabytes (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    def stop(self) -> tuple[int, int]:
        """Requests that it accepted and answered, by its own count."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
        self.log.seek(0)
        events = (json.loads(line) for line in self.log)
        last = next(event for event in events if event["event"] == "stopped")
        return last["accepted"], last["answered"]


if __name__ == "__main__":
    main()
