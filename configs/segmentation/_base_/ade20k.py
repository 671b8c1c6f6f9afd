# ADE20K as mmsegmentation wants it. Where it is: ADE20K_ROOT=/path.
data_root = "{{$ADE20K_ROOT:data/ade/ADEChallengeData2016}}"
load = dict(type="LoadImageFromFile")
labels = dict(type="LoadAnnotations", reduce_zero_label=True)
scale = (2048, 512)
train_pipeline = [
    load,
    labels,
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [load, dict(type="Resize", scale=scale, keep_ratio=True), labels, dict(type="PackSegInputs")]
train = dict(img_path="images/training", seg_map_path="annotations/training")
val = dict(img_path="images/validation", seg_map_path="annotations/validation")
loader = dict(num_workers=4, persistent_workers=True)
train_dataloader = dict(
    **loader,
    batch_size=4,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="ADE20KDataset", data_root=data_root, data_prefix=train, pipeline=train_pipeline),
)
val_dataloader = dict(
    **loader,
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ADE20KDataset", data_root=data_root, data_prefix=val, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
