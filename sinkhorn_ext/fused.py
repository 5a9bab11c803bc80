"""Plain torch, fused by torch.compile: for GPUs without compiled kernels, where it is slow otherwise."""

import functools
import warnings
from contextlib import nullcontext

import torch

# Types of devices on which to fuse. __init__.py sets it, an error of torch.compile empties it.
devices: tuple[str, ...] = ()


def where_possible(function):
    """Let torch.compile fuse an operator's body on the devices of `devices`.

    A second batch size compiles a form for all sizes. After eight forms (torch._dynamo.config.recompile_limit) and for
    tensors without elements, the body runs as it is.
    """
    compiled = functools.cache(lambda: torch.compile(function))  # when it is needed: importing the compiler is slow

    @functools.wraps(function)
    def run(*arguments):
        if torch.compiler.is_compiling():
            return function(*arguments)
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        if tensors[0].device.type not in devices or not all(tensor.numel() for tensor in tensors):
            return function(*arguments)
        # To compile would break the capture of a CUDA graph. What is compiled already runs there too.
        stance = torch.compiler.set_stance("eager_on_recompile") if _is_capturing(tensors[0]) else nullcontext()
        try:
            with torch.no_grad(), stance:
                return compiled()(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            result = function(*arguments)  # raises too, unless the reason is torch.compile
            _stop_fusing(error)
            return result

    return run


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _stop_fusing(error: Exception) -> None:
    global devices
    if not devices:
        return  # an operator within this one said it
    devices = ()
    warnings.warn(
        "sinkhorn_ext runs in plain torch without torch.compile, which does not work here; this is slower. To compile "
        f"its kernels instead: pip install --no-build-isolation -e . The reason: {error}",
        stacklevel=3,
    )
