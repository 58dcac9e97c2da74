"""metrics.jsonl: lines that are JSON, and none beyond the checkpoint."""

import json
import math

import pytest

from msbreg.metrics import MetricsFile, read_metrics


def test_lines_beyond_the_checkpoint_are_dropped_and_all_of_a_run_that_had_none(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    steps = {"train": [2, 4, 6], "eval": [0, 4]}
    lines = [json.dumps({"event": event, "step": step}) for event in steps for step in steps[event]]
    metrics.write_text("\n".join(lines))
    MetricsFile(metrics, {"train": 4, "eval": 0})
    assert [(row["event"], row["step"]) for row in read_metrics(metrics)] == [("train", 2), ("train", 4), ("eval", 0)]
    MetricsFile(metrics)
    assert read_metrics(metrics) == []


def test_numbers_that_are_not_finite_are_null(tmp_path):
    MetricsFile(tmp_path / "m").write(event="eval", step=1, loss=math.nan, spectrum=[math.inf, 1.0], of={"a": math.nan})
    row = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert row == {"event": "eval", "step": 1, "loss": None, "spectrum": [None, 1.0], "of": {"a": None}}
