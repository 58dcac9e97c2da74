"""Checkpoints: whole at every moment, and plain words where one is not."""

import pytest
import torch

from msbreg import checkpoint
from msbreg.errors import MSBRegError


def test_what_is_saved_comes_back(tmp_path):
    state = {"step": 3, "weights": {"w": torch.arange(6.0).view(2, 3)}, "name": "x", "list": [1, (2.5, None)]}
    checkpoint.save_checkpoint(tmp_path, state)
    loaded = checkpoint.load_run(tmp_path)
    assert loaded["step"] == 3 and loaded["list"] == state["list"]
    torch.testing.assert_close(loaded["weights"]["w"], state["weights"]["w"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]


def test_the_one_before_is_kept_and_steps_in_for_a_damaged_one(tmp_path):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"step": step})
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"cut short or damaged.*Going on from the one before it, step 1"):
        assert checkpoint.load_run(tmp_path)["step"] == 1


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"step": 1})
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.previous.pt")
    with pytest.warns(UserWarning, match="step 1"):
        assert checkpoint.load_run(tmp_path)["step"] == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 and no more"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(MSBRegError, match="cut short or damaged"):
        checkpoint.load_run(tmp_path)


@pytest.mark.parametrize("value", [{"weights": 1}, [1, 2]])
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
    checkpoint.save_checkpoint(tmp_path, {"step": 1})
    with file_size_limit(100_000), pytest.raises(MSBRegError, match=r"cannot save the checkpoint.*is intact"):
        checkpoint.save_checkpoint(tmp_path, {"step": 2, "weights": torch.zeros(100_000)})
    assert checkpoint.load_run(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
