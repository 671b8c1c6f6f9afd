"""Numbers that go wrong, seen while training: not finite, out of exact mode's range, rebuilt with a drift.

Each guard is told of the steps by the loop that it serves.
"""
