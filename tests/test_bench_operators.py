"""`bench/operators.py`: what it times is what it says, and what msbreg's pipeline does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

import operators

from msbreg.data import View, open_source
from msbreg.data.dali_backend import DaliBackend
from msbreg.data.draws import draw

BENCH = Path(__file__).resolve().parents[1] / "bench"

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ways(swatches) -> dict[str, operators.Operator]:
    """By name, on four images."""
    view = View(size=24, solarize=0.5, sigma=(0.5, 2.0))
    return {way.name: way for way in operators.operators(open_source(swatches / "train"), view, 4, CPU)}


def results(way, copies=1):
    outputs = operators.pipeline(way, copies, CPU, threads=1).run()
    return [[np.asarray(output.at(index)) for index in range(4)] for output in outputs]


def test_the_steps_one_after_another_are_the_packages_pipeline(swatches, ways):
    source, view = open_source(swatches / "train"), View(size=24, solarize=0.5, sigma=(0.5, 2.0))
    encoded = [np.frombuffer(source.read(index), np.uint8) for index in range(4)]
    backend = DaliBackend((view,), 4, CPU, threads=1, dtype=torch.float32)
    backend.submit(encoded, draw((view,), np.arange(4), np.full((4, 2), 16), seed=0))
    (expected,) = backend.receive()

    x = ways["decoders.image"].inputs
    for name in ("decoders.image", "resize, cubic", "filter", "coord_transform", "x ^ 255", "crop_mirror_normalize"):
        (x,) = results(ways[name]._replace(inputs=x))
    assert np.array_equal(np.stack(x), expected.permute(0, 2, 3, 1).numpy())
    backend.close()


def test_ways_to_do_the_same_do_the_same(ways):
    (blurred,), (filtered,) = results(ways["gaussian_blur"]), results(ways["filter"])
    difference = np.abs(np.stack(blurred).astype(int) - np.stack(filtered)).max()
    assert difference <= 1 and np.abs(np.stack(blurred).astype(int) - np.stack(ways["filter"].inputs)).max() > 20
    for name in ("color_twist", "resize, linear"):
        (one,) = results(ways[name])
        assert all(image.shape == (24, 24, 3) and image.dtype == np.uint8 for image in one)


def test_copies_are_made_side_by_side_and_none_hands_out_the_input(ways):
    copies = results(ways["coord_transform"], 3)
    assert len(copies) == 3 and all(np.array_equal(copies[0], copy) for copy in copies)
    works = operators.pipeline(ways["coord_transform"], 3, CPU, threads=1, works=False).run()
    assert len(works) == 1 + 3 and np.array_equal(works[0].as_array(), ways["coord_transform"].inputs)
    inverted = results(ways["x ^ 255"], 3)
    assert not np.array_equal(inverted[0], inverted[1])  # else DALI would compute most of it once


def test_what_dali_refuses_is_left_out_with_its_reason(ways):
    from nvidia.dali import fn

    odd = ways["resize, cubic"]._replace(name="odd", apply=lambda x, argument, copy: fn.resize(x, size=[1, 2, 3, 4]))
    found = list(operators.measure([odd, ways["x ^ 255"]], CPU, threads=1, rounds=2, seconds=0))
    assert [[row["operator"] for row in rows] for rows, _ in found] == 2 * [["x ^ 255"]]
    rows, refused = found[-1]
    assert list(refused) == ["crop and resize: odd"] and "4 given" in refused["crop and resize: odd"]
    facts = {"device_name": "cpu", "size": 24, "batch": 4, "threads": 1, "processor": "any"}
    assert "\n\nRefused by DALI: crop and resize: odd: " in operators.table({**facts, "rows": rows, "refused": refused})


@pytest.mark.slow
def test_the_command_prints_and_keeps_its_figures(tmp_path):
    file = tmp_path / "operators.json"
    command = [sys.executable, BENCH / "operators.py", "--device", "cpu", "--size", "16", "--batch", "4"]
    command += ["--rounds", "2", "--seconds", "0", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    steps = [row["step"] for row in result["rows"]]
    order = ["decode", "crop and resize", "blur", "colours", "solarize", "flip and normalise"]
    assert list(dict.fromkeys(steps)) == order
    assert all(row["operator"] in done.stdout for row in result["rows"]) and result["batch"] == 4


def test_bad_options_end_in_a_sentence(tmp_path):
    for options, why in ((["--batch", "0"], "--batch: expected 1 or more"), (["--data", tmp_path / "none"], "none")):
        command = [sys.executable, BENCH / "operators.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode != 0 and why in done.stderr and "Traceback" not in done.stderr
