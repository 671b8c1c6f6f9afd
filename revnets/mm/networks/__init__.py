"""Backbones, necks and layers that a config names, and the weights they start from.

The networks themselves are in `revnets.models`; here are the arguments and the norms that MMDetection's users know.
"""
