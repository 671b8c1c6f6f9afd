"""Whole training steps in one CUDA graph: the step, the graph, and optimizers that a graph can hold.

``step`` is what is public; nothing here is imported by ``import revnets``.
"""
