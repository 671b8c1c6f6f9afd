# python -m detection.digits && python detection/train.py configs/detection/digits/mask-rcnn_revbifpn-s0_digits.py
_base_ = [
    "../_base_/models/mask-rcnn_revbifpn_small.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/scratch.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)))
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = dict(metric=["bbox", "segm"])
