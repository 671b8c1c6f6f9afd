# python tools/train.py configs/pose/td-hm_revbifpn-s0_8xb64-210e_coco-256x192.py   (mmpose's)
# HRNet's recipe in mmpose, with our backbone in its slot: heatmaps of its finest map. COCO_ROOT=/path: where COCO is.
_base_ = "mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py"
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
data_root = "{{$COCO_ROOT:data/coco}}/"
people = "annotations/person_keypoints_val2017.json"
model = dict(
    backbone=dict(_delete_=True, type="RevBiFPN", arch="s0", out_indices=(0,)),
    head=dict(in_channels=48),
)
boxes = "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
val = dict(data_root=data_root, bbox_file=data_root + boxes)
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=val)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + people)
test_evaluator = val_evaluator
