"""Whole training steps in one CUDA graph: the step, the graph, and optimizers that a graph can hold.

``step`` is what is public, and ``graphed`` has passes of a part of a network; nothing here is imported by ``import revnets``.
"""
