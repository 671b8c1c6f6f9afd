# Scenes of handwritten digits with boxes and masks, made by `python -m detection.digits`. Where they are:
# DIGITS_ROOT=/path, or in detection/train.py `--cfg-options data_root=/path`.
data_root = "{{$DIGITS_ROOT:data/digits-scenes}}"
dataset = dict(
    type="CheckedCocoDataset",
    data_root=data_root,
    metainfo=dict(classes=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="Resize", scale=(128, 128), keep_ratio=True),
        dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
    ],
)
loader = dict(batch_size=8, num_workers=1, persistent_workers=True)
train = dict(ann_file="train.json", data_prefix=dict(img="train/"), filter_cfg=dict(filter_empty_gt=True, min_size=32))
val = dict(ann_file="val.json", data_prefix=dict(img="val/"), test_mode=True)
test = dict(ann_file="test.json", data_prefix=dict(img="test/"), test_mode=True)
train_dataloader = dict(**loader, sampler=dict(type="DefaultSampler", shuffle=True), dataset=dict(**dataset, **train))
val_dataloader = dict(**loader, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(**dataset, **val))
test_dataloader = dict(**loader, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(**dataset, **test))
val_evaluator = dict(type="CheckedCocoMetric", ann_file=data_root + "/val.json", metric="bbox")
test_evaluator = dict(type="CheckedCocoMetric", ann_file=data_root + "/test.json", metric="bbox")
