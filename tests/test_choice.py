"""Settings chosen from good photographs: the made-up defects, what decides, and the command."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import kizu
from kizu.config import EfficientADConfig, PatchCoreConfig, SimpleNetConfig
from kizu.evaluation.choice import choose as choosing
from kizu.evaluation.choice.candidates import in_proportion, other_size
from kizu.evaluation.choice.synthetic_defects import KINDS, MISPLACED, WHOLE_KINDS, Poses, part_of, with_defect
from kizu.evaluation.choice.trials import (
    Material,
    Trial,
    gain,
    run_trial,
    strange_when_turned,
    surprise,
    unlikeness_left,
)
from processes import kizu as command
from test_alignment import bracket, poses
from test_detectors import GOOD, part
from test_groups import photograph

ALIGNED = Poses([part(number) for number in range(12)])
SMALL = PatchCoreConfig(size=64)


def made(seed, photo=None, other=None, poses=ALIGNED):
    return with_defect(part(3) if photo is None else photo, part(4) if other is None else other, poses, (seed,))


def test_made_up_defects_are_of_all_kinds_and_change_the_photograph_where_the_mask_says():
    kinds = set()
    for seed in range(150):
        defect = made(seed)
        changed = np.abs(defect.pixels.astype(int) - part(3)).max(2)
        kinds.add(defect.kind)
        assert defect.pixels.dtype == np.uint8 and defect.pixels.shape == part(3).shape
        assert changed[defect.mask].mean() > changed[~defect.mask].mean() if not defect.mask.all() else changed.any()
    assert {*KINDS, *WHOLE_KINDS} - kinds <= {"exchanged piece"}  # these parts are nearly alike


def test_photographs_of_a_few_pixels_are_left_as_they_are_or_changed():
    for side in (1, 4, 8, 12):
        photo, other = part(3)[:side, :side], part(4)[:side, :side]
        for seed in range(40):
            assert made(seed, photo, other).pixels.shape == photo.shape


def test_equal_seeds_give_equal_defects():
    first, again, other = made(5), made(5), made(6)
    assert first.kind == again.kind and np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)


def test_a_grey_photograph_stays_grey():
    grey, other = (np.repeat(part(number).mean(2, keepdims=True).astype(np.uint8), 3, axis=2) for number in (3, 4))
    for seed in range(100):
        assert not np.ptp(made(seed, grey, other).pixels, axis=2).any()


def test_where_parts_lie_in_any_pose_none_is_misplaced():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    assert all(made(seed, noise[0], noise[1], Poses(noise)).kind != MISPLACED for seed in range(40))


def test_the_part_is_what_differs_from_the_margin():
    photo = np.full((80, 100, 3), 200, np.uint8)
    photo[20:60, 30:70] = 60
    expected = np.zeros((80, 100), bool)
    expected[20:60, 30:70] = True
    assert np.array_equal(part_of(photo), expected)
    assert part_of(np.full((80, 100, 3), 200, np.uint8)).all()  # a plain surface is the part


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.lists(st.integers(0, 50), min_size=1, max_size=10))
def test_what_is_found_is_the_share_of_the_rates_on_a_logarithmic_scale(good, defects):
    """Against a fine grid of rates: a defect is stopped at each that is at least its p-value."""
    rates = np.exp(np.linspace(-np.log(len(good) + 1), 0, 4001))
    for share, score in zip(surprise(good, defects), defects, strict=True):
        p_value = (1 + sum(other >= score for other in good)) / (len(good) + 1)
        assert share == pytest.approx((rates >= p_value).mean(), abs=1e-3)


@given(st.integers(200, 6000), st.integers(200, 6000), st.sampled_from([(256, 256), (320, 320), (448, 448)]))
def test_an_input_in_proportion_has_the_photographs_shape_and_about_as_many_pixels(height, width, size):
    result = in_proportion(size, (height, width))
    assert all(side % 32 == 0 for side in result)
    if max(height, width) <= 1.25 * min(height, width):
        assert result == size
    elif max(height, width) < 4 * min(height, width):
        assert result[0] * result[1] == pytest.approx(size[0] * size[1], rel=0.3)
        assert result[0] / result[1] == pytest.approx(height / width, rel=0.3)


def test_sizes_stay_within_bounds():
    assert other_size((320, 320), 1.4) == (448, 448)
    assert other_size((192, 512), 0.8) is None and other_size((320, 800), 1.4) is None


def test_the_photographs_are_divided_and_each_part_is_in_one_half():
    photos = [part(number) for number in range(12)] + [part(3)]
    material = Material.of([kizu.Photo(photo) for photo in photos], seed=0)
    learned, held_out = ({photo.source.tobytes() for photo in items} for items in (material.learn, material.held_out))
    assert material.parts == 12 and len(learned) == 8 and len(held_out) == 4 and not learned & held_out
    assert len(material.defects) == len(material.kinds) == 16


@pytest.mark.slow
def test_equal_photographs_lead_to_equal_choices_and_what_was_given_stays():
    first, again = (kizu.choose(GOOD, SMALL) for _ in range(2))
    assert first.config == again.config and first.config.size == (64, 64)
    assert [trial.found for trial in first.trials] == [trial.found for trial in again.trials]
    one_pose, turned, wider = first.reasons
    assert wider.startswith("wider: finds") and turned.startswith("any pose: ") and one_pose.startswith("one pose: ")
    assert not kizu.choose(GOOD, SMALL.model_copy(update={"augment": True})).reasons or first.reasons


@pytest.mark.slow
def test_simplenet_is_chosen_for_too():
    choice = kizu.choose(GOOD, SimpleNetConfig(size=64, meta_epochs=1))
    assert isinstance(choice.config, SimpleNetConfig) and choice.config.meta_epochs == 1


def told(settings, surprises):
    """A trial that found what is given."""
    trial = Trial(settings, [0.0] * 9, [], [1.0] * len(surprises), 0.02, 10.0, 0.1)
    trial.__dict__["surprises"] = np.float32(surprises)
    return trial


def test_a_hopeless_trial_ends_after_half_of_the_material():
    material = Material.of([kizu.Photo(photograph(number, 0)) for number in range(15)], 0)
    whole = run_trial(kizu.PatchCore(SMALL), {}, material)
    asked = []
    half = run_trial(kizu.PatchCore(SMALL), {}, material, hopeless=lambda trial: not asked.append(trial))
    assert len(whole.defects) == len(material.defects) == 20 and len(half.defects) == 8 and len(half.held_out) == 2
    assert half.defects == whole.defects[:8] and half.learned == whole.learned and asked == [half]
    assert np.array_equal(whole.within(half).surprises, surprise([*half.learned, *half.held_out], half.defects))
    assert gain(half, whole) == (0.0, 0.0)


def test_a_change_is_kept_where_it_is_clearly_better(monkeypatch):
    """The course alone, with trials that are what this test says of them."""
    found = {(): 0.5, (448, 448): 0.7, (640, 640): 0.9}
    two_sizes = "size 320x320 and 448x448, wider"
    sees_more, growths = -0.1, []

    def trial(detector, settings, material, progress, hopeless, growth, rate):
        value = found.get(tuple(settings.get("size", ())), 0.5) + 0.2 * ("rotate_degrees" in settings)
        value = 0.5 + sees_more if "layers" in settings else value
        growths.append(growth)
        return told(settings, value + 0.01 * np.arange(-8, 8) / 8)

    monkeypatch.setattr(choosing, "run_trial", trial)
    monkeypatch.setattr(choosing, "unlikeness_left", lambda material: 0.6)
    monkeypatch.setattr(choosing, "strange_when_turned", lambda detector, material: 0.95)
    choice = kizu.choose(GOOD)
    assert choice.config.size == (448, 448) and choice.config.rotate_degrees == 0
    assert [row["settings"] for row in choice.rows] == ["as they were", two_sizes, "wider", "size 448x448"]
    assert [row[""] for row in choice.rows] == ["", "", "", "taken"] and choice.settings == {"size": (448, 448)}
    assert [reason.rpartition(", ")[2] for reason in choice.reasons] == [
        "because good parts are not much more alike in it.",
        "because good parts look strange when they are turned.",
        "because it is less.",
        "because it is less.",
        "taken.",
        "because so many pixels are tried only with a bound in milliseconds.",
    ]
    assert "size 448x448. 49.9 % of these defects were found before, and 69.9 % with the change" in choice.sentence
    slow = kizu.choose(GOOD, milliseconds=5)
    assert slow.config.size == (320, 320) and all("takes 10 ms" in reason for reason in slow.reasons[2:])
    assert kizu.choose(GOOD, milliseconds=50).config.size == (640, 640)

    sees_more = 0  # which is favoured, and copies, which find more
    monkeypatch.setattr(choosing, "strange_when_turned", lambda detector, material: 0.75)
    choice = kizu.choose(GOOD)
    assert [row["settings"] for row in choice.rows] == ["as they were", "any pose", two_sizes]
    assert growths[-3:] == pytest.approx([1.5, 1.5, 3])  # with copies there are five times as many patches, 0.4 kept
    assert choice.config.coreset == pytest.approx(0.004)
    both = "blocks.2@0.71,blocks.2:5@0.71,blocks.4@0.71,blocks.4:5@0.71,blocks.6:1@0.71,blocks.2,blocks.4"
    assert choice.config.layers == tuple(both.split(","))
    assert choice.taken == [1, 2] and choice.config.rotate_degrees == 180 and choice.config.size == (448, 448)
    assert "69.9 % and 49.9 % with each of the changes alone (not tried together)" in choice.sentence
    monkeypatch.setattr(choosing, "strange_when_turned", lambda detector, material: 0.95)
    sees_more = -0.1
    found.clear()
    wide = kizu.choose([np.concatenate([part(n), part(n)[::-1]], 1) for n in range(12)])
    assert wide.config.size == (224, 448) and wide.sentence.startswith("size 224x448, in the photographs' proportions")
    hurried = kizu.choose(GOOD, minutes=1e-9)
    assert len(hurried.trials) == 1 and all("not tried" in reason for reason in hurried.reasons)


def test_poses_are_told_by_good_parts_that_are_turned(monkeypatch):
    """Where they look usual, turned copies are kept unless they find clearly less; where strange, none are tried."""
    top = np.arange(96)[:, None, None] < 48
    lying = [np.where(top, photograph(number, 0), 30).astype(np.uint8) for number in range(40)]
    turned = [np.rot90(photo, number % 4).copy() for number, photo in enumerate(lying)]
    strange = {}
    for name, photos in (("one pose", lying), ("any pose", turned)):
        material = Material.of([kizu.Photo(photo) for photo in photos], 0)
        detector = kizu.PatchCore(SMALL).fit(material.learn)
        strange[name] = strange_when_turned(detector, material)
    assert strange["one pose"] > choosing.STRANGE and strange["any pose"] < choosing.USUAL

    def trial(detector, settings, material, progress, hopeless, growth, rate):
        return told(settings, 0.5 + 0.02 * (np.arange(16) % 3 - 0.8) * ("rotate_degrees" in settings))

    monkeypatch.setattr(choosing, "run_trial", trial)
    monkeypatch.setattr(choosing, "unlikeness_left", lambda material: 0.6)
    config = PatchCoreConfig(size=64, layers="blocks.2")
    for value, degrees, words in ((0.5, 180, "look usual"), (0.75, 0, "may be chance"), (0.95, 0, "look strange")):
        monkeypatch.setattr(choosing, "strange_when_turned", lambda detector, material, value=value: value)
        choice = kizu.choose(GOOD, config)
        assert choice.config.rotate_degrees == degrees and words in choice.reasons[1]


@pytest.mark.slow
def test_one_pose_is_kept_where_good_parts_are_much_more_alike_in_it(monkeypatch):
    """Unless it finds clearly less; then copies are considered as without it."""
    lying = [bracket(seed=number) for number in range(24)]
    anyhow = [bracket(*pose, seed=number) for number, pose in enumerate(poses(24))]
    left = [unlikeness_left(Material.of([kizu.Photo(photo) for photo in photos], 0)) for photos in (lying, anyhow)]
    assert left[0] > choosing.ALIKE > left[1]
    choice = kizu.choose(anyhow, PatchCoreConfig(size=64, layers="blocks.2"))
    assert choice.config.align and choice.config.rotate_degrees == 0
    assert not kizu.choose(lying, PatchCoreConfig(size=64, layers="blocks.2")).config.align
    assert kizu.choose(anyhow, PatchCoreConfig(size=64, layers="blocks.2", align=True)).settings == {}

    def trial(detector, settings, material, progress, hopeless, growth, rate):
        return told(settings, 0.5 - 0.2 * ("align" in settings) + 0.01 * np.arange(-8, 8) / 8)

    monkeypatch.setattr(choosing, "run_trial", trial)
    monkeypatch.setattr(choosing, "strange_when_turned", lambda detector, material: 0.5)
    choice = kizu.choose(anyhow, PatchCoreConfig(size=64, layers="blocks.2"))
    assert not choice.config.align and choice.config.rotate_degrees == 180


@pytest.mark.slow
def test_a_rate_that_all_photographs_can_promise_is_not_refused_for_a_trial():
    chosen = kizu.choose(GOOD, SMALL.model_copy(update={"false_alarms": 1 / (len(GOOD) + 1)}))
    assert chosen.config.false_alarms == 1 / (len(GOOD) + 1) and chosen.trials[0].rate == chosen.config.false_alarms
    with pytest.raises(kizu.OptionError, match=f"and there are {len(GOOD)}"):
        kizu.choose(GOOD, SMALL.model_copy(update={"false_alarms": 0.001}))


def test_too_few_photographs_and_a_method_without_a_pretrained_network(tmp_path):
    for number in range(12):
        Image.fromarray(part(number)).save(tmp_path / f"{number}.png")
    with pytest.raises(kizu.DataError, match="9 different good parts"):
        kizu.choose([part(number) for number in range(9)])
    with pytest.raises(kizu.DataError, match="1 different good parts"):
        kizu.choose(tmp_path, group_by="folder")  # all are of one part
    with pytest.raises(kizu.OptionError, match="pretrained"):
        kizu.choose(GOOD, EfficientADConfig())


@pytest.mark.slow
def test_the_report_names_the_size_that_was_chosen(tmp_path):
    """And bounds of a choice that is not made are refused."""
    tall = [np.concatenate([part(number)] * 2) for number in range(14)]
    for number, photo in enumerate(tall):
        folder = tmp_path / "parts" / ("good" if number < 13 else "bad")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(folder / f"{number}.png")
    done = command("train", "patchcore", "parts", "--auto", "--minutes", 0.1, "--name", "tall", cwd=tmp_path)
    run = tmp_path / "results/project/group/tall"
    report = (run / "report.html").read_text()
    config = PatchCoreConfig(**json.loads(next(run.glob("models/*/model.json")).read_text())["config"])
    sizes = sorted(look.size for look in config.looks)  # how many were tried within six seconds, the machine says
    assert sizes in ([(448, 224)], [(448, 224), (640, 320)])
    assert " and ".join(f"{height}x{width}" for height, width in sizes) in done.stdout
    assert " and ".join(f"{height}×{width}" for height, width in sizes) in report and "320×320" not in report
    assert "kept for the test split" in report and done.stdout.count("kept for the test split") == 0
    for flag in ("--minutes", "--ms"):
        assert "needs --auto" in command("train", "patchcore", "parts", flag, 5, cwd=tmp_path, code=2).stderr


def test_train_auto_chooses_says_and_keeps_it(tmp_path):
    for folder, numbers, spot in (("good", range(14), False), ("bad", range(50, 53), True)):
        (tmp_path / "parts" / folder).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(part(number, spot=spot)).save(tmp_path / "parts" / folder / f"{number}.png")
    words = ["train", "patchcore", "parts", "--auto", "--size", "64", "--name", "chosen"]
    done = command(*words, cwd=tmp_path)
    assert "made-up defects" in done.stdout and "as they were" in done.stdout
    run = tmp_path / "results/project/group/chosen"
    about = json.loads((run / "run.json").read_text())
    (choice,) = about["choices"].values()
    assert about["auto"] and choice["rows"] and choice["sentence"] in done.stdout
    report = (run / "report.html").read_text()
    assert "How the settings were chosen" in report and "No defective part and no test photograph" in report
    config = json.loads(next(run.glob("models/*/model.json")).read_text())["config"]
    assert config["rotate_degrees"] == choice["config"].get("rotate_degrees", 0.0)


def test_only_methods_whose_settings_can_be_chosen_offer_it():
    offered = {method: "--auto" in command("train", method, "--help").stdout for method in kizu.config.CONFIGS}
    assert offered == {"patchcore": True, "simplenet": True, "efficientad": False, "puad": False}
