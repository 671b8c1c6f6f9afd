"""Networks of a training: built, checked against the images, loaded with weights; a teacher's, and sparse layers.

Architectures are in `revnets.models` and in timm, layers in `revnets.layers`; what trains a network is in `run`.
"""
