"""Random numbers that are kept instead of drawn a second time: where no generator can be asked or set.

While a CUDA graph is captured, the state of a generator is unknown to the host. So what a branch draws is kept (for
stochastic depth a number per sample, for dropout as much as its output) and given again when the branch is recomputed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Draws(TorchDispatchMode):
    """Dispatch mode under which the results of random operators are kept.

    Args:
        kept: where they go.

    Example:
        >>> kept = []
        >>> with Draws(kept):
        ...     x = torch.rand(2)
        >>> with DrawnAgain(kept):
        ...     torch.rand(2).equal(x)
        True
    """

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled branches stay compiled inside."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_random(func, args, kwargs):
            self.kept.append(_copies(_written(func, args, kwargs) or result))
        return result


class DrawnAgain(TorchDispatchMode):
    """Dispatch mode under which random operators give what ``Draws`` kept, in the same order.

    Args:
        kept: by ``Draws``; it is not changed.
    """

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.rest: Iterator[Any] = iter(kept)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled branches stay compiled inside."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func, args, kwargs):
            return func(*args, **kwargs)
        kept, written = next(self.rest), _written(func, args, kwargs)
        if not written:
            return _copies(kept)
        for tensor, value in zip(written, kept, strict=True):
            tensor.copy_(value)
        return written[0] if len(written) == 1 else tuple(written)


def is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator draws random numbers when called so; attention without dropout does not, say."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    return _arguments(func, args, kwargs).get("dropout_p", 1.0) != 0.0


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    declared = func._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return defaults | dict(zip((a.name for a in declared), args, strict=False)) | kwargs


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to: itself in place, or ``out=``."""
    given = _arguments(func, args, kwargs)
    return [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _copies(values: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.detach().clone(), values)
