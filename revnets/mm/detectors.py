"""MMDetection configs for ``revnets profile``: backbone, backbone and neck, and the whole detector."""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path
from torch import Tensor, nn

from ..profiling.fake import ProfileError
from ..profiling.target import Job, Setting, Target, as_job, is_size, register_reader, training_loss
from ..reversible import RevSequential, set_mode
from ..training.errors import reason

PARTS = ("backbone", "backbone + neck", "detector")
DEFAULT_SIZE = (800, 1333)
DIVISOR = 32
BOXES_PER_IMAGE = 8
NECK_DEPTHS = (1, 2, 4, 8)
PRETRAINED = ("Pretrained", "PretrainedInit")


@dataclass(frozen=True)
class DetectorTarget(Target):
    """A detector of an MMDetection config, or the part of it up to the neck, at an image size and a memory mode.

    Prediction and measurement of the parts run the same step on the mean of squares of their outputs. The whole
    detector is *measured* in a real training step on random images with ``BOXES_PER_IMAGE`` boxes. It is *predicted*
    with its heads at full load, since assigning boxes depends on values: all RoIs that the sampler may take, spread
    evenly over the levels, and as many positive ones as it allows for masks; the assignment itself is left out.

    Args:
        name: stem of the config's file.
        img_size: short side of the images, pixels.
        batch_size: images per step.
        mode: memory mode of everything in the detector that has one.
        part: one of ``PARTS``.
        config: path, or ``mmdet::...`` for a config that MMDetection ships.
        aspect: long side over short side.
        options: changes to the config, by dotted keys.
    """

    part: str = PARTS[-1]
    config: str = ""
    aspect: float = DEFAULT_SIZE[1] / DEFAULT_SIZE[0]

    def __str__(self) -> str:
        return f"{self.title} @{self.img_size}x{round(self.img_size * self.aspect)} batch {self.batch_size}"

    @property
    def title(self) -> str:
        """The detector and the part of it."""
        return f"{self.name} {self.part}"

    def columns(self) -> dict[str, Any]:
        """What it is, for files."""
        return {**super().columns(), "part": self.part, "width": round(self.img_size * self.aspect)}

    @property
    def mode_name(self) -> str:
        """The mode in words."""
        return "plain" if self.mode == "store" else self.mode

    def build(self, setting: Setting, device: torch.device | str) -> Job:
        """The step on ``device``; on ``"meta"``, the one whose shapes do not depend on values."""
        torch.manual_seed(0)
        with torch.device(device):
            cfg = _read(self.config, dict(self.options))
            detector = _build(cfg, self.mode, setting)
            height, width = (-(-round(s) // DIVISOR) * DIVISOR for s in (self.img_size, self.img_size * self.aspect))
            x = torch.randn(self.batch_size, 3, height, width)
        if setting.channels_last:
            detector, x = detector.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        measured = self.part == "detector" and torch.device(device).type != "meta"
        if measured:
            _initialise(detector)
        step = RealStep(detector, _annotations(x, self, _loaded(cfg))) if measured else FixedStep(detector, self.part)
        return as_job(step.train(), x, training_loss if not measured else _itself, setting)

    def deeper(self) -> Sequence[Target]:
        """Backbone and neck with the neck repeated more and more often; as it is where it cannot be."""
        neck = _read(self.config).model.get("neck") or {}
        key = next((key for key in ("num_silos", "stack_times") if key in neck), None)
        if self.part != "backbone + neck":
            return []
        return [self] if key is None else [replace(self, options=((f"model.neck.{key}", n),)) for n in NECK_DEPTHS]

    def divisor(self, setting: Setting) -> int:
        """Image sides are padded to multiples of this."""
        return DIVISOR


def _itself(loss: Tensor) -> Tensor:
    return loss


@register_reader
def parse_config(text: str, setting: Setting, img_size: int | None = None, batch_size: int = 1) -> list[DetectorTarget]:
    """Targets of ``CONFIG.py[@HEIGHTxWIDTH][:BATCH]``: each part in each mode.

    Args:
        text: what was typed.
        setting: options of the networks.
        img_size: short side where the text has none; 800 by default.
        batch_size: where the text has none.

    Raises:
        ProfileError: for a config that cannot be read or built.
    """
    match = re.fullmatch(r"(.+\.py)(?:@(\d+)(?:x(\d+))?)?(?::(\d+))?", text)
    if match is None or not all(size is None or is_size(size) for size in match.groups()[1:]):
        raise ProfileError(f"{text!r}: expected CONFIG.py@HEIGHTxWIDTH:BATCH, such as faster-rcnn.py@800x1333:1")
    height = int(match[2] or img_size or DEFAULT_SIZE[0])
    aspect = int(match[3]) / height if match[3] else 1.0 if match[2] else DEFAULT_SIZE[1] / DEFAULT_SIZE[0]
    cfg = _read(match[1])
    modes = _modes(cfg, setting)
    parts = [part for part in PARTS if part != "backbone + neck" or cfg.model.get("neck")]
    size = (height, int(match[4] or batch_size))
    name = Path(match[1].rsplit("::", 1)[-1]).stem
    return [
        DetectorTarget(name, *size, mode, config=match[1], part=part, aspect=aspect) for mode in modes for part in parts
    ]


def _read(path: str, changes: dict[str, Any] | None = None) -> Config:
    file = Path(path)
    if path.startswith("mmdet::"):
        file = Path(get_installed_path("mmdet")) / ".mim" / "configs" / path.removeprefix("mmdet::")
    if not file.is_file():
        raise ProfileError(f"config {path!r} is not there: pass the path of a file, or mmdet::FOLDER/FILE.py")
    try:
        cfg = Config.fromfile(file)
        cfg.merge_from_dict(changes or {})
    except Exception as error:  # a config is a program: it may fail in any way
        raise ProfileError(f"config {path!r} cannot be read: {reason(error)}") from error
    if not cfg.get("model"):
        raise ProfileError(f"config {path!r} has no model: expected a detector's")
    return cfg


def _build(cfg: Config, mode: str | None, setting: Setting) -> Any:
    from mmdet.registry import MODELS

    init_default_scope("mmdet")
    model = copy.deepcopy(cfg.model)
    if mode == "checkpoint" and model.backbone.type != "RevBiFPN":
        model.backbone = {**model.backbone, "with_cp": True}
    for part in ("backbone", "neck"):
        for node in _nodes(model.get(part)):  # necks may be lists
            if node.get("type") in ("RevBiFPN", "RevBiFPNNeck"):
                node["exact"] = setting.exact
    try:
        detector = MODELS.build(model)
    except Exception as error:
        raise ProfileError(f"the model of {cfg.filename} cannot be built: {reason(error)}") from error
    detector = revert_sync_batchnorm(detector)  # as MMEngine's runner does in a process of its own
    if mode is not None and _is_reversible(detector):
        set_mode(detector, mode)
    return detector


def _initialise(detector: Any) -> None:
    """As at a run's start, without pretrained weights: some parameters are whatever lay in memory before."""
    for module in detector.modules():
        cfgs = getattr(module, "init_cfg", None) or []
        own = [cfg for cfg in (cfgs if isinstance(cfgs, list) else [cfgs]) if _type(cfg) not in PRETRAINED]
        if cfgs:
            module.init_cfg = own or None
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)  # it would say what becomes of each parameter
    try:
        detector.init_weights()
    finally:
        logger.setLevel(level)


def _is_reversible(detector: nn.Module) -> bool:
    return any(isinstance(m, RevSequential) for m in detector.modules())


def _modes(cfg: Config, setting: Setting) -> Sequence[str]:
    modes = ["store"]
    with torch.device("meta"):
        if _is_reversible(_build(cfg, None, setting)):
            modes.insert(0, "reversible")
        try:
            _build(cfg, "checkpoint", setting)
        except ProfileError:  # its backbone takes no `with_cp`
            return modes
    return [*modes, "checkpoint"]


class FixedStep(nn.Module):
    """The forward pass of a part of a detector with shapes that depend on no value: the outputs of all its heads.

    ``names`` are those of the detector's modules, where they are the same modules here.
    """

    def __init__(self, detector: Any, part: str) -> None:
        super().__init__()
        self.part = part
        self.names = frozenset(name for name, _ in detector.named_modules())
        self.backbone = detector.backbone
        self.neck = detector.neck if part != "backbone" and detector.with_neck else None
        heads = part == "detector"
        if heads:
            _check_heads(detector)
        # of two-stage detectors `rpn_head` and `roi_head`, of one-stage ones `bbox_head`
        self.dense_head = (getattr(detector, "rpn_head", None) or detector.bbox_head) if heads else None
        self.roi_head = getattr(detector, "roi_head", None) if heads else None
        if self.dense_head is not None:
            self.dense_head = copy.copy(self.dense_head)  # the detector's own keeps its anchors,
            # tensors that a fake twin of the head cannot have; forward passes (RTMDet's) read strides at most
            strides = getattr(getattr(self.dense_head, "prior_generator", None), "strides", None)
            self.dense_head.prior_generator = SimpleNamespace(strides=strides)
        self.sampler = detector.train_cfg["rcnn"]["sampler"] if self.roi_head is not None else None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Args: x: images ``(N, 3, H, W)``. Returns: outputs, in no particular shape."""
        maps = self.backbone(x)
        if self.neck is not None:
            maps = self.neck(maps)
        if self.dense_head is None:
            return list(maps)
        outputs = _flat(self.dense_head(maps))
        if self.roi_head is None or self.sampler is None:
            return outputs
        count = len(x) * self.sampler["num"]
        outputs += _flat(self.roi_head.bbox_head(_rois(self.roi_head.bbox_roi_extractor, maps, count)))
        if getattr(self.roi_head, "mask_head", None) is not None:
            positive = int(count * self.sampler["pos_fraction"])
            outputs.append(self.roi_head.mask_head(_rois(self.roi_head.mask_roi_extractor, maps, positive)))
        return outputs


def _check_heads(detector: Any) -> None:
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads import StandardRoIHead

    dense = getattr(detector, "rpn_head", None) or getattr(detector, "bbox_head", None)
    regions = getattr(detector, "roi_head", None)
    if not isinstance(dense, BaseDenseHead) or type(regions) not in (type(None), StandardRoIHead):
        raise ProfileError(
            f"the heads of {type(detector).__name__} cannot be predicted, only a dense head and mmdet's "
            "StandardRoIHead after it: use --part backbone,neck"
        )


def _rois(extractor: Any, maps: Sequence[Tensor], count: int) -> Tensor:
    """Features of ``count`` regions, the same number from each level: ``(count, C, h, w)``."""
    from torchvision.ops import roi_align

    layers = extractor.roi_layers
    numbers = [count // len(layers) + (k < count % len(layers)) for k in range(len(layers))]
    found = maps[0].new_zeros(count, maps[0].shape[1], *layers[0].output_size)
    start = 0
    for layer, y, n in zip(layers, maps, numbers, strict=False):
        rois = y.new_zeros(n, 5)
        found[start : start + n] = roi_align(
            y, rois, layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        )
        start += n
    return found


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for item in outputs for t in _flat(item)]


class RealStep(nn.Module):
    """The loss of a detector in a training step on images with random boxes (and masks), in a run's first epoch."""

    def __init__(self, detector: Any, samples: list[Any]) -> None:
        super().__init__()
        hub = MessageHub.get_current_instance()  # where TOOD's head, for one, looks
        if hub.get_info("epoch") is None:
            hub.update_info("epoch", 0)
        self.detector = detector
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: images ``(N, 3, H, W)``. Returns: the sum of the detector's losses."""
        return self.detector.parse_losses(self.detector(x, copy.deepcopy(self.samples), mode="loss"))[0]


def _loaded(cfg: Config) -> set[str]:
    """What the config's pipelines load beside boxes: ``"mask"``, which some assigners use where it is, ``"seg"``."""
    loaders = [node for node in _nodes(cfg.to_dict()) if _type(node).endswith("Annotations")]
    if not loaders:
        return {"mask"}
    kinds = ("mask", "seg")
    return {k for k in kinds if any(node.get(f"with_{k}", "Panoptic" in _type(node)) for node in loaders)}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries of a config."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        yield from _nodes(child)


def _type(node: dict[str, Any]) -> str:
    kind = node.get("type", "")
    return str(getattr(kind, "__name__", kind))


def _annotations(x: Tensor, target: DetectorTarget, loaded: set[str]) -> list[Any]:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    generator = torch.Generator().manual_seed(0)
    height, width = x.shape[-2:]
    shape = (target.img_size, round(target.img_size * target.aspect))
    samples = []
    for _ in range(len(x)):
        side = torch.tensor([shape[1], shape[0]])
        corners = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * side * 0.6
        sides = (0.1 + 0.25 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)) * side
        boxes = torch.cat((corners, corners + sides), dim=1)
        instances = InstanceData(bboxes=boxes.to(x.device))
        instances.labels = torch.zeros(BOXES_PER_IMAGE, dtype=torch.long, device=x.device)
        masks = torch.zeros(BOXES_PER_IMAGE, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        if "mask" in loaded:
            instances.masks = BitmapMasks(masks.numpy(), height, width)
        sample = DetDataSample(
            metainfo={
                "img_shape": shape,
                "ori_shape": shape,
                "pad_shape": (height, width),
                "batch_input_shape": (height, width),
                "scale_factor": (1.0, 1.0),
            }
        )
        sample.gt_instances = instances
        if "seg" in loaded:
            sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, height, width, dtype=torch.long, device=x.device))
        sample.ignored_instances = InstanceData(bboxes=boxes.new_zeros(0, 4).to(x.device))
        samples.append(sample)
    return samples
