"""The `genkit` command: arguments in, one call, an exit code out. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import typer

from genkit.errors import EXIT_HOST, EXIT_INPUT, EXIT_OK, EXIT_SIGINT, HostError, InputError

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Diffusion generation toolbox: a prompt file in; scored, filtered, reproducible images out.",
)  # fmt: skip

UsageError: Any = typer.BadParameter.__mro__[1]  # click's; newer releases of typer bundle it under another name


def main() -> None:
    """Run the command and leave with its exit code; errors are one line on standard error."""
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
    # Do not wait for threads that still compile, or write to a disk that hangs
    busy = any(thread.name == "genkit-compile" for thread in threading.enumerate())
    os._exit(code) if busy or code == EXIT_HOST else sys.exit(code)


def run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
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
    names = {} if sub is None else {o: p.name for p in sub.params for o in p.opts if o.startswith("-")}
    seen: set[str] = set()
    for argument in arguments[1:]:
        if argument == "--":
            return
        name = names.get(argument.split("=")[0])
        if name in seen and name != "scorer":
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
