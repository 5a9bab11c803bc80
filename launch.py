"""What every script starts with: options, one-line errors, signals, messages.

    parser = OptionParser(prog="my_script.py", description=__doc__)
    parser.add("epochs", 10, positive_int, "Train for this many epochs.", common="N")
    args = parser.parse_args(sys.argv[1:])

Copy this file to use it elsewhere: it needs only torch. processes.run_script prints a UserError as one line.
"""

import argparse
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

T = TypeVar("T")

# The largest numbers of an option; torch reports others in ways that are hard to read.
MAX_INT, FLOAT32 = 2**31 - 1, torch.finfo(torch.float32)


# Errors


class UserError(ValueError):
    """Bad input. `processes.run_script` prints it as one line; a bug keeps its traceback."""

    code = 2  # exit code


class RunStopped(RuntimeError):
    """The run ended itself, for example at a loss of NaN. `processes.run_script` prints it and exits with `code`."""

    def __init__(self, message: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError of the calls inside into a UserError; `prefix` goes before its message.

    Only for calls that do nothing but check what the user gave: a ValueError elsewhere is a bug.
    """
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{prefix}{error}".replace("\n", " ")) from None


REMEDIES = {  # what an error's text holds: what happened, and what to do
    r"DataLoader timed out after (\d+) seconds": (
        "the loader's workers gave no batch for {0} seconds: the storage of the images is stuck or slow, /dev/shm is "
        "full, or memory is short; look at these, or lower --workers (0: none)"
    ),
    r"killed by signal: Bus error|unable to allocate shared memory|unable to (?:mmap|write to file) .*torch_": (
        "a loader worker found /dev/shm full; make it larger (docker run --shm-size=8g), or lower --workers (0: none)"
    ),
    r"DataLoader worker .*(?:killed by signal|exited unexpectedly)": (
        "a loader worker was killed or ended by itself, most likely as memory or /dev/shm was short: lower --workers "
        "or --batch_size; --workers 0 shows its error"
    ),
    r"^OutOfMemoryError": (
        "the GPU is out of memory; lower --batch_size, use fewer or smaller crops, or train with "
        "--checkpoint_activations on or --accumulate 2"
    ),
    r"MemoryError|an't allocate memory|annot allocate memory": (
        "memory is short; lower --batch_size or --workers, or choose a smaller model, queue or crops"
    ),
    r"Too many open files|received 0 items of ancdata": (
        "too many open files; raise the limit (ulimit -n 65536), or lower --workers"
    ),
}


def one_line(error: Exception) -> str | None:
    """What an error means and what to do about it, in one line; None if it is a bug."""
    if isinstance(error, (UserError, RunStopped)):
        *_, message = str(error).splitlines() or [repr(error)]  # a loader worker's error comes below its traceback
        return message.removeprefix("launch.UserError: ")
    text = f"{type(error).__name__}: {error}" if isinstance(error, (RuntimeError, OSError, MemoryError)) else ""
    for pattern, message in REMEDIES.items():
        if found := re.search(pattern, text):
            return message.format(*found.groups())
    return None


# The end of a process


_clean_ups: list[Callable[[], object]] = []


@contextmanager
def at_exit(clean_up: Callable[[], object]) -> Iterator[None]:
    """Call clean_up after the block, also where `end_process` cuts the block off. It may be called twice."""
    _clean_ups.append(clean_up)
    try:
        yield
    finally:
        clean_up()
        _clean_ups.remove(clean_up)


def end_process(code: int) -> NoReturn:
    """End this process, from any thread, whatever its main thread waits for. Skips `finally`, but not `at_exit`."""
    for clean_up in reversed(_clean_ups):
        with suppress(Exception):
            clean_up()
    kill_children()
    sys.stdout.flush()
    os._exit(code)


def kill_children() -> None:
    """End the loader's workers, which ignore signals: one that hangs would keep the script from ending."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports killed workers by it
    for child in multiprocessing.active_children():
        child.kill()


# Options


class OptionParser(argparse.ArgumentParser):
    """Command-line options with two tiers of help: --help shows the common ones, --help-all every one.

    Takes `_` or `-` in names, and options from a file (@FILE, see `read_option_file`; fromfile_prefix_chars as in
    argparse). affects: {option: what it changes}, see `add`. parse_args raises UserError.
    """

    def __init__(self, fromfile_prefix_chars: str = "", **options: object) -> None:
        self.file_marks = tuple(fromfile_prefix_chars)
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=24, width=100)
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=formatter, **options)
        self.affects: dict[str, str] = {}
        self.common: list[argparse.Action] = []
        self.start_group("help")
        self.group.add_argument("-h", "--help", action="help", help="Show the common options.")
        self.group.add_argument("--help_all", action="help", help="Show all options.")

    def start_group(self, title: str, affects: str = "learning") -> None:
        """Put the options that are added next into a group of --help-all. affects: their default in `add`."""
        self.group, self.group_affects = self.add_argument_group(title), affects

    def add(
        self,
        name: str,
        default: object,
        kind: Callable[[str], object],
        help: str,
        *,
        common: str | None = None,
        affects: str | None = None,
        default_text: str | None = None,
        **more: object,
    ) -> None:
        """Add the option --NAME.

        common: for an option that --help shows, the name of its value there. affects: "model" if it shapes the
        weights, "learning" if it changes what is learned, "nothing" otherwise; a resumed run compares options by this.
        default_text: what the help says of the default, if not the value.
        """
        if default_text is None and default is not None:
            default_text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        if default_text is not None:
            help = f"{help.removesuffix('.')} (default: {default_text})."
        action = self.group.add_argument(f"--{name}", default=default, type=kind, help=help, metavar=common, **more)
        self.affects[name] = affects or self.group_affects
        if common:
            self.common.append(action)

    def format_help(self, all_options: bool = False) -> str:
        """The text of --help, or of --help-all."""
        if all_options:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        formatter.start_section("options")
        formatter.add_arguments(self.common)
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        lines = []  # (the file and line, or "", and its words)
        for word in argv:
            lines += read_option_file(word[1:]) if word.startswith(self.file_marks) else [("", [word])]
        words = [_underscored(word) for _, words in lines for word in words]
        if "--help_all" in words:
            print(self.format_help(all_options=True), end="")
            self.exit()
        try:
            return self._parse(words)
        except UserError as error:
            end = 0
            for place, of_line in lines:  # the first line with which the error comes
                end += len(of_line)
                try:
                    self._parse(words[:end])
                except UserError as same:
                    if place and str(same) == str(error):
                        raise UserError(f"{place}: {error}") from None
            raise

    def _parse(self, words: list[str]) -> argparse.Namespace:
        """Parse words. Options may stand between paths, except where there is a --, which older Pythons would lose."""
        return super().parse_args(words) if "--" in words else super().parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (python {self.prog} --help-all lists the options)")


