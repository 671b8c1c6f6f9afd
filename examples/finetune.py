"""Fine-tunes any network of timm on a folder of images, with DIR/train/CLASS/*.jpg and DIR/validation/CLASS/*.jpg.

python examples/finetune.py DIR --model revbifpn_s0 --pretrained
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import revnets  # noqa: F401 - registers revbifpn_s0 to _s6 with timm


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, prints loss and accuracy of every epoch, and returns the last accuracy, %."""
    line = argparse.ArgumentParser(description="Fine-tune a network of timm on a folder of images.")
    line.add_argument("folder")
    line.add_argument("--model", default="revbifpn_s0")
    line.add_argument("--pretrained", action="store_true", help="start from the published weights (downloaded once)")
    line.add_argument("--epochs", type=int, default=3)
    line.add_argument("--batch-size", type=int, default=16)
    line.add_argument("--img-size", type=int, default=224)
    args = line.parse_args(argv)

    classes = ImageFolder(f"{args.folder}/train").classes
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(classes))
    config = {**resolve_model_data_config(model), "input_size": (3, args.img_size, args.img_size)}
    train = ImageFolder(f"{args.folder}/train", create_transform(**config, is_training=True))
    held_out = ImageFolder(f"{args.folder}/validation", create_transform(**config))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    accuracy = 0.0
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for images, labels in DataLoader(train, args.batch_size, shuffle=True):
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # activations are rebuilt here, op by op
            optimizer.step()
            total += loss.item() * len(images)
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(images.to(device)).argmax(1).cpu() == labels).sum())
                for images, labels in DataLoader(held_out, args.batch_size)
            )
        accuracy = 100 * right / len(held_out)
        print(f"epoch {epoch}: loss {total / len(train):.3f}, {accuracy:.1f}% of {len(held_out)} images right")
    return accuracy


if __name__ == "__main__":
    main()
