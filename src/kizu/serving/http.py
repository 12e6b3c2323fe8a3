"""The HTTP server around a service: its routes, its page, its life from start to graceful stop."""

import asyncio
import hashlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kizu import __version__
from kizu.errors import OptionError
from kizu.serving.feedback import Label
from kizu.serving.history import Entry
from kizu.serving.logbook import log
from kizu.serving.middleware import Gate
from kizu.serving.observability import CONTENT_TYPE
from kizu.serving.responses import Wishes, about, promise
from kizu.serving.schemas import Collected, Health, Kept, Model, Predictions, Problem, Promise
from kizu.serving.service import Service
from kizu.serving.uploads import Refusal, read_uploads

__all__ = ["application", "listen", "run"]

PAGE = Path(__file__).with_name("static")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
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
REFUSALS = {
    401: "the API key is missing or wrong",
    403: "the request comes from another site",
    404: "there is none of that name or number",
    408: "the body came too slowly",
    409: "that cannot be done now",
    413: "too many bytes, pixels or photographs",
    415: "not a photograph",
    422: "a damaged photograph, or an option that cannot be",
    429: "too much is waiting",
    503: "it took too long",
}

LAST = 2**53  # the largest whole number that JavaScript knows
Number = Annotated[int, Query(ge=1, le=LAST)]
Place = Annotated[int, PathParameter(ge=1, le=LAST)]
ModelName = Annotated[str | None, Query(description="The model's name; it may be left out where one is served.")]


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": REFUSALS[status]} for status in (401, 403, 429, *statuses)}


def application(service: Service, *, key: str | None = None) -> Gate:
    """The ASGI application: FastAPI behind its gate."""

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
        responses=_refusals(422),
        dependencies=[Depends(_only_known)],
    )
    for routes in (_verdicts(service), _models(service), _kept(service), _house(service), _page()):
        app.include_router(routes)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    gate = Gate(app, key=key, limits=service.limits, counters=service.counters)
    if key is not None:
        _describe_key(app)
    return gate


def _verdicts(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["verdicts"])

    @routes.post("/predict", responses=_refusals(404, 408, 413, 415, 422, 503), openapi_extra={"requestBody": BODY})
    async def predict(
        request: Request,
        model: ModelName = None,
        map: Annotated[Literal["none", "png", "npy"], Query(description="Add the anomaly map.")] = "none",
        map_size: Annotated[
            int, Query(ge=0, le=8192, description="Its longer side at most; 0: as the photograph.")
        ] = 512,
        why: Annotated[bool, Query(description="Add the nearest good patches, where the method has any.")] = False,
        view: Annotated[bool, Query(description="Add the photograph as JPEG.")] = False,
        keep: Annotated[bool, Query(description="Keep the verdict, where verdicts are kept.")] = True,
        name: Annotated[str, Query(max_length=200, description="What to call raw bytes.")] = "image",
    ) -> Predictions:
        """Judge photographs: raw bytes of one, or any number as multipart.

        Where some of several cannot be judged, their verdict is error; where none can, the status says why.
        """
        served = service.pick(model)
        uploads = await read_uploads(request, service.limits)
        found = await service.predict(served, uploads, Wishes(map, map_size, why, view), keep)
        request.state.said |= {"model": served.name, "version": found.version}
        request.state.said["verdicts"] = [[one.image, one.verdict, one.score] for one in found.results]
        return found

    @routes.post("/feedback", responses=_refusals(404, 408, 409, 413, 415, 422), openapi_extra={"requestBody": BODY})
    async def feedback(
        request: Request,
        label: Annotated[Label, Query(description="What a person says of them.")],
        model: ModelName = None,
        id: Annotated[Number | None, Query(description="The kept verdict that this is about.")] = None,
        name: Annotated[str, Query(max_length=200, description="What to call raw bytes.")] = "image",
    ) -> Collected:
        """Collect photographs as good or bad, for kizu update and kizu tune. Marked again, a photograph moves."""
        served = service.pick(model)
        uploads = await read_uploads(request, service.limits)
        if id is not None and (service.journal is None or service.journal.entry(id) is None):
            raise Refusal(404, f"There is no kept verdict {id}")
        collected = await asyncio.to_thread(service.collect, served, uploads, label, id)
        request.state.said |= {"model": served.name, "label": label, "files": collected.files}
        return collected

    return routes


