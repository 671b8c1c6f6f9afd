"""What a training step starts on a GPU, counted: operator calls, and the kernels of CUDA with Triton, on any machine.

The table of several networks is in `bench`.
"""
