"""The same commands on a Ray cluster: row for row what one process says, whatever is killed meanwhile."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import kizu
from kizu.data import files
from kizu.data.demo import render
from kizu.inference.batch import image_paths, predict_files
from kizu.testing import photograph as part
from processes import kizu as run

if find_spec("ray") is None:  # which is imported by the cluster, after it has been told to keep to this machine
    pytest.skip("Ray is not installed: pip install 'kizu[ray]'", allow_module_level=True)
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'kizu[ray]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'kizu[ray]'")

from kizu.ray.cluster import cluster  # noqa: E402
from kizu.ray.judging import judge, model_files  # noqa: E402
from kizu.ray.predict import predict  # noqa: E402
from kizu.ray.sources import photographs as listed  # noqa: E402

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
        wait_for(lambda: list(Path("disturbed").glob("*/*/*/*/unfinished")))
        os.kill(workers(b"ray::_carried_out")[0], signal.SIGKILL)
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


def wait_for(condition, seconds=60.0):
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


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')")
    said = run("predict", EXPORTED, "new", "--parquet", "out", "--ray", code=2, cwd=tmp_path)
    assert "pip install 'kizu[ray]'" in said.stderr
