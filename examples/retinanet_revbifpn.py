# A config of MMDetection: its RetinaNet, with RevBiFPN-S0 in place of ResNet-50.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
model = dict(
    # mode="store" would keep all activations; init_cfg=dict(type="Pretrained", checkpoint=FILE) starts from weights
    backbone=dict(_delete_=True, type="RevBiFPN", arch="s0", out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 320], start_level=0),
    bbox_head=dict(num_classes=3),
)
