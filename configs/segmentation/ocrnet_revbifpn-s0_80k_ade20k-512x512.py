# python tools/train.py configs/segmentation/ocrnet_revbifpn-s0_80k_ade20k-512x512.py   (mmsegmentation's)
# HRNet's recipe in mmsegmentation, with our backbone in its slot. Nothing is inherited from there: MMEngine looks for
# the configs of "mmseg::" under a name that the maintained fork is not installed by.
_base_ = ["./_base_/ocrnet_revbifpn.py", "./_base_/ade20k.py", "./_base_/runtime_80k.py"]
model = dict(backbone=dict(arch="s0"))
