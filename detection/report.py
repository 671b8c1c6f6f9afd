"""What a run leaves behind: the table of AP, memory and time, `summary.json`, and the picture of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from revnets.training.files import write_json
from revnets.training.pictures import picture

SUMMARY, PICTURE = "summary.json", "predictions.png"
SHOWN = 0.3  # least score of a box in the picture


def table(title: str, metrics: Mapping[str, float], more: Mapping[str, object]) -> Table:
    """AP of boxes and masks side by side, then whatever else there is.

    Args:
        title: Above it.
        metrics: As MMDetection names them.
        more: Further names and values.
    """
    names = [name(key) for key in metrics]
    kinds = list(dict.fromkeys(each.split(" ")[0] for each in names if " " in each))
    grid = Table("", *(kind for kind in kinds), title=title)
    values = dict(zip(names, metrics.values(), strict=True))
    for row in dict.fromkeys(each.split(" ", 1)[1] for each in names if " " in each):
        cells = [values.get(f"{kind} {row}") for kind in kinds]
        grid.add_row(row, *("" if value is None else f"{value:.3f}" for value in cells))
    for each, value in {**{k: f"{v:.4g}" for k, v in values.items() if " " not in k}, **more}.items():
        grid.add_row(each, str(value))
    return grid


def show(title: str, metrics: Mapping[str, float], more: Mapping[str, object]) -> None:
    """Prints the table."""
    kept = {key: value for key, value in metrics.items() if "copypaste" not in key}
    Console().print(table(title, kept, more))


def write_summary(folder: Path, values: Mapping[str, Any]) -> Path:
    """Writes `summary.json`; numbers that are none, such as a metric without data, are null."""
    return write_json(folder / SUMMARY, values)


def draw(model: Any, dataset: Any, count: int, folder: Path) -> Path | None:
    """Draws what the model finds on images of a data set, beside what is there: `predictions.png`.

    Args:
        model: A detector of MMDetection, on its device.
        dataset: One of MMDetection's, with its test pipeline.
        count: Images, spread evenly over the data set.
        folder: For the picture.

    Returns:
        The file, or None where none was asked for, or where matplotlib is not installed (said in one line).
    """
    if count < 1:
        return None
    from mmengine.dataset import pseudo_collate

    classes = dataset.metainfo.get("classes", ())
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()

    def paint(figure: Any) -> None:
        axes = figure.subplots(2, len(chosen), squeeze=False)
        model.eval()
        for column, index in enumerate(chosen):
            with torch.no_grad():
                (sample,) = model.test_step(pseudo_collate([dataset[index]]))
            found = sample.pred_instances.to("cpu")
            found = found[found.scores >= SHOWN]
            instances = dataset.get_data_info(index).get("instances", [])
            labels = [f"{_class(classes, int(n))} {s:.2f}" for n, s in zip(found.labels, found.scores, strict=True)]
            _picture(axes[0, column], sample.img_path, found.bboxes.tolist(), found.labels.tolist(), labels)
            truth = [each["bbox_label"] for each in instances]
            boxes = [each["bbox"] for each in instances]
            _picture(axes[1, column], sample.img_path, boxes, truth, [_class(classes, each) for each in truth])
        axes[0, 0].set_ylabel(f"found (score at least {SHOWN})")
        axes[1, 0].set_ylabel("there")

    return picture(folder / PICTURE, (4 * len(chosen), 8), paint)


def _class(classes: Sequence[str], label: int) -> str:
    return str(classes[label]) if label < len(classes) else str(label)


def _picture(axis: Any, path: str, boxes: Sequence[Any], numbers: Sequence[int], labels: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    with Image.open(path) as image:
        axis.imshow(image.convert("RGB"))
    axis.set_xticks([])
    axis.set_yticks([])
    for (left, top, right, bottom), number, label in zip(boxes, numbers, labels, strict=True):
        color = f"C{number % 10}"
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.5))
        axis.text(
            left, top, label, fontsize=7, color="white", va="bottom", bbox={"facecolor": color, "pad": 1, "lw": 0}
        )


def metric_words(metrics: dict[str, float]) -> str:
    """COCO's AP and AP50 of boxes and masks, or whatever the metrics are, in one line."""
    wanted = {key: value for key, value in metrics.items() if key.endswith(("_mAP", "_mAP_50"))} or metrics
    return ", ".join(f"{name(key)} {value:.3f}" for key, value in wanted.items())


def name(key: str) -> str:
    """How a metric of MMDetection is called in COCO's tables: `coco/bbox_mAP_50` is `bbox AP50`."""
    kind, _, rest = key.removeprefix("coco/").partition("_")
    return f"{kind} {rest.replace('mAP_copypaste', 'AP, all').replace('mAP_', 'AP').replace('mAP', 'AP')}".strip()
