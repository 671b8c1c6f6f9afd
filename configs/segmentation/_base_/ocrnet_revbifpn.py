# OCRNet of mmsegmentation on our four maps of strides 4 to 32; files of another size set arch and both in_channels.
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
norm_cfg = dict(type="BN", requires_grad=True)  # on several GPUs: "SyncBN", for the backbone, too (its norm_cfg)
maps = dict(
    in_channels=[48, 64, 128, 320],
    in_index=(0, 1, 2, 3),
    input_transform="resize_concat",
    dropout_ratio=-1,
    num_classes=150,
    norm_cfg=norm_cfg,
    align_corners=False,
)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False)
model = dict(
    type="CascadeEncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        size=(512, 512),
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        seg_pad_val=255,
    ),
    num_stages=2,
    backbone=dict(type="RevBiFPN", arch="s0"),
    decode_head=[
        dict(
            type="FCNHead",
            channels=560,
            kernel_size=1,
            num_convs=1,
            concat_input=False,
            loss_decode=dict(loss_weight=0.4, **loss),
            **maps,
        ),
        dict(type="OCRHead", channels=512, ocr_channels=256, loss_decode=dict(loss_weight=1.0, **loss), **maps),
    ],
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
