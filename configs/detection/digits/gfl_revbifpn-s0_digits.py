# python -m detection.digits && python detection/train.py configs/detection/digits/gfl_revbifpn-s0_digits.py
_base_ = [
    "../_base_/models/gfl_revbifpn_small.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/scratch.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(bbox_head=dict(num_classes=10))
