"""One run, one folder: the lock that keeps other runs out, and run.json, which says what the run is."""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from launch import UserError, at_exit, log

LOCK_SECONDS, LOCK_STALE = 60, 600  # how often a lock is renewed; age at which one of another machine is ignored


@contextmanager
def locked(dump: Path) -> Iterator[None]:
    """Keep other runs out of a folder. For the first process only. Raises UserError if another run is in it.

    The lock holds host, process and Slurm job, and is renewed each minute. It is taken over when its process is gone,
    when it is of this Slurm job, or when it is of another host and ten minutes old.
    """
    path, done = dump / "run.lock", threading.Event()
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "started": start_of_process(os.getpid())}
    ours |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "slurm_job_id": os.environ.get("SLURM_JOB_ID")}
    text = json.dumps(ours)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        holder = read_lock(path)
        if holder and is_running(holder, path):
            raise UserError(
                f"--dump_path: another run writes to {dump}: process {holder['pid']} on {holder['host']}, since "
                f"{holder['since']}; wait for it, or write another --dump_path"
            ) from None
        log(f"{path}: taken over from a run that ended without removing it")
        path.write_text(text)
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)

    def renew() -> None:
        while not done.wait(LOCK_SECONDS):
            with suppress(OSError):
                os.utime(path)

    def remove() -> None:
        done.set()
        if read_lock(path) == ours:
            with suppress(OSError):
                path.unlink()

    threading.Thread(target=renew, daemon=True).start()
    with at_exit(remove):
        yield


def read_lock(path: Path) -> dict | None:
    """The contents of a lock; None if it is gone or was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def is_running(holder: Mapping[str, Any], path: Path) -> bool:
    """Whether the process that holds a lock still runs, as far as this machine can know."""
    if holder["host"] == socket.gethostname():
        return holder["pid"] != os.getpid() and start_of_process(holder["pid"]) == holder["started"]
    job = os.environ.get("SLURM_JOB_ID")
    return (job is None or holder["slurm_job_id"] != job) and time.time() - path.stat().st_mtime < LOCK_STALE


def start_of_process(pid: int) -> str | None:
    """When a process started, in the system's units; "running" where the system does not tell; None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def write_facts(dump: Path, settings: Mapping[str, Any], reasons: Mapping[str, str], **facts: object) -> None:
    """Write run.json: the command, every option with its reason, versions, machine, and more facts.

    settings: options and images. reasons: by option, those that the user did not set.
    """
    options = {
        name: {"value": value, "reason": reasons.get(name, "set by the user")}
        for name, value in settings["options"].items()
    }
    contents = {
        "command": shlex.join([sys.executable, *sys.argv]),
        "options": options,
        "images": settings["images"],
        "git": git_revision(),
        "packages": {name: version_of(name) for name in ("torch", "torchvision", "numpy", "pillow")},
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        **facts,
    }
    unfinished = dump / "run.json.tmp"
    with suppress(OSError):  # a full disk is reported where it loses something
        unfinished.write_text(json.dumps(contents, indent=1, default=str) + "\n")
        os.replace(unfinished, dump / "run.json")


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not known, as for Pillow where Pillow-SIMD takes its place."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def git_revision() -> str | None:
    """The revision of this code, with "+" if files differ from it; None outside of a repository."""
    command = "git describe --always --dirty=+ --abbrev=40 --exclude=*".split()
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, text=True, timeout=10, stderr=subprocess.DEVNULL
        ).strip()
    return None
