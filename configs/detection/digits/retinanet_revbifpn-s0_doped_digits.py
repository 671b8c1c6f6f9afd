# python -m detection.digits && python detection/train.py configs/detection/digits/retinanet_revbifpn-s0_doped_digits.py
# Sparse iso-FLOP layers in backbone, neck and head, their masks changed by RigL.
_base_ = "./retinanet_revbifpn-s0_digits.py"
conv_cfg = dict(type="SparseDopedConv2d", sparsity=0.75)
model = dict(
    backbone=dict(layers="sparse_doped:0.75"),
    neck=dict(conv_cfg=conv_cfg),
    bbox_head=dict(conv_cfg=conv_cfg),
)
custom_hooks = [dict(type="SparsityHook", schedule="rigl", interval=100)]
