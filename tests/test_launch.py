"""launch.py: options and their help, errors, progress lines, signals."""

import argparse
import os
import re
import shlex
import signal
import sys
import threading
import time
from itertools import count

import pytest
import torch
from conftest import ROOT, forked

import eval_linear
import launch
import options
import train
from launch import OptionParser, UserError, positive_int, user_errors

CPU = torch.device("cpu")

# Help


COMMON = {
    "train.py": {
        *("data_path", "dataset", "arch", "init", "epochs", "batch_size", "dump_path"),
        *("seed", "device", "workers", "precision", "on_collapse", "tensorboard"),
    },
    "eval_linear.py": {
        *("checkpoint", "data_path", "dataset", "size", "cached", "finetune", "sweep", "labels", "epochs", "knn_k"),
        *("workers", "device", "seed"),
    },
}
PARSERS = {"train.py": train.option_parser, "eval_linear.py": eval_linear.option_parser}


def help_of(parser: OptionParser, word: str, capsys) -> str:
    with pytest.raises(SystemExit) as leave:
        parser.parse_args([word])
    assert not leave.value.code
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    """Names of the options and positional arguments that a help text lists."""
    return set(re.findall(r"^  (?:-h, )?(?:--)?(\w+)", text.partition("\n\n")[2], re.MULTILINE))


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("name", PARSERS)
def test_help_shows_the_common_options_on_one_screen(name, word, capsys):
    text = help_of(PARSERS[name](), word, capsys)
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert options_in(text) == COMMON[name]
    assert "--help-all" in text


@pytest.mark.parametrize("word", ["--help-all", "--help_all"])
@pytest.mark.parametrize("name", PARSERS)
def test_help_all_shows_every_option_with_a_help_text(name, word, capsys):
    parser = PARSERS[name]()
    text = help_of(parser, word, capsys)
    actions = {action.dest if action.default != argparse.SUPPRESS else action.option_strings[-1][2:]: action
               for action in parser._actions}  # fmt: skip
    hidden = {option for option, action in actions.items() if action.help == argparse.SUPPRESS}
    assert hidden == (set(options.REPLACED_BY_TORCHRUN) if name == "train.py" else set())
    assert options_in(text) == actions.keys() - hidden
    assert all(action.help and action.help.strip() for action in actions.values())
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", PARSERS)
def test_help_of_a_script_exits_with_0(name):
    done = forked(ROOT / name, "--help")
    assert done.returncode == 0 and done.stdout == PARSERS[name]().format_help() and not done.stderr


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_declares_what_it_affects(name):
    parser = PARSERS[name]()
    declared = {action.dest for action in parser._actions if action.default != argparse.SUPPRESS}
    if name == "train.py":
        assert parser.affects.keys() == declared - set(options.REPLACED_BY_TORCHRUN)
        assert set(parser.affects.values()) == {"model", "learning", "nothing"}
    assert parser.affects.keys() <= declared and set(parser.affects.values()) <= {"model", "learning", "nothing"}


# Options


def small_parser() -> OptionParser:
    parser = OptionParser(prog="small.py", fromfile_prefix_chars="@")
    parser.start_group("numbers", affects="nothing")
    parser.add("step_count", 3, positive_int, "Take this many steps.", common="N")
    parser.add("side_lengths", [4, 5], positive_int, "sides in pixels", nargs="+", affects="model")
    return parser


def test_options_come_with_underscores_or_hyphens_from_a_file_or_the_command_line(tmp_path):
    (tmp_path / "o.args").write_text("# a comment\n--step-count 7  # another\n--side_lengths 1 2\n")
    assert vars(small_parser().parse_args([])) == {"step_count": 3, "side_lengths": [4, 5]}
    assert vars(small_parser().parse_args([f"@{tmp_path}/o.args"])) == {"step_count": 7, "side_lengths": [1, 2]}
    for words in (["--step-count=8"], ["--step_count", "8"]):
        args = small_parser().parse_args([f"@{tmp_path}/o.args", *words])
        assert (args.step_count, args.side_lengths) == (8, [1, 2])


def test_paths_that_begin_with_a_hyphen_come_after_two():
    parser = launch.OptionParser(prog="x.py")
    parser.start_group("all", affects="nothing")
    parser.add("size", None, int, "A size.")
    parser.group.add_argument("paths", nargs="*")
    assert parser.parse_args(["a", "--size", "2", "b"]) == argparse.Namespace(size=2, paths=["a", "b"])
    assert parser.parse_args(["--size", "2", "--", "-a", "b"]) == argparse.Namespace(size=2, paths=["-a", "b"])


