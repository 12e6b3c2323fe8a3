"""The page on which zones are drawn, as one file with a photograph in it."""

import html
import re
from importlib.resources import files as resources
from pathlib import Path

import click

from kizu.cli.options import quiet_option
from kizu.errors import OptionError

__all__ = ["zones"]

SIDE = 1600  # pixels that the photograph is shown with, at most


@click.command()
@click.argument("photograph")
@click.option("--output", default="zones.html", show_default=True, metavar="FILE", help="The page to write.")
@quiet_option
def zones(photograph: str, output: str, quiet: bool) -> None:
    """Write a page for drawing zones on a photograph, with mouse, finger or keys.

    PHOTOGRAPH is one of a good part, or the data to learn from, whose first is taken. The page needs no server and
    sends nothing: open it in a browser, draw, save zones.json, and learn:  kizu train METHOD DATA --zones zones.json.

    \b
    Example:  kizu zones photos/good/000.png
    """
    from kizu.data import dataset, files, image
    from kizu.data.preprocessing import shown

    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--output {output}: the page is an HTML file, as zones.html")
    path = Path(photograph)
    if path.is_dir():
        train = [sample.path for sample in dataset.find(path).samples if sample.split == "train"]
        if not train:
            raise OptionError(f"{photograph} holds no photographs of good parts to learn from: name one")
        path = train[0]
    photo = image.small(shown(path), SIDE)
    files.write_text(Path(output), _page(image.data_uri(photo), path.name))
    if not quiet:
        click.echo(f"{output}\nOpen it in a browser, draw, save zones.json, and learn with it:")
        click.echo("  kizu train patchcore PHOTOS --zones zones.json")


def _page(photograph: str, name: str) -> str:
    """The server's page of the same name, with all that it refers to inside."""
    folder = resources("kizu.serving") / "static"
    page = (folder / "zones.html").read_text(encoding="utf-8")

    def style(found: "re.Match[str]") -> str:
        return f"<style>\n{(folder / found[1]).read_text(encoding='utf-8')}</style>"

    def script(found: "re.Match[str]") -> str:
        return f'<script type="module">\n{(folder / found[1]).read_text(encoding="utf-8")}</script>'

    page = re.sub(r'<link rel="stylesheet" href="([\w.]+)">', style, page)
    page = re.sub(r'<script type="module" src="([\w.]+)"></script>', script, page)
    page = page.replace('<link rel="icon" href="icon.svg">', f'<meta name="photograph" content="{photograph}">')
    return page.replace("<title>Zones", f"<title>Zones of {html.escape(name)}")
