"""What every request passes: who may use the server, how many at once, the log, the counters, safe headers."""

import hmac
import ipaddress
import logging
import time
import uuid
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kizu.serving.limits import Budget, Limits, Refusal, drain
from kizu.serving.observability import Counters, log

__all__ = ["GuardMiddleware"]

OPEN = ("/", "/healthz", "/page/", "/openapi.json")  # without a key; /page/ with all below it
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


GONE = 499  # what the log says of a client that hung up


class GuardMiddleware:
    """An ASGI application around another, below `root_path` or at the root.

    Without a key it answers only to addresses, localhost and the names in `hosts`. It never answers to other sites'
    pages. Who sends the `threshold_key` may do all, and set thresholds besides. The bodies of all requests together are
    held within `budget`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        threshold_key: str | None = None,
        limits: Limits,
        counters: Counters,
        budget: Budget,
        hosts: Collection[str] = (),
        root_path: str = "",
    ) -> None:
        self._app = app
        self._key = key
        self._threshold_key = threshold_key
        self._limits = limits
        self._counters = counters
        self._budget = budget
        self._hosts = frozenset(host.lower() for host in hosts)
        self._root_path = root_path
        self.accepted = 0  # requests since the start
        self.answered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._below_root(scope)
        start, name, status = time.perf_counter(), uuid.uuid4().hex[:12], 500
        begun = False
        facts: dict[str, object] = {}  # that the routes add to the line in the log
        scope.setdefault("state", {})["facts"] = facts

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", []), *HEADERS, (b"x-request-id", name.encode())]
            await send(message)

        self.accepted += 1
        request = Request(scope, receive)
        try:
            if scope["path"] == "":
                await RedirectResponse(f"{self._root_path}/", 308)(scope, receive, answer)
                return
            self._check(request)
            with self._budget.hold(_body_size(request, self._limits)):
                await self._app(scope, receive, answer)
        except Refusal as refusal:
            await drain(request, self._limits)
            await refusal.response()(scope, receive, answer)
        except ClientDisconnect:
            status = GONE
        except Exception:
            log.exception("fault", extra={"facts": {"id": name, "path": scope["path"]}})
            if not begun:
                fault = Refusal("fault", f"Something went wrong; the server's log has the error under {name}")
                await fault.response()(scope, receive, answer)
        finally:
            self.answered += 1
            self._record(scope, request, name, status, time.perf_counter() - start, facts)

    def _below_root(self, scope: Scope) -> Scope:
        """The request as if the server were at the root, whether or not a proxy has taken the root path away."""
        path, root = scope["path"], self._root_path
        if not root or not (path == root or path.startswith(root + "/")):
            return scope
        return {**scope, "path": path[len(root) :], "raw_path": scope.get("raw_path", b"")[len(root) :]}

    def _check(self, request: Request) -> None:
        """Raise `Refusal` where the request is not one that this server answers."""
        path, host = request.scope["path"], request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and _site(origin, "Origin").netloc != host:
            raise Refusal("forbidden", f"{origin} is another site: its pages may not use this server")
        name = _site(f"//{host}", "Host").hostname or ""
        if self._key is None and name not in self._hosts and not _is_address(name):
            rule = "Without an API key this server answers to its address and localhost"
            raise Refusal("forbidden", f"{rule}, not to {host}: whoever starts it can let this name in")
        sets_thresholds = _has(request, self._threshold_key)
        request.state.sets_thresholds = sets_thresholds
        if not (self._key is None or _is_open(path) or sets_thresholds or _has(request, self._key)):
            key = "key for thresholds" if request.method == "PUT" else "API key"
            raise Refusal("unauthorized", f"The {key} is missing or wrong: it is sent as  Authorization: Bearer KEY")
        if self.accepted - self.answered > self._limits.requests:
            raise Refusal("busy", f"{self._limits.requests} requests are being answered: come again in a second")

    def _record(
        self, scope: Scope, request: Request, name: str, status: int, seconds: float, facts: dict[str, object]
    ) -> None:
        route = getattr(scope.get("route"), "path", "") or ("/page/" if scope["path"].startswith("/page/") else "other")
        self._counters.add("kizu_requests_total", method=_known_method(request.method), path=route, status=str(status))
        self._counters.observe("kizu_request_seconds", seconds, path=route)
        client = request.client.host if request.client else None
        line = {"id": name, "method": request.method, "path": scope["path"], "status": status}
        line |= {"ms": round(1000 * seconds, 2), "client": client, **facts}
        quiet = route in ("/healthz", "/metrics") and status == 200
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": line})


def _is_open(path: str) -> bool:
    return path in OPEN or any(len(prefix) > 1 and prefix.endswith("/") and path.startswith(prefix) for prefix in OPEN)


def _has(request: Request, key: str | None) -> bool:
    """Whether a request comes with this key, if there is one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    return key is not None and hmac.compare_digest(given.strip().encode(), key.encode())


def _site(text: str, header: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        raise Refusal("malformed", f"The header {header} cannot be read: {text.removeprefix('//')}") from None


def _body_size(request: Request, limits: Limits) -> int:
    """How many bytes the body will take at most."""
    if request.method not in ("POST", "PUT", "PATCH"):
        return 0
    stated = request.headers.get("content-length", "")
    return min(int(stated), limits.bytes) if stated.isdecimal() else limits.bytes


def _is_address(name: str) -> bool:
    """Whether the name in a Host header is an address or localhost: no other site's name can have led here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("", "localhost")
    return True


def _known_method(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
