"""A step whose loss or gradient was inf or nan, run again: python train.py --replay DUMP/bad_step-0.pth."""

import argparse
import warnings
from collections.abc import Callable

import torch
from torch.utils.data import Dataset

import checkpoint
import machine
from data import CroppedBatches, crops_to_device
from images import GIVEN, GivenImages, open_images
from launch import UserError, log
from options import build_loss, build_model, build_multicrop


def replay(path: str, data_path: str | None, device: torch.device, given: Dataset | None = None) -> str | None:
    """Run the step of a bad_step-RANK.pth again, with anomaly detection. Return its first bad tensor, or None.

    data_path: where the images are now; None: as in the run. given: the Dataset of a run on --dataset python. Of
    several processes it runs the images of one, so codes are balanced over fewer images. Embeddings that the queue got
    from the bad step on are left out.
    """
    contents = checkpoint.load(path)
    if "image_indices" not in contents:
        raise UserError(f"--replay: expected a bad_step-RANK.pth of a run that stopped, got {path}")
    older = {"accumulate": 1, "checkpoint_activations": "off"}  # options that older files lack
    args = argparse.Namespace(**(older | contents["options"]))
    if args.dataset == GIVEN and given is None:
        raise UserError(
            f"--replay: the run of {path} had its images from Python; run it again with them: "
            f'train.main(train.parse_args(["--replay", "{path}"]), images=dataset)'
        )
    if given is None:
        images = open_images(args.dataset, data_path or args.data_path, value_range=contents.get("value_range"))
    else:
        images = GivenImages(given)
    keys = [(contents["epoch"] - 1, index) for index in contents["image_indices"]]
    batch, _ = CroppedBatches(images, build_multicrop(args), args.seed).__getitems__(keys)
    dtype, model, criterion = machine.choose_precision(args.precision, device), build_model(args), build_loss(args, 1)
    model.load_state_dict(contents["state_dict"])
    queue, filled = (contents["queue"][name] for name in ("queue", "queue_filled"))
    # [A, Q, D], newest first; without the bad step's own batch, which came after its codes were computed
    criterion.queue = queue[:, (contents["steps_since"] + 1) * len(keys) :]
    criterion.queue_filled = criterion.queue.shape[1] * (filled == queue.shape[1])  # codes use it only when it is full
    criterion.queue_started = contents["queue"]["_extra_state"]["started"]
    model, criterion = model.to(device), criterion.to(device)
    bad: list[str] = []

    def check(name: str, *tensors: torch.Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            bad.append(name)

    def check_output(name: str) -> Callable:
        return lambda _module, _inputs, out: check(f"output of {name}", *(out if isinstance(out, tuple) else [out]))

    for name, module in model.named_modules():
        module.register_forward_hook(check_output(name or "the model"))
    crops = crops_to_device(batch, device, parts=args.accumulate)
    for i, crop in enumerate(crops):
        check(f"crop {i}", crop)
    for name, weight in model.named_parameters():
        check(f"weight {name}", weight)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), torch.autograd.set_detect_anomaly(True):
        embeddings, scores = model(crops)
        loss = criterion(embeddings, scores, model.prototypes.weight)
    check("the loss", loss)
    try:
        with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it too
            loss.backward()
    except RuntimeError as error:  # names the operation whose gradient is nan
        bad.append(str(error).splitlines()[0])
    for name, weight in reversed(list(model.named_parameters())):  # in the order of backward
        if weight.grad is not None:
            check(f"gradient of {name}", weight.grad)
    log(f"step {contents['step']} again: the loss is {loss.item():.4f}; in the run, {contents['reason']}")
    log(f"first bad tensor: {bad[0]}" if bad else "no bad tensor: here the step is finite")
    return bad[0] if bad else None
