"""Image classification on timm's own parts: scripts to train, validate, make a small data set, and the quickstart.

`train.py` reads as steps over the rooms: `options`, `images`, `networks`, `run`, each of which knows those before it
and none behind. `runtime` is the device and the processes, `tables` runs many trainings. Recipes, which set options,
are in `configs/classification/`; what detection needs, too, is in `revnets/`.
"""
