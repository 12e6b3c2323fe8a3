"""The HTTP server around a service: its routes, its page, from start to graceful stop."""

import asyncio
import hashlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kizu import __version__
from kizu.calibration.threshold import finite
from kizu.errors import OptionError
from kizu.serving import connections
from kizu.serving.feedback import Label
from kizu.serving.history import Entry, History
from kizu.serving.limits import MEANINGS, STATUSES, Refusal, RefusalKind, read_uploads
from kizu.serving.middleware import GuardMiddleware
from kizu.serving.observability import CONTENT_TYPE, log
from kizu.serving.responses import ResponseOptions, promise_at
from kizu.serving.schemas import Collected, Health, KeptVerdict, Model, Predictions, Problem, Promise
from kizu.serving.service import Service

__all__ = ["application", "listen", "run"]

PAGE = Path(__file__).with_name("static")
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PHOTOGRAPH = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": PHOTOGRAPH, "minItems": 1}},
                "required": ["image"],
                "additionalProperties": False,
            }
        },
        "image/png": {"schema": PHOTOGRAPH},
        "image/jpeg": {"schema": PHOTOGRAPH},
        "application/octet-stream": {"schema": PHOTOGRAPH},
    },
}
# why any route may refuse a request, and a route that reads photographs
COMMON: tuple[RefusalKind, ...] = ("malformed", "unauthorized", "forbidden", "busy")
READING: tuple[RefusalKind, ...] = ("unknown", "slow", "too-large", "unsupported", "unreadable", "full")

PhotographName = Annotated[str, Query(max_length=200, description="The photograph's name, if the body is raw bytes.")]
MAX_ID = 2**53  # the largest whole number that JavaScript knows
IdQuery = Annotated[int, Query(ge=1, le=MAX_ID)]
IdInPath = Annotated[int, PathParameter(ge=1, le=MAX_ID)]
Item = TypeVar("Item")
ModelName = Annotated[str | None, Query(description="The model's name; needed only where the server has several.")]


def _refusals(*kinds: RefusalKind) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document describes the ways in which a route may refuse."""
    statuses = (STATUSES[kind] for kind in (*COMMON, *kinds))
    return {status: {"model": Problem, "description": MEANINGS[status]} for status in statuses}


def application(
    service: Service,
    *,
    key: str | None = None,
    threshold_key: str | None = None,
    hosts: Collection[str] = (),
    root_path: str = "",
) -> GuardMiddleware:
    """The ASGI application: FastAPI behind the guard, which knows the keys and the `hosts` that stand for this server.

    Below a `root_path`, as in /inspection, it answers whether or not a proxy takes that away.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(service.follow())
        yield
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="kizu",
        version=__version__,
        description="Visual inspection learned from photographs of good parts only.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        servers=[{"url": root_path}] if root_path else None,
        responses=_refusals("invalid"),
        dependencies=[Depends(_refuse_unknown_options)],
    )
    routers = _verdicts(service), _models(service), _history(service), _server(service), _page()
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    if key is not None:
        _describe_key(app)
    return GuardMiddleware(
        app,
        key=key,
        threshold_key=threshold_key,
        limits=service.limits,
        counters=service.counters,
        budget=service.budget,
        hosts=hosts,
        root_path=root_path,
    )


