"""Image classification on timm's own parts: scripts to train, validate, make a small data set, and the quickstart.

Here live `train.py`, `validate.py`, `digits.py`, `quickstart.py` and the modules they share; the YAML files they read
are in `configs/classification/`. Networks and the reversible engine live in `revnets/`, which imports nothing of this.
"""
