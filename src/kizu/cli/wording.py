"""How the command line spells the settings that a sentence of the library names."""

from kizu.errors import worded

__all__ = ["flagged"]


def flagged(sentence: str) -> str:
    """The sentence with `size=64` as --size 64, `skip_bad=True` as --skip-bad, `resize=False` as --no-resize."""
    return worded(sentence, _flag)


def _flag(name: str, value: str | None) -> str:
    flag = name.replace("_", "-")
    if value is None or value == "True":
        return f"--{flag}"
    if value == "False":
        return f"--no-{flag}"
    return f"--{flag} " + value.strip("\"'")
