"""Checkpoints of any origin: read as plain tensors and values, compared with a schema and with the run at hand.

Whole files are written in `training.files`; what a checkpoint of ours must hold is declared in ``held``.
"""
