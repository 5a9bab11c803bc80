"""What two crops of an image share in the embeddings of a run on `shapes`: its class, or where the image is bright.

    python -m bench.what_crops_share [CHECKPOINT]        # default: runs/shapes/checkpoint.pth; half a minute

Each row is a direction in which the embeddings of two crops agree best, over 2,000 validation images: a canonical
correlation. *classes* is the share of its variance that lies between classes. *light* is how well the brightness of the
image, in 1x1, 2x2 or 4x4 cells, predicts it: R squared on 500 images of a quadratic that was fitted to the others.
"""

import sys
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from data import augment_one_by_one
from images import open_images
from launch import UserError
from options import build_model, build_multicrop
from processes import run_script

DIRECTIONS, CELLS, FITTED = 4, (1, 2, 4), 1500


@torch.no_grad()
def main(path: str = "runs/shapes/checkpoint.pth") -> None:
    """Print the table. Raises UserError for a checkpoint of another run."""
    contents = checkpoint.load(path)
    options = Namespace(**contents.get("options", {}))
    if getattr(options, "dataset", None) != "shapes" or options.nmb_crops[0] < 2:
        raise UserError(f"checkpoint: expected a run of train.py --dataset shapes with two large crops, got {path}")
    model = build_model(options)
    model.load_state_dict(contents["state_dict"])
    model.eval()
    pixels, labels = zip(*open_images("shapes", split="val"), strict=True)
    rngs = [np.random.default_rng((0, i)) for i in range(len(pixels))]
    large, params = build_multicrop(options).crop(pixels, rngs)[0]
    two = slice(2 * len(pixels))  # the first two crops of all images
    crops = torch.from_numpy(augment_one_by_one(large[two], params[two]))
    first, second = torch.cat([model([batch])[0] for batch in crops.split(250)]).chunk(2)
    correlations, positions = agreement(first, second)
    between = share_between_classes(torch.tensor(labels), positions)
    grey = torch.stack(pixels).float().mean(1)
    light = [predicted_by_brightness(grey, cells, positions) for cells in CELLS]
    print(f"{path}: {contents['epoch']} epochs")
    print("correlation  classes  " + "  ".join(f"light {cells}x{cells}" for cells in CELLS))
    for i in range(DIRECTIONS):
        columns = "  ".join(f"{max(0.0, column[i].item()):9.2f}" for column in light)
        print(f"{correlations[i]:11.2f}  {between[i]:7.2f}  {columns}")


def agreement(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the directions in which two crops' embeddings [N, D] agree best, with a ridge (canonical correlations).

    Returns the correlations [D], best first, and each image's positions [N, D] along the directions.
    """
    first, second = (embeddings.double() - embeddings.double().mean(0) for embeddings in (first, second))
    covariance = (first.T @ first + second.T @ second) / (2 * len(first))
    variances, axes = torch.linalg.eigh(covariance)
    whitening = axes * (variances + 0.01 * variances.mean()).rsqrt()
    shared = whitening.T @ (first.T @ second + second.T @ first) @ whitening / (2 * len(first))
    correlations, directions = torch.linalg.eigh(shared)
    return correlations.flip(0), ((first + second) @ whitening @ directions).flip(1)


def share_between_classes(labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute which share of the variance of positions [N, C] lies between the classes: [C]."""
    members = F.one_hot(labels).double()
    means = members.T @ positions / members.sum(0)[:, None]
    return means[labels].var(0) / positions.var(0)


def predicted_by_brightness(grey: torch.Tensor, cells: int, positions: torch.Tensor) -> torch.Tensor:
    """Compute R squared [C] of positions [N, C] predicted from grey images [N, S, S] in cells x cells averages.

    A mirrored image has the same prediction.
    """
    brightness = F.adaptive_avg_pool2d(grey[:, None], cells)
    brightness = (brightness + brightness.flip(3)).flatten(1).double()  # crops are flipped at random
    brightness = (brightness - brightness.mean(0)) / brightness.std(0)
    inputs = torch.cat([torch.ones(len(brightness), 1), brightness, brightness**2], 1)
    ridge = 10 * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs[:FITTED].T @ inputs[:FITTED] + ridge, inputs[:FITTED].T @ positions[:FITTED])
    errors = positions[FITTED:] - inputs[FITTED:] @ weights
    return 1 - errors.pow(2).sum(0) / (positions[FITTED:] - positions[:FITTED].mean(0)).pow(2).sum(0)


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:2]))
