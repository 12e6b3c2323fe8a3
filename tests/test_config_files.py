"""--config FILE and --print-config: the same options from a file, in every format, for every command."""

import json
import tomllib

import pytest
from PIL import Image

import kizu as library
from kizu.cli.main import GROUPS
from processes import kizu
from test_detectors import part


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "good").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(part(number)).save(tmp_path / "photos" / "good" / f"{number}.png")
    return tmp_path


FILES = {
    "options.toml": 'size = [64, 96]\nlayers = "blocks.2,blocks.4"\ncoreset = 0.3\nkeep-copies = true\nname = "told"',
    "options.yaml": "size: 64x96\nlayers: blocks.2,blocks.4\ncoreset: 0.3\nkeep-copies: true\nname: told\n",
    "options.json": json.dumps(
        {"size": [64, 96], "layers": ["blocks.2", "blocks.4"], "coreset": 0.3, "keep_copies": True, "name": "told"}
    ),
}


@pytest.mark.parametrize(
    "name", ["options.toml", *(pytest.param(f"options.{kind}", marks=pytest.mark.slow) for kind in ("yaml", "json"))]
)
def test_options_come_from_a_file_and_the_command_line_wins(name, photos):
    (photos / name).write_text(FILES[name])
    kizu("train", "patchcore", "photos", "--config", name, "--coreset", 0.5, "-q", cwd=photos)
    run = json.loads((photos / "results/project/group/told/run.json").read_text())
    config = run["config"]
    assert (config["size"], config["layers"], config["coreset"]) == ([64, 96], ["blocks.2", "blocks.4"], 0.5)
    again = "results/project/group/told/run.json"  # a run's own settings, for another run
    kizu("train", "patchcore", "photos", "--config", again, "--name", "again", "-q", cwd=photos)
    models = [library.load(photos / "results/project/group" / run / "models" / "photos") for run in ("told", "again")]
    assert models[0].calibration_scores == models[1].calibration_scores


def test_what_is_printed_is_a_file_that_is_taken(photos):
    printed = kizu("train", "patchcore", "--size", 64, "--layers", "blocks.2", "--print-config", cwd=photos).stdout
    assert tomllib.loads(printed) == {"size": [64, 64], "layers": ["blocks.2"]}
    (photos / "mine.toml").write_text(printed)
    assert kizu("train", "patchcore", "--config", "mine.toml", "--print-config", cwd=photos).stdout == printed
    everything = printed.replace("# coreset =", "coreset =").replace("# top =", "top =")
    assert len(tomllib.loads(everything)) == 4


def test_wrong_files_get_a_sentence(photos):
    for name, text, sentence in (
        ("a.toml", "siz = 64", "siz is no option of kizu train patchcore. Did you mean size?"),
        ("b.toml", "size = ", "b.toml is not TOML"),
        ("c.yaml", "size: [", "c.yaml is not YAML"),
        ("d.json", "[" * 100_000, "d.json is not JSON"),
        ("e.json", "[1]", "holds no options"),
        ("f.toml", "coreset = 7", "--coreset 7"),
        ("g.yaml", "on: true", "True is no option of kizu train patchcore"),
        (
            "h.json",
            json.dumps({"method": "simplenet", "config": {}}),
            "is a run of simplenet: its settings do not fit kizu train patchcore",
        ),
        ("i.toml", 'category = "none"\nbad = "scratched"\nms = 30\nauto = true', "--bad scratched: there is no folder"),
    ):
        (photos / name).write_text(text)
        done = kizu("train", "patchcore", "photos", "--config", name, cwd=photos, code=2)
        assert sentence in done.stderr, done.stderr
    assert "cannot be read" in kizu("predict", "m", "x.png", "--config", "none.toml", code=2).stderr
    assert "Missing argument 'DATA'" in kizu("train", "patchcore", code=2).stderr


def test_a_setting_that_is_a_table_comes_back(photos):
    """PUAD's settings of the method below it."""
    options = ("--base-settings", "coreset=0.3", "--print-config")
    printed = kizu("train", "puad", *options, cwd=photos).stdout
    (photos / "puad.toml").write_text(printed)
    assert kizu("train", "puad", "--config", "puad.toml", "--print-config", cwd=photos).stdout == printed
    run = {"method": "puad", "config": {"base_settings": {"coreset": 0.3}}}
    (photos / "run.json").write_text(json.dumps(run))
    assert kizu("train", "puad", "--config", "run.json", "--print-config", cwd=photos).stdout == printed


def test_every_command_with_options_takes_a_file():
    for commands in GROUPS.values():
        for command in commands:
            names = [param.name for param in command.params]
            assert (
                "config_file" in names or not hasattr(command, "callback") or hasattr(command, "commands") or not names
            )
