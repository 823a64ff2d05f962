"""The command ``vhost-reactor``: start a cluster, and talk to one that runs.

Modules are imported by the command that needs them: ``rpc`` should not wait for what ``start``
loads.
"""

import errno
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from reactor.errors import OperationError, to_operation_error
from reactor.failure import PROGRAM, Failure
from reactor.rundir import default_run_dir

Command = TypeVar("Command", bound=Callable[..., Any])


class LazyGroup(click.Group):
    """A group of commands some of which are imported when they are asked for."""

    lazy: ClassVar = {
        "demo": ("vhost.demo", "demo_command", "Serve two disks, and show that they work."),
        "events": ("vhost.watch", "events_command", "Print what happens in a running cluster."),
        "io": ("vhost.io", "io_command", "Drive a vhost-user-blk disk and measure it."),
        "check": ("bdev.check", "check_command", "Say what this machine can do, and what not."),
        "nvme": ("bdev.check", "nvme_group", "Move NVMe drives between drivers."),
        "scsi": ("vhost.scsi_command", "scsi_command", "Send a command to a vhost-user-scsi disk."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted((*super().list_commands(ctx), *self.lazy))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command called ``cmd_name``, imported if need be."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = self.lazy[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing the lazy ones."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self.lazy:
                rows.append((name, self.lazy[name][2]))
            elif command := self.get_command(ctx, name):
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print the version, also of a source tree that is not installed."""
    if asked:
        from reactor.control import program_version

        click.echo(f"{PROGRAM} {program_version()}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Serve block devices to virtual machines over vhost-user."""


def run_dir_option(command: Command) -> Command:
    """Add ``--run-dir``."""
    return click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        default=default_run_dir,
        show_default="/run/vhost-reactor for root, else $XDG_RUNTIME_DIR/vhost-reactor "
        "or /tmp/vhost-reactor-UID",
        help="Directory of the cluster's own sockets.",
    )(command)


@cli.command()
@click.option("-m", "--cpumask", metavar="MASK|LIST", help="CPUs: 0x3, 3 (a mask), [0,2], 0-3,7.")
@click.option(
    "-S",
    "--socket-dir",
    type=click.Path(path_type=Path),
    help="Directory of the vhost-user sockets.  [default: the run directory]",
)
@click.option(
    "-r",
    "--rpc-socket",
    type=click.Path(path_type=Path),
    help="JSON-RPC socket.  [default: rpc.sock in the run directory]",
)
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help="Configuration to load, as save_config writes it.",
)
@run_dir_option
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    help="Directory of what must survive a restart.  "
    "[default: $STATE_DIRECTORY, else /var/lib/vhost-reactor]",
)
@click.option(
    "--poll",
    type=click.Choice(["adaptive", "always", "never"]),
    default="adaptive",
    show_default=True,
    help="When reactors poll: while there is work and a little longer, always, or never.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
    help="Least level of what is logged to standard error.",
)
@click.option(
    "--lock-dir",
    type=click.Path(path_type=Path),
    envvar="VHOST_REACTOR_LOCK_DIR",
    help="Directory of the locks that claim CPUs, common to all clusters.  [default: /var/tmp]",
)
@click.option(
    "--orphan-timeout",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="Seconds that reactors go on when the control process has died, for another to come.",
)
@click.option(
    "--watchdog",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="Seconds without a turn after which a reactor is hung, and is replaced; 0: never.",
)
@click.option("--load", multiple=True, metavar="MODULE", help="Module for reactors to load, too.")
def start(**options: Any) -> None:
    """Start a cluster: one reactor process on each CPU. SIGTERM or Ctrl-C ends it."""
    import asyncio

    from vhost.app import Options, run

    sys.exit(asyncio.run(run(Options(**options))))


@cli.command()
@click.argument("method")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "-s", "--socket", type=click.Path(path_type=Path), help="JSON-RPC socket of the cluster."
)
@run_dir_option
@click.option("-t", "--timeout", type=float, default=60.0, show_default=True, help="Seconds.")
def rpc(
    method: str, arguments: tuple[str, ...], socket: Path | None, run_dir: Path, timeout: float
) -> None:
    """Call a JSON-RPC METHOD of a running cluster and print its result.

    A VALUE that is JSON is taken as such, anything else as a string: name=disk0 num_blocks=2048
    readonly=true names='["a","b"]' name='"123"'.
    """
    from reactor.rpc_client import RpcClient

    path = socket or run_dir / "rpc.sock"
    params = parse_arguments(arguments)
    try:
        with RpcClient(path, timeout=timeout) as client:
            show(client.call(method, params))
    except (OperationError, OSError, ValueError) as error:
        raise explain(error) from None


@cli.command()
@click.argument("target")
@click.argument("op")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@run_dir_option
@click.option("-t", "--timeout", type=float, default=10.0, show_default=True, help="Seconds.")
def event(target: str, op: str, arguments: tuple[str, ...], run_dir: Path, timeout: float) -> None:
    """Send an event to a process, control or reactor-N, and print its answer.

    Values are written as those of rpc.
    """
    from reactor.client import Client

    args = parse_arguments(arguments)
    try:
        with Client(run_dir, timeout=timeout) as client:
            show(client.call(target, op, **args))
    except (OperationError, OSError, ValueError) as error:
        raise explain(error) from None


@cli.command()
@click.option(
    "-s", "--socket", type=click.Path(path_type=Path), help="JSON-RPC socket of the cluster."
)
@run_dir_option
@click.option("-t", "--timeout", type=float, default=60.0, show_default=True, help="Seconds.")
def upgrade(socket: Path | None, run_dir: Path, timeout: float) -> None:
    """Replace the program of a running cluster by the one that is installed now.

    Front-ends stay connected, and guests see a pause. Ends when the new program serves.
    """
    from vhost.upgrade import ask_for_upgrade

    try:
        click.echo(ask_for_upgrade(socket or run_dir / "rpc.sock", timeout))
    except (OperationError, OSError, ValueError) as error:
        raise explain(error) from None


def parse_arguments(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Return the map that ``key=value`` words stand for; UsageError if one is none."""
    parsed: dict[str, Any] = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"expected KEY=VALUE, got {word!r}")
        if key in parsed:
            raise click.UsageError(f"{key} is given twice")
        parsed[key] = parse_value(value)
    return parsed


def parse_value(text: str) -> Any:
    """Return what ``text`` is as JSON (RFC 8259: no NaN, no Infinity), else ``text`` itself."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


def show(result: Any) -> None:
    """Print a result: a string as it is, anything else as JSON, in colour on a terminal."""
    if isinstance(result, str):
        click.echo(result)
    elif sys.stdout.isatty():
        import rich

        rich.print_json(data=result)
    else:
        click.echo(json.dumps(result, indent=2))


def explain(error: OperationError | OSError | ValueError) -> Failure:
    """Return the line that says what went wrong in a call to a cluster."""
    if isinstance(error, OperationError):
        return Failure(f"{error.message} (code {error.code})")
    if isinstance(error, ValueError):
        return Failure(f"not a reply: {error}")
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        reason = os.strerror(error.errno)
        return Failure(f"nobody listens at {error.filename}: {reason}; is a cluster running there?")
    return Failure(to_operation_error(error).message)


def main() -> None:
    """Run the command."""
    cli(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
