"""Images of a data set on their way to the network: where they are, how they are read, in which batches they come.

Archives, splits and an order that can be resumed are in `revnets.training.data`, which detection shares; `digits.py`,
one folder up, makes a small data set.
"""
