"""Tiles that are chosen by the smallest defect that matters."""

import math
from typing import TYPE_CHECKING, Any

import click

from kizu.cli.options import find_data
from kizu.errors import OptionError

if TYPE_CHECKING:
    from kizu.config import Config

__all__ = ["smallest_option", "tiles_for"]

HEADERS = 200  # photographs, at most, that are asked how large they are

smallest_option = click.option(
    "--smallest",
    type=click.FloatRange(min=0, min_open=True),
    metavar="LENGTH",
    help="Smallest defect that matters, in pixels, or in mm with --pixel-size: chooses --tile and --overlap so that "
    "the network can see it.",
)


def tiles_for(
    smallest: float, config: "Config", given: dict[str, Any], data: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The settings of tiles that show the smallest defect in DATA's largest photograph; none where none are needed.

    Raises `OptionError` where such settings are among those that were given, or there is no photograph.
    """
    from kizu.data.geometry.tiling import VISIBLE, Tiling
    from kizu.data.image import size_of

    for name in ("tile", "overlap"):
        if name in given:
            raise OptionError(f"--smallest chooses --tile and --overlap: leave --{name} away, or --smallest")
    if data is None:
        raise OptionError("--smallest depends on how large DATA's photographs are: name it")
    smallest /= config.pixel_size or 1
    paths = [sample.path for sample in find_data(data, options).samples if sample.split == "train"]
    shapes = [size_of(path, large=True) for path in paths[:: max(1, len(paths) // HEADERS)]]
    if not shapes:
        raise OptionError(f"{data} holds no good photograph to learn from")
    tilings = [(shape, Tiling.showing(smallest, config.size, shape)) for shape in sorted(set(shapes), key=math.prod)]
    (height, width), tiling = next((found for found in tilings[::-1] if found[1] is not None), tilings[-1])
    if tiling is None:
        shown = min(smallest * side / of_all for side, of_all in zip(config.size, (height, width), strict=True))
        message = f"Without tiles, photographs of {width} x {height} show a defect of {smallest:g} pixels"
    else:
        shown = VISIBLE
        tile = "x".join(map(str, tiling.tile))
        message = f"--tile {tile} --overlap {tiling.overlap} shows a defect of {smallest:g} pixels"
    message += f" with {shown:.0f} of the network's input."
    if not (options["quiet"] or options["as_json"]):
        click.echo(message, err=True)
    return {} if tiling is None else {"tile": tiling.tile, "overlap": tiling.overlap}
