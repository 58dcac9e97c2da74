"""What the curves of a run show."""

import warnings

import pytest

from msbreg.plots import draw_curves


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
    assert shown["step 0"] == [1.0, 1e-4] and shown["step 4"] == [1.2, None]


def test_evaluations_by_other_rules_are_not_drawn_beside_the_last(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    row = {"event": "eval", "knn_top1_pixels": 0.1, "spectrum": [1.0]}
    rules = ((0, 0.5, {"protocol": "five"}), (2, 0.2, {}), (4, 0.3, {"protocol": "ten"}))  # one by an older version
    rows = [row | {"step": step, "knn_top1": knn} | protocol for step, knn, protocol in rules]
    draw_curves(rows, tmp_path / "curves.png", title="a run", score="kNN", start="untrained network")
    monkeypatch.undo()
    plt.close(figure := drawn[-1])
    shown = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].lines}
    assert shown == {"kNN, this run": [0.2, 0.3], "kNN, raw pixels": [0.1, 0.1]}


def test_curves_of_a_run_whose_metrics_were_deleted(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"event": "eval", "step": 4, "knn_top1": 0.4, "knn_top1_pixels": 0.1, "spectrum": [1.2, 1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* deprecated - use ")  # pyparsing's, of older matplotlib
        for rows in ([row], []):
            draw_curves(rows, tmp_path / "curves.png", title="a run", score="kNN", start="untrained network")
            assert (tmp_path / "curves.png").exists()
