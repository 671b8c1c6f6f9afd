"""Detectors of MMDetection on our backbone, made small: one declaration each, from the configs that it ships."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import get_installed_path

CLASSES = 3
CHANNELS = (48, 64, 128, 320)
"""Of RevBiFPN-S0."""
WIDTH = 32
NUMBERS = {
    "num_classes": CLASSES,
    "num_things_classes": CLASSES,
    "num_stuff_classes": 0,
    "class_weight": [1.0] * CLASSES + [0.1],
    "embed_dims": WIDTH,
    "num_feats": WIDTH // 2,
    "feedforward_channels": 2 * WIDTH,
    "fc_out_channels": WIDTH,
    "feat_channels": WIDTH,
    "conv_out_channels": WIDTH,
    "out_channels": WIDTH,
    "proposal_feature_channel": WIDTH,
    "num_heads": 4,
    "num_layers": 1,
    "stacked_convs": 1,
    "num_queries": 10,
    "num_proposals": 10,
}
"""What is small, by its name, wherever a config has it."""


@dataclass(frozen=True)
class Detector:
    """A config of MMDetection, and what it takes beyond ``NUMBERS``.

    Attributes:
        config: below ``configs/``.
        levels: the backbone's maps that its neck reads.
        change: of the shrunk model.
        memory: activations in reversible mode are less than this part of those in `store`, two images of 128 pixels;
            where it was measured.
        unused: parameters that no loss of this step reaches, by a part of their name.
    """

    config: str
    levels: Sequence[int] = (0, 1, 2, 3)
    change: Callable[[Any], None] = lambda model: None
    memory: float | None = None
    unused: tuple[str, ...] = ()


def write(detector: Detector, folder: Path, arch: str = "s0") -> str:
    """The path of its config."""
    path = Path(get_installed_path("mmdet")) / ".mim" / "configs" / detector.config
    cfg = Config.fromfile(path)
    model = cfg.model
    _shrink(model)
    head = model.neck if model.get("neck") else model.panoptic_head
    head = head[0] if isinstance(head, list) else head
    head.in_channels = [CHANNELS[k] for k in detector.levels]
    if head.get("start_level") and len(detector.levels) < len(CHANNELS):
        head.start_level = 0
    model.backbone = {"type": "RevBiFPN", "arch": arch, "out_indices": list(detector.levels)}
    detector.change(model)
    cfg.custom_imports = {"imports": ["revnets.mm"], "allow_failed_imports": False}
    written = folder / path.name
    cfg.dump(written)
    return str(written)


def _shrink(node: Any) -> None:
    if isinstance(node, list | tuple):
        for child in node:
            _shrink(child)
    if isinstance(node, dict):
        for key, value in node.items():
            if key in NUMBERS and type(value) in (int, list):
                node[key] = NUMBERS[key]
            elif key == "in_channels" and isinstance(value, int):
                node[key] = WIDTH
            else:
                _shrink(value)


def _detr(model: Any) -> None:
    model.bbox_head.embed_dims = WIDTH


def _dino(model: Any) -> None:
    _detr(model)
    model.dn_cfg.group_cfg.num_dn_queries = 10


def _condinst(model: Any) -> None:
    model.mask_head.update(feat_channels=8, num_layers=3)  # which make its `num_params`
    model.mask_head.mask_feature_head.out_channels = 8


def _mask2former(model: Any) -> None:
    model.train_cfg.num_points = 64


def _centernet(model: Any) -> None:
    model.neck.update(in_channels=CHANNELS[-1], num_deconv_filters=(WIDTH,) * 3)


def _yolof(model: Any) -> None:
    model.neck.update(in_channels=CHANNELS[-1], block_mid_channels=WIDTH // 2)


def _sparse_rcnn(model: Any) -> None:
    head = model.roi_head
    head.update(num_stages=2, stage_loss_weights=[1, 1], bbox_head=head.bbox_head[:2])
    model.train_cfg.rcnn = model.train_cfg.rcnn[:2]


ZOO = {
    "FCOS": Detector("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", (1, 2, 3), memory=0.15),
    "ATSS": Detector("atss/atss_r50_fpn_1x_coco.py", (1, 2, 3), memory=0.15),
    "GFL": Detector("gfl/gfl_r50_fpn_1x_coco.py", (1, 2, 3), memory=0.15),
    "Cascade R-CNN": Detector("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", memory=0.6),
    "Deformable DETR": Detector("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", (1, 2, 3), _detr, memory=0.15),
    "DINO": Detector("dino/dino-4scale_r50_8xb2-12e_coco.py", (1, 2, 3), _dino, memory=0.15),
    "RetinaNet": Detector("retinanet/retinanet_r50_fpn_1x_coco.py", (1, 2, 3), memory=0.15),
    "SOLOv2": Detector("solov2/solov2_r50_fpn_1x_coco.py", memory=0.3),
    "CondInst": Detector("condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py", (1, 2, 3), _condinst, memory=0.15),
    "VFNet": Detector("vfnet/vfnet_r50_fpn_1x_coco.py", (1, 2, 3), memory=0.15),
    "Mask2Former": Detector("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", change=_mask2former, memory=0.25),
    "MaskFormer": Detector("maskformer/maskformer_r50_ms-16xb1-75e_coco.py", memory=0.5),
    "YOLOX": Detector("yolox/yolox_tiny_8xb8-300e_coco.py", (1, 2, 3), memory=0.15),
    "RTMDet": Detector("rtmdet/rtmdet_tiny_8xb32-300e_coco.py", (1, 2, 3), memory=0.15),
    "CenterNet": Detector("centernet/centernet_r18_8xb16-crop512-140e_coco.py", (3,), _centernet, memory=0.15),
    "CenterNet, updated": Detector(
        "centernet/centernet-update_r50_fpn_8xb8-amp-lsj-200e_coco.py", (1, 2, 3), memory=0.15
    ),
    "Sparse R-CNN": Detector("sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py", change=_sparse_rcnn, memory=0.15),
    "TOOD": Detector("tood/tood_r50_fpn_1x_coco.py", (1, 2, 3), memory=0.15),
    "Faster R-CNN, CARAFE": Detector("carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py", memory=0.42),
    "Mask R-CNN, CARAFE": Detector("carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py", memory=0.92),
    "Guided Anchoring": Detector("guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py", (1, 2, 3), memory=0.15),
    "Guided Anchoring, Faster R-CNN": Detector("guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py", memory=0.25),
    "PISA": Detector("pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py"),
    "AutoAssign": Detector("autoassign/autoassign_r50-caffe_fpn_1x_coco.py", (1, 2, 3)),
    "Cascade Mask R-CNN": Detector("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"),
    "Cascade RPN": Detector("cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py"),
    "DAB-DETR": Detector("dab_detr/dab-detr_r50_8xb2-50e_coco.py", (3,), unused=("decoder.query_scale",)),
    "DDOD": Detector("ddod/ddod_r50_fpn_1x_coco.py", (1, 2, 3)),
    "DETR": Detector("detr/detr_r50_8xb2-150e_coco.py", (3,)),
    "Double Heads": Detector("double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py"),
    "DyHead": Detector("dyhead/atss_r50_fpn_dyhead_1x_coco.py", (1, 2, 3)),
    "Dynamic R-CNN": Detector("dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py"),
    "FoveaBox": Detector("foveabox/fovea_r50_fpn_4xb4-1x_coco.py", (1, 2, 3)),
    "FPG": Detector("fpg/faster-rcnn_r50_fpg_crop640-50e_coco.py"),
    "FreeAnchor": Detector("free_anchor/freeanchor_r50_fpn_1x_coco.py", (1, 2, 3)),
    "FSAF": Detector("fsaf/fsaf_r50_fpn_1x_coco.py", (1, 2, 3)),
    "GHM": Detector("ghm/retinanet_r50_fpn_ghm-1x_coco.py", (1, 2, 3)),
    "Grid R-CNN": Detector("grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py"),
    "GRoIE": Detector("groie/faste-rcnn_r50_fpn_groie_1x_coco.py"),
    "Hybrid Task Cascade": Detector("htc/htc-without-semantic_r50_fpn_1x_coco.py"),
    "Libra R-CNN": Detector("libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py"),
    "Mask Scoring R-CNN": Detector("ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py"),
    "Mask2Former, panoptic": Detector("mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py", change=_mask2former),
    "PAA": Detector("paa/paa_r50_fpn_1x_coco.py", (1, 2, 3)),
    "PAFPN": Detector("pafpn/faster-rcnn_r50_pafpn_1x_coco.py"),
    "Panoptic FPN": Detector("panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py"),
    "PointRend": Detector("point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py"),
    "RepPoints": Detector("reppoints/reppoints-moment_r50_fpn_1x_coco.py", (1, 2, 3)),
    "RTMDet-Ins": Detector("rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", (1, 2, 3)),
    "SABL": Detector("sabl/sabl-retinanet_r50_fpn_1x_coco.py", (1, 2, 3)),
    "SOLO": Detector("solo/solo_r50_fpn_1x_coco.py"),
    "YOLACT": Detector("yolact/yolact_r50_1xb8-55e_coco.py", (1, 2, 3)),
    "YOLOF": Detector("yolof/yolof_r50-c5_8xb8-1x_coco.py", (3,), _yolof),
}
"""By what their papers call them; the first column of docs/detection.md's table."""
