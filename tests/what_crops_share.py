"""What a run on `shapes` has found that two crops of an image share: its classes, or where the image is light.

python tests/what_crops_share.py [checkpoint]        # default: runs/shapes/checkpoint.pth; half a minute

Rows are the directions in which embeddings of two crops of an image agree best over 2,000 validation images
(canonical correlations), with the share of their variance that lies between classes, and what a thumbnail of the
image's brightness predicts of them (R squared on 500 images, of a quadratic fitted to the others).
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import augment_singly, open_images
from eval_linear import load_checkpoint
from train import build_model, build_multicrop, run

DIRECTIONS, THUMBNAILS, FITTED = 4, (1, 2, 4), 1500


def agreement(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical correlations of two crops' embeddings [N, D], with a ridge, and each image's place: [D], [N, D]."""
    first, second = (embeddings.double() - embeddings.double().mean(0) for embeddings in (first, second))
    covariance = (first.T @ first + second.T @ second) / (2 * len(first))
    variances, axes = torch.linalg.eigh(covariance)
    whitening = axes * (variances + 0.01 * variances.mean()).rsqrt()
    shared = whitening.T @ (first.T @ second + second.T @ first) @ whitening / (2 * len(first))
    correlations, directions = torch.linalg.eigh(shared)
    return correlations.flip(0), ((first + second) @ whitening @ directions).flip(1)


def share_between(labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of the variance of places [N, C], what lies between the classes: [C]."""
    members = F.one_hot(labels).double()
    means = members.T @ places / members.sum(0)[:, None]
    return means[labels].var(0) / places.var(0)


def predicted(grey: torch.Tensor, side: int, places: torch.Tensor) -> torch.Tensor:
    """R squared of places [N, C] by images' brightness [N, S, S] in side x side cells, the same if mirrored: [C]."""
    cells = F.adaptive_avg_pool2d(grey[:, None], side)
    cells = (cells + cells.flip(3)).flatten(1).double()  # flips leave a crop's meaning alone
    cells = (cells - cells.mean(0)) / cells.std(0)
    inputs = torch.cat([torch.ones(len(cells), 1), cells, cells**2], 1)
    ridge = 10 * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs[:FITTED].T @ inputs[:FITTED] + ridge, inputs[:FITTED].T @ places[:FITTED])
    errors = places[FITTED:] - inputs[FITTED:] @ weights
    return 1 - errors.pow(2).sum(0) / (places[FITTED:] - places[:FITTED].mean(0)).pow(2).sum(0)


@torch.no_grad()
def main(path: str = "runs/shapes/checkpoint.pth") -> None:
    checkpoint = load_checkpoint(path)
    options = Namespace(**checkpoint.get("options", {}))
    if getattr(options, "dataset", None) != "shapes" or options.nmb_crops[0] < 2:
        raise ValueError(f"checkpoint: expected one of train.py --dataset shapes with two large crops, got {path}")
    model = build_model(options)
    model.load_state_dict(checkpoint["state_dict"])
    model.eval()
    images = open_images("shapes", split="val")
    pixels, labels = zip(*images, strict=True)
    rngs = [np.random.default_rng((0, i)) for i in range(len(images))]
    large, rows = build_multicrop(options).cut(pixels, rngs)[0]
    two = slice(2 * len(images))
    crops = torch.from_numpy(augment_singly(large[two], rows[two]))
    first, second = torch.cat([model([batch])[0] for batch in crops.split(250)]).chunk(2)
    correlations, places = agreement(first, second)
    between = share_between(torch.tensor(labels), places)
    grey = torch.stack(pixels).float().mean(1)
    light = [predicted(grey, side, places) for side in THUMBNAILS]
    print(f"{path}: {checkpoint['epoch']} epochs")
    print("correlation  classes  " + "  ".join(f"light {side}x{side}" for side in THUMBNAILS))
    for i in range(DIRECTIONS):
        cells = "  ".join(f"{max(0.0, column[i].item()):9.2f}" for column in light)
        print(f"{correlations[i]:11.2f}  {between[i]:7.2f}  {cells}")


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:2]))
