# python detection/train.py configs/detection/coco/mask-rcnn_revbifpn-s3_amp-1x_coco.py
_base_ = "./mask-rcnn_revbifpn-s3_1x_coco.py"
optim_wrapper = dict(type="Bf16OptimWrapper")
