"""A training run: what trains the network, the loop over the epochs, and the folder that a run is resumed from.

`training` is the run that all share, `state` what checkpoints hold of it. What detection's runs need, too (whole files,
the reading of checkpoints, guards, captured steps), is in `revnets.training`.
"""
