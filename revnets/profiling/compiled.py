"""``torch.compile`` that keeps a share of its choice for the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch

COMPILER = "inductor"
"""The backend that makes the kernels."""


@functools.cache
def backend_of(share: float) -> Any:
    """The backend whose graphs keep this share of what is fastest to keep, by torch's own choice.

    Each share has one backend: dynamo finds what it has compiled by the backend, too, so that no share gets another
    one's code, and all can take turns without a reset between them.

    Args:
        share: ``torch._functorch.config.activation_memory_budget``: 1 saves what is fastest, 0 recomputes everything.

    Example:
        >>> backend_of(0.5) is backend_of(0.5), backend_of(0.5) is backend_of(0.25)
        (True, False)
    """

    # it counts while the first step is compiled, forward and backward at once
    def backend(*graph: Any, **options: Any) -> Any:
        config: Any = torch._functorch.config
        compile_graph: Any = torch._dynamo.lookup_backend(COMPILER)
        with config.patch(activation_memory_budget=share):
            return compile_graph(*graph, **options)

    return backend
