"""What every training loop needs to survive, whichever it is: order that can be resumed, signals, whole files.

Here lives what `classification/`, `detection/` and `revnets.mm` share: errors and options, whole files and checksums,
data that follow from seeds, SIGTERM, guards against numbers that go wrong. Nothing of timm's or MMEngine's, and no
loop.
"""
