"""The accuracy benchmark: its runs end in time, go on where they were, are not repeated, and are reported right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import accuracy
import accuracy_report
import runs

from msbreg.data.rendered import render
from msbreg.monitor import read_metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a run has come to a step, and then says that all time is over."""

    def set_to(metrics: Path, step: int) -> None:
        def now() -> float:
            return math.inf if any(row["step"] >= step for row in read_metrics(metrics)) else 0.0

        monkeypatch.setattr(runs, "CLOCK", now)

    return set_to


@pytest.mark.slow
def test_time_is_up_in_the_middle_of_a_run_and_the_next_call_goes_on_with_it(tmp_path, clock, monkeypatch, capsys):
    images = render(tmp_path / "images", images=1280, test_images=100, size=16)
    folder = tmp_path / "runs"
    command = ["--small", "--data", str(images), "--folder", str(folder), "--minutes", "1", "--epochs", "0.25", "1"]
    command += ["--arms", "msbreg-k2", "--", "--run.threads", "1", "--data.threads", "1"]
    first, second = folder / "msbreg-k2-epochs0.25-seed0", folder / "msbreg-k2-epochs1-seed0"

    clock(second / "metrics.jsonl", 10)
    assert accuracy.main(command) == 0
    said = capsys.readouterr().out
    assert "MSBReg, K = 2, epochs 0.25, seed 0: linear" in said
    assert "MSBReg, K = 2, epochs 1, seed 0: time is up" in said
    assert "runs finished: 1, left of this list: 1;" in said
    steps = [row["step"] for row in read_metrics(second / "metrics.jsonl")]
    assert 10 <= steps[-1] < 80 and (second / "checkpoint.pt").exists() and runs.finished(second) is None
    assert "| MSBReg, K = 2 | 1 | 2 | 1 |" not in (folder / "accuracy.md").read_text()

    monkeypatch.undo()
    assert accuracy.main(command) == 0
    said = capsys.readouterr().out
    assert "epochs 1, seed 0: linear" in said and "epochs 0.25" not in said
    assert "going on from step" in (second / "log.txt").read_text()
    for place, steps in ((first, 20), (second, 80)):
        assert runs.finished(place)["summary"]["step"] == steps
        assert not list(place.glob("checkpoint*")) and not list(place.glob("backbone*"))
    page = (folder / "accuracy.md").read_text()
    assert "| MSBReg, K = 2 | 0.25 | 0.5 | 1 |" in page and "| MSBReg, K = 2 | 1 | 2 | 1 |" in page
    assert "published" not in page  # which is of other images
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    records = json.loads((folder / "accuracy.json").read_text())["runs"]
    assert [record["epochs"] for record in records] == [0.25, 1.0]

    logs = [(place / "log.txt").read_bytes() for place in (first, second)]
    assert accuracy.main(command) == 0
    assert capsys.readouterr().out.startswith("runs finished: 2, left of this list: 0;")
    assert [(place / "log.txt").read_bytes() for place in (first, second)] == logs

    assert accuracy.main([*command, "--method.lambda_b", "0.1"]) == 1
    assert capsys.readouterr().err.count("holds a run with other options") == 2


def test_a_run_that_fails_is_told(tmp_path, swatches, capsys):
    command = ["--small", "--data", str(swatches), "--folder", str(tmp_path), "--arms", "msbreg-k2"]
    assert accuracy.main([*command, "--", "--data.batch_size", "1000"]) == 1
    said = capsys.readouterr()
    assert "a batch of 1,000 images cannot be filled from the 240" in said.err
    assert "no run in" in said.out


def test_no_time_and_no_data(tmp_path, capsys):
    assert accuracy.main(["--small", "--folder", str(tmp_path), "--minutes", "0"]) == 0
    assert "no run in" in capsys.readouterr().out and not list(tmp_path.iterdir())
    for command, words in (([], "--data is missing"), (["--data", str(tmp_path / "no")], "there is no folder")):
        with pytest.raises(SystemExit) as ended:
            accuracy.main(command)
        assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_run_that_does_not_save_itself_is_killed(monkeypatch):
    monkeypatch.setattr(runs, "GRACE", 0.5)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    process.stdout.readline()
    runs.stop(process)
    assert process.returncode == -9
    process.stdout.close()


