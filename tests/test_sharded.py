"""PatchCore from shards of the photographs: the promise of one machine, whoever carries out the steps, in any order."""

import numpy as np
import pytest
import torch
from PIL import Image

import kizu
from kizu.config import PatchCoreConfig
from kizu.data import dataset
from kizu.detectors.patchcore.coreset import StreamingCoreset
from kizu.detectors.patchcore.leave_one_out import LeaveOneOut
from kizu.detectors.patchcore.sharded import ShardedPatchCore, number_of_shards, one_after_another

SETTINGS = {"size": 64, "coreset": 0.05, "false_alarms": 0.2}


def patches(seed):
    """(96, 96, 3): coloured patches, of which no two photographs have the same."""
    colours = np.random.default_rng(seed).integers(60, 200, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(colours).resize((96, 96), Image.Resampling.BICUBIC))


GOOD = [patches(seed) for seed in range(13)]


def learned(shards, good=GOOD, run=one_after_another, settings=SETTINGS, **options):
    return ShardedPatchCore(PatchCoreConfig(**settings), shards, run).fit(good, **options)


def content(detector, folder):
    """The bytes of a saved model."""
    return {path.name: path.read_bytes() for path in sorted(detector.save(folder).iterdir())}


@pytest.fixture
def few_fit(monkeypatch):
    """As with so many photographs that their features do not fit into one machine."""
    monkeypatch.setattr(StreamingCoreset, "would_hold", lambda self, images: images < len(GOOD))


