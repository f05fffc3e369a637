"""Finds the command, runs it, and turns what went wrong into an exit code.

0 is success, 2 a mistake in the usage or the input, 1 a failure of the run. A user's mistake is one line on
stderr; set DINA_LRM_TRACEBACK=1 to see where it was noticed. A command's module is imported only when the
command is used, so that `dina-lrm --help` answers at once.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from dina_lrm import __version__
from dina_lrm.cli.console import UsageError, quiet_libraries, report_error, stderr
from dina_lrm.errors import DinaError, ScoringError

COMMANDS = {
    "score": "score images against a prompt, or a whole file of rows",
    "compare": "probability that one image is preferred to another",
    "inspect": "what is in a set of preference data, with or without its images",
    "audit": "what a test set shares with training data; position bias",
    "prepare": "encode a data set into latent shards, once, for training",
    "train": "train a reward on preference pairs, from a recipe",
    "evaluate": "accuracy, intervals and calibration on a benchmark",
    "align": "train a generator's LoRA on a reward: refl, grpo, dpo, step-dpo",
    "search": "the best of several samples, chosen while they are sampled",
    "serve": "the reward over HTTP: latents of trainers, pictures, and a page",
    "label": "a page on which people choose between pictures, and their votes as rows",
    "demo": "generate, train, measure and rank offline; writes a report",
    "doctor": "versions, device, whether a score can be computed; what another generator would take",
}

EXIT_SUCCESS, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those after `dina-lrm`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print_overview(to_stderr=not arguments)
        return EXIT_SUCCESS if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"dina-lrm {__version__}")
        return EXIT_SUCCESS
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        report_error(f"no command {command!r}; there are {', '.join(COMMANDS)}")
        return EXIT_USAGE
    try:
        quiet_libraries()
        return importlib.import_module(f"dina_lrm.cli.{command}").main(rest)
    except SystemExit as leaving:  # tyro leaves this way: 0 after --help, 2 after a bad flag
        return leaving.code if isinstance(leaving.code, int) else EXIT_USAGE
    except KeyboardInterrupt as stop:  # a command that answers SIGTERM too says which signal it was
        stderr().print("interrupted")
        return 128 + stop.args[0] if stop.args else EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as in `dina-lrm score ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        return explain(error)


def explain(error: Exception) -> int:
    """Say what went wrong and return the exit code; only a fault of ours shows where in the code it is."""
    if os.environ.get("DINA_LRM_TRACEBACK") == "1":
        traceback.print_exception(error)
    if isinstance(error, ScoringError):  # a server, or a number that is none: not the user's mistake
        report_error(str(error))
        return EXIT_FAILURE
    # Our functions refuse bad values with ValueError (InvalidInputError and CheckpointError are ones).
    if isinstance(error, UsageError | DinaError | ValueError):
        report_error(str(error))
        return EXIT_USAGE
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | FileExistsError):
        report_error(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        return EXIT_USAGE
    if isinstance(error, OSError | MemoryError):
        report_error(f"{type(error).__name__}: {error}")
        return EXIT_FAILURE
    report_error(f"{type(error).__name__}: {error}")
    if os.environ.get("DINA_LRM_TRACEBACK") != "1":
        traceback.print_exception(error)
    return EXIT_FAILURE


def print_overview(*, to_stderr: bool) -> None:
    """The commands, one line each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    for command, summary in COMMANDS.items():
        table.add_row(f"[bold]{command}[/]", summary)
    console = Console(stderr=to_stderr, highlight=False)
    console.print("Preference rewards on noisy diffusion latents.\n")
    console.print(escape("usage: dina-lrm COMMAND [-h] [options]\n"))
    console.print(table)
    console.print(
        "\ndina-lrm COMMAND --help explains a command's options; dina-lrm --version prints the version."
    )


def run() -> None:
    """The console script."""
    sys.exit(main())
