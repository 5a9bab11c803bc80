"""run_folder.py: the lock of a run's folder, run.json."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import run_training

import run_folder
from launch import UserError


def test_a_folder_in_use_is_refused_and_a_lock_left_behind_is_taken_over(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.lock"
    with run_folder.locked(tmp_path):
        holder = json.loads(path.read_text())
        assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
    assert not path.exists()

    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        path.write_text(json.dumps(holder | {"pid": other.pid, "started": run_folder.start_of_process(other.pid)}))
        with pytest.raises(
            UserError, match=f"--dump_path: another run writes to .*process {other.pid} on .*wait for it"
        ):
            with run_folder.locked(tmp_path):
                pass
        assert path.exists()
        path.write_text(json.dumps(holder | {"pid": other.pid, "started": "1"}))  # another process had this number
        with run_folder.locked(tmp_path):
            assert "taken over" in capsys.readouterr().out
    finally:
        other.communicate(b"\n")
    for left_behind in (json.dumps(holder | {"pid": other.pid}), "half a fi", ""):
        path.write_text(left_behind)
        with run_folder.locked(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()


def test_a_lock_of_another_machine_counts_for_ten_minutes(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    elsewhere = {"host": "elsewhere", "pid": 1, "started": "1", "since": "today", "slurm_job_id": "77"}
    path.write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="process 1 on elsewhere, since today"), run_folder.locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(UserError), run_folder.locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # requeued on another machine
    with run_folder.locked(tmp_path):
        pass
    monkeypatch.delenv("SLURM_JOB_ID")
    path.write_text(json.dumps(elsewhere))
    os.utime(path, (0, time.time() - 601))
    with run_folder.locked(tmp_path):
        pass


def test_a_lock_is_renewed_and_a_stolen_one_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.01)
    path = tmp_path / "run.lock"
    with run_folder.locked(tmp_path):
        os.utime(path, (0, 0))
        for _ in range(500):
            time.sleep(0.01)
            if path.stat().st_mtime > 0:
                break
        assert path.stat().st_mtime > 0
        path.write_text('{"pid": 1}')
    assert path.read_text() == '{"pid": 1}'


def test_processes_are_known_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(run_folder.Path, "exists", lambda self: False)
    assert run_folder.start_of_process(os.getpid()) == "running"
    assert run_folder.start_of_process(2**22 + 1) is None


def test_run_json_has_the_command_and_the_reasons_of_options(images, tmp_path):
    run_training(images, tmp_path, "--epochs", "1")
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["options"]["epochs"] == {"value": 1, "reason": "set by the user"}
    assert facts["options"]["wd"] == {"value": 1e-6, "reason": "default"}
    assert facts["options"]["sync_bn"]["reason"].startswith("embeddings must not")
    assert facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["world_size"] == 1 and facts["sinkhorn"] in ("cpp", "torch") and facts["sinkhorn_ext"]["platform"]
    assert facts["command"] and facts["images"]["images"] == 10 and facts["device"] == "cpu"


def test_a_package_that_is_not_found_has_no_version_and_ends_no_run(tmp_path, monkeypatch):
    version = run_folder.metadata.version

    def without_pillow(name):
        if name == "pillow":  # Pillow-SIMD has another name
            raise run_folder.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(run_folder.metadata, "version", without_pillow)
    run_folder.write_facts(tmp_path, {"options": {}, "images": {}}, {})
    packages = json.loads((tmp_path / "run.json").read_text())["packages"]
    assert packages["pillow"] is None and packages["torch"]
