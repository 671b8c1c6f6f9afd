"""Whole training steps in one CUDA graph: the step, the graph, and optimizers that a graph can hold.

``step`` is what is public; ``graphed`` has the passes of a part of a network, by its shapes. ``import revnets`` imports
nothing here.
"""
