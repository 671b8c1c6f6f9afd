# python detection/train.py configs/detection/coco/gfl_revbifpn-s2_1x_coco.py
_base_ = [
    "../_base_/models/gfl_revbifpn.py",
    "../_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(backbone=dict(arch="s2"), neck=dict(in_channels=[128, 256, 640]))
optim_wrapper = dict(optimizer=dict(lr=0.01))
