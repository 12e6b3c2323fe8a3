"""What mkdocs cannot do alone: pages and files from outside docs/, notebooks as pages, tables of settings.

A link in a Markdown file leads to another file of the repository, so that it works wherever the repository is read. On
the site it leads to the page that the file has become.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from pydantic import BaseModel

from kizu import config as configs

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CITATION.cff": "CITATION.cff",
    "benchmarks/README.md": "running-the-benchmarks.md",
}
NOTEBOOKS = {f"examples/{path.name}": f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")}
SOURCES = {page: source for source, page in (PAGES | NOTEBOOKS).items()}
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
SETTINGS = re.compile(r"^<!-- settings: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in NOTEBOOKS:
        for name, content in _notebook(ROOT / source).items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables of settings in their places, and let links lead to pages."""
    markdown = SETTINGS.sub(lambda found: _settings(getattr(configs, found[1])), markdown)
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")
    return LINK.sub(lambda link: f"]({_target(link[1], here, source)}{link[2] or ''})", markdown)


def _target(link: str, here: str, source: str) -> str:
    """Where a link of the file `source` leads on its page `here`: unchanged if it leads to no page of its own."""
    if re.match(r"\w+:", link):
        return link
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    page = (PAGES | NOTEBOOKS).get(linked) or (linked.removeprefix("docs/") if linked.startswith("docs/") else None)
    return link if page is None else posixpath.relpath(page, posixpath.dirname(here) or ".")


def _notebook(path: Path) -> dict[str, Any]:
    """A notebook as a page of Markdown and its pictures, by their names."""
    exporter = MarkdownExporter()
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    resources = {"output_files_dir": path.stem, "unique_key": "output"}
    text, resources = exporter.from_notebook_node(nbformat.read(path, as_version=4), resources)
    return {f"{path.stem}.md": text, **resources["outputs"]}


def _settings(kind: type[BaseModel]) -> str:
    """A table of a config's fields, each with its default."""
    rows = ["| setting | |", "|---|---|"]
    for name, field in kind.model_fields.items():
        rows.append(f"| `{name}={field.default!r}` | {(field.description or '').replace('|', '&#124;')} |")
    return "\n".join(rows)
