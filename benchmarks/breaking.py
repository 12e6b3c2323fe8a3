"""Breaks things: damaged photographs, kills, flipped bits, bad requests, disks that are full or may not be written to.

python benchmarks/breaking.py                          all of it, for about an hour
python benchmarks/breaking.py kill-train --count 10    a part of it, smaller

Each part counts what must not happen; the exit code is 1 if anything did.
"""

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import kizu
from disks import disks
from kizu.cli.terminal import print_table
from kizu.data import files
from kizu.export.onnx import export
from kizu.inference import model_json

HERE = Path(__file__).parent
KIZU = [sys.executable, "-m", "kizu"]
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp", "GIF": ".gif", "PPM": ".ppm"}
FORMATS |= {"JPEG2000": ".jp2", "AVIF": ".avif", "TGA": ".tga"}
MODES = ("RGB", "L", "P", "RGBA", "1", "CMYK")
MOST_BYTES = 10**9
TIMEOUT = 600.0
Found = Counter[str]  # what must not happen, and how much was tried


def main() -> None:
    options = parsed()
    rows = []
    with tempfile.TemporaryDirectory(prefix="breaking-") as folder:
        bench = Bench(Path(folder), random.Random(options.seed))
        for part in options.parts or PARTS:
            work, usual = PARTS[part]
            start = time.perf_counter()
            found = work(bench, options.count or usual)
            tried = found.pop("tried")
            rows.append({"part": part, "tried": tried, "faults": sum(found.values()), "which": dict(found) or "none"})
            rows[-1]["seconds"] = f"{time.perf_counter() - start:.0f}"
            print(rows[-1], file=sys.stderr)
    print_table(rows)
    if not options.count:
        _keep(rows)
    sys.exit(any(row["faults"] for row in rows))


def _keep(rows: list[dict[str, object]]) -> None:
    """Write down the rows of these parts, beside those of the others."""
    table = HERE / "results" / "breaking.csv"
    kept = {row["part"]: row for row in csv.DictReader(table.read_text().splitlines())} if table.exists() else {}
    kept |= {str(row["part"]): row for row in rows}
    files.write_csv(table, rows[0], [kept[part].values() for part in PARTS if part in kept])


class Bench:
    """A folder with photographs, a trained model and an exported one."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.scratch = folder / "tmp"
        self.scratch.mkdir()
        noise = np.random.default_rng(rng.randrange(2**32))
        for name, count in (("good", 14), ("more", 4), ("bad", 4), ("new", 12)):
            (folder / name).mkdir()
            for number in range(count):
                Image.fromarray(drawn(noise, name == "bad")).save(folder / name / f"{number:02}.png")
        trained = kizu.PatchCore(size=64, coreset=0.2).fit(folder / "good")
        self.trained = trained.save(folder / "trained")
        self.exported = export(trained, folder / "exported").folder

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"}

    def run(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command to its end, with other `options` for `subprocess.run` where they are given."""
        usual = {"env": self.environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": TIMEOUT}
        command = [*KIZU, *map(str, words)]
        return subprocess.run(command, text=True, errors="replace", **(usual | options))

    def leftovers(self) -> list[Path]:
        return [
            Path(place, name)
            for place, folders, names in os.walk(self.folder)  # which minds no folder that goes away
            for name in (*folders, *names)
            if name.startswith((".kizu-", ".replaced-"))
        ]


def drawn(noise: np.random.Generator, defect: bool) -> np.ndarray:
    photo = noise.integers(90, 130, (96, 96, 3), dtype=np.uint8)
    photo[30:60, 30:60] = 200
    photo[int(noise.integers(5, 25)), int(noise.integers(5, 80)) :] = 160
    if defect:
        photo[40:52, 10:85] = 0
    return photo


# ------------------------------------------------------------------------------------------------- damaged photographs


def images(bench: Bench, count: int) -> Found:
    """Mutated photographs of all formats: each gets a row, nobody crashes, hangs or takes a gigabyte."""
    found: Found = Counter(tried=count)
    seeds = list(_seeds(bench))
    place = bench.folder / "mutated"
    for start in range(0, count, 500):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        number = min(500, count - start)
        for index in range(number):
            suffix, content = seeds[(start + index) % len(seeds)]
            (place / f"{index}{suffix}").write_bytes(_mutated(content, bench.rng))
        command = [*KIZU, "predict", str(bench.exported), str(place), "--json"]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=output, stderr=errors, env=bench.environment())
            ended = _waited_for(process)
            if ended is None:
                found["hangs"] += 1
                continue
            code, most_bytes = ended
            for file in (output, errors):
                file.seek(0)
            rows = json.loads(output.read() or b"[]")
            found["crashes"] += code not in (0, 1) or b"Traceback" in errors.read()
        found["photographs without a row"] += number - len(rows)
        found["above 1 GB"] += most_bytes > MOST_BYTES
    return +found


