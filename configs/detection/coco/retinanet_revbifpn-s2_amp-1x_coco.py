# python detection/train.py configs/detection/coco/retinanet_revbifpn-s2_amp-1x_coco.py
_base_ = "./retinanet_revbifpn-s2_1x_coco.py"
optim_wrapper = dict(type="Bf16OptimWrapper")
