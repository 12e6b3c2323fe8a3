"""The server against its own OpenAPI document, with requests that schemathesis makes up."""

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from services import encoded, serving, small_model
from test_detectors import part

KEY = "made up for the test"
PICTURES = strategies.sampled_from([encoded(part(1)), encoded(part(2), "JPEG"), encoded(part(3, spot=True))])

schemathesis.openapi.format("binary", PICTURES)  # bytes made up are no photographs
for kind in ("image/png", "image/jpeg", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, PICTURES)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_the_server_does_what_its_document_says(tmp_path, mode):
    folder = small_model(tmp_path / "disc")
    tried = {}
    key = ["--api-key", KEY] if mode is GenerationMode.POSITIVE else []
    with serving(folder, "--keep", "10", *key, log=tmp_path / "log") as (_, url):
        document = schemathesis.openapi.from_url(f"{url}openapi.json")
        for found in document.get_all_operations():
            operation = found.ok()

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def hold(case):
                tried[case.operation.label] = tried.get(case.operation.label, 0) + 1
                case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"} if key else {})

            with suppress(Unsatisfiable):  # nothing about it could be wrong
                hold()
    assert len(tried) >= 7 and "POST /v1/predict" in tried
