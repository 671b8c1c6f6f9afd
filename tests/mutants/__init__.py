"""Small faults that are put into copies of the sources one by one, to know whether the quick tests see them.

``python -m tests.mutants`` (``make test-mutants``) runs them. The tables are by area, one file each.
"""
