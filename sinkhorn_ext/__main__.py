"""Print which kernels run and how they were built: `python -m sinkhorn_ext`. Put the output into a bug report."""

import platform
from pathlib import Path

import torch

from . import _kernels_state, backend, fused


def report() -> dict[str, object]:
    """Collect the lines of the report: a name and a value for each, in order."""
    lines: dict[str, object] = {"sinkhorn_ext": Path(__file__).resolve().parent}
    lines |= {f"backend on {device}": backend(device) for device in ("cpu", "cuda")}
    lines["compiled kernels"] = _kernels_state
    if _kernels_state == "loaded":
        from . import _C

        lines["compiled kernels"] = Path(_C.__file__).name
        build_info = getattr(_C, "build_info", lambda: {"built by": "an older version; build it again"})
        lines |= {f"  {name}": value for name, value in build_info().items()}
    lines["plain torch, fused on"] = ", ".join(fused.devices) or "no device"
    lines["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}"
    lines["GPUs"] = gpus()
    lines["Python"] = platform.python_version()
    lines["platform"] = platform.platform()
    return lines


def gpus() -> str:
    """Name the GPUs that torch sees, with their compute capabilities."""
    try:
        found = [torch.cuda.get_device_properties(gpu) for gpu in range(torch.cuda.device_count())]
    except RuntimeError as error:  # raised if the driver is too old for this torch, for example
        return f"not usable: {error}"
    return ", ".join(f"{gpu.name} ({gpu.major}.{gpu.minor})" for gpu in found) or "none"


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{name:22}{value}")