def _waited_for(process: subprocess.Popen[bytes]) -> tuple[int, int] | None:
    """Its exit code and the most bytes of memory that it had; None, and it is killed, if it takes too long."""
    end, most = time.monotonic() + TIMEOUT, 0
    while time.monotonic() < end:
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = next((1024 * int(line.split()[1]) for line in status.splitlines() if line[:6] == "VmHWM:"), most)
        if process.poll() is not None:
            return process.returncode, most
        time.sleep(0.02)
    process.kill()
    process.wait()
    return None


def _seeds(bench: Bench) -> Iterator[tuple[str, bytes]]:
    """Encoded photographs in each format, and in each mode that it can have."""
    photo = Image.open(bench.folder / "new" / "00.png")
    for format, suffix in FORMATS.items():
        for mode in MODES:
            buffer = BytesIO()
            try:
                photo.convert(mode).save(buffer, format)
            except (OSError, ValueError, KeyError):
                continue
            yield suffix, buffer.getvalue()


def _mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        at = rng.randrange(min(len(changed), rng.choice((64, 256, len(changed)))))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                changed[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(
                    4, rng.choice(("big", "little"))
                )
            case 3:
                del changed[at : at + rng.randrange(1, 64)]
            case 4:
                changed[at:at] = changed[at : at + rng.randrange(1, 64)]
            case _:
                del changed[max(1, at) :]
        if len(changed) < 2:
            break
    return bytes(changed)


# --------------------------------------------------------------------------------------------------------------- kills


def kills(name: str, bench: Bench, count: int) -> Found:
    """A command killed at any moment, half the times while it saves: nothing corrupt, lost, doubled or left over."""
    found: Found = Counter()
    KILLED[name](bench, count, found)
    found["leftovers"] += len(bench.leftovers())
    return +found


def _killed(bench: Bench, words: list[object], usual: float, aim: bool) -> bool:
    """Start a command and kill it, while it saves if that is the aim; whether it was still running."""
    process = subprocess.Popen(
        [*KIZU, *map(str, words)], env=bench.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + (5 * usual if aim else bench.rng.uniform(0, 1.2 * usual))
    while time.monotonic() < end and process.poll() is None:
        if aim and bench.leftovers():
            time.sleep(bench.rng.expovariate(200))
            break
        time.sleep(0.0005 if aim else 0.01)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def _changes(bench: Bench, count: int, found: Found, name: str, words: list[object], model: Path) -> None:
    """Kill a command that changes a model; the model is always whole."""
    start = time.perf_counter()
    found[f"{name}: failed"] += bench.run(*words).returncode != 0
    usual = time.perf_counter() - start
    for number in range(count):
        found["tried"] += 1
        _killed(bench, words, usual, aim=number % 2 == 0)
        try:
            files.recover(model)
            model_json.check(model)
        except kizu.KizuError:
            found[f"{name}: corrupt"] += 1
    found[f"{name}: failed"] += bench.run(*words).returncode != 0
    kizu.load(model)


def _kill_update(bench: Bench, count: int, found: Found) -> None:
    model = bench.folder / "updated"
    shutil.copytree(bench.trained, model)
    start = time.perf_counter()
    lots = [bench.folder / f"lot-{number}" for number in range(count + 1)]
    noise = np.random.default_rng(1)
    for lot in lots:
        lot.mkdir()
        Image.fromarray(drawn(noise, False)).save(lot / "a.png")
    bench.run("update", model, lots[-1])
    usual = time.perf_counter() - start
    for number, lot in enumerate(lots[:-1]):
        found["tried"] += 1
        before = model_json.read(model)["training"]["images"]
        _killed(bench, ["update", model, lot], usual, aim=number % 2 == 0)
        files.recover(model)
        try:
            whole = model_json.check(model)
            found["update: lost"] += model_json.read(model)["training"]["images"] not in (before, before + 1)
        except kizu.KizuError:
            whole = False
        found["update: corrupt"] += not whole
    learned = bench.run("update", model, *[bench.folder / "more"])
    found["update: failed"] += learned.returncode != 0
    kizu.load(model)


def _kill_tune(bench: Bench, count: int, found: Found) -> None:
    model = bench.folder / "tuned"
    shutil.copytree(bench.trained, model)
    words = ["tune", model, bench.folder / "more", bench.folder / "bad", "--set", "-q"]
    _changes(bench, count, found, "tune", words, model)


def _kill_export(bench: Bench, count: int, found: Found) -> None:
    target = bench.folder / "exported again"
    words = ["export", bench.trained, "--to", "onnx", "--output", target, "-q"]
    _changes(bench, count, found, "export", words, target)


def _kill_train(bench: Bench, count: int, found: Found) -> None:
    """Killed and resumed until it is done: the same model as undisturbed."""
    words: list[object] = ["train", "patchcore", bench.folder / "good", "--size", 64, "--coreset", 0.2, "-q"]
    start = time.perf_counter()
    found["train: failed"] += bench.run(*words, "--output", bench.folder / "calm").returncode != 0
    usual = time.perf_counter() - start
    for number in range(count):
        found["tried"] += 1
        run = ["--output", bench.folder / "killed", "--name", f"n{number}"]
        running = _killed(bench, [*words, *run], usual, aim=number % 2 == 0)
        folder = bench.folder / "killed/project/group" / f"n{number}"
        finished = folder.exists() and not (folder / "unfinished").exists()
        if running and not finished:
            again = bench.run(*words, *run, *(["--resume"] if folder.exists() else []))
            found["train: not resumed"] += again.returncode != 0
        tensors = [
            next((bench.folder / place).glob("models/*/model.safetensors")).read_bytes()
            for place in ("calm/project/group/run", f"killed/project/group/n{number}")
        ]
        found["train: another model"] += tensors[0] != tensors[1]


def _kill_watch(bench: Bench, count: int, found: Found) -> None:
    incoming, book = bench.folder / "incoming", bench.folder / "verdicts.jsonl"
    incoming.mkdir()
    words = ["watch", incoming, "--model", bench.exported, "--output", book, "--csv", bench.folder / "table.csv"]
    words += ["--settle", 0, "--interval", 0.05, "--once", "-q"]
    noise = np.random.default_rng(2)
    for number in range(count):
        found["tried"] += 1
        for copy in range(4):
            Image.fromarray(drawn(noise, copy == 3)).save(incoming / f"{number}-{copy}.png")
        _killed(bench, words, 1.5, aim=False)
    found["watch: failed"] += bench.run(*words).returncode != 0
    judged = [json.loads(line)["image"] for line in book.read_text().splitlines()]
    table = (bench.folder / "table.csv").read_text().splitlines()[1:]
    found["watch: lost"] += len({path.name for path in incoming.iterdir()} - set(judged))
    found["watch: doubled"] += len(judged) - len(set(judged)) + abs(len(table) - len(judged))


KILLED: dict[str, Callable[[Bench, int, Found], None]] = {
    "update": _kill_update,
    "tune": _kill_tune,
    "export": _kill_export,
    "train": _kill_train,
    "watch": _kill_watch,
}


# --------------------------------------------------------------------------------------------------------------- flips


def flips(bench: Bench, count: int) -> Found:
    """Single bits of every file of a trained and of an exported model: each is found when the model is loaded."""
    found: Found = Counter()
    for model in (bench.trained, bench.exported):
        copy = bench.folder / "flipped"
        shutil.copytree(model, copy)
        for path in sorted(copy.iterdir()):
            content = path.read_bytes()
            for _ in range(count):
                at, bit = bench.rng.randrange(len(content)), 1 << bench.rng.randrange(8)
                path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
                found["tried"] += 1
                try:
                    kizu.load(copy)
                    found[f"accepted in {path.name}"] += 1
                except kizu.ModelError:
                    pass
            path.write_bytes(content)
        shutil.rmtree(copy)
    return +found


# ------------------------------------------------------------------------------------------------------------ requests


def requests(bench: Bench, count: int) -> Found:
    """Requests in eight threads beside 400 idle connections, one in twenty damaged: each gets its own answer."""
    found: Found = Counter(tried=count)
    paths = sorted((bench.folder / "new").iterdir())
    model = kizu.load(bench.exported)
    expected = {path.name: model.predict(path).score for path in paths}
    contents = {path.name: path.read_bytes() for path in paths}
    with _serving(bench) as address, ThreadPoolExecutor(8) as pool:
        host, port = address.removeprefix("http://").rstrip("/").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(400)]
        draws = [(number, bench.rng.choice(paths).name, bench.rng.random() < 0.05) for number in range(count)]

        def ask(draw: tuple[int, str, bool]) -> str:
            number, name, bad = draw
            body = _mutated(contents[name][:200], random.Random(number)) if bad else contents[name]
            status, answer = _posted(f"{address}v1/predict?name={name}", body)
            if bad:
                return "" if status in (200, 413, 415, 422) else f"bad body: status {status}"
            if status != 200:
                return f"lost: status {status}"
            result = answer["results"][0]
            crossed = abs(result["score"] - expected[name]) > 1e-4 * expected[name]
            return "crossed" if crossed else ""

        for outcome in pool.map(ask, draws):
            if outcome:
                found[outcome] += 1
        for one in idle:
            one.close()
    return +found


def _posted(url: str, body: bytes) -> tuple[int, dict[str, list[dict[str, float]]]]:
    headers = {"Content-Type": "application/octet-stream"}
    for _ in range(100):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in (429, 503):
                    return error.code, {}
            time.sleep(0.05)
        except OSError:  # a connection that was closed before its request was read
            time.sleep(0.05)
    return 0, {}


@contextmanager
def _serving(bench: Bench) -> Iterator[str]:
    command = [*KIZU, "serve", str(bench.exported), "--port", "0", "--store", str(bench.folder / "served")]
    with (bench.folder / "server.log").open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=bench.environment(),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
        )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split(" at ")[1].split()[0]
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


PARTS: dict[str, tuple[Callable[[Bench, int], Found], int]] = {
    "images": (images, 10_000),
    **{f"kill-{name}": (partial(kills, name), 100) for name in KILLED},
    "flips": (flips, 100),
    "requests": (requests, 10_000),
    "disks": (disks, 6),
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--count", type=int, help="of each, instead of the usual number")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
