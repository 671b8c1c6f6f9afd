"""What every training loop needs to survive, whichever it is: order that can be resumed, signals, whole files.

Here lives what `classification/` and `revnets.mm` share: data that follow from seeds, SIGTERM, checksums, guards
against numbers that go wrong. Nothing of timm's or MMEngine's, and no loop.
"""
