"""What every request passes: who may come in, how much at once, what is counted and logged, safe headers."""

import hmac
import ipaddress
import time
import uuid
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kizu.serving.logbook import log
from kizu.serving.observability import Counters
from kizu.serving.uploads import Limits, Refusal, spend

__all__ = ["Gate"]

OPEN = ("/", "/healthz", "/page/", "/openapi.json")  # without a key; those that end in / with all below them
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
]


class Gate:
    """An ASGI application around another.

    Without a key it answers to addresses and to localhost alone, and with or without never to other sites' pages.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, limits: Limits, counters: Counters) -> None:
        self._app = app
        self._key = key
        self._limits = limits
        self._counters = counters
        self.accepted = 0  # requests since the start
        self.answered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, name, status = time.perf_counter(), uuid.uuid4().hex[:12], 500
        begun = False
        said: dict[str, object] = {}
        scope.setdefault("state", {})["said"] = said

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", []), *HEADERS, (b"x-request-id", name.encode())]
            await send(message)

        self.accepted += 1
        request = Request(scope, receive)
        try:
            refusal = self._refuse(request)
            if refusal is None:
                await self._app(scope, receive, answer)
            else:
                await spend(request, self._limits)
                await self._say(refusal)(scope, receive, answer)
        except Exception:
            log.exception("fault", extra={"facts": {"id": name, "path": request.url.path}})
            if not begun:
                fault = Refusal(500, f"Something went wrong; the log says what under {name}")
                await self._say(fault)(scope, receive, answer)
        finally:
            self.answered += 1
            self._record(scope, request, name, status, time.perf_counter() - start, said)

    def _refuse(self, request: Request) -> Refusal | None:
        path, host = request.url.path, request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return Refusal(403, f"{origin} is another site: its pages may not use this server")
        if self._key is None and not _plain(host):
            return Refusal(403, f"Without an API key this server answers to its address and localhost, not to {host}")
        free = path in OPEN or any(len(some) > 1 and some.endswith("/") and path.startswith(some) for some in OPEN)
        if self._key is not None and not free and not hmac.compare_digest(_given(request), self._key.encode()):
            return Refusal(401, "This needs the API key, as in  Authorization: Bearer KEY")
        if self.accepted - self.answered > self._limits.requests:
            return Refusal(429, f"{self._limits.requests} requests are being answered: come again in a second")
        return None

    @staticmethod
    def _say(refusal: Refusal) -> JSONResponse:
        extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(refusal.status, {})
        return JSONResponse({"error": str(refusal)}, refusal.status, extra)

    def _record(
        self, scope: Scope, request: Request, name: str, status: int, seconds: float, said: dict[str, object]
    ) -> None:
        route = getattr(scope.get("route"), "path", "") or ("/page/" if "page" in request.url.path[:6] else "other")
        self._counters.add("kizu_requests_total", method=_verb(request.method), path=route, status=str(status))
        self._counters.observe("kizu_request_seconds", seconds, path=route)
        client = request.client.host if request.client else None
        facts = {"id": name, "method": request.method, "path": request.url.path, "status": status}
        facts |= {"ms": round(1000 * seconds, 2), "client": client, **said}
        quiet = route in ("/healthz", "/metrics") and status == 200
        log.log(10 if quiet else 20, "request", extra={"facts": facts})


def _given(request: Request) -> bytes:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    return given.strip().encode()


def _plain(host: str) -> bool:
    """Whether a Host header is an address or localhost: no other site's name can have led here."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("", "localhost")
    return True


def _verb(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
