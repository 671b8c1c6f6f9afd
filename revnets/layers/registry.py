"""The layer registry: a name to a validated config and the function that makes the layer (or changes the network).

A spec says which layers to use, in any of these forms:

- ``"sparse_parallel:0.75"``: the name, then the config's first field. Further options follow by name: a flag alone
  switches it on (``"sparse_parallel:0.75:norm_only"``), any other is followed by its value
  (``"sparse_parallel:0.75:depthwise:init_scale"``). No ``=``, which ``--model-kwargs`` of timm's scripts splits on.
- ``dict(type="sparse_parallel", sparsity=0.75)``: the same as a dictionary.
- ``"sparse_wide:0.75+mus_fp8"``, or a list of the above: one after the other.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from ..sparsity.blocks import block_of
from ..sparsity.masks import check_sparsity

Spec = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class LayerConfig:
    """Options of a layer; subclasses add fields and validate them in ``__post_init__``."""


@dataclass(frozen=True)
class SparseConfig(LayerConfig):
    """Options of all sparse layers.

    Args:
        sparsity: share s of zeros, in [0, 1).
        depthwise: convert depthwise convolutions, too.
        squeeze_excite: convert the layers of squeeze-and-excite, too.
        init_scale: start with weights larger by ``1 / sqrt(density)``.

    Raises:
        ValueError: for a sparsity outside [0, 1).
    """

    sparsity: float
    depthwise: bool = False
    squeeze_excite: bool = False
    init_scale: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)


@dataclass(frozen=True)
class MaskConfig(SparseConfig):
    """Options of sparse layers whose zeros may come in blocks.

    Args:
        pattern: ``4x1``: zeros in blocks of four input channels, which ``revnets deploy`` skips in INT8; None: single.

    Raises:
        ValueError: for another pattern.
    """

    pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        block_of(self.pattern)


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a layer.

    Attributes:
        name: in specs.
        config: class of its options.
        make: the registered function.
        network: whether ``make`` changes a whole network rather than one layer.
        whole: whether it changes no layer, so that no layer can be unsuitable.
        everywhere: whether the first layer, the classifier and sparse layers are converted, too.
        keeps_weights: whether converted layers keep the weights that they had.
        summary: first line of its docstring.
    """

    name: str
    config: type[LayerConfig]
    make: Callable[..., Any]
    network: bool
    whole: bool
    everywhere: bool
    keeps_weights: bool
    summary: str


@dataclass(frozen=True)
class Part:
    """One part of a spec: an entry with its options."""

    entry: Entry
    config: LayerConfig

    def __str__(self) -> str:
        options = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        return self.entry.name + "".join(f", {name}={value}" for name, value in options.items())

    @property
    def keeps_weights(self) -> bool:
        """Whether converted layers keep the weights that they had: not with the option ``init``."""
        return self.entry.keeps_weights and not getattr(self.config, "init", False)


_ENTRIES: dict[str, Entry] = {}


def register_layer(
    name: str,
    config: type[LayerConfig] = LayerConfig,
    network: bool = False,
    everywhere: bool = False,
    keeps_weights: bool = False,
    whole: bool = False,
) -> Callable[[Made], Made]:
    """Register a function under ``name``; its first docstring line is what ``revnets layers`` shows.

    Args:
        name: for specs.
        config: frozen dataclass of the options.
        network: whether the function changes a whole network.
        everywhere: whether it takes the first layer, the classifier (``site.role`` tells them from the others) and
            sparse layers, too.
        keeps_weights: whether converted layers keep the weights that they had; others are newly initialised.
        whole: with ``network``, whether no layer changes, but how the network runs: all that the filter lets through
            are given to the function.

    The function takes ``(site, config)`` and returns the module to put there, or raises ``Unsuitable`` with the reason
    why the layer stays as it is; see ``revnets.layers.sites.Site``. With ``network=True`` it takes ``(job, config)``
    and returns the network; see ``revnets.layers.convert.Job``.

    Raises:
        ValueError: when the name is taken or unusable.

    Example:
        >>> @register_layer("example_double")
        ... def double(site, config):
        ...     "A layer applied twice."
        ...     return nn.Sequential(site.layer, site.layer)
        >>> "example_double" in list_layers(), _ENTRIES.pop("example_double").summary
        (True, 'A layer applied twice.')
    """
    if name in _ENTRIES or not name.isidentifier():
        raise ValueError(f"layer name {name!r}: expected an identifier that is not registered yet")

    def register(make: Made) -> Made:
        summary = (make.__doc__ or "").strip().split("\n")[0]
        _ENTRIES[name] = Entry(name, config, make, network, whole, everywhere, keeps_weights, summary)
        return make

    return register


