"""Widths of a network as sums of free ones: what may change, and what must then change with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

Term = tuple[int, int | None]
Form = tuple[Term, ...]
"""A size as an ordered sum of ``coefficient * width``; a term without width is a number.

``((64, 0), (1, 1), (3, None))`` is ``64 a + b + 3``."""


def number(size: int) -> Form:
    """A size that cannot change."""
    return ((size, None),)


def is_number(form: Form) -> bool:
    """Whether no free width is in it."""
    return all(width is None for _, width in form)


def scaled(form: Form, factor: int) -> Form:
    """The size times a number."""
    return tuple((c * factor, w) for c, w in form)


def joined(forms: list[Form]) -> Form:
    """Sizes one after the other, as of concatenated channels.

    Example:
        >>> joined([((1, 0),), ((2, 0),), ((4, None),)])
        ((3, 0), (4, None))
    """
    terms: list[Term] = []
    for c, w in (term for form in forms for term in form):
        if terms and terms[-1][1] == w:
            terms[-1] = (terms[-1][0] + c, w)
        else:
            terms.append((c, w))
    return tuple(terms) or number(0)


class Widths:
    """Free widths and what is known about them. Declaring a width fixed is always sound: it just stays as it is.

    Example:
        >>> widths = Widths()
        >>> qkv, stream = widths.new(1152), widths.new(384)
        >>> heads = widths.divided(qkv, 3 * 64, "heads")
        >>> widths.unify(widths.times(heads, 64), stream, "the attention's width is that of the stream")
        >>> widths.size(qkv, widths.sizes(2.0)), widths.size(stream, widths.sizes(2.0))
        (2304, 768)
    """

    def __init__(self) -> None:
        self._size: list[int] = []
        self._known: dict[int, Form] = {}
        self.reasons: dict[int, str] = {}

    def new(self, size: int) -> Form:
        """A free width; sizes below 2 are numbers."""
        if size < 2:
            return number(size)
        self._size.append(size)
        return ((1, len(self._size) - 1),)

    def resolved(self, form: Form) -> Form:
        """The size in terms of widths that are still free."""
        while any(w in self._known for _, w in form if w is not None):
            form = joined([scaled(self._known[w], c) if w in self._known else ((c, w),) for c, w in form])
        return form

    def now(self, form: Form) -> int:
        """The present size."""
        return sum(c if w is None else c * self._size[w] for c, w in form)

    def times(self, form: Form, factor: int) -> Form:
        """The size times a number, resolved."""
        return scaled(self.resolved(form), factor)

    def fix(self, form: Form, why: str) -> Form:
        """Declare that the size stays as it is."""
        for _, w in self.resolved(form):
            if w is not None:
                self._known[w] = number(self._size[w])
                self.reasons[w] = why
        return self.resolved(form)

    def unify(self, a: Form, b: Form, why: str) -> None:
        """Declare two sizes equal, whatever becomes of them; fixes what cannot be expressed."""
        a, b = self.resolved(a), self.resolved(b)
        if a == b:
            return
        if is_number(a) or is_number(b):
            self.fix(a, why), self.fix(b, why)
            return
        if len(b) == 1:
            a, b = b, a
        if len(a) == 1 and self._solve(a[0], b):
            return
        if len(a) == len(b) and all(self.now((s,)) == self.now((t,)) for s, t in zip(a, b, strict=True)):
            for s, t in zip(a, b, strict=True):
                self.unify((s,), (t,), why)
            return
        self.fix(a, why), self.fix(b, why)

    def _solve(self, term: Term, form: Form) -> bool:
        """Make ``term`` equal ``form`` by choosing the term's width."""
        c, w = term
        if any(other == w for _, other in form):
            return False
        quotient = self._quotient(form, c)
        if quotient is None or w is None:
            return False
        self._known[w] = quotient
        return True

    def _quotient(self, form: Form, divisor: int) -> Form | None:
        """``form / divisor``, refining widths into multiples where needed; None where it does not divide."""
        form = self.resolved(form)
        need = [(w, divisor // math.gcd(c, divisor)) for c, w in form]
        if any(f > 1 and (w is None or self._size[w] % f) for w, f in need):
            return None
        for w, factor in need:
            if w is not None and factor > 1 and w not in self._known:
                self._size.append(self._size[w] // factor)
                self._known[w] = ((factor, len(self._size) - 1),)
        form = self.resolved(form)
        if any(c % divisor for c, _ in form):
            return None
        return tuple((c // divisor, w) for c, w in form)

    def divided(self, form: Form, divisor: int, why: str) -> Form:
        """The size over a number, of which it stays a multiple; fixed where that cannot be."""
        quotient = self._quotient(form, divisor)
        if quotient is None:
            return number(self.now(self.fix(form, why)) // divisor)
        return quotient

    def sizes(self, factor: float) -> dict[int, int]:
        """All free widths times ``factor``: multiples of 8 stay such (from 8 to 15, of 2), none gets smaller."""
        found = {}
        for w, size in enumerate(self._size):
            if w in self._known:
                continue
            step = next(
                step for step in ((8, 4, 2, 1) if size >= 16 else (2, 1) if size >= 8 else (1,)) if size % step == 0
            )
            found[w] = max(size, step * round(factor * size / step))
        return found

    def size(self, form: Form, sizes: Mapping[int, int]) -> int:
        """What the size becomes."""
        return sum(c if w is None else c * sizes[w] for c, w in self.resolved(form))
