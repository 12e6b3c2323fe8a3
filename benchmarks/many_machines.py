"""Judging and training on a Ray cluster beside one process, and what is lost when workers, nodes and commands die.

python benchmarks/many_machines.py                         all, 100,000 photographs
python benchmarks/many_machines.py --photographs 10000     with fewer
python benchmarks/many_machines.py --size 128              with a smaller, faster model
python benchmarks/many_machines.py --only faults           or speed, driver, training

Each part that was measured replaces its rows in results/many_machines.csv.

The photographs are links to real ones of a category, scaled to 256 pixels: distinct paths, as many as are wanted.
Model: PatchCore with its defaults at 256 × 256 (`--size`), exported to ONNX.

Speed: one `kizu predict` and one `kizu predict --ray` over the same photographs on the same cores, in turns, first over
one half of the photographs and then over the other one. One process is timed as a whole command, Ray from the first
photograph to the last, with the start of the actors; Ray's own start, listing and end are a row of their own. Memory is
the resident set of the driver and of the largest actor, sampled every second: the largest value in the second quarter
of the time, and in the last one.

Faults: three nodes on this machine (`ray.cluster_utils.Cluster`), with 5 % damaged files. At random moments twenty
actors are killed, a node is removed and another comes, and twice the command is killed and started again. Then every
row is compared with what one process says.

Training: `kizu train patchcore` and the same with `--ray --shards 4`, at the same size, on bottle and magnetic tile;
the latter also with little memory, where the bank is chosen among coresets; then once more, while workers are killed,
each a second after one is seen at work, until three are dead. The memory is that of the largest worker.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from beside import beside
from kizu.data.files import write_text

HERE = Path(__file__).parent
DATA = Path(os.environ.get("KIZU_TEST_DATA", HERE.parents[1] / "shared" / "data"))
SIDE = 256
KILLS, DRIVERS = 20, 2
DAMAGED = 20  # every so many-th photograph
FAULTS_SHARE = 10  # of the photographs, one in so many
SAME = ("score", "p_value", "verdict", "threshold", "zone", "regions", "cannot_judge", "error")
PARTS = ("speed", "driver", "faults", "training")
SMALLER = "speed at {size}"  # the part's name for another size than the usual one, whose rows it leaves
TRAINED = {"bottle": DATA / "mvtec_ad" / "bottle", "magnetic tile": DATA / "magnetic_tile"}
SHARDS, WORKERS_KILLED = 4, 3
Verdicts = dict[str, tuple[bytes, str]]  # of each path a hash of what is said, and the error
LISTED = 1_000_000  # paths of the driver's part
HEADER = ("part", "measure", "value", "unit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--photographs", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=SIDE, help="of the models' input")
    parser.add_argument("--category", type=Path, default=DATA / "mvtec_ad" / "bottle", help="in MVTec's layout")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which something is killed")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "many_machines.csv")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        model = Path("model") if arguments.only == "training" else prepare(arguments.category, arguments.size)
        for part in PARTS if arguments.only is None else [arguments.only]:
            if part == "speed":
                rows = [*speed(model, arguments.photographs, arguments.size)]
            elif part == "driver":
                rows = [*driver(model)]
            elif part == "training":
                rows = [*training(arguments.size)]
            else:
                rows = [*faults(model, arguments.photographs // FAULTS_SHARE, arguments.seed)]
            smaller = part == "speed" and arguments.size != SIDE
            record(arguments.output, SMALLER.format(size=arguments.size) if smaller else part, rows)


def record(path: Path, part: str, rows: list[tuple[str, str, str]]) -> None:
    """Print the rows of a part, and put them into the table in place of those that it had."""
    before = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    names = sorted({*PARTS, part, *(row[0] for row in before)}, key=lambda name: (PARTS.index(name.split()[0]), name))
    table = {name: [row for row in before if row[0] == name] for name in names}
    table[part] = [[part, *row] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *(row for kept in table.values() for row in kept)])
    write_text(path, text.getvalue())
    for row in rows:
        print("  ".join(row), flush=True)


def prepare(category: Path, size: int) -> Path:
    """The model, and real photographs at 256 pixels in the folder real."""
    import kizu
    from kizu.data.image import read, resize, write
    from kizu.data.photographs import scan
    from kizu.export import export

    export(kizu.PatchCore(size=size).fit(category / "train" / "good"), "model")
    Path("real").mkdir()
    for number, path in enumerate(scan(category / "test")):
        write(f"real/{number:03}.png", resize(read(path), (SIDE, SIDE)))
    return Path("model").absolute()


def links(folder: Path, count: int, damaged: bool = False) -> Path:
    """So many paths to the real photographs, in folders of a thousand."""
    real = sorted(Path("real").resolve().iterdir())
    for number in range(count):
        path = folder / f"{number // 1000:04}" / f"{number:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if damaged and number % DAMAGED == 0:
            whole = real[number % len(real)].read_bytes()
            path.write_bytes(whole[: random.Random(number).randrange(len(whole) // 2)])
        else:
            path.symlink_to(real[number % len(real)])
    return folder


def speed(model: Path, count: int, size: int) -> Iterator[tuple[str, str, str]]:
    seconds, start, memory = {"one": 0.0, "ray": 0.0}, [], []
    different = 0
    for turn in range(2):
        folder = links(Path(f"speed-{turn}"), count // 2)
        begun = time.monotonic()
        said_by_one = command("predict", model, folder, "--json").stdout
        seconds["one"] += time.monotonic() - begun
        plain = said(said_by_one)
        del said_by_one
        begun = time.monotonic()
        out = f"verdicts-{turn}"
        sampled = Memory()
        with beside(sampled.sample):
            summary = json.loads(
                command("predict", model, folder, "--json", "--parquet", out, "--ray", "local", on=sampled).stdout
            )
        whole = time.monotonic() - begun
        seconds["ray"] += summary["seconds"]
        start.append(whole - summary["seconds"])
        memory.append(sampled)
        different += sum(differences(plain, out))
    pairs = len(memory)
    yield "photographs", str(count), ""
    yield "side of the network's input", str(size), "pixels"
    yield "one process", f"{count / seconds['one']:.1f}", "photographs a second"
    yield "Ray, as many cores", f"{count / seconds['ray']:.1f}", "photographs a second"
    yield "Ray against one process", f"{seconds['one'] / seconds['ray']:.3f}", ""
    yield "Ray's start, listing and end", f"{sum(start) / pairs:.1f}", "seconds"
    yield "rows that differ", str(different), ""
    for role in ("driver", "actor"):
        for quarter in (1, 3):
            largest = max(sample.largest(role, quarter) for sample in memory)
            yield f"{role}, quarter {quarter + 1} of the time", f"{largest / 1e6:.0f}", "MB"
    parquet = sum(path.stat().st_size for turn in range(2) for path in Path(f"verdicts-{turn}").glob("*.parquet"))
    yield "Parquet", f"{parquet / count:.0f}", "bytes a photograph"


def driver(model: Path) -> Iterator[tuple[str, str, str]]:
    """What a million paths cost the driver, and where the time of a photograph goes."""
    from kizu import load
    from kizu.inference.batch import profile
    from kizu.inference.processor import use

    Path("list.txt").write_text(
        "".join(f"s3://bucket/line-07/2031-05-14/{number:09}.png\n" for number in range(LISTED))
    )
    measured = json.loads(subprocess.run([sys.executable, "-c", LISTING], capture_output=True, check=True).stdout)
    yield "listing a million paths", f"{measured['seconds']:.1f}", "seconds"
    yield "leaving out a million that are done", f"{measured['filter']:.1f}", "seconds"
    yield "a path in the driver, at most", f"{measured['bytes'] / LISTED:.0f}", "bytes"
    use(1)
    spent = profile(load(model), sorted(Path("real").iterdir()))
    yield "decoding", f"{spent['decode']:.1f}", "ms a photograph"
    yield "graph, one thread", f"{spent['graph']:.1f}", "ms a photograph"
    sizes = [path.stat().st_size for path in Path("real").iterdir()]
    yield "file", f"{sum(sizes) / len(sizes) / 1e3:.0f}", "kB a photograph"


LISTING = """
import json, re, time
from pathlib import Path
import pyarrow.compute as pc
from kizu.ray.sources import photographs

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
before, start = peak(), time.monotonic()
names = photographs([], "list.txt")
seconds = time.monotonic() - start
start = time.monotonic()
missing = names.filter(pc.invert(pc.is_in(names, value_set=names)))
assert not len(missing)
print(json.dumps({"seconds": seconds, "filter": time.monotonic() - start, "bytes": peak() - before}))
"""


def faults(model: Path, count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # 127.0.0.1 alone
    from ray.cluster_utils import Cluster

    import kizu  # noqa: F401 - Ray reports nothing

    folder = links(Path("faults"), count, damaged=True)
    plain = said(command("predict", model, folder, "--json", code=1).stdout)
    options = {"num_cpus": 1, "object_store_memory": 256 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=options | {"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(**options) for _ in range(2)]
    chance, done = random.Random(seed), {"workers": 0, "nodes": 0, "commands": 0}
    words = [sys.executable, "-m", "kizu", "predict", model, folder, "--json", "--parquet", "out"]
    moments = sorted([chance.random() for _ in range(KILLS)] + [0.5] + [0.3, 0.7])  # of the photographs
    driver = started(words, cluster.address)
    for moment in moments:
        while progress("out") < moment * len(plain) * 0.95 or not (judging := actors()):
            if driver.poll() is not None:
                raise SystemExit(f"the command has ended: {driver.communicate()}")
            time.sleep(0.05)
        if moment in (0.3, 0.7):
            driver.kill()
            driver.communicate()
            driver = started(words, cluster.address)
            done["commands"] += 1
        elif moment == 0.5:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(cluster.add_node(**options))
            done["nodes"] += 1
        else:
            os.kill(chance.choice(judging), signal.SIGKILL)
            done["workers"] += 1
    output, errors = driver.communicate()
    if not output.startswith("{"):
        raise SystemExit(f"the command failed: {output[:2000]} {errors}")
    lost, doubled, different = differences(plain, "out")
    summary = json.loads(output)
    cluster.shutdown()
    yield "photographs of the faults", str(count), ""
    yield from ((f"{name} killed", str(number), "") for name, number in done.items())
    yield "lost", str(lost), ""
    yield "doubled", str(doubled), ""
    yield "different", str(different), ""
    yield "damaged", str(sum(bool(error) for _, error in plain.values())), ""
    yield "error rows", str(summary["counts"]["error"]), ""
    yield "exit code", str(driver.returncode), ""


def started(words: Sequence[Any], address: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*words, "--ray", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def progress(out: str) -> int:
    """How many verdicts there are."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in Path(out).glob("part-*"))


