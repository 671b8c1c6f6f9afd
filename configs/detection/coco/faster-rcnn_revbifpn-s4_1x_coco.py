# python detection/train.py configs/detection/coco/faster-rcnn_revbifpn-s4_1x_coco.py
_base_ = [
    "../_base_/models/faster-rcnn_revbifpn.py",
    "../_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(backbone=dict(arch="s4"), neck=dict(in_channels=[192, 256, 512, 1280]))