@pytest.mark.parametrize(("shards", "groups"), [(4, None), (3, [number // 2 for number in range(13)])])
def test_where_all_features_fit_shards_learn_what_one_machine_does(shards, groups):
    options = {"group_by": groups, "keep_copies": True}
    one, sharded = kizu.PatchCore(**SETTINGS).fit(GOOD, **options), learned(shards, **options)
    for bank, other in zip(one.graph.banks, sharded.graph.banks, strict=True):
        assert torch.equal(bank.images, other.images) and torch.equal(bank.places, other.places)
        torch.testing.assert_close(other.entries, bank.entries, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.counts, bank.counts)
        torch.testing.assert_close(other.sums, bank.sums, rtol=1e-4, atol=1e-4)
    assert sharded.calibration_scores == pytest.approx(one.calibration_scores, rel=1e-5)
    assert sharded.map_peaks == pytest.approx(one.map_peaks, rel=1e-5)
    assert sharded.training["digests"] == one.training["digests"]
    assert sharded.facts["bank"] == one.facts["bank"] and sharded.facts["patches"] == one.facts["patches"]
    assert sharded.facts["radius"] == pytest.approx(one.facts["radius"], rel=1e-5)
    assert sharded.predict(patches(50)).score == pytest.approx(one.predict(patches(50)).score, rel=1e-5)


@pytest.mark.parametrize("groups", [None, [number // 2 for number in range(13)]])
def test_each_photograph_is_scored_against_the_finished_bank_without_its_own_entries(groups, few_fit):
    """As by one `LeaveOneOut` over all photographs and the merged bank, in one place."""
    kept, candidates = {}, []

    def watched(step, detector, shards, done):
        kept["detector"] = detector
        if step.__name__ == "search":
            candidates.extend(shard.candidates for shard in shards)
        return one_after_another(step, detector, shards, done)

    sharded = learned(4, run=watched, group_by=groups, keep_copies=True)
    graph = sharded.graph
    pixels = torch.from_numpy(np.stack([sharded.preprocessing(photo).transpose(2, 0, 1) for photo in GOOD]))
    with torch.inference_mode():
        for bank in graph.banks:
            bank.sums.zero_()
            bank.counts.zero_()
        leave_one_out = LeaveOneOut(
            graph,
            range(len(GOOD)),
            lambda numbers: graph.rows(graph.embed(pixels[list(numbers)])),
            groups,
            kept["detector"].radii,
        )
        leave_one_out.find_stand_ins(
            [[torch.cat(each) for each in zip(*bank, strict=True)] for bank in zip(*candidates, strict=True)]
        )
        scores = leave_one_out.scores(lambda done, total: None)[0].tolist()
    if groups is not None:
        scores = [max(pair) for pair in zip(scores[::2], [*scores[1::2], 0.0], strict=True)]
    assert sharded.calibration_scores == pytest.approx(scores, rel=1e-5)
    assert sharded.threshold.count == len(scores)


def test_order_and_repetition_of_the_tasks_change_nothing(tmp_path):
    def disturbed(step, detector, shards, done):
        results = {}
        for number in reversed(range(len(shards))):
            step(detector, shards[number])
            results[number] = step(detector, shards[number])
            done(number)
        return [results[number] for number in range(len(shards))]

    plain, other = (content(learned(3, run=run), tmp_path / run.__name__) for run in (one_after_another, disturbed))
    assert plain == other
    assert kizu.load(tmp_path / "disturbed").facts["shards"] == 3


def test_a_shard_computes_its_features_once_to_choose_from(monkeypatch):
    embedded = []
    embed = ShardedPatchCore._embed
    monkeypatch.setattr(
        ShardedPatchCore,
        "_embed",
        lambda self, graph, context: embedded.append(len(context.photos)) or embed(self, graph, context),
    )
    learned(3)
    assert sorted(embedded) == [4, 4, 5]


def test_where_few_features_fit_the_shards_decide(tmp_path, few_fit):
    assert content(learned(4), tmp_path / "four") != content(learned(3), tmp_path / "three")


def test_what_all_shards_must_know_of_each_other(tmp_path):
    """A copy in another shard is left out; what is told of how photographs were taken is of all; some are not used."""
    good = tmp_path / "good"
    good.mkdir()
    for number, photo in enumerate([*GOOD, GOOD[0]]):
        Image.fromarray(photo).save(good / f"{number:02}.jpg", quality=95 - number // 13)
    data = dataset.find(tmp_path).select(split="train")
    settings = SETTINGS | {"cannot_judge": "ask", "thumbnails": True}
    one, sharded = kizu.PatchCore(**settings).fit(data), learned(3, data, settings=settings)
    assert len(sharded.calibration_scores) == len(one.calibration_scores) == 13
    assert sharded.training["copies"] == one.training["copies"] and len(sharded.training["copies"]) == 1
    assert sharded.captures.to_json() == one.captures.to_json()
    assert sharded.thumbnails == one.thumbnails
    assert [word in sharded.remarks[0] for word in ("13.jpg", "00.jpg")] == [True, True]

    (good / "05.jpg").write_bytes(b"")
    with pytest.raises(kizu.DataError, match=r"(?s)1 of 14 training images cannot be used.*05\.jpg"):
        learned(3, data)
    assert len(learned(3, data, skip_bad=True).calibration_scores) == 12


def test_photographs_that_change_meanwhile_are_told(tmp_path):
    for number, photo in enumerate(GOOD):
        Image.fromarray(photo).save(tmp_path / f"{number:02}.png")

    def replacing(step, detector, shards, done):
        if step.__name__ == "search":
            Image.fromarray(patches(99)).save(tmp_path / "11.png")
        return one_after_another(step, detector, shards, done)

    with pytest.raises(kizu.DataError, match="changed while they were learned from"):
        learned(3, sorted(tmp_path.iterdir()), run=replacing)


def test_varied_copies_held_out_photographs_and_several_backbones():
    sharded = learned(3, held_out=GOOD[8:], good=GOOD[:8], settings=SETTINGS | {"augment": True, "augmented_copies": 2})
    assert sharded.facts["patches"] == [8 * 3 * 64, 8 * 3 * 16]
    assert sharded.calibration_scores == pytest.approx([sharded.predict(photo).score for photo in GOOD[8:]], rel=1e-4)
    both = learned(
        2, settings=SETTINGS | {"backbone": "efficientnet_lite2,efficientnet_lite2", "layers": "0.blocks.2,1.blocks.4"}
    )
    assert len(both.graph.members) == 2 and len(both.calibration_scores) == 13


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"align": True}, "`align=True`"),
        ({"tile": 64, "overlap": 8}, "`tile=64x64`"),
        ({"sampler": "identity"}, "identity"),
        ({"search": "ivfpq"}, "ivfpq"),
        (
            {"zones": kizu.read_zones(["a=0%,0% 50%,0% 50%,100% 0%,100%", "b=50%,0% 100%,0% 100%,100% 50%,100%"])},
            "zones",
        ),
    ],
)
def test_what_needs_all_photographs_in_one_place_is_refused_with_the_way_out(settings, sentence):
    with pytest.raises(kizu.OptionError, match=f"{sentence}.*train it without `ray`"):
        ShardedPatchCore(PatchCoreConfig(**SETTINGS | settings))


def test_the_number_of_shards_depends_on_the_photographs_alone():
    assert [number_of_shards(count) for count in (1, 100, 101, 1_000_000)] == [1, 1, 2, 10_000]
    assert [number_of_shards(count, 4) for count in (1, 3, 5)] == [1, 3, 4]