def test_the_default_ends_the_help_text_as_one_sentence():
    text = small_parser().format_help(all_options=True)
    assert "Take this many steps (default: 3)." in text and "sides in pixels (default: 4 5)." in text
    assert "side_lengths" not in small_parser().format_help()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--step_count 0", "^--step_count: expected a whole number from 1, got 0 "),
        ("--step_count 1.5", "^--step_count: expected a whole number from 1, got 1.5 "),
        ("--step 4", "^unrecognized arguments: --step 4 "),  # no abbreviations
        ("--steps 4", r"\(python small.py --help-all lists the options\)$"),
        ("@none.args", "none.args"),
    ],
)
def test_bad_options_are_user_errors(words, message):
    with pytest.raises(UserError, match=message):
        small_parser().parse_args(words.split())


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (launch.nonnegative_int, {"0": 0, "12": 12}, ["-1", "1.5", "nan", "x"]),
        (launch.positive_int, {"1": 1}, ["0"]),
        (launch.nonnegative, {"0": 0.0, "1e-3": 0.001}, ["-1", "nan", "inf"]),
        (launch.positive, {"0.5": 0.5}, ["0", "nan", "inf", "-inf"]),
        (launch.workers_or_auto, {"auto": "auto", "0": 0, "1024": 1024}, ["-1", "some", "1025"]),
        (launch.epoch_count, {"1": 1, "10000000": 10**7}, ["0", "10000001"]),
        (launch.number(int, 2), {"2": 2}, ["1"]),
    ],
)
def test_numbers_of_options_are_checked(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^expected .* got {text}$"):
            parse(text)


def test_options_as_a_command_line():
    assert launch.as_command_line({"base_lr": 0.3, "nmb_crops": [2, 6], "stem": "small"}) == (
        "--base_lr 0.3 --nmb_crops 2 6 --stem small"
    )
    words = launch.as_command_line({"data_path": "my photos", "dump_path": "runs/it's", "blur_sigma": [-0.1, 2.0]})
    assert shlex.split(words) == ["--data_path", "my photos", "--dump_path", "runs/it's", "--blur_sigma", "-0.1", "2.0"]


# Errors


def test_user_errors_turns_a_value_error_into_a_user_error_with_a_prefix():
    with pytest.raises(UserError, match="^--size_crops: too small$") as caught, user_errors("--"):
        raise ValueError("size_crops:\ntoo small")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    original = UserError("--epochs: too few")
    with pytest.raises(UserError) as caught, user_errors("--"):
        raise original
    assert caught.value is original
    with pytest.raises(KeyError), user_errors("--"):
        raise KeyError("a bug")


# Messages


@pytest.mark.parametrize("on_terminal, expected", [(False, "one\ntwo\n"), (True, "\r\033[2Kone\r\033[2Ktwo\n")])
def test_a_progress_line_is_overwritten_only_on_a_terminal(on_terminal, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    launch.show_progress("one")
    launch.show_progress("two", keep=True)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_long_loop_shows_how_long_the_rest_takes(on_terminal, tmp_path, monkeypatch, capsys):
    ticks = count(0, 10)  # seconds
    monkeypatch.setattr(launch.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    monkeypatch.setattr(launch, "write_to_log", logged := [].append)
    assert list(launch.track("abcd", "measuring")) == list("abcd")
    out = capsys.readouterr().out
    assert re.search(r"measuring: batch 2/4  ETA 0:\d\d:\d\d", out) and "batch 4" in launch.activity[0]
    assert out.endswith("\r\033[2K" if on_terminal else "\n") and bool(logged.__self__) != on_terminal


def test_only_the_first_process_logs(monkeypatch, capsys):
    launch.log("one")
    monkeypatch.setenv("RANK", "1")
    launch.log("two")
    assert capsys.readouterr().out == "one\n"


# Signals


def test_signals_are_noted_and_a_second_one_interrupts(monkeypatch):
    before = {name: signal.getsignal(getattr(signal, name)) for name in launch.STOP_CODES}
    for name in launch.STOP_CODES:
        with launch.stop_signals() as requested_stop, monkeypatch.context() as patch:
            assert requested_stop() is None
            os.kill(os.getpid(), getattr(signal, name))
            assert requested_stop() == name
            os.kill(os.getpid(), getattr(signal, name))  # torchrun passes on what the terminal sent
            patch.setattr(launch, "REPEAT_SECONDS", 0)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(5)
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in launch.STOP_CODES}


def test_signals_are_left_alone_in_other_threads_and_where_they_do_not_exist(monkeypatch):
    def in_thread():
        with launch.stop_signals() as requested_stop:
            results.append(requested_stop())

    results = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert results == [None]
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    with launch.stop_signals() as requested_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested_stop() == "SIGTERM"
