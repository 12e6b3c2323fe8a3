"""The HTTP interface: verdicts, refusals, feedback, what is kept; a server's life from start to stop."""

import base64
import json
import math
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from io import BytesIO

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import kizu
from kizu.data import files
from kizu.serving.hosted_model import folders_by_name
from kizu.serving.http import application
from kizu.serving.limits import Limits
from kizu.serving.service import Service
from services import encoded, serving, small_model
from test_detectors import part

GOOD, BAD = encoded(part(98)), encoded(part(99, spot=True))
RAW = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("served") / "disc")


@pytest.fixture(scope="module")
def model(folder):
    return kizu.load(folder)


@contextmanager
def client(store, *, key=None, threshold_key=None, keep=0, models=None, **limits):
    service = Service(models, Limits(**limits), store=store, keep=keep, sets_thresholds=threshold_key is not None)
    guarded = application(service, key=key, threshold_key=threshold_key)
    with TestClient(guarded, base_url="http://127.0.0.1") as web:
        web.service = service
        yield web


@pytest.fixture
def web(folder, tmp_path):
    with client(tmp_path / "store", models={"disc": folder}, keep=5, bytes=200_000, pixels=10_000, images=8) as web:
        yield web


def test_a_verdict_is_the_models_own(web, model):
    expected = model.predict(BAD)
    answer = web.post("/v1/predict?map=npy&map_size=0&why=true&view=true&name=a.png", content=BAD, headers=RAW).json()
    (found,) = answer["results"]
    assert found["image"] == "a.png" and found["verdict"] == "stop"
    assert found["score"] == pytest.approx(expected.score, rel=1e-6) and found["p_value"] == expected.p_value
    assert [region["box"] for region in found["regions"]] == [list(region.box) for region in expected.regions]
    values = np.load(BytesIO(base64.b64decode(found["map"]["data"])))
    np.testing.assert_allclose(values, expected.anomaly_map, rtol=1e-5)
    assert found["pairs"][0]["there"] and found["pairs"][0]["region"] == 1
    assert Image.open(BytesIO(base64.b64decode(found["view"]))).size == (96, 96)


def test_a_map_as_png_is_the_map_in_16_bits(web, model):
    drawn = web.post("/v1/predict?map=png&map_size=48", content=BAD, headers=RAW).json()["results"][0]["map"]
    values = np.asarray(Image.open(BytesIO(base64.b64decode(drawn["data"]))))
    assert values.dtype == np.uint16 and values.shape == (48, 48)
    restored = drawn["low"] + values / 65535 * (drawn["high"] - drawn["low"])
    expected = model.preprocessing.restore(model.predict(BAD).input_map, (48, 48))
    np.testing.assert_allclose(restored, expected, atol=(drawn["high"] - drawn["low"]) / 65000)


def test_many_in_one_request_keep_their_order_and_one_bad_file_spoils_none(web, model):
    files = [("a", ("1.png", GOOD)), ("b", ("2.png", b"nothing")), ("c", ("3.png", BAD)), ("c", ("4.png", GOOD[:400]))]
    found = web.post("/v1/predict", files=files).json()["results"]
    assert [one["image"] for one in found] == ["1.png", "2.png", "3.png", "4.png"]
    assert [one["verdict"] for one in found] == ["pass", "error", "stop", "error"]
    assert "not an image" in found[1]["error"] and "damaged" in found[3]["error"]
    assert found[0]["score"] == pytest.approx(model.predict(GOOD).score, rel=1e-5)


@pytest.mark.parametrize(
    ("status", "sentence", "request_"),
    [
        (415, "application/json", {"content": b"{}", "headers": {"content-type": "application/json"}}),
        (415, "not an image", {"content": b"no picture", "headers": RAW}),
        (422, "empty", {"content": b"", "headers": RAW}),
        (422, "damaged", {"content": GOOD[:600], "headers": RAW}),
        (422, "boundary", {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}),
        (422, "no file", {"data": {"note": "hello"}, "files": [("image", ("1.png", GOOD))]}),
        (413, "larger than 0.2 MB", {"content": b"x" * 300_000, "headers": RAW}),
        (413, "megapixels", {"content": encoded(np.zeros((120, 120, 3), np.uint8)), "headers": RAW}),
        (413, "At most 8", {"files": [("image", (f"{n}.png", GOOD)) for n in range(9)]}),
        (404, "there are: disc", {"content": GOOD, "headers": RAW, "params": {"model": "cube"}}),
        (422, "map", {"content": GOOD, "headers": RAW, "params": {"map": "gif"}}),
    ],
)
def test_what_is_refused_and_why(web, status, sentence, request_):
    answer = web.post("/v1/predict", **request_)
    assert answer.status_code == status and sentence in answer.json()["error"]
    assert web.post("/v1/predict", content=GOOD, headers=RAW).status_code == 200


