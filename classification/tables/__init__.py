"""Tables of experiments: many trainings over seeds and options, each with the picture of it.

A file per table declares its runs and its columns; `runner` is what all share, `series` trains what is missing. What a
single training needs is one folder up.
"""
