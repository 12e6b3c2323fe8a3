"""Seeds and folds: what is learned from, what is judged, and the table."""

import json
import statistics

import pytest
from PIL import Image

import kizu
from kizu.config import PatchCoreConfig
from kizu.data import dataset
from kizu.evaluation.repetition import repetitions, seeds_in
from processes import kizu as command
from test_detectors import part

GOOD, BAD = 14, 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    place = tmp_path_factory.mktemp("parts")
    for name, count in (("good", GOOD), ("bad", BAD)):
        (place / "photos" / name).mkdir(parents=True)
        for number in range(count):
            photo = part(number, spot=name == "bad")
            Image.fromarray(photo).save(place / "photos" / name / f"{number // 2}_{number}.png")
    return place


@pytest.mark.parametrize(("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("1,5-6", [1, 5, 6])])
def test_seeds_as_a_person_lists_them(text, seeds):
    assert seeds_in(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "0-100", "1-2-3", "-1"])
def test_what_lists_no_seeds_is_told(text):
    with pytest.raises(kizu.OptionError, match="seeds"):
        seeds_in(text)


@pytest.mark.parametrize("group_by", [None, r"^(\d+)_"])
def test_each_good_image_is_judged_once_over_the_folds_and_defects_always(photos, group_by):
    data = dataset.find(photos / "photos")
    judged, names = [], set()
    for one in repetitions(PatchCoreConfig(), data, [], 4, group_by):
        learned = {s.path for s in one.data.select(split="train")}
        tested = {s.path for s in one.data.select(split="test") if not s.is_anomalous}
        assert learned.isdisjoint(tested) and len(learned | tested) == GOOD
        assert sum(s.is_anomalous for s in one.data.select(split="test")) == BAD
        judged += tested
        names.add(one.suffix)
        if group_by:
            assert {path.name[0] for path in learned}.isdisjoint(path.name[0] for path in tested)
    assert len(judged) == len(set(judged)) == GOOD and names == {f"fold-{number}" for number in range(1, 5)}
    with pytest.raises(kizu.DataError, match="14 good parts cannot be divided into 15"):
        list(repetitions(PatchCoreConfig(), data, [], 15))


def test_the_table_is_of_all_runs(photos):
    train = ("train", "patchcore", "photos", "--size", "64", "--coreset", "0.5", "--false-alarms", "0.2")
    said = json.loads(command(*train, "--folds", "2", "--seeds", "0,1", "--json", "--name", "x", cwd=photos).stdout)
    runs = [f"x-seed-{seed}-fold-{fold}" for seed in (0, 1) for fold in (1, 2)]
    assert [run["folder"].rpartition("/")[2] for run in said["runs"]] == runs
    (row,) = said["summary"]
    values = [run["categories"][0]["image_auroc"] for run in said["runs"]]
    assert row["image AUROC"] == f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    assert row["runs"] == "4" and row["defects stopped"].endswith(f" of {4 * BAD}")
    assert row["false alarms"].endswith(f" of {2 * GOOD}")
    table = command(*train, "--seeds", "0-1", "--name", "y", cwd=photos).stdout
    assert "±" in table and "y-seed-1" in table
    events = list((photos / "results/project/group/y-seed-0/tensorboard").rglob("events*"))
    assert sum(b"image/png" in path.read_bytes() or b"PNG" in path.read_bytes() for path in events) == 1
