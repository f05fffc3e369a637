"""Finds the command, runs it, and turns what went wrong into an exit code.

0 is success, 2 a mistake in the usage or the input, 1 a failure of the run, 130 and 143 an end by SIGINT and
SIGTERM. A user's mistake is one line on stderr; set DINA_LRM_TRACEBACK=1 to see where it was noticed. A
command's module is imported only when the command is used, so that `dina-lrm --help` answers at once.
"""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NoReturn

from dina_lrm import __version__
from dina_lrm.cli.console import UsageError, log, quiet_libraries, report_error
from dina_lrm.errors import DinaError, RunError


@dataclass(frozen=True)
class Command:
    """A command, what it does, and what one would type first."""

    summary: str
    example: str


COMMANDS = {
    "score": Command(
        "score images against a prompt, or a whole file of rows",
        'dina-lrm score "a red circle on a gray background" a.png b.png',
    ),
    "compare": Command(
        "probability that one image is preferred to another, also for a file of pairs",
        'dina-lrm compare "a red circle on a gray background" a.png b.png',
    ),
    "rank": Command(
        "images from best to worst, and how sure each place is",
        'dina-lrm rank "a red circle on a gray background" a.png b.png c.png',
    ),
    "inspect": Command(
        "what is in a set of preference data, with or without its images",
        "dina-lrm inspect jsonl --root rows.jsonl",
    ),
    "audit": Command(
        "what a test set shares with training data; position bias",
        "dina-lrm audit jsonl --root test.jsonl --against jsonl --against-root train.jsonl",
    ),
    "prepare": Command(
        "encode a data set into latent shards, once, for training",
        "dina-lrm prepare jsonl --root rows.jsonl --output latents",
    ),
    "train": Command(
        "train a reward on preference pairs, from a recipe",
        "dina-lrm train shapes --output run",
    ),
    "evaluate": Command(
        "accuracy, intervals and calibration on a benchmark",
        "dina-lrm evaluate --model bundled --benchmark shapes",
    ),
    "align": Command(
        "train a generator's LoRA on a reward: refl, grpo, dpo, step-dpo",
        "dina-lrm align refl shapes --reward bundled --output aligned",
    ),
    "search": Command(
        "the best of several samples, chosen while they are sampled",
        'dina-lrm search "a red circle on a gray background" --samples 8 --output found',
    ),
    "serve": Command(
        "the reward over HTTP: latents of trainers, pictures, and a page",
        "dina-lrm serve --model bundled --port 8000",
    ),
    "label": Command(
        "a page on which people choose between pictures, and their votes as rows",
        "dina-lrm label --input pictures.jsonl --output votes.sqlite",
    ),
    "demo": Command(
        "generate, train, measure and rank offline; writes a report",
        "dina-lrm demo --output demo",
    ),
    "doctor": Command(
        "versions, device, whether a score can be computed; what another generator would take",
        "dina-lrm doctor",
    ),
}

EXIT_SUCCESS, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2
EXIT_CODES = "0 success, 1 the run failed, 2 wrong usage or input, 130 stopped by Ctrl-C, 143 by SIGTERM"


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
        with sigterm_raised():
            if {"-h", "--help"} & set(takewhile(lambda word: word != "--", rest)):
                print(f"try: {COMMANDS[command].example}\n")
            quiet_libraries()
            code = importlib.import_module(f"dina_lrm.cli.{command}").main(rest)
            sys.stdout.flush()
            return code
    except SystemExit as leaving:  # tyro leaves this way: 0 after --help, 2 after a bad flag
        return leaving.code if isinstance(leaving.code, int) else EXIT_USAGE
    except KeyboardInterrupt as stop:
        log("; ".join(["interrupted", *getattr(stop, "__notes__", [])]))
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:  # the reader of stdout left, as in `dina-lrm score ... | head`
        abandon_stdout()
        return EXIT_FAILURE
    except Exception as error:
        return explain(error)


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: files are closed, workers stopped. It raises a KeyboardInterrupt
    with its number, unless the caller of `main` listens to it; only the main thread can."""

    def terminate(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def abandon_stdout() -> None:
    """Nothing more can be written there: what is left in the buffer goes nowhere, at the end too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception) -> int:
    """Say what went wrong and return the exit code; only a fault of ours shows where in the code it is."""
    if os.environ.get("DINA_LRM_TRACEBACK") == "1":
        traceback.print_exception(error)
    message, code, ours = str(error), EXIT_FAILURE, False
    # Our functions refuse bad values with ValueError (InvalidInputError and CheckpointError are ones).
    if isinstance(error, UsageError | DinaError | ValueError):
        code = EXIT_FAILURE if isinstance(error, RunError) else EXIT_USAGE
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.strerror}: {os.fsdecode(error.filename)}"
        theirs = FileNotFoundError | IsADirectoryError | NotADirectoryError | FileExistsError
        code = EXIT_USAGE if isinstance(error, theirs) else EXIT_FAILURE
    elif isinstance(error, ChildProcessError):  # which ours are: workers that ended
        pass
    elif isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | FileExistsError):
        code = EXIT_USAGE
    elif isinstance(error, OSError | MemoryError):
        message = error.strerror if isinstance(error, OSError) and error.strerror else message
        message = message or "out of memory"
    else:
        message, ours = f"{type(error).__name__}: {error}", True
    report_error("; ".join([message, *getattr(error, "__notes__", [])]))
    if ours and os.environ.get("DINA_LRM_TRACEBACK") != "1":
        traceback.print_exception(error)
    return code


def print_overview(*, to_stderr: bool) -> None:
    """The commands, one line each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"[bold]{name}[/]", command.summary)
    console = Console(stderr=to_stderr, highlight=False)
    console.print(f"try: {COMMANDS['score'].example}\n", soft_wrap=True, markup=False)
    console.print("Preference rewards on noisy diffusion latents.\n")
    console.print(escape("usage: dina-lrm COMMAND [-h] [options]\n"))
    console.print(table)
    console.print("\ndina-lrm COMMAND --help explains a command, dina-lrm --version prints the version.")
    console.print(f"Exit codes: {EXIT_CODES}.", soft_wrap=True)


def run() -> None:
    """The console script."""
    stream: Any = sys.stdout
    if stream is not None and stream.encoding.lower() == "utf-8":
        stream.reconfigure(errors="surrogateescape")  # names of files are printed as they were typed
    code = main()
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # else gloo's threads may abort an interpreter that is ending
    try:
        sys.stdout.flush()
    except OSError:  # told already, where it happened
        abandon_stdout()
    sys.exit(code)
