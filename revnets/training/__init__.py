"""What every training loop needs to survive, whichever it is: order that can be resumed, signals, whole files.

Here lives what `classification/`, `detection/` and `revnets.mm` share: errors, options, whole files, splits and weights
that are checked, data that follow from seeds, SIGTERM, guards of numbers. Nothing of timm's or MMEngine's, and no loop.
"""