def test_the_list_has_the_published_lengths_and_equal_views_and_begins_with_the_cheapest():
    listed = accuracy.plan(accuracy.ARMS, accuracy.EPOCHS, accuracy.VIEWS_SEEN, 3)
    names = [run.folder for run in listed]
    assert len(names) == len(set(names))
    for arm in accuracy.ARMS:
        for epochs in (1, 10, 30):
            assert all(f"{arm.key}-epochs{epochs}-seed{seed}" in names for seed in range(3))
    for seen in (20, 60):
        assert {run.arm.views for run in listed if run.arm.views * run.epochs == seen} == {2, 4, 8, 16, 20}
    assert [run.arm.key for run in listed[:3]] == ["msbreg-k2", "byol", "simsiam"]
    assert listed[-1].folder == "msbreg-k20-epochs30-seed2"


def test_short_schedules_have_short_warm_ups_and_short_memories():
    def option(epochs: float, name: str) -> float:
        options = accuracy.Run(accuracy.ARMS[0], epochs, 0).options()
        return float(options[options.index(name) + 1])

    assert [option(epochs, "--optim.warmup_epochs") for epochs in (1.25, 10, 30)] == [0.125, 1, 3]
    assert [option(epochs, "--method.tau") for epochs in (0.5, 1, 5, 10, 30)] == [0.9, 0.9, 0.98, 0.99, 0.99]


def record(name, views, epochs, linear, minutes, seed=0):
    summary = {"linear_top1": linear, "knn_top1": linear - 0.1, "seconds": 60 * minutes, "views_per_second": 1e4}
    summary |= {"device": "cpu", "images": 50000, "knn_top1_untrained": 0.3, "knn_top1_pixels": 0.2}
    about = {"options": ["--data.size", "32", "--run.seed", str(seed)], "date": "2026-11-22", "commit": "c"}
    about |= {"versions": {"torch": "2.15"}, "machine": {"processor": "p", "cores": 2}}
    return {"name": name, "views": views, "epochs": epochs, "seed": seed, "summary": summary, **about}


RECORDS = [
    record("A", 2, 1.0, 0.50, 0.15),
    record("A", 2, 10.0, 0.70, 1.5),
    record("B", 20, 1.0, 0.80, 1.2),
    record("B", 20, 1.0, 0.82, 1.4, seed=1),
]


def rows(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines}


def test_tables_compare_at_equal_epochs_equal_views_and_equal_minutes():
    found = accuracy_report.points(RECORDS)
    shown = [*found, *accuracy_report.published(RECORDS)]
    epochs = rows(accuracy_report.equal_lengths(shown, (1, 10, 30), lambda point: point.epochs, "epochs"))
    assert epochs["method"][0] == "epochs 1: linear, %" and len(epochs["method"]) == 6
    assert epochs["A"] == ["50.0", "40.0", "0.15", "70.0", "60.0", "1.50"]
    assert epochs["B"] == ["81.0 ± 1.4", "71.0 ± 1.4", "1.30", "", "", ""]
    assert epochs["published: EMP-SSL, 20 patches"] == ["80.6", "", "", "90.7", "", ""]
    views = rows(accuracy_report.equal_lengths(shown, (20, 60), lambda point: point.views_seen, "views"))
    assert views["A"] == ["70.0", "60.0", "1.50"] and views["B"] == ["81.0 ± 1.4", "71.0 ± 1.4", "1.30"]
    assert views["published: EMP-SSL, 20 patches"] == ["80.6", "", ""]
    assert views["published: BYOL"] == ["48.9", "", ""]
    minutes = rows(accuracy_report.equal_minutes(found))
    assert minutes["method"] == ["0.2 min", "0.5 min", "1 min", "2 min"]
    assert minutes["A"] == ["50.0 (1)", "50.0 (1)", "50.0 (1)", "70.0 (10)"]
    assert minutes["B"] == ["", "", "", "81.0 ± 1.4 (1)"]


def test_the_page_says_what_all_runs_share():
    page = accuracy_report.page(RECORDS, ["a.png"], (1, 10, 30), (20, 60))
    assert "* options of all runs: `--data.size 32 --run.seed`" in page
    assert "* kNN of untrained networks, %: 30.0 ± 0.0" in page and "![a.png](a.png)" in page
    assert "| published: BYOL | 24.9 |" in page and "of another protocol" in page
