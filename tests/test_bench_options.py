"""`bench/options.py`: what cannot be meant is refused in one sentence."""

import argparse

import pytest

pytest.importorskip("triton")

import compile_report
import options


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (options.positive, {"1": 1, "20": 20}, ["0", "-5", "many"]),
        (options.above_zero, {"0.3": 0.3, "7": 7}, ["0", "-1", "nan", "inf", "long"]),
        (options.not_negative, {"0": 0, "1.5": 1.5}, ["-1", "nan", "inf", "long"]),
        (options.limit, {"0": 0, "1.5": 1.5, "inf": float("inf")}, ["-1", "nan", "long"]),
        (compile_report.architecture, {"90": "90", "gfx942": "gfx942"}, ["foo", "sm_90", "42"]),
    ],
)
def test_numbers_and_names(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected .*, got {text}"):
            kind(text)
