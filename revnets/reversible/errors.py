"""What the engine raises; every message names the op, what was expected, and the fix."""


class ReversibleError(RuntimeError):
    """An op cannot be run backwards: consumed tape, changed output, changed parameter, second derivative."""


class RangeError(ReversibleError):
    """A value left the range in which the fixed grid of exact mode adds without rounding."""
