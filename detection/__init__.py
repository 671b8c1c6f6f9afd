"""Object detection on MMEngine's Runner: scripts to train and test, a data set of scenes, and the quickstart.

Here live `train.py`, `test.py`, `digits.py`, `quickstart.py` and what they share; the configurations are in
`configs/detection/`. Networks and what MMDetection registers live in `revnets/`, which imports nothing of this.
"""
