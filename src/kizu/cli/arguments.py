"""What several commands take: options, and a model's folder."""

from pathlib import Path

import click

from kizu.errors import OptionError

__all__ = ["json_option", "model_folder", "quiet_option"]

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def model_folder(path: str, category: str | None = None) -> Path:
    """A model's folder from itself, or from a run or its models folder, by category where there are several."""
    folder = Path(path)
    if (folder / "model.json").exists():
        return folder
    models = folder / "models" if (folder / "models").is_dir() else folder
    names = sorted(candidate.parent.name for candidate in models.glob("*/model.json")) if models.is_dir() else []
    if category in names:
        return models / str(category)
    if len(names) == 1:
        return models / names[0]
    if not names:
        raise OptionError(f"{path}: there is no kizu model (a folder with model.json and model.safetensors)")
    raise OptionError(f"{path} holds {len(names)} models; name one: {', '.join(str(models / name) for name in names)}")
