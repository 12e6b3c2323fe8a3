"""Photographs that belong together count once, and are left out together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import kizu
from kizu.calibration.groups import highest, named, recognised
from kizu.cli.description import describe_model
from kizu.detectors import DETECTORS, detector_class
from kizu.serving.responses import promise_at
from processes import kizu as command
from test_detectors import SETTINGS, part

PARTS, EACH = 12, 3


def photograph(number, turn):
    """One of several photographs of a part: each with its own light, all with the part's own texture."""
    rng = np.random.default_rng([number, 1])
    texture = rng.normal(0, 12, (12, 12, 3)).repeat(8, 0).repeat(8, 1)
    light = np.random.default_rng([number, turn]).normal(0, 6, (96, 96, 3))
    return np.clip(part(0) + texture + light, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 parts, 3 photographs of each, called a00_1.png …"""
    target = tmp_path_factory.mktemp("photographs")
    for number in range(PARTS):
        for turn in range(EACH):
            Image.fromarray(photograph(number, turn)).save(target / f"a{number:02}_{turn}.png")
    return target


def paths(*names):
    return [None if name is None else Path(name) for name in names]


def test_names_and_folders_make_groups():
    names = paths("x/kos01/a1.png", "x/kos01/a2.png", "x/kos02/a1.png", None, "y/readme.png")
    assert named(names, "folder") == [0, 0, 1, 2, 3]
    assert named(names, r"kos\d+") == named(names, r"kos\d(\d)") == [0, 0, 1, 2, 3]
    assert named(paths("b1/a2.png", "b1/a3.png", "b2/a3.png"), r"a\d") == [0, 1, 1]
    assert named(names, "none") == [0, 1, 2, 3, 4]
    with pytest.raises(kizu.OptionError, match="no regular expression"):
        named(names, "kos(")
    with pytest.raises(kizu.OptionError, match="finds nothing"):
        named(names, "lot")


def test_groups_are_recognised_where_names_and_likeness_agree(folder):
    files = sorted(folder.iterdir())
    pictures = [np.asarray(Image.open(path)) for path in files]
    assert recognised(files, pictures) == [number // EACH for number in range(PARTS * EACH)]
    for seed in range(200):
        shuffled = np.random.default_rng(seed).permutation(len(files))
        assert recognised(files, [pictures[place] for place in shuffled]) is None  # names without likeness
    numbered = [Path(f"{number:03}.png") for number in range(len(files))]
    assert recognised(numbered, pictures) is None  # likeness without names
    assert recognised([None, *files[1:]], pictures) is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1))
def test_a_group_has_its_highest_value(pairs):
    values, groups = zip(*pairs, strict=True)
    expected = [max(v for v, g in pairs if g == group) for group in dict.fromkeys(groups)]
    assert highest(values, groups) == expected


PLAIN = {"size": 64, "sampler": "identity", "fusion": "stack", "local_scale": False, "top": 0, "coreset": 1.0}


def test_patchcore_scores_a_group_as_if_all_of_it_were_new():
    """Three times each photograph, in a group, gives what once each gives, where all patches are kept."""
    photos = [part(number) for number in range(8)]
    once = kizu.PatchCore(**PLAIN).fit(photos)
    groups = [number for number in range(8) for _ in range(3)]
    thrice = kizu.PatchCore(**PLAIN).fit([photos[n] for n in groups], keep_copies=True, group_by=groups)
    alone = kizu.PatchCore(**PLAIN).fit([photos[n] for n in groups], keep_copies=True, group_by="none")
    assert thrice.calibration_scores == pytest.approx(once.calibration_scores, rel=1e-4)
    assert max(alone.calibration_scores) < 0.1 * min(once.calibration_scores)
    assert all(int(bank.images.max()) == 23 for bank in thrice.graph.banks)  # images again, not groups


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method == "patchcore" else pytest.mark.slow) for method in DETECTORS]
)
def test_every_method_counts_parts(method, folder, tmp_path):
    detector = detector_class(method)(**SETTINGS[method]).fit(folder, group_by="a(..)")
    assert detector.threshold.grouped and detector.threshold.count <= PARTS
    assert len(detector.calibration_scores) == detector.threshold.count
    assert "good parts of several photographs each" in detector.threshold.statement
    assert any("12 parts" in remark for remark in detector.remarks)
    folder_of_model = detector.save(tmp_path / "model")
    assert kizu.load(folder_of_model).threshold == detector.threshold
    assert describe_model(folder_of_model)["promise"] == detector.threshold.statement
    assert "good parts of several photographs each" in promise_at(detector, detector.threshold.value * 1.01).statement
    if method == "patchcore":  # a threshold by hand, and back
        command("tune", folder_of_model, "--threshold", 9, "--set")
        command("tune", folder_of_model, "--reset")
        assert kizu.load(folder_of_model).threshold == detector.threshold


def test_more_photographs_of_parts_count_by_part_too(folder):
    detector = kizu.PatchCore(**SETTINGS["patchcore"]).fit(folder)
    more = [photograph(number, turn) for number in (50, 51) for turn in range(EACH)]
    detector.update(more)
    assert detector.threshold.grouped and detector.threshold.count == PARTS + len(more)


def test_the_choice_divides_groups_from_each_other(folder):
    from kizu.evaluation.choice.trials import Material

    material = Material.of([kizu.Photo(path) for path in sorted(folder.iterdir())], seed=0)
    assert material.parts == PARTS and len(material.held_out) == PARTS // 3 * EACH
    assert not {*material.groups} & {*material.held_out_groups}
