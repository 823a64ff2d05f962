"""``python -m benchmarks NAME``: each module of this folder that has a ``command`` is one."""

from __future__ import annotations

import importlib
import pkgutil

import click

import benchmarks


class Suite(click.Group):
    """Finds benchmarks by their modules; imports only the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all modules that are benchmarks."""
        names = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
        return sorted(name for name in names if self.get_command(ctx, name) is not None)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of one module."""
        del ctx
        if cmd_name.startswith("_") or not cmd_name.isidentifier():
            return None
        try:
            module = importlib.import_module(f"benchmarks.{cmd_name}")
        except ModuleNotFoundError as error:
            if error.name != f"benchmarks.{cmd_name}":
                raise
            return None
        command = getattr(module, "command", None)
        return command if isinstance(command, click.Command) else None


@click.group(cls=Suite)
def main() -> None:
    """Measure, beside what we measure ourselves against, in the same run."""


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
