# python -m detection.digits && python detection/train.py configs/detection/digits/faster-rcnn_revbifpn-s0_digits.py
_base_ = [
    "../_base_/models/faster-rcnn_revbifpn_small.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/scratch.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=10)))
