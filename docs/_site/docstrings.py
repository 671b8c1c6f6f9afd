"""What docstrings here are written in that the site's Markdown does not know: formulas, and sections ``Example:``."""

import re
from textwrap import dedent
from typing import Any

import griffe

FORMULA = re.compile(r"(?m)^( *)\.\. math::(.*(?:\n\1 +.*)*)$")


class Docstrings(griffe.Extension):
    """Rewrites them before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that may have a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    r"""Formulas as code, since drawing them would need a script from elsewhere; ``Examples:``, which griffe knows.

    Example:
        >>> rewritten("For :math:`x`.\n\n.. math::\n    y = x^2\n\nExample:\n    >>> 1\n    1").splitlines()
        ['For `x`.', '', '```tex', 'y = x^2', '```', '', 'Examples:', '    >>> 1', '    1']
    """
    text = FORMULA.sub(lambda m: "\n".join([f"{m[1]}```tex", f"{m[1]}{dedent(m[2]).strip()}", f"{m[1]}```"]), text)
    text = text.replace(":math:`", "`")
    return re.sub(r"(?m)^( *)Example:$", r"\1Examples:", text)
