"""bench.what_crops_share explains a direction of the embeddings by what it is made of, and by nothing else."""

import torch
import torch.nn.functional as F

from bench.what_crops_share import agreement, predicted_by_brightness, share_between_classes


def test_finds_what_crops_share_and_what_explains_it():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 10
    grey = torch.rand(2000, 8, 8, generator=generator)
    by_class = torch.randn(10, generator=generator)[labels]
    upper_half = F.adaptive_avg_pool2d(grey[:, None], 2)[:, 0, 0].sum(1)
    upper_half = (upper_half - upper_half.mean()) / upper_half.std()
    hidden = torch.stack([by_class, upper_half, torch.zeros(2000)], 1)
    mixed = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q

    def crop():  # the first two dimensions have little noise; the third is noise of each crop
        noise = torch.randn(2000, 3, generator=generator) * torch.tensor([0.1, 0.3, 1.0])
        return (hidden + noise) @ mixed

    correlations, positions = agreement(crop(), crop())
    assert correlations[0] > 0.95 and 0.85 < correlations[1] < 0.93 and correlations[2].abs() < 0.1
    between = share_between_classes(labels, positions)
    light, level = (predicted_by_brightness(grey, cells, positions) for cells in (2, 1))
    assert between[0] > 0.95 and between[1:].max() < 0.05
    assert light[1] > 0.9 and light[0] < 0.05 and level[1] < 0.7
