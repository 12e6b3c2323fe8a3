"""Photographs out of requests, within limits; what is refused, and with which status."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from kizu.data import image as images
from kizu.errors import BadImage, KizuError
from kizu.serving.batcher import Upload

__all__ = ["Limits", "Refusal", "check", "read_uploads", "refusal_of", "spend"]

FORM = "multipart/form-data"
BINARY = ("application/octet-stream", "application/x-www-form-urlencoded")  # the latter is what curl says of any bytes
LEFTOVER = 4  # times the limit of bytes: so much is read and thrown away, so that a refusal reaches its client


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    bytes: int = 32 * 10**6
    pixels: int = 50 * 10**6
    seconds: float = 30.0
    images: int = 64
    requests: int = 256  # being read or answered at the same time


class Refusal(KizuError):
    """A request that is not granted, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """The photographs in a request: raw bytes of one, or multipart with any number.

    Raises `Refusal`: 408 too slow, 413 too large or too many, 415 neither photograph nor multipart, 422 none in it.
    """
    kind = request.headers.get("content-type", BINARY[0]).partition(";")[0].strip().lower()
    if kind != FORM and kind not in BINARY and not kind.startswith("image/"):
        await spend(request, limits)
        raise Refusal(415, f"The body is {kind or 'of no type'}: send a photograph as image/… or as {FORM}")
    try:
        async with asyncio.timeout(limits.seconds):
            if kind == FORM:
                return await _parts(request, limits)
            content = b"".join([chunk async for chunk in _bounded(request, limits)])
    except TimeoutError:
        raise Refusal(408, f"The body did not come within {limits.seconds:g} seconds") from None
    if not content:
        raise Refusal(422, "The body is empty: send a photograph")
    return [Upload(content, request.query_params.get("name") or "image")]


def check(upload: Upload, limits: Limits) -> None:
    """Look at the header. Raises `Refusal`: 413 too many pixels, 415 not an image, 422 damaged."""
    try:
        height, width = images.size_of(upload.content)
        if images.suffix_of(upload.content) is None:
            raise BadImage(upload.name, "is not an image in a format that is supported")
    except BadImage as error:
        raise refusal_of(upload.name, error) from None
    if height * width > limits.pixels:
        allowed = f"{limits.pixels / 1e6:g}"
        raise Refusal(413, f"{upload.name} has {height * width / 1e6:.1f} megapixels; at most {allowed} are allowed")


def refusal_of(name: str, error: BadImage) -> Refusal:
    """The status that says what is wrong with an image."""
    kind = 415 if "not an image" in error.reason else 413 if "megapixels" in error.reason else 422
    return Refusal(kind, f"{name} {error.reason}")


async def spend(request: Request, limits: Limits) -> None:
    """Read what is left of a body and throw it away: a client that is still sending hears no answer."""
    size = 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > LEFTOVER * limits.bytes:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # the last one: all was read before
        return


async def _parts(request: Request, limits: Limits) -> list[Upload]:
    if "boundary=" not in request.headers["content-type"]:
        await spend(request, limits)
        raise Refusal(422, f"The {FORM} body has no boundary")
    parser = MultiPartParser(
        request.headers, _bounded(request, limits), max_files=limits.images, max_fields=limits.images
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        await spend(request, limits)
        if "Too many" in error.message:
            raise Refusal(413, f"At most {limits.images} photographs may come in a request") from None
        raise Refusal(422, f"The {FORM} body cannot be read: {error.message}") from None
    try:
        found = []
        for field, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise Refusal(422, f"The part {field} is no file: give options in the address, photographs in the body")
            found.append(Upload(await part.read(), part.filename or field))
    finally:
        await form.close()
    if not found:
        raise Refusal(422, "There is no photograph in the body")
    return found


async def _bounded(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.bytes:
            await spend(request, limits)
            raise Refusal(413, f"The body is larger than {limits.bytes / 1e6:g} MB")
        yield chunk
