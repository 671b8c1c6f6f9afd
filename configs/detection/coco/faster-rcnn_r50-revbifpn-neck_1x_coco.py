# python detection/train.py configs/detection/coco/faster-rcnn_r50-revbifpn-neck_1x_coco.py
# RevSilos in place of the FPN of MMDetection's ResNet-50: memory does not grow with `num_silos`.
_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
model = dict(
    neck=dict(
        _delete_=True,
        type="RevBiFPNNeck",
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        num_silos=3,
        num_outs=5,
    )
)
