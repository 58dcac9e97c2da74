"""The accuracy benchmark: its runs end in time, go on where they were, are not repeated, and are reported right."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")


import accuracy
import accuracy_report
import choices
import records
import runs

from msbreg.data.rendered import render
from msbreg.metrics import read_metrics


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
    command = ["--small", "--data", str(images), "--folder", str(folder), "--minutes", "60", "--epochs", "0.25", "1"]
    command += ["--arms", "msbreg-k2", "--", "--run.threads", "1", "--data.threads", "1"]
    first, second = folder / "msbreg-k2-epochs0.25-seed0", folder / "msbreg-k2-epochs1-seed0"

    clock(second / "metrics.jsonl", 10)
    assert accuracy.main(command) == 0
    said = capsys.readouterr().out
    assert "MSBReg, K = 2, epochs 0.25, seed 0: linear" in said
    assert "MSBReg, K = 2, epochs 1, seed 0: time is up" in said
    assert "runs finished: 1, failed: 0, left of this list: 1;" in said
    steps = [row["step"] for row in read_metrics(second / "metrics.jsonl")]
    assert 10 <= steps[-1] < 80 and (second / "checkpoint.pt").exists() and runs.finished(second) is None
    assert "| MSBReg, K = 2 | 1 | 2 | 1 |" not in unpadded((folder / "accuracy.md").read_text())

    monkeypatch.undo()
    assert accuracy.main(command) == 0
    said = capsys.readouterr().out
    assert "epochs 1, seed 0: linear" in said and "epochs 0.25" not in said
    assert "going on from step" in (second / "log.txt").read_text()
    for place, steps in ((first, 20), (second, 80)):
        assert runs.finished(place)["summary"]["step"] == steps
        assert not list(place.glob("checkpoint*")) and not list(place.glob("backbone*"))
    page = unpadded((folder / "accuracy.md").read_text())
    assert "| MSBReg, K = 2 | 0.25 | 0.5 | 1 |" in page and "| MSBReg, K = 2 | 1 | 2 | 1 |" in page
    assert "published" not in page  # which is of other images
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    records = json.loads((folder / "accuracy.json").read_text())["runs"]
    assert [record["epochs"] for record in records] == [0.25, 1.0]

    logs = [(place / "log.txt").read_bytes() for place in (first, second)]
    assert accuracy.main(command) == 0
    assert capsys.readouterr().out.startswith("runs finished: 2, failed: 0, left of this list: 0;")
    assert [(place / "log.txt").read_bytes() for place in (first, second)] == logs

    assert accuracy.main([*command, "--method.lambda_b", "0.1"]) == 1
    assert capsys.readouterr().err.count("holds a run with other options") == 2


def test_a_run_that_fails_is_told_and_stays_on_the_page(tmp_path, swatches, capsys):
    command = ["--small", "--data", str(swatches), "--folder", str(tmp_path), "--arms", "msbreg-k2"]
    assert accuracy.main([*command, "--", "--data.batch_size", "1000"]) == 1
    said = capsys.readouterr()
    reason = "a batch of 1,000 images cannot be filled from the 240"
    assert reason in said.err and "no run in" in said.out

    other = tmp_path / "msbreg-k4-epochs1-seed0"
    other.mkdir()
    (other / runs.RECORD).write_text(json.dumps({"arm": "msbreg-k4", **record("MSBReg, K = 4", 4, 1.0, 0.5, 1.0)}))
    assert accuracy.main([*command, "--report"]) == 0
    assert "runs finished: 1, failed: 1, left of this list: 1;" in capsys.readouterr().out
    failed = json.loads((tmp_path / "accuracy.json").read_text())["failed"]
    assert list(failed) == ["msbreg-k2-epochs1-seed0"] and reason in failed["msbreg-k2-epochs1-seed0"]
    page = (tmp_path / "accuracy.md").read_text()
    assert "## Failed runs\n\n* msbreg-k2-epochs1-seed0: error: a batch of 1,000 images" in page
    assert str(swatches) not in page and str(tmp_path) not in page

    accuracy.main([*command, "--minutes", "0.01"])  # stopped: nobody knows whether it would have failed again
    assert json.loads((tmp_path / "accuracy.json").read_text())["failed"] == {}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status", "saved"), [(signal.SIGTERM, 143, True), (signal.SIGKILL, -9, False)])
def test_a_signal_to_the_comparison_ends_the_run_at_hand(tmp_path, swatches, number, status, saved):
    place = tmp_path / "msbreg-k2-epochs1000-seed0"
    command = [sys.executable, accuracy.__file__, "--small", "--data", swatches, "--folder", tmp_path]
    command += ["--arms", "msbreg-k2", "--epochs", "1000", "--", "--run.threads", "1", "--data.threads", "1"]
    with subprocess.Popen(command) as process:
        try:
            assert wait_for(lambda: any(row["step"] >= 10 for row in read_metrics(place / "metrics.jsonl")), 120)
            trainer = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            process.send_signal(number)
            assert process.wait(30) == status
            ended = wait_for(lambda: not lives(trainer), 5)
            if not ended:
                os.kill(trainer, signal.SIGKILL)
            assert ended
        finally:
            process.kill()
    assert (place / "checkpoint.pt").exists() == saved
    assert not (place / runs.FAILED).exists()


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


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("--json", "--json"),
        ("/home/someone/x.json", "x.json"),
        ("--json=/home/someone/x.json", "--json=x.json"),
        ("results/x.json", "results/x.json"),
        ("/data/a=b", "IMAGES"),
        ("--data=/data/a=b", "--data=IMAGES"),
    ],
)
def test_a_record_says_nothing_of_this_machines_folders(word, kept):
    assert records.without_folder(word, "/data/a=b") == kept


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_record_has_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() == ""
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--message", "m")
    git("tag", "--annotate", "v1", "--message", "v1")
    assert records.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert records.commit() == git("rev-parse", "HEAD") + "+"


def test_the_list_has_the_published_lengths_and_equal_views_and_begins_with_the_cheapest():
    listed = accuracy.plan(accuracy.ARMS, accuracy.EPOCHS, accuracy.VIEWS_SEEN, 3)
    names = [run.folder for run in listed]
    assert len(names) == len(set(names))
    for arm in accuracy.ARMS:
        for epochs in (1, 10, 30):
            assert all(f"{arm.key}-epochs{epochs}-seed{seed}" in names for seed in range(3))
    for seen in (20, 60):
        assert {run.arm for run in listed if run.arm.views * run.epochs == seen} == set(accuracy.ARMS)
    assert [run.arm.key for run in listed[:3]] == ["msbreg-k2", "byol", "simsiam"]
    assert listed[-1].folder == "msbreg-k20-epochs30-seed2" and len(listed) == 144


def test_short_schedules_have_short_warm_ups_and_short_memories():
    def option(epochs: float, name: str, arm: str = "byol") -> float:
        options = accuracy.Run(accuracy.ARMS[accuracy.KEYS.index(arm)], epochs, 0).options()
        return float(options[options.index(name) + 1])

    assert [option(epochs, "--optim.warmup_epochs") for epochs in (1.25, 10, 30)] == [0.125, 1, 3]
    assert [option(epochs, "--method.tau") for epochs in (0.5, 1, 5, 30)] == [0.99] * 4
    with_predictor = [option(epochs, "--method.tau", "msbreg-k4-predictor") for epochs in (0.5, 1, 5, 10, 30)]
    assert with_predictor == [0.9, 0.9, 0.98, 0.99, 0.99]
    assert [option(epochs, "--method.tau", "msbreg-k4") for epochs in (0.5, 1, 5, 10)] == [0.5, 0.5, 0.9, 0.95]


def test_each_method_has_its_own_optimizer_and_what_is_given_for_all_runs_wins(monkeypatch, tmp_path):
    rates = {}

    def train(place, options, **about):
        rates[about["arm"]] = [after for word, after in pairwise(options) if word == "--optim.lr"]

    monkeypatch.setattr(accuracy, "train", train)
    command = ["--small", "--folder", str(tmp_path), "--arms", "msbreg-k2", "msbreg-k4-predictor", "byol", "simsiam"]
    accuracy.main(command)
    assert rates == {"msbreg-k2": ["32"], "msbreg-k4-predictor": ["8"], "byol": ["0.004"], "simsiam": ["0.002"]}
    accuracy.main([*command, "--", "--optim.lr", "16"])
    assert {given[-1] for given in rates.values()} == {"16"}


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
LENGTHS = {"seeds": 2, "epochs": (1, 10, 30), "views_seen": (20, 60)}


def unpadded(page: str) -> str:
    return " ".join(page.split())


def rows(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines}


def test_tables_compare_at_equal_epochs_and_equal_views():
    found = accuracy_report.points(RECORDS, 1)
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


def test_minutes_are_compared_within_a_factor_of_two_that_is_named():
    longer = record("A", 2, 9.0, 0.65, 1.1)
    minutes = rows(accuracy_report.similar_minutes(accuracy_report.points([*RECORDS, longer], 1)))
    assert minutes["method"] == ["0.125 to 0.25 min", "1 to 2 min"]
    assert minutes["A"] == ["50.0 (1; 0.15)", "70.0 (10; 1.50)"]
    assert minutes["B"] == ["", "81.0 ± 1.4 (1; 1.30)"]
    exact = accuracy_report.points([record("A", 2, 1.0, 0.5, 0.5)], 1)
    assert rows(accuracy_report.similar_minutes(exact))["method"] == ["0.25 to 0.5 min"]
    assert "may have had nearly twice the time" in accuracy_report.page(RECORDS, {}, [], **LENGTHS)


def test_missing_seeds_are_told_wherever_means_are_compared():
    page = unpadded(accuracy_report.page(RECORDS, {}, [], **LENGTHS))
    assert page.count("| 50.0, n = 1 | 40.0, n = 1 |") == 1  # equal epochs
    assert page.count("| 70.0, n = 1 | 60.0, n = 1 |") == 2  # equal epochs, equal views
    assert "| 50.0, n = 1 (1; 0.15) | 70.0, n = 1 (10; 1.50) |" in page
    assert "81.0 ± 1.4 |" in page and "81.0 ± 1.4, n" not in page and "80.6, n" not in page


def test_the_plot_has_plain_minutes_hollow_single_seeds_and_one_style_for_what_is_published():
    def lines(records):
        found = [*accuracy_report.points(records, 2), *accuracy_report.published(records)]
        figure = accuracy_report.plot(found)
        figure.canvas.draw()
        return figure, {box.get_label(): box.lines[0] for box in figure.axes[1].containers}

    figure, drawn = lines(RECORDS)  # under two decades of minutes
    for axis in figure.axes:
        texts = [label.get_text() for label in (*axis.get_xticklabels(), *axis.get_xticklabels(minor=True))]
        assert "$" not in "".join(texts) and len([text for text in texts if text]) >= 3
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in hollow] == [[0.15, 1.5]]
    _, fewer = lines(RECORDS[2:])
    for name in accuracy_report.STYLES:
        assert drawn[name].get_marker() == fewer[name].get_marker() != drawn["B"].get_marker()


def test_the_page_says_what_all_runs_share():
    page = accuracy_report.page(RECORDS, {}, ["a.png"], **LENGTHS)
    assert "* options of all runs: `--data.size 32`\n" in page
    assert "| A | `--run.seed 0` |" in unpadded(page) and "5,000 of the test images" in unpadded(page)
    assert "* kNN of untrained networks, %: 30.0 ± 0.0" in page and "![a.png](a.png)" in page
    assert "| published: BYOL | 24.9 |" in unpadded(page) and "of another protocol" in page


@pytest.mark.slow
def test_the_choices_are_written_only_where_asked(tmp_path, swatches, monkeypatch, capsys):
    monkeypatch.setattr(choices, "ROWS", {"no Brownian loss": ["--method.lambda_b", "0"]})
    monkeypatch.setattr(choices, "COMMON", [*choices.COMMON, "--data.size", "16", "--data.batch_size", "16"])
    monkeypatch.chdir(tmp_path)
    page = records.ROOT / "docs" / "choices.md"
    before = page.read_text()
    command = ["--data", str(swatches), "--steps", "2", "--seeds", "1"]
    choices.main(command)
    table = capsys.readouterr().out
    assert "| no Brownian loss " in table and [path.name for path in tmp_path.iterdir()] == ["runs"]
    choices.main([*command, "--json", "new/choices.json", "--page", "new/choices.md"])
    result = json.loads(Path("new/choices.json").read_text())
    assert len(result["rows"]["no Brownian loss"]) == 1 and str(swatches) not in str(result)
    assert table in Path("new/choices.md").read_text()
    assert page.read_text() == before


def test_the_page_of_choices_is_drawn_from_its_results_and_has_choices_alone():
    result = json.loads((records.ROOT / "bench/results/cpu/2026-11-29/choices.json").read_text())
    assert result["rows"].keys() == choices.ROWS.keys()
    assert (records.ROOT / "docs/choices.md").read_text() == choices.page(result)
