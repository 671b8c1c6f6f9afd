"""Image classification on timm's own parts: scripts to train, validate, make a small data set, and the quickstart.

`train.py` reads as steps: images are `data` (with `sources`, `images`), the network is `network` (with `models`), what
trains it `start` (with `trial`, `distill`, `sparse`), the folder of the run `journal` (with `folder`, `checkpoints`,
`resuming`, `recovery`, `report`), and `loop` goes over the epochs (with `captured`). `training` is the run that all of
them share, `state` what checkpoints hold of it, `runtime` the device and the processes. Options are declared in
`options` (with `learning`, `needs`, `policy`); the YAML files that set them are in `configs/classification/`.
"""
