"""Models that kizu 0.1.0 wrote load, and say what they said then."""

import json
from pathlib import Path

import numpy as np
import pytest

import kizu
from test_detectors import part

FOLDER = Path(__file__).with_name("models_of_0_1")
SAID = json.loads((FOLDER / "scores.json").read_text())


@pytest.mark.parametrize("name", SAID)
def test_a_model_of_before_says_what_it_said(name):
    model = kizu.load(FOLDER / name)
    predictions = [model.predict(part(seed, spot=seed >= 99)) for seed in (50, 51, 99, 100)]
    assert model.threshold.value == SAID[name]["threshold"]
    assert [prediction.is_anomalous for prediction in predictions] == SAID[name]["verdicts"]
    assert [prediction.p_value for prediction in predictions] == SAID[name]["p_values"]
    # on the machine that wrote them they are equal to the bit; another processor rounds the last ones otherwise
    np.testing.assert_allclose([p.score for p in predictions], SAID[name]["scores"], rtol=1e-4)
    sums = [p.anomaly_map.sum(dtype=np.float64) for p in predictions]
    np.testing.assert_allclose(sums, SAID[name]["map_sums"], rtol=1e-4)
