# Faster R-CNN for small images, trained from scratch: 64 channels, batch norm, anchors of 16 to 128 pixels.
_base_ = "./faster-rcnn_revbifpn.py"
norm_cfg = dict(type="BN", requires_grad=True)
proposals = dict(nms_pre=200, max_per_img=100)
model = dict(
    neck=dict(out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=proposals,
        rcnn=dict(sampler=dict(num=64, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=proposals),
)
