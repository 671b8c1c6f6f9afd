# python detection/train.py configs/detection/coco/retinanet_revbifpn-s1_1x_coco.py
_base_ = [
    "../_base_/models/retinanet_revbifpn.py",
    "../_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(backbone=dict(arch="s1"), neck=dict(in_channels=[80, 160, 416]))
optim_wrapper = dict(optimizer=dict(lr=0.01))