def _verdicts(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["verdicts"])

    @routes.post("/predict", responses=_refusals(*READING, "late"), openapi_extra={"requestBody": BODY})
    async def predict(
        request: Request,
        model: ModelName = None,
        map: Annotated[Literal["none", "png", "npy"], Query(description="Adds the anomaly map.")] = "none",
        map_size: Annotated[
            int, Query(ge=0, le=8192, description="The map's longer side at most, in pixels; 0: as the photograph.")
        ] = 512,
        why: Annotated[bool, Query(description="Adds the nearest good patches, if the method has any.")] = False,
        view: Annotated[bool, Query(description="Adds the photograph as JPEG.")] = False,
        keep: Annotated[bool, Query(description="Keeps the verdict in the history, where there is one.")] = True,
        name: PhotographName = "image",
    ) -> Predictions:
        """Judge photographs: raw bytes of one, or several as multipart, at most as many as may wait.

        A photograph that cannot be judged has the verdict error. If none can be judged, the status says why.
        """
        hosted = service.pick(model)
        uploads = await read_uploads(request, service.limits)
        options = ResponseOptions(map, map_size, why, view)
        predictions = await service.predict(hosted, uploads, options, keep)
        request.state.facts |= {"model": hosted.name, "version": predictions.version}
        request.state.facts["verdicts"] = [[r.image, r.verdict, r.score] for r in predictions.results]
        return predictions

    @routes.post(
        "/feedback", responses=_refusals(*READING, "conflict", "unwritable"), openapi_extra={"requestBody": BODY}
    )
    async def feedback(
        request: Request,
        label: Annotated[Label, Query(description="What a person says of the photographs.")],
        model: ModelName = None,
        id: Annotated[IdQuery | None, Query(description="The kept verdict that the feedback is about.")] = None,
        name: PhotographName = "image",
    ) -> Collected:
        """Collect photographs as good or bad, for kizu update and kizu tune. A photograph marked again moves.

        A verdict that the history has dropped meanwhile loses nothing: the photograph is in the request.
        """
        hosted = service.pick(model)
        uploads = await read_uploads(request, service.limits)
        collected = await asyncio.to_thread(service.collect, hosted, uploads, label, id)
        request.state.facts |= {"model": hosted.name, "label": label, "files": collected.files}
        return collected

    return routes


