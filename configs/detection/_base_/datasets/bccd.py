# BCCD, photographs of blood cells (MIT licence) with COCO files. Where they are: BCCD_ROOT=/path, or in
# detection/train.py `--cfg-options data_root=/path`.
data_root = "{{$BCCD_ROOT:data/bccd}}"
read = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
resize = [dict(type="Resize", scale=(320, 240), keep_ratio=True)]
pack = [dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))]
flips = [dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])]
dataset = dict(
    type="CheckedCocoDataset",
    data_root=data_root,
    data_prefix=dict(img="images/"),
    metainfo=dict(classes=("RBC", "WBC", "Platelets")),
)
train = dict(
    **dataset, ann_file="train.json", filter_cfg=dict(filter_empty_gt=True), pipeline=read + resize + flips + pack
)
val = dict(**dataset, ann_file="val.json", test_mode=True, pipeline=read + resize + pack)
test = dict(**dataset, ann_file="test.json", test_mode=True, pipeline=read + resize + pack)
loader = dict(batch_size=4, num_workers=2, persistent_workers=True)
train_dataloader = dict(**loader, sampler=dict(type="DefaultSampler", shuffle=True), dataset=train)
val_dataloader = dict(**loader, sampler=dict(type="DefaultSampler", shuffle=False), dataset=val)
test_dataloader = dict(**loader, sampler=dict(type="DefaultSampler", shuffle=False), dataset=test)
val_evaluator = dict(type="CheckedCocoMetric", ann_file=data_root + "/val.json", metric="bbox")
test_evaluator = dict(type="CheckedCocoMetric", ann_file=data_root + "/test.json", metric="bbox")