def read_option_file(path: str) -> list[tuple[str, list[str]]]:
    """Read options from a file, one or more per line: [("FILE, line N", words)].

    Spaces separate words. Quotes around a word, or around the value in --name=value, keep its spaces; within words
    they mean nothing, nor does a backslash. A # at the start of a line or after a space starts a comment. Raises
    UserError with file and line.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # paths may have any encoding
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"@{path}: cannot read this file of options: {error.strerror}") from None
    words_of_lines = []
    for number_of_line, line in enumerate(lines, 1):
        place, words = f"{path}, line {number_of_line}", []
        for match in OPTION_WORD.finditer(line):
            name, quoted, quote_left_open, plain = match.group("name", "quoted", "open", "plain")
            if quote_left_open:
                raise UserError(f"{place}: expected a second {quote_left_open[0]} at the end of {quote_left_open}")
            words += [name + quoted[1:-1]] if quoted else [plain] if plain else []
        words_of_lines.append((place, words))
    return words_of_lines


# The words of a line; comments and spaces match as none of the groups.
OPTION_WORD = re.compile(
    r"""\s+|\#.*|(?P<name>(?:--[\w-]+=)?)(?:(?P<quoted>(?:".*?"|'.*?')(?=\s|$))|(?P<open>["'].*))|(?P<plain>\S+)"""
)


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def number(kind: type, least: float, above: bool = False, most: float | None = None) -> Callable[[str], int | float]:
    """The type of an option: an int or a float from `least`, or (above) more than `least`, to `most`.

    most: by default the largest that torch takes.
    """
    smallest, largest = (least, most or MAX_INT) if kind is int else (FLOAT32.tiny, most or FLOAT32.max)

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        what = "a whole number" if kind is int else "a number"
        text = text if len(text) < 50 else f"{text[:50]}... ({len(text)} characters)"
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"expected {what} {'above' if above else 'from'} {least}, got {text}")
        if value > largest or 0 < value < smallest:
            raise argparse.ArgumentTypeError(f"expected {what} from {smallest:.5g} to {largest:.10g}, got {text}")
        return value

    return parse


