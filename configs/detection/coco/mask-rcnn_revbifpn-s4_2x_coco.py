# python detection/train.py configs/detection/coco/mask-rcnn_revbifpn-s4_2x_coco.py
_base_ = [
    "../_base_/models/mask-rcnn_revbifpn.py",
    "../_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_2x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(backbone=dict(arch="s4"), neck=dict(in_channels=[192, 256, 512, 1280]))
