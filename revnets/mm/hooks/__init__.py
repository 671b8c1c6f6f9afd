"""Hooks of MMEngine's runner, and its loop: whole checkpoints, resuming, guards, memory, numerics, masks, FLOPs.

What they share with classification is in `revnets.training`; what is built from a config is in `networks`.
"""
