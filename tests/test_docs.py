"""Every snippet in the README and the documents runs."""

import csv
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import pytest
from PIL import Image

from kizu.cli.main import GROUPS, cli
from processes import kizu, python
from test_detectors import part

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def snippets(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workshop(tmp_path):
    """The folders that the documents speak of."""
    for number in range(10):
        for folder in ("photos/good", "parts/good"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(part(number)).save(tmp_path / folder / f"{number}.png")
    for number in range(3):
        for folder in ("photos/bad", "new"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(part(50 + number, spot=True)).save(tmp_path / folder / f"{number}.png")
    Image.fromarray(part(90)).save(tmp_path / "part.png")
    return tmp_path


LONG = {
    "command-line.md",
    "simplenet.md",
    "sizes.md",
    "zones.md",
    "missed-defects.md",
    "verdicts.md",
    "metrics.md",
    "efficientad.md",
    "large-photographs.md",
    "runtime.md",
    "serving.md",
    "watching.md",
    "many-machines.md",
}  # for `make test-all`
LONG_PYTHON = {"many-machines.md", "missed-defects.md", "runtime.md", "simplenet.md"}  # likewise
SERVED = "127.0.0.1:8000"


@pytest.fixture
def port():
    """One that is free, in the place of the documents' 8000."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


@contextmanager
def staying(command, workshop):
    """A command that goes on until it is told to stop, from its first line of output on."""
    with (workshop / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=workshop, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout.readline(), (workshop / "log").read_text()
            yield
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG else ())
        for page in PAGES
        if snippets(page, "console")
    ],
)
def test_commands_run(page, workshop, port):
    """In order; a server that is started runs to the page's end, and the page's Python talks to it."""
    served = "$ kizu serve" in page.read_text()
    with ExitStack() as servers:
        for language, block in re.findall(
            r"^```(console|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        ):
            block = block.replace(SERVED, f"127.0.0.1:{port}")
            if language == "python" and served:
                run(block, workshop)
            for line in block.splitlines() if language == "console" else ():
                assert re.match(r"\$ (kizu|curl) ", line), line
                program, *arguments = shlex.split(line)[1:]
                command = [Path(sys.executable).with_name("kizu"), *arguments]
                if program == "curl":
                    command = ["curl", "--fail", "--silent", "--show-error", *arguments]
                    subprocess.run(command, cwd=workshop, check=True)
                elif arguments[0] == "serve":
                    servers.enter_context(staying([*command, "--port", str(port)], workshop))
                elif arguments[0] == "watch" and "--once" not in arguments:
                    with staying(command, workshop):
                        pass
                else:
                    kizu(*arguments, cwd=workshop)


def run(block, workshop):
    done = python("-c", block, cwd=workshop)
    assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG_PYTHON else ())
        for page in PAGES
        if snippets(page, "python") and "$ kizu serve" not in page.read_text()
    ],
)
def test_python_runs(page, workshop):
    for block in snippets(page, "python"):
        run(block, workshop)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_are_named_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for module in re.findall(r"^  {0,4}(\w+\.py)", text, re.MULTILINE):
        assert list((ROOT / "src").rglob(module)), module


@pytest.mark.parametrize(
    ("page", "table"),
    [("README.md", "accuracy"), ("docs/benchmarks.md", "accuracy"), ("docs/efficientad.md", "efficientad_accuracy")],
)
def test_the_published_table_is_the_measured_one(page, table):
    text = (ROOT / page).read_text()
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / f"{table}.csv").read_text().splitlines()):
        values = (row[key] for key in ("image_auroc", "pixel_auroc", "au_pro"))
        cells = " | ".join(value if value == "n/a" else f"{float(value):.4f}" for value in values)
        assert f"| {row['category'].replace('_', ' ')} | {cells} |" in text, row["category"]


@pytest.mark.parametrize("page", ["README.md", "docs/missed-defects.md"])
def test_the_published_table_of_chosen_settings_is_the_measured_one(page):
    text = (ROOT / page).read_text()
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / "auto.csv").read_text().splitlines()):
        if row["settings"] != "defaults":
            cells = (row["category"].replace("_", " "), row["settings"].removeprefix("auto: "), row["image_auroc"])
            assert f"| {' | '.join(cells)} | {row['au_pro']} | {row['stopped']} | {row['false alarms']} |" in text


def test_the_published_table_of_turned_photographs_is_the_measured_one():
    text = (ROOT / "docs" / "alignment.md").read_text()
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / "auto.csv").read_text().splitlines()):
        if "turned" in row["category"] or "one pose" in row["settings"]:
            cells = (row[key] for key in ("settings", "image_auroc", "stopped", "false alarms", "ms a photograph"))
            assert f"| {row['category'].replace('_', ' ')} | {' | '.join(cells)} |" in text


def test_commands_that_are_named_exist():
    texts = [*PAGES, *sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "src").rglob("*.js"))]
    named = {(path.name, word) for path in texts for word in re.findall(r"`kizu ([a-z]+)", path.read_text())}
    known = {command.name for commands in GROUPS.values() for command in commands}
    assert len(named) > 40 and {(page, word) for page, word in named if word not in known} == set()


OTHERS = {"--now", "--unit", "--stop-timeout", "--options"}  # systemd's, docker's, and what stands for any


def options_of(command):
    """Every way to write an option of a command, and of the commands below it."""
    context = click.Context(command)
    options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    names = {flag.replace("_", "-") for option in options for flag in (*option.opts, *option.secondary_opts)}
    if isinstance(command, click.Group):
        below = [command.get_command(context, name) for name in command.list_commands(context)]
        names = names.union(*map(options_of, below))
    return names


def test_options_that_are_named_exist():
    """Those of kizu's commands, of the scripts in benchmarks/, and of the programs that services.md speaks of."""
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    known = options_of(cli) | set(re.findall(r"--[a-z][\w-]+", scripts)) | OTHERS
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`|^\$ (kizu .*)", page.read_text(), re.MULTILINE)
        named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", "".join(span))}
        assert {flag for flag in named if flag.replace("_", "-") not in known} == set(), page.name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path):
    """With this environment's kizu in the place of theirs; systemd says what it does not know or finds."""
    units = snippets(ROOT / "docs" / "services.md", "ini")
    for name, unit in zip(("kizu-serve", "kizu-watch"), units, strict=True):
        path = tmp_path / f"{name}.service"
        path.write_text(
            unit.replace("/opt/kizu/bin/kizu", str(Path(sys.executable).with_name("kizu"))).replace(
                "/etc/kizu.env", "-/etc/kizu.env"
            )
        )
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
        assert name not in done.stderr, done.stderr
        words = shlex.split(re.search(r"ExecStart=\S+ (.*)", unit)[1])
        assert "No such option" not in kizu(*words, code=2).stderr  # only the folders are not there


def test_the_published_choice_is_the_measured_one():
    text = (ROOT / "docs" / "missed-defects.md").read_text()
    for row in csv.reader((ROOT / "benchmarks" / "results" / "choice.csv").read_text().splitlines()):
        assert f"| {' | '.join(row)} |" in text, row


def test_the_published_columns_are_the_measured_ones():
    text = (ROOT / "docs" / "coming-from-the-originals.md").read_text()
    for table in ("originals.csv", "seeds.csv"):
        _, *rows = csv.reader((ROOT / "benchmarks" / "results" / table).read_text().splitlines())
        for row in rows:
            assert f"| {' | '.join(row)} |" in text, row


def test_the_published_sizes_are_the_measured_ones():
    with (ROOT / "benchmarks" / "results" / "sizes.csv").open() as file:
        rows = {(r["category"], r["input"], r["contrast"], r["diameter"]): r for r in csv.DictReader(file)}
    lines = (ROOT / "docs" / "sizes.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ \|", line)]
    columns = [(c, i, k) for i in ("320", "640") for c in ("bottle", "pill") for k in ("60", "150")]
    assert len(table) == 8
    for diameter, *cells in table:
        for (category, size, contrast), cell in zip(columns, cells, strict=True):
            row = rows[category, size, contrast, diameter]
            marked, painted = map(int, row["marked"].split(" of "))
            assert cell == (row["length"] if 2 * marked >= painted else "–")


def test_the_published_refusals_are_the_measured_ones():
    with (ROOT / "benchmarks" / "results" / "captures.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs" / "cannot-judge.md").read_text()
    for kind in dict.fromkeys(row["photographs"] for row in rows):
        cells = [row["refused"] for row in rows if row["photographs"] == kind]
        assert f"| {kind.removeprefix('other good ones, learned from ')} | {' | '.join(cells)} |" in page


def test_the_published_figures_of_a_cluster_are_the_measured_ones():
    text = (ROOT / "docs" / "many-machines.md").read_text()
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / "many_machines.csv").read_text().splitlines()):
        assert f"| {row['measure']} | {row['value']} {row['unit']}".rstrip() + " |" in text, row["measure"]