def _models(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.get("")
    async def models() -> list[Model]:
        """The models on duty."""
        return [about(name, served.loaded) for name, served in service.models.items()]

    @routes.get("/{name}", responses=_refusals(404))
    async def model(name: str) -> Model:
        """One of them."""
        return about(name, service.pick(name).loaded)

    @routes.get("/{name}/promise", responses=_refusals(404))
    async def promised(name: str, threshold: Annotated[float, Query(ge=-1e30, le=1e30)]) -> Promise:
        """What another threshold would promise about false alarms, by the good images behind the level."""
        return promise(service.pick(name).loaded.model, threshold)

    @routes.post("/{name}/reload", responses=_refusals(404, 409))
    async def reload(name: str) -> Model:
        """Read the model's folder again. Requests go on meanwhile; where it cannot be read, the old model stays."""
        return about(name, await service.reload(service.pick(name)))

    return routes


def _kept(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/verdicts", tags=["verdicts"])

    def found(number: int, read: Callable[[int], Any]) -> Any:
        value = None if service.journal is None else read(number)
        if value is None:
            raise Refusal(404, f"There is no kept verdict {number}")
        return value

    def kept(entry: Entry) -> Kept:
        return Kept.model_validate(vars(entry))

    @routes.get("")
    def verdicts(limit: Annotated[int, Query(ge=1, le=1000)] = 50, before: Number | None = None) -> list[Kept]:
        """The last verdicts, as far as they are kept, the latest first."""
        return [] if service.journal is None else [kept(entry) for entry in service.journal.last(limit, before)]

    @routes.get("/{id}", responses=_refusals(404))
    def verdict(id: Place) -> Kept:
        """One of them."""
        return kept(found(id, lambda number: service.journal and service.journal.entry(number)))

    @routes.get("/{id}/photograph", responses=_refusals(404) | _file("application/octet-stream"))
    def photograph(id: Place) -> Response:
        """The photograph as it was sent."""
        content = found(id, lambda number: service.journal and service.journal.photograph(number))
        return Response(content, media_type="application/octet-stream")

    @routes.get("/{id}/thumbnail", responses=_refusals(404) | _file("image/jpeg"))
    def thumbnail(id: Place) -> Response:
        """A small picture of it."""
        content = found(id, lambda number: service.journal and service.journal.thumbnail(number))
        return Response(content, media_type="image/jpeg")

    return routes


def _house(service: Service) -> APIRouter:
    routes = APIRouter(tags=["server"])

    @routes.get("/healthz")
    async def healthz() -> Health:
        """Whether it is there."""
        return Health(models=len(service.models))

    @routes.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """What was done, in Prometheus' text format."""
        return Response(service.counters.text(service.gauges()), headers={"Content-Type": CONTENT_TYPE})

    return routes


def _page() -> APIRouter:
    """The page and its files, read once."""
    routes = APIRouter(include_in_schema=False)
    contents = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in KINDS}
    tags = {name: f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"' for name, content in contents.items()}

    @routes.api_route("/", methods=["GET", "HEAD"])
    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def page(request: Request, name: str = "index.html") -> Response:
        if name not in contents:
            raise HTTPException(404)
        headers = {"Cache-Control": "no-cache", "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(contents[name], headers=headers, media_type=KINDS[Path(name).suffix])

    return routes


async def _only_known(request: Request) -> None:
    """An option that does not exist is refused: it is a mistake, or was meant for another version."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise Refusal(422, f"There is no option {name}; there are: {', '.join(sorted(known)) or 'none'}")


def _file(kind: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": PHOTOGRAPH}}, "description": "the file"}}


def _describe_key(app: FastAPI) -> None:
    """The key in the OpenAPI document."""
    document = app.openapi()
    document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path == "/healthz" else [{"key": []}]
    app.openapi_schema = document


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _problem(error.status, str(error), {"Retry-After": "1"} if error.status in (429, 503) else None)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = (f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
    return _problem(422, "; ".join(said))


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises `OptionError` where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OptionError(f"--host {host} --port {port}: {error}") from None


def run(gate: Gate, service: Service, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then answer every request that came in; SIGHUP reloads all models."""
    config = uvicorn.Config(gate, log_config=None, access_log=False, server_header=False, lifespan="on")
    server = uvicorn.Server(config)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        async def reload_all() -> None:
            for served in service.models.values():
                with suppress(Refusal):
                    await service.reload(served)

        def on_hangup() -> None:
            task = loop.create_task(reload_all())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, on_hangup)
        await server.serve(sockets=[bound])

    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(serve())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    log.info("stopped", extra={"facts": {"accepted": gate.accepted, "answered": gate.answered}})
