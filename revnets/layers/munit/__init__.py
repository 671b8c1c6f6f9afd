"""FP8 convolutions of munit-scaled layers: who computes them (``fp8_conv``), the Triton kernels, what compiles of them.

``fp8_conv`` holds the torch operators and is all that layers import; ``fp8_trial`` tries them on a device. Triton is
imported late, at the first convolution.
Numbers are those of the emulation in ``functional``, to the order of the sums.
"""
