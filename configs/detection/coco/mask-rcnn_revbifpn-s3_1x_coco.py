# python detection/train.py configs/detection/coco/mask-rcnn_revbifpn-s3_1x_coco.py
_base_ = [
    "../_base_/models/mask-rcnn_revbifpn.py",
    "../_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(backbone=dict(arch="s3"), neck=dict(in_channels=[128, 160, 336, 848]))
