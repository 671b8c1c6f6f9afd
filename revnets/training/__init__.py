"""What every training loop needs to survive, whichever it is: whole files, checkpoints, order, options, errors.

Here lives what `classification/`, `detection/` and `revnets.mm` share, with a folder each for options, checkpoints,
data, guards of numbers and captured steps. Nothing of timm's or MMEngine's, and no loop.
"""
