# The small Faster R-CNN with a small mask head, and masks of 14 x 14 pixels per box.
_base_ = "./faster-rcnn_revbifpn_small.py"
roi_layer = dict(type="RoIAlign", output_size=7, sampling_ratio=0)
model = dict(
    type="MaskRCNN",
    roi_head=dict(
        mask_roi_extractor=dict(
            type="SingleRoIExtractor", roi_layer=roi_layer, out_channels=64, featmap_strides=[4, 8, 16, 32]
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=2,
            in_channels=64,
            conv_out_channels=64,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=14)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