def said(text: str) -> Verdicts:
    """What `kizu predict --json` printed, row by row: all rows together would take many times as much memory."""
    decoder, verdicts, place = json.JSONDecoder(), Verdicts(), text.index("[") + 1
    while (start := text.find("{", place)) >= 0:
        row, place = decoder.raw_decode(text, start)
        verdicts[row["path"]] = hashed(row), row["error"]
    return verdicts


def hashed(row: dict[str, Any]) -> bytes:
    """A hash of what a row says, whether it comes from JSON or from Parquet."""
    values = [row[name] or "" if name in ("cannot_judge", "error") else row[name] for name in SAME]
    return hashlib.blake2b(json.dumps(floats(values), sort_keys=True).encode(), digest_size=16).digest()


def floats(value: Any) -> Any:
    """The same with all numbers as floats."""
    if isinstance(value, dict):
        return {name: floats(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def differences(plain: Verdicts, out: str) -> tuple[int, int, int]:
    """How many photographs have no row, how many more than one, and how many another one than one process gives."""
    import pyarrow.parquet as pq

    found, doubled, different = set(), 0, 0
    for part in sorted(Path(out).glob("part-*")):
        for row in pq.read_table(part).to_pylist():
            doubled += row["path"] in found
            found.add(row["path"])
            different += row["path"] in plain and hashed(row) != plain[row["path"]][0]
    return len(plain.keys() - found), doubled, different


def training(size: int) -> Iterator[tuple[str, str, str]]:
    for name, data in TRAINED.items():
        folder = name.replace(" ", "-")
        words = ("train", "patchcore", data, "--size", size, "--output", folder, "--json")
        on_ray = (*words, "--ray", "local", "--shards", SHARDS)
        kinds = {
            "one process": words,
            f"{SHARDS} shards": on_ray,
            f"{SHARDS} shards, from coresets": (*on_ray, "--memory", "100MB"),  # too little for all features
        }
        runs, seconds = {}, {}
        sampled = Memory(b"ray::_of_shard")
        for kind, options in kinds.items():
            begun = time.monotonic()
            with beside(sampled.sample) if options is on_ray else nullcontext():
                command(*options, "--name", kind, on=sampled)
            seconds[kind] = time.monotonic() - begun
            runs[kind] = figures(Path(folder, "project", "group", kind))
        auroc = [run["image_auroc"] for run in runs.values()]
        killer = Killer(b"ray::_of_shard", WORKERS_KILLED)
        with beside(killer.kill):
            command(*on_ray, "--name", "killed")
        for kind, run in runs.items():
            yield f"{name}, {kind}: image AUROC", f"{run['image_auroc']:.4f}", ""
            yield f"{name}, {kind}: good parts stopped", f"{run['alarms']} of {run['good']}", ""
            yield f"{name}, {kind}: defects stopped", f"{run['hits']} of {run['bad']}", ""
            yield f"{name}, {kind}: whole command", f"{seconds[kind]:.0f}", "seconds"
        yield f"{name}: image AUROC, difference", f"{auroc[1] - auroc[0]:+.4f}", ""
        yield f"{name}: image AUROC, difference from coresets", f"{auroc[2] - auroc[0]:+.4f}", ""
        yield f"{name}: largest worker", f"{max(s['actor'] for s in sampled.samples) / 1e6:.0f}", "MB"
        yield f"{name}: workers killed while it learned", str(killer.killed), ""
        models = [
            {path.name: path.read_bytes() for path in Path(folder, "project", "group", run, "models").rglob("model.*")}
            for run in (f"{SHARDS} shards", "killed")
        ]
        yield f"{name}: bytes of the model afterwards", "the same" if models[0] == models[1] else "others", ""


def figures(run: Path) -> dict[str, Any]:
    """What a run says of its test photographs."""
    with (run / "results.csv").open() as table:
        row = next(csv.DictReader(table))
    good, bad = int(row["test_good"]), int(row["test_defective"])
    hits = bad - int(row["misses"])
    return {
        "image_auroc": float(row["image_auroc"]),
        "alarms": row["false_alarms"],
        "good": good,
        "hits": hits,
        "bad": bad,
    }


class Killer:
    """Kills so many workers, each a second after one is seen at work."""

    def __init__(self, title: bytes, most: int) -> None:
        self.title, self.most, self.killed = title, most, 0

    def kill(self, over: threading.Event) -> None:
        while self.killed < self.most and not over.wait(0.02):
            if actors(self.title) and not over.wait(1.0) and (working := actors(self.title)):
                os.kill(working[0], signal.SIGKILL)
                self.killed += 1


def command(*words: Any, code: int = 0, on: "Memory | None" = None) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kizu", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if on is not None:
        on.driver = process.pid
    output, errors = process.communicate()
    if process.returncode != code:
        raise SystemExit(f"{words}: {process.returncode}\n{errors}")
    return subprocess.CompletedProcess(words, code, output, errors)


def actors(kind: bytes = b"ray::MapWorker") -> list[int]:
    """The processes, below this one, in which a model judges, or that are called otherwise."""
    parents: dict[int, int] = {}
    titles: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
    found = []
    for process, title in titles.items():
        above = process
        while above != os.getpid() and above in parents:
            above = parents[above]
        if above == os.getpid() and title.startswith(kind):
            found.append(process)
    return found


class Memory:
    """The resident set of a driver and its actors, sampled every second."""

    def __init__(self, kind: bytes = b"ray::MapWorker") -> None:
        self.driver, self.kind = 0, kind
        self.samples: list[dict[str, int]] = []

    def largest(self, role: str, quarter: int) -> int:
        """Bytes of the largest process of a role in a quarter (from 0) of the time in which actors judge."""
        judging = [sample for sample in self.samples if sample["actor"]]
        ends = [round(len(judging) * part / 4) for part in (quarter, quarter + 1)]
        return max(sample[role] for sample in judging[slice(*ends)])

    def sample(self, over: threading.Event) -> None:
        while not over.wait(1.0):
            sizes = [resident(process) for process in actors(self.kind)]
            self.samples.append({"driver": resident(self.driver), "actor": max(sizes, default=0)})


def resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
