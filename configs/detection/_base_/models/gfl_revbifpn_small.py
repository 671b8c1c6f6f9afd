# GFL for small images, trained from scratch: four levels from stride 4, 64 channels, batch norm.
_base_ = "./gfl_revbifpn.py"
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[48, 64, 128, 320], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=4, strides=[4, 8, 16, 32]),
    ),
)
