"""The command line: `infera run | inspect | verify | tune | pull | ops | doctor`, and commands that other packages add.

A command is an ordinary typed function. What goes wrong is raised, not printed: `main` turns it into one line on stderr
and an exit status: 1 for a failure, 2 for a wrong command line, 130 for an interrupt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from infera_gpu import __version__
from infera_gpu.cli import doctor, inspect, ops, pull, run, tune, verify
from infera_gpu.cli.console import print_error
from infera_gpu.cli.extensions import ExtensibleGroup
from infera_gpu.errors import InferaError

app = typer.Typer(
    name="infera",
    cls=ExtensibleGroup,
    help="Run ONNX models on an NVIDIA GPU, or with the same answers on the CPU.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("tune")(tune.command)
app.command("pull")(pull.command)
app.command("ops")(ops.command)
app.command("doctor")(doctor.command)


@dataclass(slots=True)
class Options:
    """What applies to every command."""

    debug: bool = False


def _print_version(asked: bool) -> None:
    if asked:
        print(f"infera {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    context.obj.debug = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process unless given) and return its exit status."""
    chosen = Options()
    command = typer.main.get_command(app)
    try:
        status = command.main(argv, prog_name="infera", standalone_mode=False, obj=chosen)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) left: nothing to say, and nothing that the interpreter should flush at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if chosen.debug:
            raise
        message, status = _explain(error)
        print_error(message)
        return status


def _explain(error: Exception) -> tuple[str, int]:
    """The line for an exception and the exit status."""
    # typer's usage errors come from click, or from its own copy of it, depending on its version: no common base class.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        asked = "infera" if context is None else context.command_path
        message = error.format_message().replace("Value error, ", "")  # how pydantic, also inside typer, begins
        return f"{message} (see {asked} --help)", int(getattr(error, "exit_code", 2))
    if isinstance(error, InferaError):
        return str(error), 1
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        return f"{error.filename}: {said}" if error.filename and error.strerror else said, 1
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}; give smaller inputs or free some", 1
    return f"{type(error).__name__}: {error} (unexpected: `infera --debug ...` shows where)", 1
