"""MMDetection's COCO data set and metric, with sizes from the image files where the annotations have none."""

import functools
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS, METRICS
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what MMDetection's other metrics would need
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric

ORIENTATION = 0x0112  # of EXIF
QUARTER_TURNS = (5, 6, 7, 8)
NAMED = 5


def is_size(value: Any) -> bool:
    """Whether a width or height can be that of an image; some annotation tools write -1 for what they do not know.

    Example:
        >>> [is_size(value) for value in (640, 640.0, 0, -1, 0.5, float("nan"), "640", True, None)]
        [True, True, False, False, False, False, False, False, False]
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and value >= 1 and value == int(value)


def has_sizes(image: Mapping[str, Any]) -> bool:
    """Whether an entry of a COCO file's images says how large the image is."""
    return is_size(image.get("width")) and is_size(image.get("height"))


def file_size(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of an image file, as a loader sees it that turns it as its EXIF data say, and as stored.

    Raises:
        OSError, SyntaxError, ValueError: it is missing, or no image.
    """
    with Image.open(path) as image:
        stored = image.size
        turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
    return (stored[1], stored[0]) if turned else stored, stored


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """MMDetection's, which reads the size of an image from its file where the annotations have none (-1, 0, no number).

    MMDetection's own drops such images, or all their boxes, without a word. Images that are not trained on are counted
    and named in the log. With ``filter_empty_gt``, images whose boxes are all left out (no area, outside of the image)
    are, too, where MMDetection would train on them as if they showed nothing.

    Args:
        *args: of ``CocoDataset``.
        report: log what is left out.
        **kwargs: of ``CocoDataset``.

    Raises:
        ValueError: for an image whose size cannot be read, or a category id that is no number.

    Example:
        >>> CheckedCocoDataset(metainfo={"classes": ("a",)}, lazy_init=True).report  # dict(type="CheckedCocoDataset")
        True
    """

    def __init__(self, *args: Any, report: bool = True, **kwargs: Any) -> None:
        self.report = report
        self._measured = 0
        super().__init__(*args, **kwargs)

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> Any:
        """MMDetection's, with a size that is one."""
        image = raw_data_info["raw_img_info"]
        for each in raw_data_info["raw_ann_info"]:
            category = each.get("category_id")
            if not isinstance(category, (int, float)) or isinstance(category, bool):
                raise ValueError(
                    f"{self.ann_file}: annotation {each.get('id')} has category_id {category!r}, expected a number"
                )
        if not has_sizes(image):
            path = Path(self.data_prefix.get("img") or "", image["file_name"])
            try:
                upright, stored = file_size(path)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(
                    f"{self.ann_file}: image {image['file_name']!r} has no size, and its file none either ({error})"
                ) from error
            width, height = stored if ignores_orientation(self.pipeline_steps) else upright
            image = {**image, "width": width, "height": height}
            self._measured += 1
        return super().parse_data_info({**raw_data_info, "raw_img_info": image})

    def filter_data(self) -> list[dict[str, Any]]:
        """MMDetection's, and what it leaves out in the log."""
        kept = super().filter_data()
        self._say(f"sizes of {self._measured} images are those of the files, the annotations have none", self._measured)
        if self.test_mode:
            return kept
        filters = self.filter_cfg or {}
        left = {id(info) for info in kept}
        small, empty = [], []
        for info in self.data_list:
            if min(info["width"], info["height"]) < filters.get("min_size", 0):
                small.append(info)
            elif id(info) not in left or (filters.get("filter_empty_gt", False) and not info["instances"]):
                empty.append(info)
        self._say(f"{len(small)} images with a side under {filters.get('min_size')} pixels are skipped", small)
        self._say(f"{len(empty)} images without an object are skipped", empty)
        gone = {id(info) for info in empty}
        return [info for info in kept if id(info) not in gone]

    @property
    def pipeline_steps(self) -> list[Any]:
        """The transforms."""
        return list(getattr(getattr(self, "pipeline", None), "transforms", []))

    def _say(self, what: str, found: Any) -> None:
        if not found or not self.report or not is_main_process():
            return
        names = [Path(info["img_path"]).name for info in found[:NAMED]] if isinstance(found, list) else []
        more = ", ..." if isinstance(found, list) and len(found) > NAMED else ""
        listed = f" ({', '.join(names)}{more})" if names else ""
        print_log(f"{self.ann_file}: {what}{listed}", logger="current", level=logging.WARNING)


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """MMDetection's, which measures masks with the sizes of the images, and boxes whose annotation has the id 0.

    pycocotools takes an object of id 0 for one that was not found, and cannot draw masks of images of unknown size.

    Args:
        *args: of ``CocoMetric``.
        **kwargs: of ``CocoMetric``.

    Example:
        >>> CheckedCocoMetric(metric="bbox").metrics  # in a config: val_evaluator = dict(type="CheckedCocoMetric")
        ['bbox']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._coco_api is not None and 0 in self._coco_api.anns:
            _number_from_one(self._coco_api)

    def compute_metrics(self, results: list[Any]) -> Any:
        """MMDetection's, of annotations that know how large images are."""
        images = self._coco_api.imgs if self._coco_api is not None else {}
        for truth, _ in results:
            image = images.get(truth["img_id"])
            if image is not None and not has_sizes(image):
                image.update(width=truth["width"], height=truth["height"])
        return super().compute_metrics(results)


def _number_from_one(api: Any) -> None:
    for number, each in enumerate(api.dataset["annotations"], 1):
        each["id"] = number
    api.createIndex()
    api.img_ann_map, api.cat_img_map = api.imgToAnns, api.catToImgs


def ignores_orientation(pipeline: Any) -> bool:
    """Whether a pipeline, as configured or as built, reads images without turning them as their EXIF data say."""
    for step in pipeline or []:
        kind = step.get("color_type", "") if isinstance(step, Mapping) else getattr(step, "color_type", "")
        if "ignore_orientation" in str(kind) or kind == "unchanged":
            return True
    return False


def use_checked(cfg: Any, report: bool = True) -> None:
    """Puts the two classes in place of MMDetection's own in a configuration; classes derived from those stay.

    Args:
        cfg: MMEngine's ``Config``.
        report: see ``CheckedCocoDataset``.
    """
    for key in [key for key in cfg if key.endswith("_dataloader") and cfg[key]]:
        for dataset in coco_datasets(cfg[key].get("dataset") or {}):
            dataset["type"], dataset["report"] = CheckedCocoDataset.__name__, report
    for key in [key for key in cfg if key.endswith("_evaluator") and cfg[key]]:
        for each in cfg[key] if isinstance(cfg[key], (list, tuple)) else [cfg[key]]:
            if each.get("type") in ("CocoMetric", "mmdet.CocoMetric", CocoMetric):
                each["type"] = CheckedCocoMetric.__name__


def check_all() -> None:
    """Have every runner that is made of a configuration use the two classes, in scripts of MMDetection's."""
    plain = Runner.from_cfg.__func__

    @functools.wraps(plain)
    def from_cfg(cls: type[Runner], cfg: Any) -> Runner:
        use_checked(cfg)
        made: Runner = plain(cls, cfg)
        return made

    Runner.from_cfg = classmethod(from_cfg)


def coco_datasets(dataset: Any) -> list[Any]:
    """The configured data sets of either kind, inside of wrappers (repeated, balanced, concatenated), too."""
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    if inner:
        return [found for each in inner for found in coco_datasets(each)]
    kinds = ("CocoDataset", "mmdet.CocoDataset", CocoDataset, CheckedCocoDataset.__name__, CheckedCocoDataset)
    return [dataset] if dataset.get("type") in kinds else []