def _models(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.get("")
    async def models() -> list[Model]:
        """The models that the server answers with."""
        return [service.describe(hosted) for hosted in service.models.values()]

    @routes.get("/{name}", responses=_refusals("unknown"))
    async def model(name: str) -> Model:
        """One model."""
        return service.describe(service.pick(name))

    @routes.get("/{name}/promise", responses=_refusals("unknown"))
    async def promise(name: str, threshold: Annotated[float, Query(ge=-1e30, le=1e30)]) -> Promise:
        """What another threshold would promise about false alarms, by the good images behind the model's own."""
        return promise_at(service.pick(name).loaded.model, threshold)

    @routes.post("/{name}/reload", responses=_refusals("unknown", "conflict"))
    async def reload(name: str) -> Model:
        """Read the model's folder again. Requests go on meanwhile; if it cannot be read, the loaded model stays."""
        hosted = service.pick(name)
        await service.reload(hosted)
        return service.describe(hosted)

    @routes.put("/{name}/threshold", responses=_refusals("unknown", "conflict", "unwritable"))
    async def threshold(
        request: Request,
        name: str,
        version: Annotated[str, Query(max_length=40, description="The version that it is meant for.")],
        by: Annotated[str, Query(min_length=1, max_length=60, description="Who sets it; kept with the threshold.")],
        value: Annotated[
            float | None, Query(ge=-1e30, le=1e30, description="Without it: back to what its good images give.")
        ] = None,
    ) -> Model:
        """Set a model's threshold, in its folder, for all who use it. This needs the key for thresholds."""
        if not request.state.sets_thresholds:
            raise Refusal(
                "unauthorized", "The key for thresholds is missing or wrong: ask whoever started the server for it"
            )
        if not by.isprintable() or not by.strip():
            raise Refusal("invalid", "by: a name, without line breaks and other signs that cannot be printed")
        hosted = service.pick(name)
        request.state.facts |= {"model": name, "before": finite(hosted.loaded.model.threshold.value), "by": by.strip()}
        await service.set_threshold(hosted, value, by.strip(), version)
        request.state.facts["threshold"] = finite(hosted.loaded.model.threshold.value)
        return service.describe(hosted)

    return routes


def _history(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/verdicts", tags=["verdicts"])

    def find(number: int, read: Callable[[History, int], Item | None]) -> Item:
        item = None if service.history is None else read(service.history, number)
        if item is None:
            raise Refusal("unknown", f"There is no kept verdict {number}")
        return item

    def kept(entry: Entry) -> KeptVerdict:
        return KeptVerdict.model_validate(vars(entry))

    @routes.get("")
    def verdicts(limit: Annotated[int, Query(ge=1, le=1000)] = 50, before: IdQuery | None = None) -> list[KeptVerdict]:
        """The last verdicts that are kept, the latest first."""
        return [] if service.history is None else [kept(entry) for entry in service.history.last(limit, before)]

    @routes.get("/{id}", responses=_refusals("unknown"))
    def verdict(id: IdInPath) -> KeptVerdict:
        """One verdict."""
        return kept(find(id, History.entry))

    @routes.get("/{id}/photograph", responses=_refusals("unknown") | _file("application/octet-stream"))
    def photograph(id: IdInPath) -> Response:
        """The photograph of a verdict, as it was sent."""
        find(id, History.entry)
        content = None if service.history is None else service.history.photograph(id)
        if content is None:
            raise Refusal("unknown", f"The photograph of verdict {id} was not kept")
        return Response(content, media_type="application/octet-stream")

    @routes.get("/{id}/thumbnail", responses=_refusals("unknown") | _file("image/jpeg"))
    def thumbnail(id: IdInPath) -> Response:
        """A small picture of a verdict's photograph."""
        return Response(find(id, History.thumbnail), media_type="image/jpeg")

    return routes


def _server(service: Service) -> APIRouter:
    routes = APIRouter(tags=["server"])

    @routes.get("/healthz")
    async def healthz() -> Health:
        """Whether the server is up."""
        return Health(models=len(service.models))

    @routes.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """What the server has done, in Prometheus' text format."""
        return Response(service.counters.text(service.gauges()), headers={"Content-Type": CONTENT_TYPE})

    return routes


def _page() -> APIRouter:
    """The page and its files, read once."""
    routes = APIRouter(include_in_schema=False)
    contents = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in MEDIA_TYPES}
    tags = {name: f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"' for name, content in contents.items()}

    @routes.api_route("/", methods=["GET", "HEAD"])
    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def page(request: Request, name: str = "index.html") -> Response:
        if name not in contents or request.url.path.endswith("/index.html"):
            raise HTTPException(404)
        headers = {"Cache-Control": "no-cache", "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(contents[name], headers=headers, media_type=MEDIA_TYPES[Path(name).suffix])

    return routes


async def _refuse_unknown_options(request: Request) -> None:
    """Refuse an option that does not exist: it is a mistake, or was meant for another version."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise Refusal("invalid", f"There is no option {name}; there are: {', '.join(sorted(known)) or 'none'}")


def _file(kind: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": PHOTOGRAPH}}, "description": "the file"}}


def _describe_key(app: FastAPI) -> None:
    """Say in the OpenAPI document where the key is needed."""
    document = app.openapi()
    document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path == "/healthz" else [{"key": []}]
    app.openapi_schema = document


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    sentences = (f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors())
    return Refusal("invalid", "; ".join(sentences)).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address. Raises `OptionError` where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OptionError(f"`host={host}` `port={port}`: {error}") from None


def run(guarded: GuardMiddleware, service: Service, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then answer every request that came in; SIGHUP reloads all models."""
    config = uvicorn.Config(
        guarded,
        http=connections.protocol(connections.allowed_connections()),
        ws="none",
        lifespan="on",
        backlog=connections.ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(config)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        async def reload_all() -> None:
            for hosted in service.models.values():
                with suppress(Refusal):
                    await service.reload(hosted)

        def on_hangup() -> None:
            task = loop.create_task(reload_all())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, on_hangup)
        watching = loop.create_task(connections.watch_over(server, bound))
        try:
            await server.serve(sockets=[bound])
        finally:
            watching.cancel()

    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(serve())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    log.info("stopped", extra={"facts": {"accepted": guarded.accepted, "answered": guarded.answered}})
