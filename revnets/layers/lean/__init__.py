"""What layers that save memory compute: one operator per step of a layer, on CUDA one or two kernels of our own.

Here live the operators (``ops``) and their Triton kernels; the layers that call them are ``norm_act`` and neighbours.
"""