def test_a_full_queue_says_so_and_answers_those_who_wait(folder, tmp_path):
    with client(tmp_path, models={"disc": folder}, images=3, seconds=20) as web:
        served = web.service.models["disc"]
        judge, gate, sizes = served.loaded.model.judge, threading.Event(), []

        def slowly(items, **options):
            sizes.append(len(items))
            gate.wait(20)
            return judge(items, **options)

        served.loaded.model.judge = slowly
        answers = []
        ask = lambda: answers.append(web.post("/v1/predict", content=GOOD, headers=RAW))  # noqa: E731
        waiting = [threading.Thread(target=ask) for _ in range(4)]
        for number, thread in enumerate(waiting):
            thread.start()
            while not sizes or len(served.queue) < number:
                time.sleep(0.005)
        full = web.post("/v1/predict", content=GOOD, headers=RAW)
        gate.set()
        for thread in waiting:
            thread.join()
    assert full.status_code == 429 and full.headers["retry-after"] == "1" and "come again" in full.json()["error"]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert sizes == [1, 3]  # those who waited went through the model together


def test_what_takes_too_long_is_given_up_and_not_judged(folder, tmp_path):
    with client(tmp_path, models={"disc": folder}, seconds=0.5) as web:
        model = web.service.models["disc"].loaded.model
        judge, seen, begun, answered = model.judge, [], threading.Event(), threading.Event()

        def slowly(items, **options):
            seen.extend(items)
            begun.set()
            answered.wait(60)
            return judge(items, **options)

        model.judge = slowly
        started = [threading.Thread(target=web.post, args=("/v1/predict",), kwargs={"content": GOOD}) for _ in range(2)]
        started[0].start()
        assert begun.wait(60)
        started[1].start()
        late = web.post("/v1/predict", content=GOOD, headers=RAW)
        for thread in started:
            thread.join()
        answered.set()
        later = web.post("/v1/predict", content=GOOD, headers=RAW)
    assert late.status_code == 503 and "within 0.5 seconds" in late.json()["error"]
    assert later.status_code == 200 and len(seen) == 2  # the first and the last


def test_a_key_is_asked_for_everywhere_but_at_the_door(folder, tmp_path):
    with client(tmp_path, models={"disc": folder}, key="a long secret") as web:
        assert {web.get(path).status_code for path in ("/", "/page/app.js", "/healthz", "/openapi.json")} == {200}
        for path in ("/v1/models", "/metrics", "/v1/verdicts"):
            assert web.get(path).status_code == 401
            assert web.get(path, headers={"authorization": "Bearer a long secre"}).status_code == 401
            assert web.get(path, headers={"authorization": "Bearer a long secret"}).status_code == 200
        assert web.post("/v1/predict", content=GOOD, headers=RAW | {"x-api-key": "a long secret"}).status_code == 200


def test_other_sites_pages_get_nothing(web):
    assert web.get("/v1/models", headers={"origin": "http://elsewhere.example"}).status_code == 403
    assert web.get("/v1/models", headers={"host": "elsewhere.example"}).status_code == 403
    policy = web.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_marked_photographs_lie_where_update_and_tune_take_them(web, folder, tmp_path):
    for number in range(3):
        content = encoded(part(200 + number))
        web.post("/v1/feedback?label=bad&name=some/where.png", content=content, headers=RAW)
        told = web.post("/v1/feedback?label=good&name=where.png", content=content, headers=RAW).json()
    assert (told["good"], told["bad"]) == (3, 0)  # marked again, a photograph moves
    assert web.post("/v1/feedback?label=bad", content=BAD, headers=RAW).json()["bad"] == 1
    assert web.post("/v1/feedback?label=bad", content=b"no picture", headers=RAW).status_code == 415
    marked = tmp_path / "store" / "feedback" / "disc"
    assert {path.read_bytes() for path in (marked / "bad").iterdir()} == {BAD}
    updated = kizu.load(folder).update(marked / "good")
    assert updated.training["images"] == 15