def list_layers() -> list[str]:
    """Names of all registered layers, sorted.

    Example:
        >>> "sparse_doped" in list_layers()
        True
    """
    return sorted(_ENTRIES)


def layer_entry(name: str) -> Entry:
    """What is registered under ``name``.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown layer {name!r}{hint}: expected one of {', '.join(list_layers())}")
    return _ENTRIES[name]


def parse_layers(spec: Spec) -> list[Part]:
    """The parts of a spec, in order, options checked.

    Args:
        spec: see the module's docstring.

    Raises:
        ValueError: for unknown names or options, or values out of range.

    Example:
        >>> [str(part) for part in parse_layers("sparse_doped:0.75:init_scale")]
        ['sparse_doped, sparsity=0.75, depthwise=False, squeeze_excite=False, init_scale=True']
        >>> parse_layers("sparse_doped:0.75") == parse_layers(dict(type="sparse_doped", sparsity=0.75))
        True
    """
    if isinstance(spec, str):
        return [_from_text(text.strip()) for text in spec.split("+")]
    if isinstance(spec, Mapping):
        return [_from_dict(spec)]
    if isinstance(spec, Sequence) and spec:
        return [part for one in spec for part in parse_layers(one)]
    raise ValueError(
        f"layers={spec!r}: expected a text such as 'sparse_parallel:0.75', a dictionary, or a list of them"
    )


def _from_dict(spec: Mapping[str, Any]) -> Part:
    if not isinstance(spec.get("type"), str):
        raise ValueError(f"layers={dict(spec)!r}: expected a key 'type' with one of {', '.join(list_layers())}")
    entry = layer_entry(spec["type"])
    return _part(entry, {name: value for name, value in spec.items() if name != "type"})


def _from_text(text: str) -> Part:
    name, *words = text.split(":")
    entry = layer_entry(name)
    hints = get_type_hints(entry.config)
    names = [field.name for field in dataclasses.fields(entry.config)]
    options: dict[str, Any] = {}
    if words and names and words[0] not in names:
        options[names[0]] = _value(entry, names[0], hints[names[0]], words.pop(0))
    while words:
        option = words.pop(0)
        _check_option(entry, option)
        if hints[option] is bool and not (words and words[0].lower() in _BOOLS):
            options[option] = True
        elif not words:
            raise ValueError(f"{entry.name}: option {option} needs a value: write {text}:VALUE")
        else:
            options[option] = _value(entry, option, hints[option], words.pop(0))
    return _part(entry, options)


_BOOLS = {"true": True, "false": False}


def _value(entry: Entry, option: str, kind: Any, word: str) -> Any:
    """The word as the option's type, or as what is optional in it."""
    kind = next((one for one in get_args(kind) if one is not type(None)), kind)
    if kind is bool and word.lower() in _BOOLS:
        return _BOOLS[word.lower()]
    try:
        if kind in (int, float):
            return kind(word)
    except ValueError:
        raise ValueError(f"{entry.name}: {option}={word!r}: expected a number, such as {entry.name}:0.75") from None
    if kind is bool:
        raise ValueError(f"{entry.name}: {option}={word!r}: expected true or false")
    return word


def _check_option(entry: Entry, option: str) -> None:
    known = [field.name for field in dataclasses.fields(entry.config)]
    if option not in known:
        raise ValueError(f"{entry.name} has no option {option!r}: expected one of {', '.join(known) or '(none)'}")


def _part(entry: Entry, options: dict[str, Any]) -> Part:
    for option in options:
        _check_option(entry, option)
        if get_type_hints(entry.config)[option] is bool and not isinstance(options[option], bool):
            raise ValueError(f"{entry.name}: {option}={options[option]!r}: expected true or false")
    for field in dataclasses.fields(entry.config):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in options:
            raise ValueError(f"{entry.name} needs {field.name}: write {entry.name}:VALUE, such as {entry.name}:0.75")
    try:
        return Part(entry, entry.config(**options))
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from None
