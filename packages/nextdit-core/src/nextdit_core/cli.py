"""The `nextdit` command. Commands come from the entry-point group `nextdit.commands`."""

from __future__ import annotations

import sys
from typing import Any

import click

from nextdit_core import registry
from nextdit_core.errors import UserError, unknown_name

__all__ = ["main"]


class _Commands(click.Group):
    """Commands found by name; their modules import nothing heavy before they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(registry.parts("nextdit.commands"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: Any = registry.load("nextdit.commands", cmd_name)
        if not isinstance(command, click.Command):
            origin = registry.parts("nextdit.commands")[cmd_name].origin
            raise UserError(f"command {cmd_name!r} of {origin} is not a click.Command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name, part in registry.parts("nextdit.commands").items():
            try:
                command = self.get_command(ctx, name)
            except UserError:
                rows.append((name, f"({part.origin} failed to load; nextdit {name} says why)"))
                continue
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(formatter.width)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names:
            package = registry.KNOWN["nextdit.commands"].get(args[0])
            fix = f"install it with: pip install {package}" if package else ""
            raise unknown_name("command", args[0], names, fix)
        return super().resolve_command(ctx, args)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nextdit-core", prog_name="nextdit")
def nextdit() -> None:
    """Train and sample Next-DiT models of any installed modality."""


def main() -> None:
    """Run the command line; errors of the user are one line and exit code 2."""
    try:
        code = nextdit.main(prog_name="nextdit", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except UserError as error:
        print(f"nextdit: error: {error}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        print("nextdit: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
