"""The `genkit` command: arguments in, one call, an exit code out. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from genkit.errors import EXIT_HOST, EXIT_INPUT, EXIT_OK, EXIT_SIGINT, HostError, InputError
from genkit.signals import leave_as_first_process
from genkit.version import __version__

MAKE, CHOOSE, SCORE, TRAIN, LOOK = (
    "Make pictures", "Look back at runs and choose", "Score pictures", "Train models", "Models and this machine",
)  # fmt: skip


# Options of paths whose values are texts
PATHS = ("image", "mask_image", "control_image", "aesthetic", "lora_dir", "control_dir")


def _write_sections(formatter: Any, rows: list[tuple[str, tuple[str, str]]]) -> None:
    """Write (section, (term, text)) rows, sections in order of first appearance."""
    for title in dict.fromkeys(title for title, _ in rows):
        with formatter.section(title):
            formatter.write_dl([row for section, row in rows if section == title])


class Group(TyperGroup):
    """Help that lists the commands in sections, each with its whole summary; without rich, which is slow to import."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        order = [MAKE, CHOOSE, SCORE, TRAIN, LOOK]
        commands = sorted(self.commands.items(), key=lambda item: order.index(str(item[1].rich_help_panel)))  # type: ignore[attr-defined]
        rows = [(c.rich_help_panel, (name, " ".join((c.help or "").split()))) for name, c in commands]  # type: ignore[attr-defined]
        _write_sections(formatter, rows)


class Command(TyperCommand):
    """Help that lists the options in the sections that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [(p, record) for p in self.get_params(ctx) if (record := p.get_help_record(ctx)) is not None]
        records.sort(key=lambda found: found[0].param_type_name != "argument")
        kinds = {"argument": "Arguments", "option": "Options"}
        titles = [getattr(p, "rich_help_panel", None) or kinds[p.param_type_name] for p, _ in records]
        rows = [(name.replace("<list[str]>", "<str>"), text) for _, (name, text) in records]
        _write_sections(formatter, list(zip(titles, rows, strict=True)))

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with ~ and $HOME resolved in every path, and URLs of storage taken as such."""
        from genkit.files import run_path, user_path

        for name, value in ctx.params.items():
            if isinstance(value, Path):
                ctx.params[name] = run_path(value)
            elif isinstance(value, list | tuple) and any(isinstance(one, Path) for one in value):
                ctx.params[name] = [run_path(one) for one in value]
            elif name in PATHS and isinstance(value, str):
                ctx.params[name] = str(user_path(value))
        return super().invoke(ctx)


app = typer.Typer(
    cls=Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Diffusion generation toolbox: a prompt file in; scored, filtered, reproducible images out.",
)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        print(f"genkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


UsageError: Any = typer.BadParameter.__mro__[1]  # click's; newer releases of typer bundle it under another name


def main() -> None:
    """Run the command and leave with its exit code; errors are one line on standard error."""
    leave_as_first_process()
    try:
        code = run(sys.argv[1:])
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except BrokenPipeError:  # e.g. `| head`
        code = EXIT_OK
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        print(f"genkit: {error}", file=sys.stderr)
        code = EXIT_HOST
    os._exit(code) if code == EXIT_HOST else sys.exit(code)  # without waiting for a thread whose disk hangs


def run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    if not arguments:
        print(command.get_help(command.make_context("genkit", ["--help"], resilient_parsing=True)))
        return EXIT_INPUT
    try:
        _refuse_repeats(command, arguments)
        return command.main(arguments, prog_name="genkit", standalone_mode=False) or EXIT_OK
    except UsageError as error:
        return fail(error.format_message().rstrip("."), EXIT_INPUT)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_SIGINT
    except InputError as error:
        return fail(str(error), EXIT_INPUT)
    except HostError as error:
        return fail(str(error), EXIT_HOST)


def fail(message: str, code: int) -> int:
    from genkit.progress import printable

    print(f"genkit: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _refuse_repeats(command: Any, arguments: list[str]) -> None:
    """Refuse an option given twice: click would silently take the last one."""
    sub = command.commands.get(arguments[0]) if arguments else None
    names = (
        {} if sub is None else {o: p.name for p in sub.params if not p.multiple for o in p.opts if o.startswith("-")}
    )
    seen: set[str] = set()
    for argument in arguments[1:]:
        if argument == "--":
            return
        name = names.get(argument.split("=")[0])
        if name in seen:
            raise InputError(f"{argument.split('=')[0]}: given twice")
        seen |= {name} if name else set()


def print_found(found: dict[str, Any], as_json: bool) -> None:
    from genkit.progress import printable, printable_json

    if as_json:
        print(printable_json(found))
        return
    lines = list(_flat(found))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(printable(f"{name:<{width}}  {value}"))


def _flat(found: dict[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value, "unet.dtype" for a value within a value."""
    for name, value in found.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{under}{name}.")
        else:
            yield under + name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
