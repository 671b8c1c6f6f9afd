"""Where a config of any OpenMMLab toolbox finds our networks: MMEngine's root registry, which each of theirs asks."""

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

from mmengine.registry import MODELS

Network = TypeVar("Network", bound=type)
_logger = logging.getLogger("revnets")


@functools.cache
def has_mmdet() -> bool:
    """Whether MMDetection is there; one that does not go with the mmcv at hand is none, for other toolboxes."""
    try:
        import mmdet.registry
    except ModuleNotFoundError:
        return False
    except (ImportError, AssertionError) as error:  # it asserts which mmcv and MMEngine it takes
        _logger.warning(f"MMDetection is left out, it cannot be imported: {error}")
        return False
    return mmdet.registry is not None


def register_network() -> Callable[[Network], Network]:
    """Decorator of a module that configs name by its class: ``type="RevBiFPN"``, in whichever toolbox.

    ``mmdet.RevBiFPN`` is one more name for it where MMDetection is installed.

    Example:
        >>> from mmengine.registry import Registry
        >>> theirs = Registry("model", parent=MODELS, scope="some_toolbox")
        >>> theirs.get("RevBiFPN").__name__
        'RevBiFPN'
    """

    def register(network: Network) -> Network:
        MODELS.register_module(module=network)
        if has_mmdet():  # in its own scope, its registry asks no other
            from mmdet.registry import MODELS as OF_MMDET

            OF_MMDET.register_module(module=network)
        return network

    return register
