"""How a command of the command line fails."""

import sys
from typing import Any

import click

PROGRAM = "vhost-reactor"


class Failure(click.ClickException):
    """Something that went wrong: one line on standard error, and exit status 1."""

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"{PROGRAM}: {self.message}", file=file or sys.stderr)
