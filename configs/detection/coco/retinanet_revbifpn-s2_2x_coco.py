# python detection/train.py configs/detection/coco/retinanet_revbifpn-s2_2x_coco.py
_base_ = [
    "../_base_/models/retinanet_revbifpn.py",
    "../_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_2x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(backbone=dict(arch="s2"), neck=dict(in_channels=[128, 256, 640]))
optim_wrapper = dict(optimizer=dict(lr=0.01))
