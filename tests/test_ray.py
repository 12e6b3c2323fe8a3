"""The same commands on a Ray cluster: row for row what one process says, whatever is killed meanwhile."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.cli.main import cli
from kizu.config import PatchCoreConfig
from kizu.data import dataset, files
from kizu.data.demo import render
from kizu.detectors.patchcore.sharded import ShardedPatchCore
from kizu.evaluation.comparison import matrix
from kizu.inference.batch import image_paths, predict_files
from kizu.testing import photograph as part
from processes import kizu as run

if find_spec("ray") is None:  # which is imported by the cluster, after it has been told to keep to this machine
    pytest.skip("Ray is not installed: pip install 'kizu[ray]'", allow_module_level=True)
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'kizu[ray]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'kizu[ray]'")

from kizu.ray.cluster import cluster  # noqa: E402
from kizu.ray.judging import judge, model_files  # noqa: E402
from kizu.ray.matrix import as_tasks as cells_as_tasks  # noqa: E402
from kizu.ray.predict import predict  # noqa: E402
from kizu.ray.sources import photographs as listed  # noqa: E402
from kizu.ray.training import as_tasks as shards_as_tasks  # noqa: E402

EXPORTED = Path(__file__).with_name("models_of_0_1") / "patchcore-exported"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.].*")  # Ray's, of its own settings
SAID = ("verdict", "score", "p_value", "threshold", "zone", "regions", "cannot_judge", "error")


@pytest.fixture(scope="module")
def address():
    """A Ray cluster of this machine for all tests of this file; its address is for other processes."""
    with cluster("local") as ray:
        yield ray.get_runtime_context().gcs_address


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """240 paths to 20 photographs, and 12 that are damaged, in one way or another."""
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    for number in range(20):
        Image.fromarray(part(number, spot=number % 4 == 0)).save(f"{number}.png")
        for copy in range(12):
            Path(f"new/{copy:02}-{number:02}.png").symlink_to(f"../{number}.png")
    whole = Path("0.png").read_bytes()
    for number in range(4):
        Path(f"new/empty-{number}.png").write_bytes(b"")
        Path(f"new/cut-{number}.png").write_bytes(whole[: 400 * (number + 1)])
        Path(f"new/none-{number}.jpg").write_bytes(random.Random(number).randbytes(3000))
    return tmp_path


def rows(folder):
    found = pq.read_table(folder).to_pylist()
    by_path = {row["path"]: row for row in found}
    assert len(by_path) == len(found), "a photograph is there twice"
    return by_path


def expected(photographs="new"):
    """What one process says, as the command's JSON would have it."""
    verdicts = predict_files(kizu.load(EXPORTED), image_paths([photographs]))
    return {verdict.image: verdict.model_dump() for verdict in verdicts}


def check_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, verdict in wanted.items():
        said = found[path] | {name: found[path][name] or "" for name in ("cannot_judge", "error")}
        plain = {name: json.loads(json.dumps(verdict[name])) for name in SAID}
        assert {name: said[name] for name in SAID} == plain, path


