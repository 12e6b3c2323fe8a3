"""What a server survives: idle, slow and vanishing clients, odd headers, huge photographs, proxies."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from kizu.serving.batcher import PixelGate
from kizu.serving.connections import Connection
from kizu.serving.limits import Budget, Refusal
from processes import kizu
from services import encoded, serving
from test_detectors import part
from test_serve import RAW, client

GOOD = encoded(part(98))


EXPORTED = Path(__file__).with_name("models_of_0_1") / "patchcore-exported"  # quick to load: torch is not imported


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(EXPORTED, tmp_path_factory.mktemp("served") / "disc")


@pytest.fixture
def web(folder, tmp_path):
    with client(tmp_path / "store", models={"disc": folder}, feedback=2, map_pixels=9_000, memory=200_000) as web:
        yield web


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def answers(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def resident_mb(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


def test_idle_connections_give_way_and_the_log_stays_small_and_json(folder, tmp_path):
    log = tmp_path / "log"
    with serving(folder, log=log, files=256) as (_, address), ExitStack() as idle:
        place = urlsplit(address)
        for number in range(400):
            try:
                one = idle.enter_context(socket.create_connection((place.hostname, place.port), timeout=5))
                one.sendall([b"", b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"][number % 2])
            except ConnectionError:  # closed already
                continue
        with httpx.Client(base_url=address, timeout=10) as web:
            for _ in range(5):
                assert web.post("/v1/predict", content=GOOD, headers=RAW).json()["results"][0]["verdict"] == "pass"
    assert all(json.loads(line) for line in log.read_text().splitlines())
    assert log.stat().st_size < 20_000


def test_who_sends_no_request_is_let_go(folder, tmp_path):
    soon = "import kizu.serving.connections as c; c.HEADER_SECONDS = 0.5"
    with serving(folder, log=tmp_path / "log", before=soon) as (_, address):
        place = (urlsplit(address).hostname, urlsplit(address).port)
        with socket.create_connection(place, timeout=10) as silent, socket.create_connection(place, timeout=10) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127")
            assert silent.recv(1) == b"" and slow.recv(1) == b""  # closed
        assert httpx.get(f"{address}healthz").status_code == 200


def test_who_does_not_read_its_answer_is_let_go():
    clock, unread = iter([0, 20, 40, 60, 80]), iter([900, 800, 800, 800, 0])
    connection = Connection.__new__(Connection)
    connection.waiting_since, connection._unread, connection._unread_since = None, 0, 0.0
    connection.loop = SimpleNamespace(time=lambda: next(clock))
    connection.transport = SimpleNamespace(get_write_buffer_size=lambda: next(unread))
    assert [connection.is_stale() for _ in range(5)] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [({"host": "["}, "The header Host"), ({"origin": "http://["}, "The header Origin")],
)
def test_headers_that_cannot_be_read_are_the_clients_fault(web, headers, sentence):
    answer = web.get("/v1/models", headers=headers)
    assert answer.status_code == 400 and sentence in answer.json()["error"]


def test_a_client_that_hangs_up_is_no_fault_of_the_server(folder, tmp_path):
    log = tmp_path / "log"
    with serving(folder, log=log) as (_, address):
        place = (urlsplit(address).hostname, urlsplit(address).port)
        with socket.create_connection(place) as one:
            one.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n" + GOOD[:50])
            time.sleep(0.3)
        wait_for(lambda: '"status": 499' in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [line for line in lines if line["level"] == "error"]


def test_what_is_held_together_is_bounded_and_the_rest_told_to_come_again():
    budget = Budget(100)
    with budget.hold(1000):  # alone, anything
        with pytest.raises(Refusal) as refused:
            budget.hold(1).__enter__()
        answer = refused.value.response()
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    with budget.hold(60), budget.hold(40), pytest.raises(Refusal):
        budget.hold(1).__enter__()
    with budget.hold(100):
        pass


def test_the_gate_lets_in_no_more_pixels_than_fit_and_everybody_in_the_end():
    gate, lock = PixelGate(100), threading.Lock()
    inside, most, served = 0, 0, []

    def work(pixels):
        nonlocal inside, most
        with gate.hold(pixels), gate.hold(pixels):
            with lock:
                inside += min(pixels, 100)
                most = max(most, inside)
            time.sleep(0.001)
            with lock:
                inside -= min(pixels, 100)
                served.append(pixels)

    sizes = [1, 30, 70, 100, 5000] * 20
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(served) == sorted(sizes) and 70 < most <= 100


def test_a_body_waits_for_room_and_maps_fit_an_answer(web):
    with web.app._budget.hold(190_000):
        answer = web.post("/v1/predict", content=bytes(20_000), headers=RAW)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert web.post("/v1/predict?map=png&map_size=90", content=GOOD, headers=RAW).status_code == 200
    answer = web.post("/v1/predict?map=png&map_size=0", content=GOOD, headers=RAW)
    assert answer.status_code == 413 and "give a map_size, or a smaller one" in answer.json()["error"]


def test_the_feedback_folder_is_bounded(web):
    for number, status in enumerate((200, 200, 409)):
        answer = web.post("/v1/feedback?label=good", content=encoded(part(number)), headers=RAW)
        assert answer.status_code == status, answer.text
    assert "holds as many photographs as it may, 2" in answer.json()["error"]


def test_the_follower_survives_whatever_goes_wrong(folder, tmp_path, monkeypatch):
    with client(tmp_path / "store", models={"disc": folder}) as web:
        hosted = web.service.models["disc"]
        monkeypatch.setattr("kizu.serving.service.FOLLOW_INTERVAL", 0.01)
        failures = iter([RuntimeError("odd"), MemoryError(), OSError(5, "gone")])
        monkeypatch.setattr(hosted, "was_replaced", lambda: (_ for _ in ()).throw(next(failures, OSError(5, "gone"))))

        async def follow():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(web.service.follow(), 0.3)

        asyncio.run(follow())
        assert next(failures, None) is None
        monkeypatch.setattr("kizu.serving.hosted_model.load", lambda _: (_ for _ in ()).throw(RuntimeError("odd")))
        answer = web.post("/v1/models/disc/reload")
        assert answer.status_code == 409 and "RuntimeError: odd" in answer.json()["error"]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [("", "is empty"), ("short", "too short"), ("schlüssel-lang", "ASCII"), ("tab\tinside", "ASCII")],
)
def test_a_key_that_protects_nothing_is_refused_at_the_start(key, sentence, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KIZU_API_KEY", key)
    assert sentence in kizu("serve", folder, "--port", 0, cwd=tmp_path, code=2).stderr


@pytest.mark.slow
def test_huge_photographs_take_bounded_memory(folder, tmp_path):
    buffer = BytesIO()
    Image.new("RGB", (7000, 7000), (90, 90, 90)).save(buffer, "PNG")
    with serving(folder, "--timeout", 120, log=tmp_path / "log") as (process, address):
        before = resident_mb(process)
        answers = []

        def ask():
            answers.append(httpx.post(f"{address}v1/predict", content=buffer.getvalue(), headers=RAW, timeout=150))

        threads = [threading.Thread(target=ask) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 32
        assert resident_mb(process) - before < 1000


NGINX = """
daemon off; master_process off; error_log stderr; pid nginx.pid;
events {{ }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  client_max_body_size 32m;
  server {{
    listen 127.0.0.1:{port};
    location /inspection/ {{
      proxy_pass {address};
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto $scheme;
    }}
  }}
}}
"""


CADDY = """
{{
  admin off
}}
:{port} {{
  bind 127.0.0.1
  {handle} /inspection/* {{
    reverse_proxy {address}
  }}
}}
"""


def nginx(port, address, takes_the_path_away):
    """A configuration as docs/serving.md has it, and the command that runs it."""
    text = NGINX.format(port=port, address=address + ("/" if takes_the_path_away else ""))
    return text, ["-p", ".", "-c", "proxy.conf"]


def caddy(port, address, takes_the_path_away):
    text = CADDY.format(port=port, address=address, handle="handle_path" if takes_the_path_away else "handle")
    return text, ["run", "--config", "proxy.conf", "--adapter", "caddyfile"]


@pytest.mark.parametrize("proxy", [nginx, caddy])
@pytest.mark.parametrize("takes_the_path_away", [True, False])
def test_behind_a_proxy_below_a_path(proxy, takes_the_path_away, folder, tmp_path):
    if (program := shutil.which(proxy.__name__)) is None:
        pytest.skip(f"{proxy.__name__} is not on PATH")
    with serving(folder, "--root-path", "/inspection", "--allow-host", "line4", log=tmp_path / "log") as (_, address):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        text, arguments = proxy(port, address.removesuffix("/inspection/"), takes_the_path_away)
        (tmp_path / "proxy.conf").write_text(text)
        own = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        process = subprocess.Popen([program, *arguments], cwd=tmp_path, env=own, stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"host": "line4"}) as web:
                wait_for(lambda: answers(port))
                page = web.get("/inspection/")
                assert page.status_code == 200 and 'src="page/app.js"' in page.text
                assert web.get("/inspection/page/app.js").status_code == 200
                answer = web.post("/inspection/v1/predict", content=GOOD, headers=RAW | {"origin": "http://line4"})
                assert answer.json()["results"][0]["verdict"] == "pass"
                assert web.get("/inspection/healthz", headers={"host": "elsewhere"}).status_code == 403
                assert web.get("/inspection/openapi.json").json()["servers"] == [{"url": "/inspection"}]
        finally:
            process.terminate()
            process.wait()


def test_on_a_full_disk_the_verdict_is_answered_and_says_that_it_was_not_kept(folder, tmp_path):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    (tmp_path / "log").mkdir()
    log = tmp_path / "log" / "server.log"
    with serving(folder, "--store", tmp_path / "store", "--keep", "50", log=log, before=full) as (_, address):
        answers = [
            httpx.post(f"{address}v1/predict", content=encoded(part(seed)), headers=RAW).json() for seed in range(20)
        ]
        results = [answer["results"][0] for answer in answers]
        assert all(result["verdict"] in ("pass", "stop") for result in results)
        assert results[0]["id"] == 1 and results[0]["not_kept"] == ""
        assert results[-1]["id"] is None and "cannot be written" in results[-1]["not_kept"]
        assert httpx.get(f"{address}v1/verdicts").status_code == 200
        assert "kizu_verdicts_not_kept_total" in httpx.get(f"{address}metrics").text
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line["event"] == "not kept" for line in lines if "event" in line) or any(
        "not kept" in json.dumps(line) for line in lines
    )
