"""Run pytest on several test files at once, each in a process of its own.

    python tests/parallel.py                    all of tests/test_*.py
    python tests/parallel.py FILE[::TEST] ...   these

What a file prints is shown as a whole, once the file is done. The exit status is 1 if a file failed. Processes are
forked by a server that has imported torch once, which takes seconds.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parent
MOST = 4  # files at once: each takes up to 1 GB of memory
FORKED = multiprocessing.get_context("forkserver")


def run_pytest(words: list[str], output: Path) -> None:
    """Run pytest in this process, with its output in a file, and exit with its status."""
    import pytest

    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *words]))  # the cache is not made for several processes


def run(words: list[str], output: Path) -> int:
    """Run pytest in a forked process; return its status."""
    process = FORKED.Process(target=run_pytest, args=(words, output))
    process.start()
    process.join()
    return process.exitcode


def main(files: list[str]) -> int:
    """Run the files, the largest first, as they tend to take longest; return the exit status."""
    files = files or sorted(map(str, TESTS.glob("test_*.py")), key=os.path.getsize, reverse=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with TemporaryDirectory() as folder, ThreadPoolExecutor(min(cores, MOST)) as pool:
        outputs = {file: Path(folder) / f"{i}.txt" for i, file in enumerate(files)}
        running = {pool.submit(run, [file], output): file for file, output in outputs.items()}
        failed = []
        try:
            for done in as_completed(running):
                name = os.path.relpath(running[done])
                print(f"\n{name}\n{outputs[running[done]].read_text(errors='replace').strip()}", flush=True)
                if status := done.result():
                    failed.append(f"{name} (exit status {status})")  # below 0: the signal that ended it
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\nall passed: {len(files)} files")
    return int(bool(failed))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the server imports torch; see conftest.py
    FORKED.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "pytest", "PIL.Image"])
    sys.exit(main(sys.argv[1:]))