def workers(title):
    """The processes of this file's cluster that are called so: those below this process alone."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue

    def is_ours(process):
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return [process for process, name in titles.items() if name.startswith(title) and is_ours(process)]


def actors():
    return workers(b"ray::MapWorker")


@pytest.mark.slow
def test_killed_workers_and_a_killed_command_lose_nothing_and_double_nothing(address, photographs):
    command = ["predict", EXPORTED, "new", "--parquet", "out", "--part", r"-(\d+)", "--ray", address]
    driver = subprocess.Popen([sys.executable, "-m", "kizu", *command], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: parts_in("out") > 0)
    os.kill(actors()[0], signal.SIGKILL)
    wait_for(lambda: parts_in("out") > 3)
    driver.kill()
    driver.communicate()
    begun = len(rows("out"))
    assert 0 < begun < 252, "it was killed too late to show anything"

    Image.fromarray(part(77)).save("new/later-20.png")
    summary = json.loads(run(*command, "--json", code=1).stdout)
    wanted, found = expected(), rows("out")
    check_same(found, wanted)
    assert summary["before"] >= begun and summary["before"] + summary["now"] == len(wanted) == 253
    assert summary["counts"] == {
        said: sum(verdict["verdict"] == said for verdict in wanted.values())
        for said in ("pass", "stop", "ask", "error")
    }
    assert summary["counts"]["error"] == 12
    assert found["new/03-07.png"]["part"] == "07" and found["new/empty-1.png"]["part"] == "1"
    assert found["new/03-07.png"]["content_hash"] == found["new/04-07.png"]["content_hash"]
    assert len({row["content_hash"] for row in found.values()}) == 21 + 1 + 4 + 4
    assert len({row["model"] for row in found.values()}) == 1

    with pytest.raises(kizu.OptionError, match="verdicts of another model"):
        predict(EXPORTED.with_name("patchcore"), ["new"], "out")
    Path("out", "other.parquet").write_bytes(b"")
    with pytest.raises(kizu.DataError, match=r"other\.parquet is damaged"):
        predict(EXPORTED, ["new"], "out")


def test_judging_goes_on_where_a_command_was_killed_and_repeats_what_an_actor_was_at(address, photographs):
    command = ["predict", EXPORTED, "new", "--parquet", "out", "--ray", address, "--actors", "1"]
    driver = subprocess.Popen([sys.executable, "-m", "kizu", *command], stderr=subprocess.DEVNULL)
    wait_for(lambda: parts_in("out") > 1)
    driver.kill()
    driver.wait()
    begun = len(rows("out"))
    assert 0 < begun < 252, "it was killed too late to show anything"
    killed = []

    def kill(stage, done, total):
        if done and stage.startswith("Judging") and not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    judged = predict(EXPORTED, ["new"], "out", actors=1, progress=kill)
    assert killed and judged.before >= begun and judged.before + judged.now == 252
    assert judged.counts["error"] == 12
    check_same(rows("out"), expected())


def test_a_model_on_its_way_is_not_swept_away_by_other_commands(address):
    with model_files(EXPORTED).folder() as folder:
        with files.scratch_folder():
            pass
        assert kizu.load(folder).method == "patchcore"


def test_a_cluster_of_ours_is_heard_on_this_machine_alone(address):
    """No port of any of its processes is open to other machines, and nothing is reported."""
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    ports = {}
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            local, _, state, *rest = line.split()[1:]
            if state == "0A":
                ports[rest[5]] = local.rpartition(":")[0]
    heard = set()
    for process in (*workers(b""), os.getpid()):
        for link in Path(f"/proc/{process}/fd").glob("*"):
            with suppress(OSError):
                heard.add(ports.get(str(link.readlink()).removeprefix("socket:[").rstrip("]")))
    heard.discard(None)
    assert heard and heard <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def table(folder):
    return (Path(folder) / "matrix.csv").read_text()


def kill_when(condition, title):
    """Kill a worker that is called so, as soon as the condition holds; returns the thread that waits for it."""

    def kill():
        wait_for(condition)
        wait_for(lambda: workers(title))
        os.kill(workers(title)[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_matrix_of_which_a_worker_dies_and_whose_gaps_are_filled(address, tmp_path):
    render(tmp_path / "parts", train=16, good=3, each=1, size=96)
    data = [dataset.find(tmp_path / "parts")]

    def cells(folder):
        return matrix.cells_of(data, ["patchcore"], ["size=32 false_alarms=0.1"], [0, 1], tmp_path / folder)

    disturbed, whole = cells("disturbed"), cells("whole")
    killing = kill_when(lambda: list((tmp_path / "disturbed").rglob("unfinished")), b"ray::_carried_out")
    assert [outcome.problem for outcome in cells_as_tasks(disturbed[:1])] == [""]
    killing.join()
    missing = matrix.begin(disturbed, tmp_path / "disturbed", resume=True)
    assert [cell.seed for cell in missing] == [1]
    outcomes = [matrix.Outcome(disturbed[0]), *cells_as_tasks(missing)]
    assert matrix.summary_rows(outcomes) == matrix.summary_rows([*matrix.one_after_another(whole)])
    assert matrix.summary_rows(outcomes)[0]["runs"] == "2"


def patches(folder, count):
    """Photographs of coloured patches, of which no two have the same."""
    folder.mkdir(parents=True)
    for seed in range(count):
        colours = np.random.default_rng(seed).integers(60, 200, (5, 5, 3), np.uint8)
        Image.fromarray(colours).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{seed:03}.png")


def contents(model):
    return {path.name: path.read_bytes() for path in sorted(Path(model).iterdir())}


def test_training_on_a_cluster_gives_the_bytes_of_one_process(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patches(Path("parts/good"), 12)
    words = [
        "patchcore",
        "parts",
        "--size",
        "64",
        "--false-alarms",
        "0.1",
        "--shards",
        "3",
        "--ray",
        address,
        "--quiet",
    ]
    cli.main(["train", *words], standalone_mode=False)  # in this process, whose workers there are already
    found = Path("results/project/group/run")
    config = PatchCoreConfig(size=64, false_alarms=0.1)
    ShardedPatchCore(config, 3).fit(dataset.find(Path("parts")).select(split="train")).save("model")
    assert contents(found / "models" / "parts") == contents("model")
    assert json.loads((found / "run.json").read_text())["shards"] == {"parts": 3}


@pytest.mark.parametrize(
    "steps", [{"search"}, pytest.param({"look", "choose", "search", "score"}, marks=pytest.mark.slow)], ids=len
)
def test_training_of_which_workers_die_gives_the_same_bytes(steps, address, tmp_path):
    """In each of these steps the worker of one shard is killed when it has done its work and not yet said so."""
    patches(tmp_path / "good", 12)
    config, good, killed = PatchCoreConfig(size=64, false_alarms=0.1), sorted((tmp_path / "good").iterdir()), []

    def disturbed(step, detector, shards, done):
        mark = tmp_path / step.__name__

        def dying(detector, shard):
            result = step(detector, shard)
            if step.__name__ in steps and shard.numbers[0] == 0 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        results = shards_as_tasks(dying, detector, shards, done)
        killed.extend([step.__name__] if mark.exists() else [])
        return results

    ShardedPatchCore(config, 3).fit(good).save(tmp_path / "plain")
    ShardedPatchCore(config, 3, disturbed).fit(good).save(tmp_path / "disturbed")
    assert {*killed} == steps
    assert contents(tmp_path / "plain") == contents(tmp_path / "disturbed")


@pytest.mark.slow
def test_a_shard_that_cannot_be_learned_from_is_told(address, tmp_path):
    patches(tmp_path / "good", 12)
    good = sorted((tmp_path / "good").iterdir())

    def emptied(step, detector, shards, done):
        if step.__name__ == "choose":
            good[7].write_bytes(b"")
        return shards_as_tasks(step, detector, shards, done)

    with pytest.raises(kizu.DataError, match=r"(?s)1 of 4 training images cannot be used.*007\.png"):
        ShardedPatchCore(PatchCoreConfig(size=64, false_alarms=0.1), 3, emptied).fit(good)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_matrix_on_a_cluster_is_that_of_one_process(killed, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray's workers have it
    render("parts", train=24, good=8, each=2, size=96)
    command = ["compare", "parts", "--methods", "patchcore", "--setting", "size=32", "--seeds", "3"]
    comparing = [sys.executable, "-m", "kizu", *command, "--output", "disturbed", "--ray", address]
    driver = subprocess.Popen(comparing, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if killed:
        kill_when(lambda: list(Path("disturbed").glob("*/*/*/*/unfinished")), b"ray::_carried_out").join()
    run(*command, "--output", "whole")
    output, errors = driver.communicate(timeout=100)
    assert driver.returncode == 0, errors
    assert output.startswith("category"), "Ray's remarks are among the results"
    assert table("disturbed") == table("whole")


@pytest.mark.slow
def test_a_matrix_of_three_by_three_by_three_killed_and_resumed(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        render(f"parts-{name}", train=24, good=8, each=2, size=96, seed=ord(name))
    command = ["compare", *(f"parts-{name}" for name in "abc"), "--seeds", "0-2", "--ray", address]
    command += [
        "--methods",
        "patchcore,simplenet,puad",
        "--setting",
        "patchcore: size=48",
        "--setting",
        "puad: size=48",
    ]
    command += ["--setting", "simplenet: size=48 meta_epochs=1 gan_epochs=1"]
    comparing = [sys.executable, "-m", "kizu", *command, "--output", "disturbed"]
    chance = random.Random(0)
    driver = subprocess.Popen(comparing, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for finished in (2, 5, 9, 14, 20):
        wait_for(lambda count=finished: len(list(Path("disturbed").rglob("run.json"))) >= count, 600)
        wait_for(lambda: workers(b"ray::_carried_out"))
        os.kill(chance.choice(workers(b"ray::_carried_out")), signal.SIGKILL)
        if finished in (5, 14):
            driver.kill()
            driver.wait()
            driver = subprocess.Popen([*comparing, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert driver.wait(900) == 0
    run(*command, "--output", "whole")
    assert table("disturbed") == table("whole")
    assert table("whole").count(" ± ") == 3 * (9 + 3)


@pytest.mark.slow
def test_a_node_that_is_removed(real_data, tmp_path):
    """Three nodes: workers are killed at random moments, a node goes, the command is killed; 5 % are damaged."""
    benchmark = Path(__file__).parents[1] / "benchmarks" / "many_machines.py"
    command = [sys.executable, benchmark, "--photographs", "1500", "--only", "faults", "--output", "figures.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "figures.csv").open() as table:
        figures = {row["measure"]: row["value"] for row in csv.DictReader(table)}
    assert [figures[name] for name in ("lost", "doubled", "different")] == ["0", "0", "0"]
    assert figures["workers killed"] == "20" and figures["error rows"] == figures["damaged"] != "0"


def parts_in(folder):
    return len(list(Path(folder).glob("part-*")))


def wait_for(condition, seconds=180.0):  # a cluster starts slowly on a busy machine
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.02)


def test_a_pipeline_of_ones_own(address, photographs):
    import ray

    files = ray.data.read_binary_files(str(photographs / "new"), include_paths=True)
    dataset = files.add_column("line", lambda table: len(table) * [4])
    found = {row["path"]: row for row in judge(dataset, EXPORTED).iter_rows()}
    wanted = {str(Path(path).absolute()): verdict for path, verdict in expected().items()}
    check_same(found, wanted)
    assert {row["line"] for row in found.values()} == {4} and "bytes" not in next(iter(found.values()))


def test_sources(photographs):
    """Lists, tables and addresses name the same photographs as a folder does."""
    wanted = [str(path) for path in image_paths(["new"])]
    root = photographs.as_uri()
    Path("list.txt").write_text("\n".join([*wanted, "", *wanted]))
    Path("list.csv").write_text("line,file\n" + "".join(f'1,"{path}"\n' for path in wanted))
    pq.write_table(pa.table({"line": [1] * len(wanted), "where": wanted}), "list.parquet")
    assert listed([], "list.txt").to_pylist() == wanted
    assert listed([], "list.csv").to_pylist() == wanted
    assert listed([], "list.parquet", "where").to_pylist() == wanted
    assert listed(["new/0*.png", "new"]).to_pylist() == wanted
    assert sorted(listed([f"{root}/new"]).to_pylist()) == sorted(f"{root}/{path}" for path in wanted)
    assert listed([f"{root}/0.png"]).to_pylist() == [f"{root}/0.png"]
    for listing, column, sentence in [
        ("list.parquet", None, "none of the columns"),
        ("list.csv", "where", "no column where"),
        ("none.txt", None, "cannot be read"),
    ]:
        with pytest.raises(kizu.KizuError, match=sentence):
            listed([], listing, column)
    with pytest.raises(kizu.DataError, match="cannot be listed"):
        listed([f"{root}/nowhere"])
    with pytest.raises(kizu.OptionError, match="no file system"):
        listed(["moon://crater/new"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["new", "--parquet", "out"], "--parquet belongs to --ray"),
        (["new", "--ray"], "--ray needs --parquet"),
        (["new", "--ray", "--csv", "a.csv"], "--csv does not go with --ray"),
        (["--parquet", "out", "--ray", "new"], "--ray new: a cluster's address"),
        (["new", "--parquet", "out", "--ray", "127.0.0.1:1"], "no Ray cluster answers there"),
    ],
)
def test_what_does_not_go_together_is_told(arguments, sentence, tmp_path):
    assert sentence in run("predict", EXPORTED, *arguments, code=2, cwd=tmp_path).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["patchcore", "parts", "--shards", "3"], "--shards belongs to --ray"),
        (["simplenet", "parts", "--ray"], "kizu compare DATA --methods simplenet --ray trains each category"),
        (["patchcore", "parts", "--ray", "--auto"], "--auto does not go with --ray"),
        (["patchcore", "--ray", "parts"], "--ray parts: a cluster's address"),
        (["patchcore", "parts", "--align", "--ray"], "train it without --ray"),
    ],
)
def test_training_that_a_cluster_does_not_do_is_refused(arguments, sentence, tmp_path):
    patches(tmp_path / "parts" / "good", 3)
    assert sentence in run("train", *arguments, code=2, cwd=tmp_path).stderr


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')")
    patches(tmp_path / "parts" / "good", 3)
    for command in (
        ["predict", EXPORTED, "new", "--parquet", "out", "--ray"],
        ["train", "patchcore", "parts", "--ray"],
    ):
        assert "pip install 'kizu[ray]'" in run(*command, code=2, cwd=tmp_path).stderr
    assert not (tmp_path / "results").exists()
