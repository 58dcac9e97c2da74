"""The folder of a run: where it is, and which options may change when the run goes on."""

from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

from msbreg.config import Config
from msbreg.errors import MSBRegError
from msbreg.processes import Processes
from msbreg.run_folder import refuse_other_config, refuse_other_recipe, run_folder


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config()
    config.run.dir = "~/runs/one"
    with run_folder(config, Processes("cpu")) as folder:
        assert folder == tmp_path / "runs" / "one" and folder.is_dir()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run.threads", 3), ("run.log_every", 3), ("data.path", "elsewhere"), ("data.backend", "torchvision"),
        ("data.prefetch", 3), ("eval.k", 3), ("eval.every", 3.0), ("eval.temperature", 0.3), ("eval.bank", 3),
        ("eval.queries", 3), ("model.compile", "auto"), ("model.cuda_graph", True),
    ],
)  # fmt: skip
def test_what_may_change_in_the_middle(name, value):
    refuse_other_config({"config": asdict(Config())}, changed(name, value), Path())


@pytest.mark.parametrize(
    ("name", "value"),
    [("run.seed", 3), ("data.views", 3), ("optim.lr", 3.0), ("optim.steps", 3), ("eval.linear", False)],
)
def test_what_may_not(name, value):
    with pytest.raises(MSBRegError, match=f"holds a run with other options: --{name} was .* and is now {value}. "):
        refuse_other_config({"config": asdict(Config())}, changed(name, value), Path())


def test_a_checkpoint_from_before_recipes_were_kept_goes_on_with_any():
    refuse_other_recipe({}, [{"size": 32}], Config(), Path())
    refuse_other_recipe({"recipe": [{"size": 32}]}, [{"size": 32}], Config(), Path())
    with pytest.raises(MSBRegError, match="makes other views than when the run"):
        refuse_other_recipe({"recipe": [{"size": 32}]}, [{"size": 16}], Config(), Path())


def changed(name: str, value: object) -> Config:
    config, (group, option) = Config(), name.split(".")
    setattr(getattr(config, group), option, value)
    return config
