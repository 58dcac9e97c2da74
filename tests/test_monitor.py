"""What a run tells: numbers that give a collapse away, seconds of training alone, lines that are JSON, curves."""

import ast
import json
import math
import warnings
from types import SimpleNamespace

import pytest

pytest.importorskip("tqdm", reason="this needs the extra [train]")

import torch
from test_processes import run_ranks

from msbreg.monitor import MetricsFile, Progress, Stopwatch, embedding_statistics, read_metrics
from msbreg.plots import draw_curves

FLAT = torch.cat([torch.eye(8), -torch.eye(8)])
"""16 rows that are spread as evenly as can be in 8 dimensions."""
POINT = torch.ones(16, 8)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that moves on by hand."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = clock.monotonic = lambda: clock.now
    monkeypatch.setattr("msbreg.monitor.time", clock)
    return clock


def test_embeddings_that_are_spread_out_and_embeddings_that_are_not():
    spread = embedding_statistics(3 * torch.stack([FLAT, FLAT]))
    healthy = {"effective_rank": 8, "singular_max": 1, "singular_min": 1, "centroid_norm": 0}
    assert spread == pytest.approx({"embedding_std": math.sqrt(32 / 31), **healthy}, abs=1e-5)
    collapsed = {"effective_rank": 1, "singular_max": math.sqrt(8), "singular_min": 0, "centroid_norm": 1}
    found = embedding_statistics(torch.stack([POINT, POINT]).bfloat16())
    assert found == pytest.approx({"embedding_std": 0, **collapsed}, abs=1e-2)


STATISTICS = """
import sys, torch
from msbreg.monitor import embedding_statistics
from msbreg.processes import Processes
views = torch.load(sys.argv[1])
with Processes("cpu") as processes:
    print(embedding_statistics(views.chunk(processes.world, dim=1)[processes.rank], processes.group))
"""


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 6, 20)])
def test_statistics_are_those_of_all_processes(shape, tmp_path, free_port):
    views = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.save(views, tmp_path / "views.pt")
    expected = embedding_statistics(views)
    assert embedding_statistics(views[:, : shape[1] // 2])["effective_rank"] < expected["effective_rank"] - 0.1
    for said in run_ranks(STATISTICS, [[str(tmp_path / "views.pt")]] * 2, free_port):
        assert ast.literal_eval(said) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_statistics_of_what_is_not_finite_are_quiet():
    found = embedding_statistics(torch.full((2, 4, 3), torch.nan))
    assert all(math.isnan(value) for value in found.values())


def test_the_spectrum_is_that_of_the_first_view():
    found = embedding_statistics(torch.stack([torch.eye(8)[[0, 0, 0, 0, 1]], FLAT[:5]]))  # singular values 2 and 1
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)
    assert found["singular_max"] == pytest.approx(2)


def test_seconds_of_training_leave_out_what_is_between_and_go_on_after_a_resume(clock):
    watch = Stopwatch(torch.device("cpu"), 50.0, 1.0)
    for _ in range(2):
        watch.start()
        clock.now += 2
        watch.stop()
        clock.now += 7
    assert watch.seconds == 54
    watch.start()
    with watch.waiting():
        clock.now += 1
    assert watch.lap() == (5, 1)
    clock.now += 3
    assert watch.lap() == (3, 0)


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


def test_the_time_left_is_of_the_steps_since_the_resume(clock, capsys):
    progress = Progress(100, 50, shown=True)
    for _ in range(10):
        progress.step()
    clock.now += 9
    progress.show(loss=0.5)
    assert capsys.readouterr().err == ""
    clock.now += 11
    progress.show(loss=0.5)
    assert capsys.readouterr().err == "step 60/100  loss 0.5  80 s left\n"


def test_ranks_other_than_the_first_say_nothing(clock, capsys):
    progress = Progress(100, 0, shown=False)
    progress.say("going on")
    clock.now += 60
    progress.show(loss=0.5)
    assert capsys.readouterr().err == ""


def test_curves_show_what_they_are_called(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    names = ("loss", "centroid", "brownian", "singular_value", "effective_rank")
    train = [
        {"event": "train", "step": step} | {name: 10 * step + number for number, name in enumerate(names)}
        for step in (2, 4)
    ]
    train[0]["singular_value"] = None  # as where it was not finite
    scores = [(0, 0.2, [1.0, 0.0]), (2, 0.3, [1.1, 0.5]), (4, 0.4, [1.2, None])]
    evaluations = [
        {"event": "eval", "step": step, "knn_top1": knn, "knn_top1_pixels": 0.1, "spectrum": spectrum}
        for step, knn, spectrum in scores
    ]
    draw_curves([*train, *evaluations], tmp_path / "curves.png", title="a run", score="kNN", start="untrained network")
    monkeypatch.undo()
    figure = drawn[-1]  # older matplotlib closes all that there is before
    plt.close(figure)

    losses, accuracy, rank, spectrum, beside = figure.axes
    shown = {line.get_label(): list(line.get_ydata()) for axes in (losses, accuracy, spectrum) for line in axes.lines}
    assert shown["total"] == [20, 40] and shown["multiview centroid $L_M$"] == [21, 41]
    assert shown["Brownian $L_B$"] == [22, 42]
    assert beside.lines[0].get_ydata()[1] == 43 and list(rank.lines[0].get_ydata()) == [24, 44]
    assert list(rank.lines[0].get_xdata()) == [2, 4]
    assert shown["kNN, this run"] == [0.2, 0.3, 0.4] and list(accuracy.lines[0].get_xdata()) == [0, 2, 4]
    assert shown["kNN, untrained network"] == [0.2, 0.2] and shown["kNN, raw pixels"] == [0.1, 0.1]
    assert shown["start"] == [1.0, 1e-4] and shown["end"] == [1.2, None]


def test_curves_of_a_run_whose_metrics_were_deleted(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"event": "eval", "step": 4, "knn_top1": 0.4, "knn_top1_pixels": 0.1, "spectrum": [1.2, 1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* deprecated - use ")  # pyparsing's, of older matplotlib
        for rows in ([row], []):
            draw_curves(rows, tmp_path / "curves.png", title="a run", score="kNN", start="untrained network")
            assert (tmp_path / "curves.png").exists()
