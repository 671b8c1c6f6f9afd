"""What is told of a loop's progress where the output is no terminal."""

import logging

import pytest

from revnets.training.progress import Steps, clock


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (-3, "0:00:00"), (360000, "100:00:00")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert clock(seconds) == words


@pytest.mark.parametrize("shown", [True, False])
def test_lines_now_and_then(shown: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Steps("train 3", 7, 3, shown) as steps:
        for step in range(1, 8):
            if steps.due(step):
                steps.show(step, f"loss {step}")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" ETA")[0] for line in lines] == (
        ["train 3 3/7 (43%)", "train 3 6/7 (86%)", "train 3 7/7 (100%)"] if shown else []
    )
    assert all(line.endswith(f"loss {step}") for line, step in zip(lines, (3, 6, 7), strict=False))
