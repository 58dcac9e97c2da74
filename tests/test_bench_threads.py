"""`bench/threads.py`: the loader by its threads and batches ahead."""

import json
import sys

import pytest

pytest.importorskip("nvidia.dali", reason="this needs DALI")
pytest.importorskip("torchvision", reason="this needs the extra [train]")

import threads


def test_the_defaults_come_first_and_no_setting_twice():
    for cores in (1, 2, 16):
        tried = threads.settings(cores)
        assert tried[0] == (cores, 2) and len(set(tried)) == len(tried)


def test_it_measures_every_setting(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    options = ["--device", "cpu", "--views", "2", "--rounds", "2", "--seconds", "0", "--json", str(tmp_path / "t.json")]
    monkeypatch.setattr(sys, "argv", ["threads.py", *options])
    threads.main()
    result = json.loads((tmp_path / "t.json").read_text())
    assert [(row["threads"], row["prefetch"]) for row in result["rows"]] == threads.settings(1)
    assert result["rows"][0]["over_the_first"] == {"median": 1, "min": 1, "max": 1}
    assert all(row["images_per_second"]["min"] > 0 and row["cpu_ms_per_view"]["min"] > 0 for row in result["rows"])
    assert str(tmp_path) not in json.dumps(result) and result["command"].startswith("python bench/threads.py")
    assert capsys.readouterr().out.count("\n| ") == len(result["rows"]) + 2
