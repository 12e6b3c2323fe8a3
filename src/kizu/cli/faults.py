"""How a command ends: its exit code, and one sentence for whatever went wrong."""

import codecs
import errno
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import click

from kizu import __version__
from kizu.cli.wording import flagged
from kizu.errors import KizuError, missing_extra

__all__ = ["exit_with"]

DONE, NOT_DONE, UNFORESEEN, INTERRUPTED, UNREAD = 0, 2, 70, 130, 141
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SECRET = ("--api-key", "--webhook", "--mqtt", "--camera")  # options whose values are keys, or hold passwords


def exit_with(command: Callable[[], Any]) -> NoReturn:
    """Run a command and end the process with its exit code; whatever went wrong is said in a sentence."""
    _print_any_name()
    code, sentence = _outcome(command)
    with suppress(OSError, ValueError):
        if sentence:
            click.echo(f"kizu: {sentence}", err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads any more: what is left goes nowhere, without a word from Python
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _outcome(command: Callable[[], Any]) -> tuple[int, str]:
    """The exit code, and what to say."""
    try:
        os.getcwd()  # noqa: PTH109 - cheaper than pathlib
    except OSError:  # neither relative paths nor torch's libraries would be found
        return NOT_DONE, "the current folder does not exist any more: change to another one"
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE, ""
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return NOT_DONE, ""
    except KizuError as error:
        return NOT_DONE, flagged(str(error))
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED, "interrupted"
    except (BrokenPipeError, SystemExit):  # click's answer to a broken pipe, and nobody else's, is to end the process
        return UNREAD, ""
    except MemoryError:
        return NOT_DONE, "there is not enough memory: close other programs, or give a lower --memory or --size"
    except OSError as error:
        unnamed = "the output cannot be written: " if error.errno in FULL else ""
        place = f"{error.filename}: " if error.filename is not None else unnamed
        return NOT_DONE, f"{place}{error.strerror or error or type(error).__name__}"
    except UnicodeError as error:
        return NOT_DONE, f"a text or a name cannot be written or read here ({error})"
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            error = missing_extra(error)
        if isinstance(error, KizuError):
            return NOT_DONE, str(error)
        return UNFORESEEN, _report(error)


def _report(error: BaseException) -> str:
    """Write down what happened, and say where."""
    text = "\n".join(
        (
            f"kizu {__version__}, Python {platform.python_version()}, {platform.platform()}",
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            _without_secrets(sys.argv),
            "",
            "".join(traceback.format_exception(error)),
        )
    )
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kizu-report-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
        where = f"It is written down in {file.name}"
    except OSError:
        where = f"{text}\nThis"
    return f"something that nobody foresaw went wrong ({type(error).__name__}: {error}). {where}: please report it"


def _without_secrets(words: list[str]) -> str:
    """A command line without keys and passwords."""
    hidden = list(words)
    for number, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name in SECRET and equals:
            hidden[number] = f"{name}=…"
        elif number and words[number - 1] in SECRET:
            hidden[number] = "…"
    return shlex.join(hidden)


def _print_any_name() -> None:
    """Names of files that are no text are printed as their bytes, and signs that a terminal lacks as \\u."""
    codecs.register_error("kizu", _as_bytes)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="kizu")  # type: ignore[union-attr]


def _as_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)
