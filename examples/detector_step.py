"""Builds the detector of a config and takes one training step on a made image: no data, no GPU.

python examples/detector_step.py examples/retinanet_revbifpn.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

CONFIG = Path(__file__).with_name("retinanet_revbifpn.py")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Takes the step, prints the losses and what was learnt from it, and returns the losses."""
    paths = sys.argv[1:] if argv is None else list(argv)
    config = Config.fromfile(paths[0] if paths else CONFIG)  # imports revnets.mm, which registers the backbone
    init_default_scope("mmdet")
    torch.manual_seed(0)
    detector = MODELS.build(config.model).train()

    height, width = 128, 160
    sample = DetDataSample(
        metainfo={"img_shape": (height, width), "pad_shape": (height, width), "scale_factor": (1, 1)}
    )
    box = torch.tensor([[30.0, 20.0, 110.0, 90.0]])
    sample.gt_instances = InstanceData(bboxes=box, labels=torch.tensor([1]))
    batch = detector.data_preprocessor(
        {"inputs": [torch.randint(0, 256, (3, height, width), dtype=torch.uint8)], "data_samples": [sample]}, True
    )

    losses = detector.loss(batch["inputs"], batch["data_samples"])
    total, words = detector.parse_losses(losses)
    total.backward()
    torch.optim.SGD(detector.parameters(), lr=0.01).step()
    reached = sum(p.grad is not None for p in detector.backbone.parameters())
    found = {name: value.item() for name, value in words.items()}
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print(f"gradients reached {reached} tensors of the {detector.backbone.mode} backbone")
    return found


if __name__ == "__main__":
    main()
