# python detection/train.py configs/detection/coco/rtmdet_revbifpn-s2_300e_coco.py
# RTMDet's recipe for its small network, as MMDetection has it.
_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
data_root = "{{$COCO_ROOT:data/coco}}"
dataset = dict(type="CheckedCocoDataset", data_root=data_root)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(type="CheckedCocoMetric", ann_file=data_root + "/annotations/instances_val2017.json")
test_evaluator = val_evaluator
model = dict(
    backbone=dict(_delete_=True, type="RevBiFPN", arch="s2", out_indices=(1, 2, 3)),
    neck=dict(in_channels=[128, 256, 640]),
)