def test_the_last_verdicts_are_kept_over_a_restart(folder, tmp_path):
    with client(tmp_path, models={"disc": folder}, keep=3) as web:
        ids = [
            web.post(f"/v1/predict?name={n}", content=content, headers=RAW).json()["results"][0]["id"]
            for n, content in enumerate([GOOD, GOOD, BAD, GOOD])
        ]
        assert web.post("/v1/predict?keep=false", content=BAD, headers=RAW).json()["results"][0]["id"] is None
        web.post(f"/v1/feedback?label=good&id={ids[2]}", content=BAD, headers=RAW)
    with client(tmp_path, models={"disc": folder}, keep=3) as web:
        kept = web.get("/v1/verdicts").json()
        assert [one["id"] for one in kept] == ids[:0:-1] and kept[1]["verdict"]["verdict"] == "stop"
        assert [one["feedback"] for one in kept] == [None, "good", None]
        assert web.get(f"/v1/verdicts/{ids[2]}/photograph").content == BAD
        assert Image.open(BytesIO(web.get(f"/v1/verdicts/{ids[2]}/thumbnail").content)).format == "JPEG"
        assert web.get(f"/v1/verdicts/{ids[0]}").status_code == 404
        told = web.post(f"/v1/feedback?label=good&id={ids[0]}&name=dropped", content=encoded(part(77)), headers=RAW)
        assert told.status_code == 200 and "dropped-" in told.json()["files"][0]  # the history dropped it, not the mark


def test_another_threshold_promises_what_the_good_scores_say(web, model):
    good = sorted(model.calibration_scores)
    for level in (good[0] - 1, *good, sum(good[-2:]) / 2, good[-1] + 1):
        told = web.get(f"/v1/models/disc/promise?threshold={level!r}").json()
        above = sum(score > level for score in good)
        assert told["expected"] == pytest.approx(min(1, (1 + above) / (1 + len(good))))
        if level != model.threshold.value:
            peaks_above = sum(peak > told["map_level"] for peak in model.map_peaks)
            assert peaks_above == min(above, len(good) - 1)
    told = web.get(f"/v1/models/disc/promise?threshold={model.threshold.value!r}").json()
    assert told["statement"] == model.threshold.statement and told["map_level"] == model.pixel_threshold


def test_who_has_the_key_for_thresholds_sets_them_and_nobody_else(folder, model, tmp_path):
    duty = tmp_path / "disc"
    shutil.copytree(folder, duty)
    place, unasked = "/v1/models/disc/threshold", {"by": "Ada", "version": "0", "value": 9}
    user, engineer = ({"Authorization": f"Bearer {key}"} for key in ("for all of us", "for engineers"))
    with client(tmp_path / "store", models={"disc": duty}, key="for all of us", threshold_key="for engineers") as web:
        about = web.get("/v1/models/disc", headers=engineer).json()
        assert about["settable"] and not about["tuned"]
        told = {"by": "Ada", "version": about["version"]}
        for headers, wrong, status in (
            ({}, {}, 401),
            (user, {}, 401),
            (engineer, {"version": "another"}, 409),
            (engineer, {"by": ""}, 422),
            (engineer, {"by": "A\nB"}, 422),
            (engineer, {"value": "nan"}, 422),
            (engineer, {"value": "1e99"}, 422),
        ):
            assert web.put(place, params={**told, "value": 9, **wrong}, headers=headers).status_code == status, wrong
        assert kizu.load(duty).threshold == model.threshold

        with files.locked(duty):  # another command is at it
            assert web.put(place, params={**told, "value": 9}, headers=engineer).status_code == 409
        told = web.put(place, params={**told, "value": 9}, headers=engineer).json()
        assert told["threshold"] == 9 and told["tuned"] and "by hand, by Ada at 20" in told["statement"]
        assert web.post("/v1/predict", content=BAD, headers=RAW | user).json()["results"][0]["verdict"] == "pass"
        assert kizu.load(duty).threshold.statement == told["statement"]
        told = web.put(place, params={"by": "Ada", "version": told["version"]}, headers=engineer).json()
        assert told["statement"] == model.threshold.statement and told["map_level"] == model.pixel_threshold
    with client(tmp_path / "store", models={"disc": duty}) as web:  # a server that lets nobody
        assert not web.get("/v1/models/disc").json()["settable"]
        assert web.put(place, params=unasked).status_code == 401


def test_an_exported_models_threshold_is_not_set(exported_folder, tmp_path):
    with client(tmp_path, models={"part": exported_folder}, threshold_key="for engineers") as web:
        about = web.get("/v1/models/part").json()
        params, headers = {"by": "Ada", "version": about["version"], "value": 9}, {"X-API-Key": "for engineers"}
        refused = web.put("/v1/models/part/threshold", params=params, headers=headers)
        assert not about["settable"] and refused.status_code == 409 and "export it again" in refused.json()["error"]


