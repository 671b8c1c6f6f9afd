# Mask R-CNN as MMDetection's HRNet recipe has it (HRFPN, 256 channels); files of a size set arch and in_channels.
# The backbone starts from random weights; from pretrained ones with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type="RevBiFPN", arch="s0"),
    neck=dict(_delete_=True, type="LeanHRFPN", in_channels=[48, 64, 128, 320], out_channels=256),
)
