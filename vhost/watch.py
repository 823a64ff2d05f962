"""``vhost-reactor events``: what happens in a running cluster, a line each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from reactor.client import Client
from reactor.errors import OperationError
from reactor.notifications import TYPES, subscribe
from vhost.cli import explain, run_dir_option


def follow(
    run_dir: str | os.PathLike[str], kinds: tuple[str, ...], since: int | None
) -> Iterator[dict[str, Any]]:
    """Yield every notification once and in order, from number ``since`` or from now on.

    The socket pushes; the log fills in what came before the subscription, and what was lost.
    """

    def ask() -> list[dict[str, Any]]:
        with Client(run_dir) as client:
            found: list[dict[str, Any]] = client.call(
                "control", "notify_get_notifications", id=last + 1
            )
            return found

    last = -1 if since is None else since - 1
    if since is None and (known := ask()):
        last = known[-1]["id"]
    # Not by type here: a gap in the numbers shows that something was lost.
    for pushed in subscribe(run_dir, idle=0.5):
        missed = pushed is None or pushed["id"] > last + 1
        for entry in ask() if missed else [pushed]:
            assert entry is not None
            if entry["id"] > last:
                last = entry["id"]
                if not kinds or entry["type"] in kinds:
                    yield entry


def line(entry: dict[str, Any]) -> str:
    """Return a notification as people read it."""
    fraction = f"{entry['time'] % 1:.3f}"[1:]
    when = time.strftime("%H:%M:%S", time.localtime(entry["time"])) + fraction
    details = " ".join(f"{key}={value}" for key, value in entry.get("details", {}).items())
    return f"{when} {entry['id']:>5} {entry['type']} {entry['ctx']} {details}".rstrip()


@click.command()
@run_dir_option
@click.option("--type", "kinds", multiple=True, type=click.Choice(TYPES), help="Only these.")
@click.option("--since", type=int, metavar="ID", help="Begin with this one, if it is still kept.")
@click.option("--count", type=int, metavar="N", help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def events_command(
    run_dir: Path, kinds: tuple[str, ...], since: int | None, count: int | None, as_json: bool
) -> None:
    """Print what happens in a running cluster until Ctrl-C, or until the cluster ends."""
    try:
        for number, entry in enumerate(follow(run_dir, kinds, since), 1):
            click.echo(json.dumps(entry) if as_json else line(entry))
            if number == count:
                return
    except (OperationError, OSError) as error:
        raise explain(error) from None
