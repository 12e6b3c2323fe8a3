"""What a request may cost, how photographs are read from it within these limits, and how a request is refused.

A refusal has a kind; `STATUSES` gives each kind its HTTP status.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from kizu.data import image
from kizu.errors import BadImage, ImageKind, KizuError
from kizu.serving.batcher import Upload

__all__ = ["MEANINGS", "STATUSES", "Budget", "Limits", "Refusal", "RefusalKind"]
__all__ += ["check", "drain", "read_uploads", "refusal_of"]

FORM = "multipart/form-data"
BINARY = ("application/octet-stream", "application/x-www-form-urlencoded")  # the latter is what curl says of any bytes
DRAINED = 4  # times the limit of bytes: so much is read and thrown away, so that a refusal reaches its client

Reason = Literal["malformed", "unauthorized", "forbidden", "unknown", "slow", "conflict", "invalid", "busy"]
RefusalKind = ImageKind | Reason | Literal["fault", "late", "full", "unwritable"]
STATUSES: Mapping[RefusalKind, int] = {
    "malformed": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "unknown": 404,
    "slow": 408,
    "conflict": 409,
    "too-large": 413,
    "unsupported": 415,
    "unreadable": 422,
    "invalid": 422,
    "busy": 429,
    "fault": 500,
    "late": 503,
    "full": 503,
    "unwritable": 507,
}
MEANINGS = {  # as the OpenAPI document gives them
    400: "a header that cannot be read",
    401: "the API key is missing or wrong",
    403: "the request comes from another site",
    404: "there is none of that name or number",
    408: "the body came too slowly",
    409: "that cannot be done now",
    413: "too many bytes, pixels or photographs",
    415: "not a photograph",
    422: "a damaged photograph, or an option that cannot be",
    429: "too many photographs or requests are waiting",
    503: "it took too long, or photographs and answers take too much memory",
    507: "the disk is full, or may not be written to",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    bytes: int = 32 * 10**6
    pixels: int = 50 * 10**6
    seconds: float = 30.0
    images: int = 64
    requests: int = 256  # being read or answered at the same time
    memory: int = 10**9  # bytes of bodies and maps that are held at the same time
    map_pixels: int = 16 * 10**6  # of all maps in an answer
    feedback: int = 10_000  # photographs that people marked, of a model


class Budget:
    """Bytes that requests hold together. A request that alone takes more gets in when there is no other."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold so many bytes inside the block. Raises `Refusal` where others hold too many."""
        if self._held and self._held + size > self._capacity:
            raise Refusal("full", f"Requests hold {self._held / 1e6:.0f} MB already: come again in a second")
        self._held += size
        try:
            yield
        finally:
            self._held -= size


class Refusal(KizuError):
    """A request that is not granted."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        super().__init__(message)
        self.kind: RefusalKind = kind

    def response(self) -> JSONResponse:
        """What the client gets."""
        status = STATUSES[self.kind]
        return JSONResponse({"error": str(self)}, status, HEADERS.get(status))


async def read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """The photographs in a request: raw bytes of one, or multipart with any number.

    Raises `Refusal` where the body is too slow, too large, neither a photograph nor multipart, or empty.
    """
    media_type = request.headers.get("content-type", BINARY[0]).partition(";")[0].strip().lower()
    if media_type != FORM and media_type not in BINARY and not media_type.startswith("image/"):
        await drain(request, limits)
        named = media_type or "of no type"
        raise Refusal("unsupported", f"The body is {named}: send a photograph as image/… or as {FORM}")
    try:
        async with asyncio.timeout(limits.seconds):
            if media_type == FORM:
                return await _read_form(request, limits)
            content = b"".join([chunk async for chunk in _chunks(request, limits)])
    except TimeoutError:
        raise Refusal("slow", f"The body did not come within {limits.seconds:g} seconds") from None
    if not content:
        raise Refusal("invalid", "The body is empty: send a photograph")
    return [Upload(content, request.query_params.get("name") or "image")]


def check(upload: Upload, limits: Limits) -> None:
    """Look at a photograph's header. Raises `Refusal` where it is no image, is damaged or has too many pixels."""
    try:
        height, width = image.size_of(upload.content, large=True)
        if image.suffix_of(upload.content) is None:
            raise BadImage(upload.name, "is not an image in a format that is supported", "unsupported")
    except BadImage as error:
        raise refusal_of(upload, error) from None
    if height * width > limits.pixels:
        size, allowed = f"{height * width / 1e6:.1f} megapixels", f"{limits.pixels / 1e6:g}"
        raise Refusal("too-large", f"{upload.name} has {size}; at most {allowed} are allowed")


def refusal_of(upload: Upload, error: BadImage) -> Refusal:
    """What is wrong with a photograph, under the name that its sender gave it."""
    return Refusal(error.kind, f"{upload.name} {error.reason}")


async def drain(request: Request, limits: Limits) -> None:
    """Read what is left of a body and throw it away: a client that is still sending hears no answer."""
    size = 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > DRAINED * limits.bytes:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # the last one: all was read before
        return


async def _read_form(request: Request, limits: Limits) -> list[Upload]:
    if "boundary=" not in request.headers["content-type"]:
        await drain(request, limits)
        raise Refusal("invalid", f"The {FORM} body has no boundary")
    parser = MultiPartParser(
        request.headers, _chunks(request, limits), max_files=limits.images, max_fields=limits.images
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        await drain(request, limits)
        message = error.message if isinstance(error, MultiPartException) else str(error)
        if "Too many" in message:  # the parser has one class for everything
            raise Refusal("too-large", f"At most {limits.images} photographs may come in a request") from None
        raise Refusal("invalid", f"The {FORM} body cannot be read: {message}") from None
    uploads = []
    try:
        for field, part in form.multi_items():
            if not isinstance(part, UploadFile):
                advice = "give options in the address, photographs in the body"
                raise Refusal("invalid", f"The part {field} is no file: {advice}")
            uploads.append(Upload(await part.read(), part.filename or field))
    finally:
        await form.close()
    if not uploads:
        raise Refusal("invalid", "There is no photograph in the body")
    return uploads


async def _chunks(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body, as far as the limit of bytes goes."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.bytes:
            await drain(request, limits)
            raise Refusal("too-large", f"The body is larger than {limits.bytes / 1e6:g} MB")
        yield chunk
