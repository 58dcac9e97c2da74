"""Checkpoints: whole at every moment, and plain words where one is not."""

import os
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tqdm", reason="this needs the extra [train]")

import torch

from msbreg import checkpoint
from msbreg.config import Config
from msbreg.errors import MSBRegError
from msbreg.export import backbone_of
from msbreg.metrics import MetricsFile


def state(step: int, **more: Any) -> dict[str, Any]:
    """What a run saves, without the networks."""
    parts = {name: kind() for name, kind in checkpoint.PARTS.items()}
    return {**parts, "step": step, **more}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path) -> None:
    """Changes one bit in the middle of a tensor, which torch.load would not notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def misdirect(path: Path) -> None:
    """Damages where the archive's directory says it begins, far behind the file's end: its files would lie before it.

    The system refuses to go there.
    """
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x06") + 50] ^= 0x80
    path.write_bytes(data)


WEIGHTS = {"w": torch.arange(6000.0)}


def test_what_is_saved_comes_back(tmp_path):
    saved = state(3, weights={"w": torch.arange(6.0).view(2, 3)}, name="x", list=[1, (2.5, None)])
    checkpoint.save_checkpoint(tmp_path, saved)
    loaded = checkpoint.load_run(tmp_path)
    assert loaded["step"] == 3 and loaded["list"] == saved["list"]
    torch.testing.assert_close(loaded["weights"]["w"], saved["weights"]["w"])
    assert names(tmp_path) == ["checkpoint.pt"]


def test_one_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    checkpoint.save_checkpoint(tmp_path, state(3, method=WEIGHTS))
    assert checkpoint.load_run(tmp_path)["method"]["w"].device.type == "cpu"


def test_all_bytes_are_on_the_disk_before_they_get_their_name_and_then_the_name_is(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(new) or replace(old, new))
    checkpoint.save_checkpoint(tmp_path, state(1, method=WEIGHTS))
    content, renamed, folder = done
    assert content.st_size == renamed.stat().st_size and renamed.name == "checkpoint.pt"
    assert folder.st_ino == tmp_path.stat().st_ino


@pytest.mark.parametrize("harm", [damage, misdirect, lambda path: os.truncate(path, 200)])
def test_the_one_before_is_kept_and_steps_in_for_a_damaged_one(tmp_path, harm):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, state(step, method=WEIGHTS))
    harm(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match=r"cut short or damaged.*Going on from the one before it, step 1"):
        assert checkpoint.load_run(tmp_path)["step"] == 1
    assert names(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_a_damaged_one_never_takes_the_place_of_the_good_one(tmp_path):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, state(step, method=WEIGHTS))
    damage(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match="step 1"):
        checkpoint.load_run(tmp_path, to_go_on=True)
    checkpoint.save_checkpoint(tmp_path, state(3))
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.previous.pt")["step"] == 1


def test_one_that_the_system_cannot_read_is_no_damaged_one(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    (tmp_path / "other").mkdir()
    checkpoint.save_checkpoint(tmp_path / "other", state(1))
    (tmp_path / "other" / "checkpoint.pt").rename(tmp_path / "checkpoint.previous.pt")
    with pytest.raises(MSBRegError, match=r"cannot read the checkpoint .*: Is a directory"):
        checkpoint.load_run(tmp_path)


def test_one_that_the_memory_does_not_suffice_for_is_no_damaged_one(tmp_path):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, state(step, method={"w": torch.zeros(2**26)}))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Other threads may give memory back meanwhile, but not as much as the weights take.
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**25, hard))
    try:
        with pytest.raises(MSBRegError, match=r"checkpoint\.pt: this machine's memory does not suffice"):
            checkpoint.load_run(tmp_path, to_go_on=True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert names(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert checkpoint.load_run(tmp_path)["step"] == 2


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    checkpoint.save_checkpoint(tmp_path, state(1))
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.previous.pt")
    with pytest.warns(UserWarning, match="step 1"):
        assert checkpoint.load_run(tmp_path, to_go_on=True)["step"] == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 and no more"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(MSBRegError, match="cut short or damaged"):
        checkpoint.load_run(tmp_path)


WITHOUT_STEP = {name: value for name, value in state(1, format=checkpoint.FORMAT).items() if name != "step"}


def test_a_kept_checkpoint_is_a_file_of_its_own(tmp_path):
    """Which stays as it is where another is copied to checkpoint.pt, to go back to it."""
    for step in (5, 10):
        checkpoint.save_checkpoint(tmp_path, state(step))
        (tmp_path / f"checkpoint-{step}.pt.partial").write_bytes(b"what a kill left")
        checkpoint.keep_checkpoint(tmp_path, step)
    shutil.copyfile(tmp_path / "checkpoint-5.pt", tmp_path / "checkpoint.pt")
    steps = {path.name: checkpoint.load_checkpoint(path)["step"] for path in tmp_path.glob("*.pt")}
    expected = {"checkpoint.pt": 5, "checkpoint.previous.pt": 5, "checkpoint-5.pt": 5, "checkpoint-10.pt": 10}
    assert steps == expected and not list(tmp_path.glob("*.partial"))


def test_what_is_kept_already_is_replaced_where_that_is_asked_for(tmp_path):
    checkpoint.keep_checkpoint(tmp_path, 5, anew=False)  # nothing to keep
    assert not list(tmp_path.iterdir())
    for seconds, anew, expected in ((1.0, False, 1.0), (2.0, False, 1.0), (3.0, True, 3.0)):
        checkpoint.save_checkpoint(tmp_path, state(5, seconds=seconds))
        checkpoint.keep_checkpoint(tmp_path, 5, anew=anew)
        assert checkpoint.load_checkpoint(tmp_path / "checkpoint-5.pt")["seconds"] == expected


@pytest.mark.parametrize("value", [{"weights": 1}, [1, 2], WITHOUT_STEP, state(1, format=checkpoint.FORMAT, config=3)])
def test_anothers_file_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "checkpoint.pt")
    with pytest.raises(MSBRegError, match="not a checkpoint of msbreg"):
        checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"format": checkpoint.FORMAT, "step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(MSBRegError):
        checkpoint.load_run(tmp_path)
    assert not ran.exists()


def test_a_failed_write_leaves_the_earlier_checkpoints_and_no_rubbish(tmp_path, file_size_limit):
    checkpoint.save_checkpoint(tmp_path, state(1))
    with file_size_limit(100_000), pytest.raises(MSBRegError, match=r"cannot save the checkpoint.*is intact"):
        checkpoint.save_checkpoint(tmp_path, state(2, weights=torch.zeros(100_000)))
    assert checkpoint.load_run(tmp_path)["step"] == 1
    assert names(tmp_path) == ["checkpoint.pt"]


def test_other_files_are_written_whole_or_not_at_all(tmp_path, file_size_limit):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "train", "step": 1}\n' * 100)
    before = metrics.read_bytes()
    with file_size_limit(1000), pytest.raises(MSBRegError, match=r"cannot write .*metrics\.jsonl: File too large"):
        MetricsFile(metrics, {"train": 1})
    assert names(tmp_path) == ["metrics.jsonl"] and metrics.read_bytes() == before


def test_weights_of_another_network_are_one_sentence():
    with pytest.raises(MSBRegError, match="the checkpoint's weights do not fit a convnet"):
        backbone_of(state(1, config=asdict(Config()), method={"online.backbone.other": torch.zeros(1)}))
