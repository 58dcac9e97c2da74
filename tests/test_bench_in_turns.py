"""`bench/in_turns.py`: losses timed in turns, those that agree with the oracle."""

import dataclasses
import json

import in_turns
import providers
import pytest
import torch

OPTIONS = ["--shape", "2x24x16", "--device", "cpu", "--rounds", "3"]


def test_figures_are_of_the_rounds_that_count(monkeypatch, tmp_path, capsys):
    """The second loss takes twice as long as the first, and in the rounds that do not count a hundred times as long."""
    times = {"fused": iter([9.0] * in_turns.WARM_UP + [1.0, 2.0, 3.0])}
    times["svd"] = iter([900.0] * in_turns.WARM_UP + [2.0, 4.0, 6.0])
    clocks = iter(times.values())
    monkeypatch.setattr(in_turns, "device_round", lambda *_, **__: (next(clocks).__next__, "wall"))
    threads = torch.get_num_threads()
    try:
        in_turns.main([*OPTIONS, "--threads", "1", "--json", str(tmp_path / "new" / "turns.json")])
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "new" / "turns.json").read_text())
    fused, svd = result["rows"]
    assert fused["ms"] == {"median": 2e3, "min": 1e3, "max": 3e3}
    assert svd["ratio"] == {"median": 2, "min": 2, "max": 2}
    assert (result["shape"], result["dtype"], result["threads"], result["rounds"]) == ("2x24x16", "float32", 1, 3)
    text = " ".join(capsys.readouterr().out.split())
    assert "| svd | wall | 4,000.00 (2,000.00 to 6,000.00) | 2.00 (2.00 to 2.00) |" in text


def test_it_runs(capsys):
    in_turns.main([*OPTIONS, "--dtype", "bfloat16", "--providers", "svd", "fused", "fused_spectral"])
    head, _, *rows = capsys.readouterr().out.splitlines()[2:]
    assert head.endswith(" time / svd |")
    assert [row.split()[1] for row in rows] == ["svd", "fused", "fused_spectral"]


def test_a_loss_that_disagrees_with_the_oracle_is_left_out(monkeypatch, capsys):
    known = providers.providers("nuclear")
    right = known["svd"].build(torch.device("cpu"))
    wrong = dataclasses.replace(known["svd"], build=lambda device: lambda z, t, n=None: 1.1 * right(z, t, n))
    raises = dataclasses.replace(known["gram"], build=lambda device: 1 / 0)
    monkeypatch.setattr(in_turns, "providers", lambda spectrum: known | {"svd": wrong, "gram": raises})
    in_turns.main([*OPTIONS, "--providers", "svd,gram", "fused"])
    text = capsys.readouterr().out
    assert "time / fused" in text and "| fused " in text
    assert "Left out: svd: its value is off by" in text and "Left out: gram: it raises ZeroDivisionError" in text
    with pytest.raises(SystemExit, match="No loss was timed"):
        in_turns.main([*OPTIONS, "--providers", "svd"])


def test_an_interrupted_run_has_the_rounds_before(monkeypatch, capsys):
    def interrupted(*_, **__):
        times = iter([1.0] * (in_turns.WARM_UP + 2))

        def clock():
            if (time := next(times, None)) is None:
                raise KeyboardInterrupt
            return time

        return clock, "wall"

    monkeypatch.setattr(in_turns, "device_round", interrupted)
    in_turns.main([*OPTIONS[:-1], "31"])
    text = " ".join(capsys.readouterr().out.split())
    assert "2 rounds" in text and "| svd | wall | 1,000.00 (1,000.00 to 1,000.00) | 1.00 (1.00 to 1.00) |" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "8x512"], "expected one shape KxBxD"),
        (["--shape", "small"], "expected one shape KxBxD"),
        (["--rounds", "0"], "expected 1 or more"),
        (["--providers", "fused,other"], "expected some of fused, svd, "),
        (["--providers", ","], "got none"),
    ],
)
def test_what_it_cannot_measure_it_says(options, words, capsys):
    with pytest.raises(SystemExit):
        in_turns.main(options)
    assert words in capsys.readouterr().err
