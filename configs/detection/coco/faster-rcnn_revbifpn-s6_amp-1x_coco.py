# python detection/train.py configs/detection/coco/faster-rcnn_revbifpn-s6_amp-1x_coco.py
_base_ = "./faster-rcnn_revbifpn-s6_1x_coco.py"
optim_wrapper = dict(type="Bf16OptimWrapper")
