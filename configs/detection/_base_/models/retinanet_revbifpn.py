# MMDetection's RetinaNet (FPN from stride 8, 256 channels) on RevBiFPN; files of a size set arch and in_channels.
# The backbone starts from random weights; from pretrained ones with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type="RevBiFPN", arch="s0", out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 320], start_level=0),
)
