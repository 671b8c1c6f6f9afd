# python detection/train.py configs/detection/bccd/retinanet_revbifpn-s0_bccd.py
_base_ = [
    "../_base_/models/retinanet_revbifpn_small.py",
    "../_base_/datasets/bccd.py",
    "../_base_/schedules/scratch_30e.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(bbox_head=dict(num_classes=3))