nonnegative_int, positive_int = number(int, 0), number(int, 1)
nonnegative, positive = number(float, 0), number(float, 0, above=True)
epoch_count, worker_count = number(int, 1, most=10**7), number(int, 0, most=1024)  # more are typing errors


def workers_or_auto(text: str) -> int | str:
    """The type of an option: "auto", or a number of loader workers."""
    return text if text == "auto" else worker_count(text)


def as_command_line(options: Mapping[str, object]) -> str:
    """Options as a user would type them in a shell."""
    return " ".join(f"--{n} {shlex.join(map(str, v if isinstance(v, list) else [v]))}" for n, v in options.items())


# Signals

STOP_CODES = {"SIGUSR1": 75, "SIGINT": 130, "SIGTERM": 143}  # exit codes of a run that a signal stopped; 75: try again
REPEAT_SECONDS = 1  # torchrun passes on a SIGINT that the terminal has sent to all processes already


@contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of ending at once. A second one of a kind interrupts at once.

    Yields a function that gives the name of the signal that came, or None. Does nothing outside of the main thread.
    """
    came: list[tuple[str, float]] = []

    def note(number: int, _frame: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if any(n == name and now - then > REPEAT_SECONDS for n, then in came):
            raise KeyboardInterrupt
        came.append((name, now))

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    numbers = [getattr(signal, name) for name in STOP_CODES if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: came[-1][0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Messages


def environment(name: str, default: int) -> int:
    """A number that torchrun sets for each of its processes."""
    return int(os.environ.get(name, default))


activity = ("starting", time.monotonic())  # what this process does, since when; the other processes see it


def note_activity(doing: str) -> None:
    """Note what this process does; errors and time-outs of other processes name it. Costs nothing."""
    global activity
    activity = (doing, time.monotonic())


_early_lines: deque[str] = deque(maxlen=1000)  # what was logged before `log_to`
_log_file: Path | None = None


def log_to(path: str | Path) -> None:
    """Append what the first process logs, and has logged so far, to a file; and tracebacks of errors."""
    global _log_file
    if environment("RANK", 0) == 0:
        _log_file = Path(path)
        write_to_log("".join(_early_lines))
        _early_lines.clear()


def write_to_log(text: str) -> None:
    """Append text to the file of `log_to`, or keep it until there is one. A full disk does not end a run."""
    if _log_file is None:
        _early_lines.append(text)
        return
    with suppress(OSError), _log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def log(text: str, end: str = "\n", *, to_file: bool = True) -> None:
    """Print from the first process only, and append to the file of `log_to`."""
    if environment("RANK", 0) == 0:
        try:
            print(text, end=end, flush=True)
        except OSError:  # a file on a full disk, or a terminal that has gone: this does not end a run
            sys.stdout = open(os.devnull, "w")
        if to_file:
            write_to_log(text.removeprefix("\r\033[2K") + "\n")


def show_progress(line: str, keep: bool = False, *, to_file: bool = True) -> None:
    """Print a progress line. On a terminal the next line overwrites it, unless it is to be kept."""
    on_terminal = sys.stdout.isatty()
    log(f"\r\033[2K{line}" if on_terminal else line, end="" if on_terminal and not keep else "\n", to_file=to_file)


def track(batches: Iterable[T], title: str, unit: str = "batch") -> Iterator[T]:
    """Yield the batches, with a progress line that says how long the others take. See `with_progress`."""
    start = time.monotonic()

    def line(numbered: tuple[int, T]) -> str:
        done, _ = numbered
        left = timedelta(seconds=round((time.monotonic() - start) / done * (len(batches) - done)))
        return f"{title}: {unit} {done}/{len(batches)}  ETA {left}"

    for done, batch in with_progress(enumerate(batches, 1), line):
        note_activity(f"{title}: {unit} {done}")
        yield batch


def with_progress(items: Iterable[T], line: Callable[[T], str], last: Callable[[], str] = lambda: "") -> Iterator[T]:
    """Yield the items, with a progress line: each second on a terminal, every 30 s in a file. `last` replaces it."""
    on_terminal = sys.stdout.isatty()
    pause = 1 if on_terminal else 30
    has_line, next_line = False, time.monotonic() + pause
    for item in items:
        yield item
        if time.monotonic() > next_line:
            text = line(item)
            note_activity(text)
            show_progress(text, to_file=not on_terminal)
            has_line, next_line = True, time.monotonic() + pause
    text = last() if has_line else ""
    if text or (has_line and on_terminal):
        show_progress(text, keep=bool(text), to_file=bool(text))
