"""Which folder or .tar file a split of a data set is, and whether it holds what it seems to hold."""

import os
from collections import Counter
from pathlib import Path

from ..errors import did_you_mean
from .archives import IMAGES, check_archive

TRAIN = ("train", "training")  # timm's other words for a split, in its order
VALIDATION = ("val", "valid", "validation", "eval", "evaluation")
OTHER_IMAGES = (".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".avif", ".heic", ".jp2")


def find_split(root: str | Path, split: str) -> Path:
    """The folder or .tar file of a split: of that name or, as timm has it, of another word for it (val, validation).

    Args:
        root: A folder with one folder or .tar file per split; or a .tar file, which is all there is.
        split: Its name; ``.`` is the folder itself.

    Raises:
        ValueError: There is none, where timm would take all images below ``root``.

    Example:
        >>> find_split(Path(__file__).parent, ".") == Path(__file__).parent
        True
    """
    root = Path(root)
    if root.is_file():
        return _archive(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder or .tar file '{root}'")
    if not split:
        raise ValueError(f"no split is named; '.' stands for all of '{root}'")
    others = next((words for words in (TRAIN, VALIDATION) if split in words), ())
    for name in (split, *others):
        found = root / name
        if found.is_dir():
            return found
        if found.is_file():
            return _archive(found)
    known = sorted(path.name for path in root.iterdir() if path.is_dir() or path.suffix == ".tar")
    has = f"it has {', '.join(known[:8])}" if known else "it has neither folders nor .tar files"
    raise ValueError(f"there is no '{split}' in '{root}'{did_you_mean(split, known)}; {has}")


def _archive(path: Path) -> Path:
    if path.suffix != ".tar":  # timm looks for folders in everything else, and finds none
        raise ValueError(f"'{path}' is neither a folder nor a .tar file (unpacked, and called so)")
    return path


def split_or_root(root: str | Path, split: str) -> Path:
    """As ``find_split``; a folder without splits is itself the training one, of class folders.

    Raises:
        ValueError: There are other splits, but not this one.
    """
    root = Path(root)
    names = [name + end for name in (*TRAIN, *VALIDATION, "test") for end in ("", ".tar")]
    if root.is_dir() and split in TRAIN and not any((root / name).exists() for name in names):
        return root
    packed = root / f"{split}.tar"
    return packed if packed.is_file() else find_split(root, split)


def check_split(path: str | Path) -> list[str]:
    """Looks at all names of a split, once, before a data set is made of it.

    Args:
        path: Of ``find_split``.

    Returns:
        What will not be seen, each as a sentence to warn with.

    Raises:
        ValueError: A .tar file that is not whole, see ``check_archive``; a class folder without images; images outside
            of class folders; no images at all.
    """
    path = Path(path)
    if path.is_file():
        check_archive(path)
        return []
    without, others, archives, loose, images = [], Counter[str](), [], 0, 0
    for folder, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
        kinds = Counter(os.path.splitext(name)[1].lower() for name in files)
        here = sum(kinds[kind] for kind in IMAGES)
        images += here
        others.update({kind: kinds[kind] for kind in OTHER_IMAGES if kinds[kind]})
        if Path(folder) == path:
            loose = here
            archives = [name for name in files if name.endswith(".tar")]
        elif not folders and not here and not Path(folder).name.startswith("."):
            without.append(os.path.relpath(folder, path))
    if not images:
        inside = f"; '{archives[0]}' in it is none of them: name it as the split" if archives else ""
        raise ValueError(f"'{path}' holds no images ({', '.join(IMAGES)}) in class folders{inside}")
    if loose:
        raise ValueError(f"{loose} images lie in '{path}' itself, without a class: move them into class folders")
    if without:
        raise ValueError(
            f"class folder '{sorted(without)[0]}' of '{path}' holds no image ({', '.join(IMAGES)}), which would shift "
            f"the classes' numbers ({len(without)} such folders): fill or remove it"
        )
    warnings = [f"'{path}': {count} files of kind {kind} are not read" for kind, count in sorted(others.items())]
    if archives:
        warnings.append(f"'{path}': {len(archives)} .tar files beside the class folders are not read ({archives[0]})")
    return warnings


def _refuse(error: OSError) -> None:
    raise ValueError(f"folder '{error.filename}' cannot be read ({error.strerror})") from error


def overlap(train: Path, validation: Path) -> str:
    """How two splits share their images, in words; nothing where they are different folders or files.

    Example:
        >>> overlap(Path("data"), Path("data/validation"))
        "'data/validation' lies in 'data'"
    """
    if train.exists() and validation.exists() and os.path.samefile(train, validation):
        return f"'{train}' and '{validation}' are the same"
    first, second = train.resolve(), validation.resolve()
    if first in second.parents:
        return f"'{validation}' lies in '{train}'"
    return f"'{train}' lies in '{validation}'" if second in first.parents else ""


def read_class_map(path: str | Path, root: str | Path = "") -> dict[str, int]:
    """Class names to numbers, of a text file with one name a line.

    Args:
        path: Of the file, or below ``root``.
        root: Of the data.

    Raises:
        ValueError: No such file, no text, a name that is there twice, or an empty line between names.
    """
    file = next((each for each in (Path(path), Path(root, path)) if each.is_file()), None)
    if file is None:
        raise ValueError(f"there is no file '{path}'")
    if file.suffix.lower() != ".txt":  # timm also unpickles .pkl files, which could run code in its older versions
        raise ValueError(f"'{file}' is no .txt file: write one class name a line")
    try:
        names = file.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' cannot be read as text ({error})") from error
    names = [name.strip() for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if twice or not names:
        problem = f"line '{twice[0]}' is empty or there twice" if twice else "it is empty"
        raise ValueError(f"'{file}': {problem}: write each class name once")
    return {name: number for number, name in enumerate(names)}


def start_no_programs() -> None:
    """Have Pillow start no program for an image, in this process.

    It tells formats by content: an EPS file of any name would be a program of PostScript, given to Ghostscript.

    Example:
        >>> start_no_programs()
    """
    from PIL import EpsImagePlugin

    EpsImagePlugin.gs_binary = False
