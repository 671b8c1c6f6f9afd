"""timm's own ``tests/test_models.py`` on our networks: ``python -m tests.clients.timm_models FILE``.

The file is in timm's source distribution (``pip download --no-deps --no-binary timm timm``), not in its wheel. Its
lists of models are narrowed to ours; tests that name a few of timm's networks, for a promise that every network can
keep, get ours instead; those of one network of timm's are left out. What does not apply is skipped, with the reason.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm

import revnets  # noqa: F401 - registers the models

NETWORKS = ("test_revbifpn", "test_rev_mus_vit", "revbifpn_s0", "mus_vit_tiny_patch16_224")
TRANSFORMERS = "*mus_vit*"  # as timm counts its own: under the names that match "vit_*"

_SCRIPTING = (
    "torch.jit.script, which torch has deprecated, knows no variable number of tensors, as reversible chains take, nor "
    "our annotations: torch.export and torch.compile do (tests/models/test_export.py)"
)
_WEIGHTS = "downloads published weights: their files are compared in tests/models/test_pretrained.py"
_POOLING = "is about networks that cannot take 'catavgmax': ours can (tests/models/test_timm_contract.py)"
DOES_NOT_APPLY = {
    "test_model_forward_torchscript": _SCRIPTING,
    "test_model_forward_fx_torchscript": _SCRIPTING,
    "test_model_load_pretrained": _WEIGHTS,
    "test_model_features_pretrained": _WEIGHTS,
    "test_model_inference": _WEIGHTS,
    "test_catavgmax_unsupported": _POOLING,
}

ANY_SIZE = ("test_revbifpn", "revbifpn_s0")  # of whatever side the test has
SIDE_64 = (*ANY_SIZE, "test_rev_mus_vit")
# Tests with names of timm's networks that get ours: which, and what else a row of theirs has.
PROMISES: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "test_reset_classifier_keeps_pool": (SIDE_64, ()),
    "test_features_only_grad_checkpointing_backward": (SIDE_64, ()),
    "test_model_features_output_stride": (ANY_SIZE, ()),
    "test_prune_intermediate_layers_params_used": (NETWORKS, ()),
    "test_prune_intermediate_layers_last_feature": (ANY_SIZE, (True,)),
    "test_forward_after_prune_intermediate_layers": (ANY_SIZE, ()),
    "test_forward_intermediates_stop_early_final_norm": (ANY_SIZE, ({},)),
    "test_head_hidden_size": (SIDE_64, ({},)),
    "test_model_init_weights_after_to_empty": (SIDE_64, ({},)),
    "test_headless_checkpoint_reload": (NETWORKS, ({},)),
    "test_features_only_feature_cls_class": (NETWORKS, ()),
}


def like_theirs(filters: Any) -> Any:
    """Wildcards that mean timm's vision transformers, and ours with them."""
    listed = [filters] if isinstance(filters, str) else list(filters)
    return [*listed, TRANSFORMERS] if "vit_*" in listed else filters


class OnOurs:
    """A plugin of pytest: it narrows what is collected, and counts what came of it."""

    def __init__(self, networks: Iterable[str]) -> None:
        self.networks = tuple(networks)
        self.left_out: set[str] = set()
        self.outcomes: dict[str, Counter[str]] = {}
        self._original = timm.list_models

    def list_models(
        self, filter: Any = "", module: Any = "", pretrained: bool = False, exclude_filters: Any = "", **options: Any
    ) -> list[str]:
        """timm's, of our networks; ``module`` names files of timm's whose networks have the part that is tested."""
        found = self._original(
            like_theirs(filter), pretrained=pretrained, exclude_filters=like_theirs(exclude_filters), **options
        )
        return [name for name in found if name.split(".")[0] in self.networks]

    def pytest_sessionstart(self) -> None:
        timm.list_models = self.list_models

    def pytest_sessionfinish(self) -> None:
        timm.list_models = self._original

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if (promise := PROMISES.get(metafunc.definition.name)) is None:
            return
        names, rest = promise
        rows = [(name, *rest) if rest else name for name in names if name in self.networks]
        marks = metafunc.definition.own_markers
        for k, mark in enumerate(marks):
            if mark.name == "parametrize" and "model_name" in _arguments(mark.args[0]):
                marks[k] = pytest.mark.parametrize(mark.args[0], rows).mark

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ours, others = [], []
        for item in items:
            function = _function(item.nodeid)
            name = str(getattr(item, "callspec", None) and item.callspec.params.get("model_name"))  # type: ignore[attr-defined]
            if name.split(".")[0] in self.networks or function in DOES_NOT_APPLY:
                ours.append(item)
            elif "NOTSET" not in item.nodeid:
                others.append(item)
            if reason := DOES_NOT_APPLY.get(function):
                item.add_marker(pytest.mark.skip(reason=reason))
        self.left_out = {_function(item.nodeid) for item in others} - {_function(item.nodeid) for item in ours}
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(_function(report.nodeid), Counter())[report.outcome] += 1

    def table(self) -> str:
        """Lines of a Markdown table: test, how often it passed, was skipped, failed, and why it does not apply."""
        lines = ["| timm's test | passed | skipped | failed |", "|---|---|---|---|"]
        for function, counts in self.outcomes.items():
            skipped = f"{counts['skipped']}: {DOES_NOT_APPLY[function]}" if function in DOES_NOT_APPLY else "0"
            if counts["skipped"] and function not in DOES_NOT_APPLY:
                skipped = f"{counts['skipped']}, by timm's own limits of image sizes"
            lines.append(f"| `{function}` | {counts['passed']} | {skipped} | {counts['failed']} |")
        lines += ["", f"Tests of single networks of timm's, left out: {len(self.left_out)}."]
        return "\n".join(lines)


def _function(nodeid: str) -> str:
    return nodeid.rsplit("::", 1)[-1].split("[")[0]


def _arguments(names: Any) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def run(file: Path, networks: Iterable[str] = NETWORKS, options: Iterable[str] = ()) -> tuple[int, OnOurs]:
    """The exit code of pytest, and what was collected and came of it. timm's settings are not ours, nor the reverse."""
    plugin = OnOurs(networks)
    settings = ["-c", "/dev/null", "--rootdir", str(file.parent), "-p", "no:cacheprovider", "--disable-warnings", "-q"]
    settings += ["--import-mode", "importlib"]  # their folder is a package `tests`, too
    return int(pytest.main([*settings, str(file), *options], plugins=[plugin])), plugin


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.timm_models", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="timm's tests/test_models.py")
    parser.add_argument("--models", nargs="+", default=NETWORKS, metavar="NAME", help="ours to be tested")
    arguments, options = parser.parse_known_args()
    if not arguments.file.is_file():
        parser.error(f"FILE={str(arguments.file)!r}: no such file: give timm's tests/test_models.py")
    code, plugin = run(arguments.file, arguments.models, options)
    print(plugin.table())
    return code


if __name__ == "__main__":
    sys.exit(main())
