"""What several test files share: devices, groups of processes, and tiny runs of train.py."""

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

# More threads only slow down networks this small, ten times and more on a busy machine. The variable is for processes
# that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The imports of torch take seconds. For processes that tests start by multiprocessing or `forked`, a server does them
# once, and then forks.
FORKED = mp.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "pytest", "PIL.Image"])

ROOT = Path(__file__).parent.parent

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


# Processes


def run_processes(function: Callable, world_size: int, *args: Any) -> list:
    """Call function(rank, world_size, *args) in gloo processes of one thread; return the results in order of rank.

    function: at the top level of a module, as new processes import it by name. Results: anything that
    torch.load(weights_only=True) reads. An exception in any process stops all of them and is raised here. All have
    the environment that the first ones of this session had.
    """
    with TemporaryDirectory() as folder:
        mp.start_processes(_process, (Path(folder), function, world_size, args), world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _process(rank: int, folder: Path, function: Callable, world_size: int, args: tuple) -> None:
    torch.set_num_threads(1)
    rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, world_size=world_size, rank=rank, timeout=timeout)
    torch.save(function(rank, world_size, *args), folder / f"{rank}.pt")
    dist.barrier()  # no process may leave while another one needs it; one that fails leaves at once, and is reported
    dist.destroy_process_group()


def script(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command as a user types it, in a fresh process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)


def torchrun(processes: int, *words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return script(*launcher, *words, **environment)


def forked(*words: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python WORDS` in the folder: -c PROGRAM, -m MODULE, or a FILE with its arguments.

    The process is as a fresh one, except that torch and torchvision are imported already.
    """
    with TemporaryDirectory() as outputs:
        paths = [Path(outputs) / "stdout", Path(outputs) / "stderr"]
        arguments = [str(word) for word in words], folder, {**os.environ, **environment}, paths
        process = FORKED.Process(target=_forked, args=arguments)
        process.start()
        process.join(timeout=120)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments[0], 120, *(path.read_text() for path in paths))
        return subprocess.CompletedProcess(arguments[0], process.exitcode, *(path.read_text() for path in paths))


def _forked(words: list[str], folder: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    start = folder if words[0].startswith("-") else Path(words[0]).parent
    others = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    sys.path[:] = [str(start), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *others]
    torch.set_num_threads(1)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def forked_ranks(processes: int, *words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script in several processes as torchrun does, but forked. The status is that of the first that failed.

    If one fails, the others are not stopped.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}

    def run(rank: int) -> subprocess.CompletedProcess:
        variables = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        return forked(*words, **variables, **environment)

    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(run, range(processes)))
    status = next((result.returncode for result in results if result.returncode), 0)
    texts = ["".join(getattr(result, name) for result in results) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, status, *texts)


# Tiny runs of train.py


TINY = (
    "--arch resnet18 --width 8 --blocks 1 1 1 1 --stem small --hidden_mlp 16 --feat_dim 8 --nmb_prototypes 6 "
    "--nmb_crops 2 1 --size_crops 16 9 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 --batch_size 4 --epochs 4 "
    "--queue_length 8 --epoch_queue_starts 1 --freeze_prototypes_niters 2 --checkpoint_freq 2 --workers 0 --device cpu "
    "--temperature 0.1 --epsilon 0.05 --base_lr 0.6 --final_lr 0.0006 --precision fp32"
).split()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder with train/, 2 classes of 5 images, and val/, 2 classes of 3."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5), ("val", 3)):
        for label in ("cats", "dogs"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / label / f"{i}.png")
    return root


def run_training(images: Path, dump: Path, *more: str) -> dict:
    """Train for 4 epochs of 2 steps in this process; return the last checkpoint. more: options that replace TINY's."""
    import train

    train.main(train.parse_args([*TINY, f"--data_path={images}", f"--dump_path={dump}", *more]))
    return torch.load(dump / "checkpoint.pth", weights_only=True)


def without_times(dump: Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock."""
    names = "images_per_s", "data_wait_percent", "eta_s", "epoch_seconds", "epoch_images_per_s"
    rows = map(json.loads, (dump / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


# Options of a run that collapses: with epsilon 100 all codes are uniform.
STUCK = (
    "--data_path {images} --arch resnet18 --width 8 --blocks 1 1 1 1 --stem small --hidden_mlp 16 --feat_dim 8 "
    "--nmb_prototypes 6 --nmb_crops 2 --size_crops 16 --min_scale_crops 0.3 --max_scale_crops 1 --batch_size 4 "
    "--temperature 0.1 --relative_epsilon off --epsilon 100 --epochs 10 --log_freq 1 --workers 0 --device cpu"
)


def train_stuck(images: Path, dump: Path, *more: str, base_lr: float = 1e-9) -> None:
    """Run 10 epochs of 2 steps that stay at a loss of ln K, as weights hardly move (at the default base_lr)."""
    import guard
    import train

    options = STUCK.format(images=images).split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "MIN_STEPS", 0)  # the run has only 20
        train.main(train.parse_args([*options, "--base_lr", str(base_lr), "--dump_path", str(dump), *more]))


def assert_same(ours, theirs, name: str = "checkpoint") -> None:
    """Assert that two checkpoints are equal bit for bit, through dicts and lists."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), name
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_same(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), name
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{name}[{i}]")
    else:
        assert ours == theirs, name


@pytest.fixture
def collapsing(monkeypatch) -> None:
    """Let the guard find every run collapsing after a quarter of its steps, and every epoch good."""
    import guard

    update = guard.CollapseGuard.update

    def always_after_a_quarter(self, row, share_done, step):
        update(self, row, share_done, step)
        return share_done > 0.25

    monkeypatch.setattr(guard.CollapseGuard, "update", always_after_a_quarter)
    monkeypatch.setattr(guard.CollapseGuard, "epoch_is_stuck", lambda self, epoch_loss: False)
