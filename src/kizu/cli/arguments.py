"""Options that several commands take."""

import click

__all__ = ["json_option", "quiet_option"]

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
