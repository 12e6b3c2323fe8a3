"""Command-line options made from a config's fields."""

from typing import Any, Literal, get_args, get_origin

import click

__all__ = ["config_option"]


def config_option(field: str, about: Any, flag: str | None = None) -> click.Option:
    """The option that sets a field of a config, under its name or another; not given, it leaves the field's default."""
    default = about.get_default()
    shown = "x".join(map(str, default)) if isinstance(default, tuple) and default else default
    suffix = f"  [default: {shown}]" if shown not in (None, ()) else ""
    return click.Option(
        [field, flag or _flags(field, about.annotation)],
        type=_option_type(about.annotation),
        default=None,
        help=f"{about.description}{suffix}",
    )


def _flags(field: str, annotation: Any) -> str:
    name = field.replace("_", "-")
    return f"--{name}/--no-{name}" if annotation is bool else f"--{name}"


def _option_type(annotation: Any) -> Any:
    """What click shows and checks; the config checks the rest."""
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    plain = [part for part in (get_args(annotation) or [annotation]) if part is not type(None)]
    return plain[0] if plain[0] in (int, float, bool) and get_origin(annotation) is not tuple else str
