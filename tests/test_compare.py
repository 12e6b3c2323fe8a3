"""kizu compare: runs side by side, against slow oracles."""

import json
import shutil

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from kizu.data.demo import render
from kizu.evaluation.comparison.runs import auroc_difference, sign_test
from processes import kizu

TRAIN = ("train", "patchcore", "parts", "--size", "96", "--coreset", "0.1", "-q")


@pytest.mark.parametrize("seed", range(5))
def test_the_difference_of_aurocs_and_its_variance(seed):
    rng = np.random.default_rng(seed)
    good = rng.random(40) < 0.6
    first, second = (np.round(rng.normal(size=40) + (1 - good) * shift, 1) for shift in (1, 0.5))  # with ties
    difference, variance = auroc_difference(first, second, good)
    assert difference == pytest.approx(roc_auc_score(~good, first) - roc_auc_score(~good, second))
    kernels = [
        [[(bad > ok) + (bad == ok) / 2 for ok in scores[good]] for bad in scores[~good]] for scores in (first, second)
    ]
    kernel = np.array(kernels[0]) - np.array(kernels[1])  # defective × good
    slow = kernel.mean(1).var(ddof=1) / kernel.shape[0] + kernel.mean(0).var(ddof=1) / kernel.shape[1]
    assert variance == pytest.approx(slow)


@pytest.mark.parametrize(("won", "lost"), [(0, 1), (3, 3), (2, 9), (0, 0), (1, 2000)])
def test_the_sign_test(won, lost):
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert sign_test(won, lost) == pytest.approx(expected)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    render(place / "parts", train=40, good=20, each=5, size=96)
    kizu(*TRAIN, "--name", "small", cwd=place)
    kizu(*TRAIN, "--name", "smaller", "--size", "48", cwd=place)
    return place


def test_runs_side_by_side(place):
    runs = [f"results/project/group/{name}" for name in ("small", "smaller")]
    said = kizu("compare", *runs, "--output", "page.html", cwd=place).stdout
    assert "96, 96" in said
    found = json.loads(kizu("compare", *runs, "--json", cwd=place).stdout)
    tables = [(place / run / "predictions.csv").read_text().splitlines()[1:] for run in runs]
    verdicts = [[line.split(",")[5] for line in table] for table in tables]
    differing = sum(one != other for one, other in zip(*verdicts, strict=True))
    assert len(found["photographs"]) == differing
    assert [row["run"] for row in found["results"]] == ["small", "smaller"]
    assert [row["setting"] for row in found["settings"]] == ["size"]
    page = (place / "page.html").read_text()
    assert f"The verdicts differ on {differing} photograph" in page
    assert page.count("<img src=") == differing


def test_what_is_no_run_is_told(place, tmp_path):
    run = "results/project/group/small"
    assert "two runs or more" in kizu("compare", run, code=2, cwd=place).stderr
    assert "named twice" in kizu("compare", run, f"{run}/../small", code=2, cwd=place).stderr
    assert "no finished run" in kizu("compare", run, tmp_path, code=2, cwd=place).stderr
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "results.csv").write_text("category\n")
    (tmp_path / "predictions.csv").write_text("category\n")
    assert "damaged" in kizu("compare", run, tmp_path, code=2, cwd=place).stderr


MATRIX = ("compare", "parts", "--methods", "patchcore", "--setting", "size=32", "--setting", "size=48 coreset=0.1")


@pytest.fixture(scope="module")
def matrix(place):
    """Two variants with two seeds, undisturbed."""
    said = kizu(*MATRIX, "--seeds", "0-1", "--output", "whole", "--json", cwd=place)
    return json.loads(said.stdout)


def test_methods_side_by_side(place, matrix):
    from kizu.evaluation.comparison.runs import read_run

    assert [row["method"] for row in matrix["table"]] == ["patchcore size=32", "patchcore size=48 coreset=0.1"]
    for row in matrix["table"]:
        cells = [cell for cell in matrix["cells"] if f"{cell['method']} {cell['setting']}" == row["method"]]
        assert [cell["seed"] for cell in cells] == ["0", "1"]
        runs = [read_run(place / cell["run"], cell["seed"]) for cell in cells]
        aurocs = [float(run.results["flange"]["image_auroc"]) for run in runs]
        assert row["image AUROC"] == f"{np.mean(aurocs):.4f} ± {np.std(aurocs, ddof=1):.4f}"
        stopped = [image.verdict == "stop" for run in runs for image in run.images.values() if not image.is_good]
        assert row["defects stopped"] == f"{sum(stopped)} of {len(stopped)}"
        assert {run.about["seed"] for run in runs} == {0, 1}
    page = (place / "whole" / "matrix.html").read_text()
    assert page.count("patchcore size=48") >= 2 and "<img src=" in page


def test_gaps_of_a_matrix_are_filled(place, matrix):
    shutil.copytree(place / "whole", place / "gaps")
    gone, kept = (place / "gaps" / "parts" / "flange" / "patchcore-size=32" / f"seed-{seed}" for seed in range(2))
    shutil.rmtree(gone)
    before = (kept / "run.json").stat().st_mtime_ns
    command = (*MATRIX, "--seeds", "0-1", "--output", "gaps")
    assert "--resume" in kizu(*command, code=2, cwd=place).stderr
    kizu(*command, "--resume", cwd=place)
    assert (place / "gaps" / "matrix.csv").read_bytes() == (place / "whole" / "matrix.csv").read_bytes()
    assert (kept / "run.json").stat().st_mtime_ns == before and (gone / "run.json").exists()


def test_a_cell_that_fails_is_shown_as_one(place):
    command = ("compare", "parts", "--methods", "patchcore,simplenet", "--setting", "size=32 false_alarms=0.0001")
    done = kizu(*command, "--output", "failing", code=1, cwd=place)
    assert "Failed: flange, patchcore size=32" in done.stderr and "simplenet" in done.stderr
    assert "0 (1 failed)" in done.stdout
    assert "Not in the figures" in (place / "failing" / "matrix.html").read_text()
    for arguments, sentence in [
        (("--setting", "size"), "names and values"),
        (("--setting", "colour=red"), "not a setting"),
        (("--methods", "magic"), "magic"),
    ]:
        assert sentence in kizu("compare", "parts", "--methods", "patchcore", *arguments, code=2, cwd=place).stderr
    assert "--seeds belongs to --methods" in kizu("compare", "parts", "--seeds", "0", code=2, cwd=place).stderr
