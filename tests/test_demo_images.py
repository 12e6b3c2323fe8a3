import hashlib
from pathlib import Path

import numpy as np
import pytest

from kizu.data import demo, image
from kizu.data.demo import flange as geometry
from kizu.errors import DataError, OptionError, OutputError


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def render(root, seed=0, **options):
    return demo.render(root, seed=seed, train=3, good=2, each=1, size=96, **options)


@pytest.fixture(scope="module")
def studio():
    return geometry.new_studio(5, 320)


@pytest.fixture(scope="module")
def flange(tmp_path_factory):
    return render(tmp_path_factory.mktemp("demo"))


def test_same_seed_same_bytes_other_seed_other_bytes(flange, tmp_path):
    again, other = digests(render(tmp_path / "again")), digests(render(tmp_path / "other", seed=1))
    assert again == digests(flange)
    assert again.keys() == other.keys()
    assert all(again[name] != other[name] for name in again if name.endswith(".jpg"))


def test_an_image_does_not_depend_on_the_number_of_others(flange, tmp_path):
    more = digests(demo.render(tmp_path, train=4, good=3, each=2, size=96))
    few = digests(flange)
    assert {name: more[name] for name in few} == few


def test_layout(flange):
    expected = {f"train/good/{number:03}.jpg" for number in range(3)} | {"test/good/000.jpg", "test/good/001.jpg"}
    expected |= {f"test/{defect}/000.jpg" for defect in demo.DEFECTS}
    expected |= {f"ground_truth/{defect}/000_mask.png" for defect in demo.DEFECTS}
    assert flange.name == "flange"
    assert digests(flange).keys() == expected
    assert len(set(digests(flange).values())) == len(expected)
    assert [path.name for path in flange.parent.iterdir()] == ["flange"]


def test_files_are_what_their_names_say(flange):
    assert image.read(flange / "train/good/000.jpg").shape == (96, 96, 3)
    for defect in demo.DEFECTS:
        mask = image.read(flange / f"ground_truth/{defect}/000_mask.png")
        assert mask.shape == (96, 96, 3)
        assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("defect", demo.DEFECTS)
@pytest.mark.parametrize("index", range(4))
def test_mask_covers_what_the_defect_changed(studio, defect, index):
    job = ("test", defect, index)
    rgb, mask = geometry.photograph(studio, job)
    flawless, nothing = geometry.photograph(studio, job, flawless=True)
    change = np.abs(rgb.astype(int) - flawless).max(axis=2)
    assert mask.shape == rgb.shape[:2]
    assert not nothing.any()
    assert 40 < mask.sum() < 0.05 * mask.size
    assert change[mask].mean() > 4
    assert (change[~mask] > 8).sum() < 0.05 * mask.sum()
    assert change[~mask].mean() < 0.3


@pytest.mark.parametrize("defect", demo.DEFECTS)
def test_masks_lie_on_the_part(studio, defect):
    _, mask = geometry.photograph(studio, ("test", defect, 0))
    rows, columns = np.nonzero(mask)
    distance = np.hypot(rows - 159.5, columns - 159.5) / 320
    assert distance.min() > 0.1
    assert distance.max() < geometry._RIM * 1.01 + 0.032


def test_parts_are_brighter_than_the_table_and_differ(studio):
    first, second = (geometry.photograph(studio, ("train", "good", index))[0] for index in range(2))
    assert np.median(first[60:260, 60:260]) > 2 * np.median(first[:15])
    assert np.abs(first.astype(int) - second).mean() > 3


def test_progress_counts_every_image(tmp_path):
    calls = []
    render(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 9) for done in range(1, 10)]


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "flange").mkdir()
    with pytest.raises(DataError, match=r"flange exists already: delete it"):
        render(tmp_path)
    assert list((tmp_path / "flange").iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "root").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        render(tmp_path / "root")


def test_interruption_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        assert not (tmp_path / "flange").exists()
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"good": -1}, {"each": -1}, {"size": 64}])
def test_senseless_numbers(tmp_path, wrong):
    with pytest.raises(OptionError):
        demo.render(tmp_path, **wrong)
    assert list(Path(tmp_path).iterdir()) == []