def test_the_metrics_count_what_was_done(web):
    for content in (GOOD, BAD, BAD, b"no picture"):
        web.post("/v1/predict", content=content, headers=RAW)
    lines = dict(line.rsplit(" ", 1) for line in web.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert lines['kizu_verdicts_total{model="disc",verdict="stop"}'] == "2"
    assert lines['kizu_requests_total{method="POST",path="/v1/predict",status="415"}'] == "1"
    assert lines['kizu_request_seconds_count{path="/v1/predict"}'] == "4"
    assert float(lines["kizu_memory_bytes"]) > 1e7


def test_reloaded_and_stopped_under_load_it_answers_every_request_it_accepted(folder, tmp_path):
    """Eight clients; the model is replaced by another, then the server is told to stop."""
    duty, other = tmp_path / "duty", small_model(tmp_path / "other", first=300)
    shutil.copytree(folder, duty)
    photographs = [encoded(part(400 + seed, spot=seed % 2 == 0)) for seed in range(6)]
    known = {}
    answers, broken = [], []

    def ask(number, url):
        with httpx.Client(base_url=url, timeout=30) as web:
            while True:
                number = (number + 1) % len(photographs)
                try:
                    answer = web.post("/v1/predict", content=photographs[number], headers=RAW)
                except httpx.TransportError as error:  # the server has gone
                    return broken.append(error)
                answers.append((number, answer.status_code, answer.json()))

    log = tmp_path / "log"
    with serving(f"disc={duty}", log=log) as (process, url):
        versions = {httpx.get(url + "v1/models").json()[0]["version"]}
        clients = [threading.Thread(target=ask, args=(number, url)) for number in range(8)]
        for thread in clients:
            thread.start()
        time.sleep(0.5)
        kizu.load(other).save(duty)
        deadline = time.monotonic() + 20
        while len(versions) < 2 and time.monotonic() < deadline:
            versions.add(httpx.get(url + "v1/models").json()[0]["version"])
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        while log.read_text().count('"event": "reloaded"') < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(30)
        assert process.wait(30) == 0
    assert len(versions) == 2 and len(broken) == 8
    events = [json.loads(line) for line in log.read_text().splitlines()]
    stopped = next(event for event in events if event["event"] == "stopped")
    assert stopped["accepted"] == stopped["answered"]
    assert len([e for e in events if e.get("path") == "/v1/predict"]) == len(answers) > 40
    assert sum(event["event"] == "reloaded" for event in events) >= 2
    for name in (folder, other):
        loaded = kizu.load(name)
        known[len(known)] = [loaded.predict(content).score for content in photographs]
    seen = set()
    for number, status, answer in answers:
        assert status == 200
        score = answer["results"][0]["score"]
        (which,) = [k for k, scores in known.items() if math.isclose(scores[number], score, rel_tol=1e-5)]
        seen.add((answer["version"], which))
    assert len(seen) == 2 and len({version for version, _ in seen}) == 2


def test_several_models_each_answer_for_themselves(folder, tmp_path):
    other = small_model(tmp_path / "other" / "disc", first=300)
    with pytest.raises(kizu.OptionError, match="Two models are called disc"):
        folders_by_name([str(folder), str(other)])
    models = folders_by_name([str(folder), f"second={other}"])
    with client(tmp_path / "store", models=models) as web:
        assert [one["name"] for one in web.get("/v1/models").json()] == ["disc", "second"]
        assert web.post("/v1/predict", content=BAD, headers=RAW).status_code == 422
        for name, place in models.items():
            answer = web.post(f"/v1/predict?model={name}", content=BAD, headers=RAW).json()
            assert answer["results"][0]["score"] == pytest.approx(kizu.load(place).predict(BAD).score, rel=1e-6)


def test_a_model_that_cannot_be_read_leaves_the_old_one_on_duty(folder, tmp_path):
    duty = tmp_path / "duty"
    shutil.copytree(folder, duty)
    with client(tmp_path / "store", models={"disc": duty}) as web:
        (duty / "model.safetensors").write_bytes(b"broken")
        refused = web.post("/v1/models/disc/reload")
        assert refused.status_code == 409 and "stays" in refused.json()["error"]
        assert web.post("/v1/predict", content=BAD, headers=RAW).json()["results"][0]["verdict"] == "stop"
