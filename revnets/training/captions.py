"""Titles of pictures that hold names of folders, files and models, which may be any bytes."""


def caption(text: str) -> str:
    r"""The text as matplotlib draws it letter by letter.

    It takes what stands between two dollars for a formula, and no text that is not Unicode, and fails in both; a
    training of days would end in that.

    Args:
        text: Of any letters, such as those of a folder's name.

    Example:
        >>> print(caption("run $x_$ \udcff"))
        run \$x_\$ ?
    """
    return text.encode(errors="replace").decode().replace("$", r"\$")
