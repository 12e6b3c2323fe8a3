"""The command line's entry: groups, exit codes, errors as sentences. Nothing heavy is imported before it is needed.

Exit codes: 0 done; 1 done, but some images could not be judged; 2 not done, a sentence says why; 70 something that
nobody foresaw, a report is written; 130 interrupted; 141 nobody reads the output.
"""

import logging

import click

from kizu import __version__
from kizu.cli import deploy, doctor, export, models, predict
from kizu.cli.faults import exit_with
from kizu.cli.learn import train
from kizu.cli.learn.zones import zones
from kizu.cli.options import config_file_option
from kizu.cli.quality.check import check
from kizu.cli.quality.compare import compare
from kizu.cli.quality.drift import drift
from kizu.cli.quality.report import report
from kizu.cli.quality.tune import tune
from kizu.cli.reference.commands import import_models, reference
from kizu.detectors.ram import allow_tuning

__all__ = ["cli", "main"]

GROUPS = {
    "Learn": (train.train, zones, train.distill, models.update, models.merge, predict.evaluate, train.demo),
    "Judge": (predict.predict, check, drift, tune),
    "On the line": (export.export, export.verify, deploy.serve, deploy.watch),
    "Look": (report, compare, predict.data, models.info, doctor.doctor),
    "Coming from the originals": (reference, import_models),
}


class Commands(click.Group):
    """Commands listed under headings, in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [str(command.name) for commands in GROUPS.values() for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(str(command.name), command.get_short_help_str(90)) for command in commands])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="kizu %(version)s")
def cli() -> None:
    """Visual inspection learned from photographs of good parts only.

    \b
    kizu demo                                a whole run on rendered parts, in a minute
    kizu train patchcore photos/good         learn what good parts look like
    kizu predict results/…/models/good new/  judge new photographs

    Exit codes: 0 done; 1 done, but some images were not judged, or some verdicts not delivered; 2 not done; 3 what
    --exit-code of drift asks about; 70 a fault of kizu; 130 interrupted.
    """


def main() -> None:
    """Run a command; errors are one sentence, Ctrl-C is quiet."""
    logging.raiseExceptions = False  # a log that cannot be written stops nothing
    allow_tuning()
    exit_with(lambda: cli(standalone_mode=False))


for commands in GROUPS.values():
    for command in commands:
        cli.add_command(command)
        if not isinstance(command, click.Group) and any(isinstance(param, click.Option) for param in command.params):
            command.params.append(config_file_option())
