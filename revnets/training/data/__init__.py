"""Data before a training sees it: which split is where, archives that are whole, an order that can be resumed.

Pictures and annotations are read in `classification/` and `detection/`.
"""
