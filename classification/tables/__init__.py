"""Tables of experiments: many trainings over seeds and options, each with the picture of it.

A file per table declares its runs and its columns; `series.py` runs what is missing and writes what came out. What a
single training needs is one folder up.
"""
