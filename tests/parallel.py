"""Run pytest on several test files at once, each in its own process.

    python tests/parallel.py                    all of tests/test_*.py
    python tests/parallel.py FILE[::TEST] ...   these, in this order

A file's output is printed once it is done. The exit status is 1 if a file failed. Processes are forked by a server that
has imported what takes seconds to import.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parent
MOST = 4  # processes: each takes up to 1 GB
FORKED = multiprocessing.get_context("forkserver")


def test_file(words: list[str], output: Path) -> None:
    """Run pytest in this process with its output in a file, and exit with its status."""
    import pytest

    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *words]))


def run(words: list[str], output: Path) -> int:
    """Run pytest in a process; return its exit status."""
    process = FORKED.Process(target=test_file, args=(words, output))
    process.start()
    process.join()
    return process.exitcode


def main(words: list[str]) -> int:
    """Run all files, the largest first; return the exit status."""
    files = words or sorted(map(str, TESTS.glob("test_*.py")), key=os.path.getsize, reverse=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    failed = []
    with TemporaryDirectory() as folder, ThreadPoolExecutor(min(cores, MOST)) as pool:
        outputs = {file: Path(folder) / f"{i}.txt" for i, file in enumerate(files)}
        running = {pool.submit(run, [file], output): file for file, output in outputs.items()}
        for done in as_completed(running):
            file = running[done]
            print(f"\n{os.path.relpath(file)}\n{outputs[file].read_text(errors='replace').rstrip()}", flush=True)
            if done.result() != 0:
                failed.append(f"{os.path.relpath(file)} (exit status {done.result()})")
    print("\nfailed: " + ", ".join(failed) if failed else f"\nall {len(files)} files passed")
    return int(bool(failed))


if __name__ == "__main__":
    FORKED.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "pytest"])
    sys.exit(main(sys.argv[1:]))
