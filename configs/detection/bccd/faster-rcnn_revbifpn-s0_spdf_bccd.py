# python detection/train.py configs/detection/bccd/faster-rcnn_revbifpn-s0_spdf_bccd.py
#
# The backbone starts from a sparse pre-training and is fine-tuned dense (2303.10464); its masks are dropped. The
# pre-training: classification/train.py --config configs/classification/prune/cifar10_pretrain_revbifpn_s0.yaml
# --experiment s0-75; where its checkpoint is: SPDF_CHECKPOINT=/path.
_base_ = "./faster-rcnn_revbifpn-s0_bccd.py"
checkpoint = "{{$SPDF_CHECKPOINT:output/train/s0-75/last.pth.tar}}"
model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint=checkpoint)))
