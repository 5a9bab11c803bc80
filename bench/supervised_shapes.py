"""What labels achieve on the built-in images: train the recipe's network with them, some minutes on two cores.

python -m bench.supervised_shapes        # prints top-1 on the 2,000 validation images after each epoch
"""

import torch
import torch.nn.functional as F
from torch import nn

from data import CentreCrop, ProbeCrop, ordered_loader, training_loader
from images import open_images
from model import resnet18
from processes import run_script

EPOCHS, BATCH_SIZE = 10, 64


def main() -> None:
    """Train with cross-entropy and AdamW, and print the accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    backbone = resnet18(width=16, blocks=(1, 1, 1, 1), stem="medium")
    network = nn.Sequential(backbone, nn.Linear(backbone.num_features, 10)).to(memory_format=torch.channels_last)
    loader = training_loader(open_images("shapes", split="train"), ProbeCrop(64), BATCH_SIZE, workers=1)
    validation = ordered_loader(open_images("shapes", split="val"), CentreCrop(64, 64), 250)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        loader.batch_sampler.epoch = epoch
        network.train()
        for images, labels in loader:
            loss = F.cross_entropy(network(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            correct = torch.cat([(network(images).argmax(1) == labels).float() for images, labels in validation])
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.3f}  top-1 {100 * correct.mean():.1f} %", flush=True)


if __name__ == "__main__":
    run_script(main)
