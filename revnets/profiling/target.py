"""What is profiled: a network, its input and its loss, built on demand on any device."""

import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.lean.network import kept_per_image, make_lean
from ..models.named import build_model, check_model
from ..reversible import MODES
from ..training.errors import refused
from ..training.options.values import COUNT, find_device
from .fake import ProfileError
from .memory import mean_square, tensors_of

MODE_NAMES = {"store": "plain", "checkpoint": "own checkpointing", "lean": "lean"}  # for networks without our modes
LEAN = "lean"
"""Everything is stored that is not cheap to compute again: a mode of every network, which is shown when asked for."""

EXTRA_SILOS = (0, 2, 4, 8)
"""Depths of the sweep."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a profile share.

    Args:
        device: the one meant; it need not be at hand.
        channels_last: memory layout of weights and images.
        amp_dtype: autocast to ``"bfloat16"`` or ``"float16"``, or None.
        exact: exact mode of reversible networks.
        optimizer: a name known to timm (``"sgd"``, ``"adamw"``, ``"lamb"``, ...), or None.

    Raises:
        ProfileError: for names that do not exist.
    """

    device: str = "cpu"
    channels_last: bool = True
    amp_dtype: str | None = None
    exact: bool | int = True
    optimizer: str | None = "sgd"

    def __post_init__(self) -> None:
        if self.amp_dtype not in (None, "bfloat16", "float16"):
            raise ProfileError(f"unknown amp dtype {self.amp_dtype!r}: expected bfloat16 or float16")
        try:
            find_device(self.device, here=False)
        except ValueError as error:
            raise ProfileError(str(error)) from None
        if self.optimizer is not None:
            from timm.optim import list_optimizers

            _check_name("optimizer", self.optimizer, list_optimizers())

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for the parameters of ``model`` (momentum 0.9 where it has one, weight decay)."""
        from timm.optim import create_optimizer_v2

        with refused(f"optimizer {self.optimizer!r} cannot be made", kind=ProfileError):
            return create_optimizer_v2(model, opt=self.optimizer, lr=1e-3, weight_decay=1e-4)


@dataclass(frozen=True)
class Job:
    """A training step to run: the model in training mode, its input, and the loss of its output.

    ``network`` is the model without what is wrapped around it (autocast).
    """

    model: nn.Module
    x: Tensor
    loss_fn: Callable[[Any], Tensor]
    network: nn.Module


@dataclass(frozen=True)
class Target:
    """A network of timm at a size, a batch and a memory mode.

    Other kinds of networks (``revnets.mm.detectors``) are subclasses with their own ``build``.

    Args:
        name: known to timm.
        img_size: side of the images, pixels.
        batch_size: images per step.
        mode: see ``revnets.reversible.MODES``; others know ``"store"`` (plain) and ``"checkpoint"`` (their own); and
            all know ``LEAN``.
        options: for the network's constructor.
        part: of detectors, see ``revnets.mm.detectors``.
    """

    name: str
    img_size: int
    batch_size: int
    mode: str
    options: tuple[tuple[str, Any], ...] = ()
    part: str = ""

    def __str__(self) -> str:
        return f"{self.title} @{self.img_size} batch {self.batch_size}"

    @property
    def title(self) -> str:
        """The network in words, without sizes and mode."""
        return self.name

    def columns(self) -> dict[str, Any]:
        """What it is, for files."""
        sizes = {"img_size": self.img_size, "batch_size": self.batch_size}
        return {"model": self.name, **sizes, "mode": self.mode, **dict(self.options)}

    @property
    def mode_name(self) -> str:
        """The mode in words that fit the network."""
        return self.mode if is_reversible(self.name) else MODE_NAMES[self.mode]

    def build(self, setting: Setting, device: torch.device | str) -> Job:
        """The step on ``device``: ``"meta"`` for a model without memory.

        Raises:
            ProfileError: when the network refuses its options.
        """
        torch.manual_seed(0)
        cfg = timm.get_pretrained_cfg(self.name)
        channels = cfg.input_size[0] if cfg is not None else 3
        with torch.device(device), refused(f"{self} cannot be built on {torch.device(device)}", kind=ProfileError):
            model = create(self.name, self.img_size, setting, self.options)
            x = torch.randn(self.batch_size, channels, self.img_size, self.img_size)
        if not set_mode(model, self.mode, tuple(x.shape[1:])):
            raise ProfileError(f"{self.name} has no mode {self.mode!r}")
        if setting.channels_last:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        return as_job(model.train(), x, training_loss, setting)

    def deeper(self) -> "Sequence[Target]":
        """The same network with more and more silos; itself alone where it has none."""
        if not is_reversible(self.name):
            return [self]
        return [replace(self, options=(("extra_silos", n),)) for n in EXTRA_SILOS]

    def divisor(self, setting: Setting) -> int:
        """Image sides are multiples of this: the coarsest stride of the network."""
        info: Any = getattr(_on_meta(self.name, self.img_size, setting, self.options), "feature_info", None) or []
        strides = info.reduction() if hasattr(info, "reduction") else [i["reduction"] for i in info]
        return max(strides, default=32)


def as_job(network: nn.Module, x: Tensor, loss_fn: Callable[[Any], Tensor], setting: Setting) -> Job:
    """The job of a network, under autocast if the setting wants it."""
    model = network
    if setting.amp_dtype is not None:
        model = Autocast(model, torch.device(setting.device).type, getattr(torch, setting.amp_dtype)).train()
    return Job(model, x, loss_fn, network)


def is_reversible(name: str) -> bool:
    """Whether the network has our three memory modes."""
    return "revbifpn" in name


def create(name: str, img_size: int, setting: Setting, options: tuple[tuple[str, Any], ...] = ()) -> nn.Module:
    """The network on the default device, told its image size if it has to be."""
    kwargs: dict[str, Any] = {"exact": setting.exact} if is_reversible(name) else {}
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        kwargs["img_size"] = img_size
    return build_model(name, f"{name} @{img_size} cannot be built", ProfileError, **kwargs, **dict(options))


def set_mode(model: Any, mode: str, input_size: tuple[int, ...] | None = None) -> bool:
    """Switch the memory mode; False where the network has no such mode.

    Args:
        model: any.
        mode: its name.
        input_size: of one example, with which ``LEAN`` keeps what it does after ``convert(model, "lean")``; without it,
            the least.
    """
    if mode == LEAN:
        found = None if input_size is None else kept_per_image(model, input_size)
        return set_mode(model, "store") and make_lean(model, None if found is None else found.plan) is model
    if hasattr(model, "set_mode"):
        model.set_mode(mode)
        return True
    if mode == "store":
        return True
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError, TypeError):
        return False
    return mode == "checkpoint"


Reader = Callable[[str, Setting, int | None, int], Sequence[Target]]
"""What was typed, options of the networks, and side and batch where the text has none."""


@dataclass(frozen=True)
class Kind:
    """A kind of text that stands for targets of another room's: who reads it is imported when it is first needed.

    Attributes:
        pattern: of such texts, a regular expression.
        words: what such a text is, for messages.
        module: registers the reader when it is imported.
        needs: package without which it cannot be imported.
        extra: of revnets, that brings it.
    """

    pattern: str
    words: str
    module: str
    needs: str
    extra: str

    def reader(self, text: str) -> Reader:
        """The registered reader.

        Raises:
            ProfileError: where the package is not installed.
        """
        if importlib.util.find_spec(self.needs) is None:
            raise ProfileError(
                f"{text!r} is {self.words}, which needs {self.needs}: pip install 'revnets[{self.extra}]'"
            )
        importlib.import_module(self.module)
        return _READERS[self.module]


KINDS = [Kind(r"\.py(@|:|$)", "an MMDetection config", "revnets.mm.detectors", "mmdet", "detection")]
_READERS: dict[str, Reader] = {}


def register_reader(reader: Reader) -> Reader:
    """Have a function read the texts of the kind that names its module."""
    _READERS[reader.__module__] = reader
    return reader


def parse_targets(text: str, setting: Setting, img_size: int | None = None, batch_size: int = 8) -> list[Target]:
    """Targets of ``NAME[@SIZE][:BATCH]``, one per mode that the network has.

    Args:
        text: what was typed; ``CONFIG.py[@HEIGHTxWIDTH][:BATCH]`` is an MMDetection config.
        setting: options of the networks.
        img_size: where the text has none; by default the published size.
        batch_size: where the text has none.

    Raises:
        ProfileError: for unknown networks or numbers that are not.

    Example:
        >>> [t.mode for t in parse_targets("resnet18@128:4", Setting())]
        ['store', 'checkpoint']
    """
    for kind in KINDS:
        if re.search(kind.pattern, text):
            return list(kind.reader(text)(text, setting, img_size, batch_size))
    match = re.fullmatch(r"([^@:]+)(?:@(\d+))?(?::(\d+))?", text)
    if match is None or not all(size is None or is_size(size) for size in (match[2], match[3])):
        raise ProfileError(
            f"{text[:200]!r}: expected NAME@SIZE:BATCH with {COUNT.words} for both, such as revbifpn_s0@224:8"
        )
    try:
        name = check_model(match[1])
    except ValueError as error:
        raise ProfileError(str(error)) from None
    cfg = timm.get_pretrained_cfg(name)
    side = int(match[2] or img_size or (cfg.input_size[-1] if cfg is not None else 224))
    model = _on_meta(name, side, setting)
    modes = [mode for mode in MODES if (mode != "reversible" or is_reversible(name)) and set_mode(model, mode)]
    return [Target(name, side, int(match[3] or batch_size), mode) for mode in sorted(modes, key=_MODE_ORDER.index)]


def is_size(text: str) -> bool:
    """Whether a text is a number of pixels, or of images."""
    try:
        COUNT.read(text)
    except ValueError:
        return False
    return True


_MODE_ORDER = ("reversible", "store", "checkpoint")


def _on_meta(name: str, img_size: int, setting: Setting, options: tuple[tuple[str, Any], ...] = ()) -> nn.Module:
    with torch.device("meta"):
        return create(name, img_size, setting, options)


def _check_name(what: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"expected one of the {len(known)} that timm knows"
        raise ProfileError(f"unknown {what} {name!r}: {hint}")


class Autocast(nn.Module):
    """The model under autocast, as a module, so that the loss stays outside."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.device_type, self.dtype = model, device_type, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = next((t.device.type for t in tensors_of((args, kwargs))), "meta")
        with torch.autocast(given if given != "meta" else self.device_type, dtype=self.dtype):
            return self.model(*args, **kwargs)


def training_loss(y: Any) -> Tensor:
    """Cross entropy of logits ``(N, classes)`` with fixed labels; for other outputs the mean of squares."""
    if isinstance(y, Tensor) and y.ndim == 2 and y.shape[1] > 1:
        return F.cross_entropy(y.float(), torch.arange(len(y), device=y.device) % y.shape[1])
    return mean_square(y)


def with_size(target: Target, *, batch_size: int | None = None, img_size: int | None = None) -> Target:
    """The same target with another batch or image."""
    return replace(target, batch_size=batch_size or target.batch_size, img_size=img_size or target.img_size)
