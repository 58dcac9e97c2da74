"""The comparison with peers: all train, by the same mathematics and on the same kind of views, and are timed right."""

import contextlib
import copy
import functools
import json
import math
import multiprocessing
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="the comparison with peers needs torchvision")

import peer_trainers
import peers

from msbreg.data import load_recipe
from msbreg.data.recipes import MEAN, STD
from msbreg.methods import BYOL, Encoder
from msbreg.models import ConvNet, mlp_head

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


def setting(images, **changes):
    case = peer_trainers.CASES["tiny"]._replace(batch=8, **changes)
    return peer_trainers.Setting(case, str(images), "cpu", bf16=False, compile=False, cuda_graph=False, threads=1)


@pytest.fixture
def built(swatches):
    """A function that builds a provider, which is closed at the end."""
    opened = []

    def build(name, images=swatches, **changes):
        if name == "lightly":
            pytest.importorskip("lightly.transforms", reason="lightly is not installed")
        if name == "solo_style":
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        opened.append(peer_trainers.PROVIDERS[name].build(setting(images, **changes)))
        return opened[-1]

    yield build
    for peer in opened:
        peer.close()


@pytest.fixture
def child():
    """A function that calls another in a process of its own, which is killed at the end."""
    started = []

    def start(function, *args):
        started.append(multiprocessing.get_context("spawn").Process(target=function, args=args))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def run(swatches, tmp_path_factory):
    """The command with two peers and msbreg, and the JSON that it wrote."""
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    options = ["--case", "tiny", "--device", "cpu", "--providers", "lightly,solo_style,msbreg_k4", "--batch", "8"]
    options += ["--threads", "1", "--rounds", "2", "--seconds", "0", "--steps", "3"]
    options += ["--data", str(swatches), "--json", str(path)]
    command = [sys.executable, str(ROOT / "bench" / "peers.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


def test_every_provider_is_measured_or_left_out_by_name(run):
    printed, result = run
    rows = {row["provider"]: row for row in result["rows"]}
    assert rows.keys() | result["left_out"].keys() == {"lightly", "solo_style", "msbreg_k4"}
    assert not rows.keys() & result["left_out"].keys()
    assert "msbreg_k4" in rows
    for name, reason in result["left_out"].items():
        assert "not installed" in reason and f"Left out: {name}: {reason}." in printed
    for name, row in rows.items():
        assert f"| {name} | {row['views']} |" in " ".join(printed.split())
        assert [turn["steps"] for turn in row["turns"]] == [3, 3]
        rates = sorted(8 * 3 / turn["seconds"] for turn in row["turns"])
        assert row["images_per_second"] == pytest.approx(sum(rates) / 2)
        assert row["views_per_second"] == pytest.approx(row["views"] * row["images_per_second"])
        assert 0 <= row["data_wait_ms"] < row["step_ms"]
        assert 100 < row["memory_mb"] < 4000
        assert row["power_w"] is None and row["gpu_memory_mb"] is None
    if "lightly" in rows:
        ratio = rows["msbreg_k4"]["views_per_second"] / rows["lightly"]["views_per_second"]
        assert rows["lightly"]["over_lightly"] == 1 and rows["msbreg_k4"]["over_lightly"] == pytest.approx(ratio)
    else:
        assert rows["msbreg_k4"]["over_lightly"] is None


def test_the_json_says_where_it_is_from(run):
    _, result = run
    assert result["case"]["batch"] == 8 and result["precision"] == "fp32" and result["loading_threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert "--data IMAGES" in result["command"] and result["images"] == "IMAGES"
    assert result["processor"] and result["date"] and result["device_name"] == "cpu"


@pytest.mark.parametrize("name", [name for name in peer_trainers.PROVIDERS if name != "lightly"])
def test_trains_with_its_number_of_views(name, built):
    peer = built(name)
    batch = next(peer.batches)
    views = torch.cat([*(batch if isinstance(batch, list) else batch.views)])
    assert views.shape == (8 * peer_trainers.PROVIDERS[name].views, 3, 32, 32)
    peers.check(peer)
    assert peers.turn(peer, CPU, seconds=0, steps=2)["steps"] == 2


def test_views_go_on_after_an_epoch_and_are_not_the_same_ones(built):
    batches = built("solo_style").batches
    first, *_, last = (next(batches)[0] for _ in range(2 * 240 // 8 + 2))
    assert first.shape == last.shape and not torch.equal(first, last)


RULER = 12
"""Waves across and down each image of a kind."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Two folders of 60 images alike: `ruler`, a dark ramp with waves, shows how views are cut, and `grain`, which is
    orange, what is done to their colours and sharpness.
    """
    image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    folder, random = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    along = np.arange(96) / 96
    waves = 6 * np.cos(2 * np.pi * RULER * along)
    ruler = np.repeat((30 + 30 * along + waves + waves[:, None])[..., None], 3, axis=2)
    for number in range(60):
        grain = np.array([168, 128, 88]) + random.integers(-50, 50, (96, 96, 3))
        for kind, pixels in {"ruler": ruler, "grain": grain}.items():
            place = folder / kind / f"{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return folder


def views_of(batches):
    """384 of each of two blocks, (N, 3, S, S), values 0 to 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    taken = (next(batches) for _ in range(48))
    blocks = [torch.cat([*(one if isinstance(one, list) else one.views)]).chunk(2) for one in taken]
    return [torch.cat(block) * std + mean for block in zip(*blocks, strict=True)]


def waves(lines):
    """How many waves there are in each of the lines, (N, S), and how steep the ramp is beneath."""
    size = lines.shape[1]
    place = torch.linspace(-1, 1, size)
    lines = lines - lines.mean(1, keepdim=True)
    steep = (lines * place).sum(1) / place.square().sum()
    level = (lines - steep[:, None] * place) * torch.hann_window(size, periodic=False)
    power = torch.fft.rfft(level, n=1024).abs()
    power[:, : 2 * 1024 // size] = 0  # fewer than two waves are what is left of the ramp
    return power.argmax(1) * size / 1024, steep


def looks(ruler, grain):
    """What the views of a block are like: each of them (N, 3, S, S)."""
    (across, steep), (down, _) = (waves(ruler.mean((1, axis))) for axis in (2, 3))
    ratio = (across / down).log()
    colour = grain.mean((2, 3))
    coloured = (grain.amax(1) - grain.amin(1)).amax((1, 2)) > 0.02
    green = colour[:, 1] - (colour[:, 0] + colour[:, 2]) / 2
    return {
        "flipped": float((steep < 0).float().mean()),
        "area": float((across * down).mean() / RULER**2),
        # Not the deviation: the waves of a view that is nearly black are miscounted.
        "spread of the ratio": float(ratio.quantile(0.75) - ratio.quantile(0.25)),
        "brightness": float(colour.mean()),
        "spread of brightness": float(colour.mean(1).std()),
        "spread of hue": float(green[coloured].std()),
        "grey": 1 - float(coloured.float().mean()),
        "dark": float((grain.amax((1, 2, 3)) < 127.6 / 255).float().mean()),
        "sharpness": math.log(grain.diff(dim=3).abs().mean()),
    }


TOLERANCE = {"flipped": 0.12, "area": 0.06, "spread of the ratio": 0.07, "grey": 0.1, "dark": 0.13}
TOLERANCE |= {"brightness": 0.04, "spread of brightness": 0.03, "spread of hue": 0.03, "sharpness": 0.35}
"""Some three standard deviations of what 384 views show; linear interpolation, which is lightly's, blurs by 0.27."""


def blocks(batches, kinds):
    """How views of each block look; `batches` makes them of a folder of images."""
    ruler, grain = (views_of(batches(kinds / kind)) for kind in ("ruler", "grain"))
    return [looks(*pair) for pair in zip(ruler, grain, strict=True)]


@pytest.fixture(scope="module")
def expected(kinds):
    """A function that says how msbreg's views of a size look, which other tests compare with its recipe."""

    def batches(size):
        def of(images):
            peer = peer_trainers.PROVIDERS["msbreg_byol"].build(setting(images, size=size))
            closed.callback(peer.close)
            return peer.batches

        return of

    with contextlib.ExitStack() as closed:
        yield functools.cache(lambda size: blocks(batches(size), kinds))


def differences(found, expected):
    """What views of each block differ in."""
    pairs = zip(found, expected, strict=True)
    return [{key for key in TOLERANCE if abs(its[key] - should[key]) > TOLERANCE[key]} for its, should in pairs]


@pytest.mark.parametrize("size", [32, 96])  # views of 96 pixels are blurred too
@pytest.mark.parametrize("name", ["solo_style", "lightly"])
def test_views_are_those_of_our_recipe(name, size, built, kinds, expected):
    torch.manual_seed(0)
    found = blocks(lambda images: built(name, images, size=size).batches, kinds)
    assert differences(found, expected(size)) == [set(), set()]


@pytest.mark.parametrize(("change", "size", "seen"), [
    ({"jitter": 0.0}, 32, [{"spread of brightness", "spread of hue"}] * 2),
    ({"brightness": 1e-5}, 32, [{"spread of brightness"}] * 2),
    ({"hue": 1e-5}, 32, [{"spread of hue"}] * 2),
    ({"grayscale": 0.0}, 32, [{"grey"}] * 2),
    ({"flip": 0.0}, 32, [{"flipped"}] * 2),
    ({"area": (0.5, 1.0)}, 32, [{"area"}] * 2),
    ({"ratio": (0.99, 1.0)}, 32, [{"spread of the ratio"}] * 2),
    ({"solarize": 0.0}, 32, [set(), {"dark"}]),
    ({"blur": 0.0}, 96, [{"sharpness"}, set()]),
])  # fmt: skip
def test_views_of_another_recipe_are_told_apart(change, size, seen, kinds, expected):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    other = tuple(replace(view, **change) for view in load_recipe("auto", 2, size))
    found = blocks(lambda images: peer_trainers.dali_batches(other, setting(images, size=size)), kinds)
    assert [must <= do for must, do in zip(seen, differences(found, expected(size)), strict=True)] == [True, True]


def test_two_passes_are_byol(swatches):
    online, predictor = nn.Sequential(ConvNet(4), mlp_head(16, 32, 8)), nn.Linear(8, 8)
    oracle = BYOL(Encoder(*copy.deepcopy(online), view_chunk=1), copy.deepcopy(predictor))
    views = list(torch.randn(2, 8, 3, 16, 16))
    peer = peer_trainers.byol(
        setting(swatches), online, predictor, peer_trainers.squared_distance, lambda *_: None, iter(()), ahead=0
    )
    loss = oracle([torch.cat(views)], 8).loss
    torch.testing.assert_close(peer.step(views) / 2, loss.detach())


def broken(change):
    """A tiny provider, with one thing wrong."""
    online, predictor, target = (nn.Linear(4, 4) for _ in range(3))
    trained = [one for name, one in {"online": online, "predictor": predictor}.items() if name != change]
    optimizer = torch.optim.SGD(nn.ModuleList(trained).parameters(), 0.1)

    def step(batch):
        loss = predictor(online(batch)).square().mean()
        loss.backward()
        optimizer.step()
        if change != "target":
            with torch.no_grad():
                target.weight.lerp_(online.weight, 0.1)
        return loss.detach() * (torch.nan if change == "loss" else 1)

    return peer_trainers.Peer(online, predictor, target, iter(lambda: torch.ones(2, 4), None), step, ahead=0)


@pytest.mark.parametrize(("change", "said"), [
    ("online", "weight of the online network"), ("predictor", "weight of the predictor network"),
    ("target", "weight of the target network"), ("loss", "first losses"),
])  # fmt: skip
def test_what_does_not_train_is_refused(change, said):
    peers.check(broken(None))
    with pytest.raises(peers.MSBRegError, match=said):
        peers.check(broken(change))


def untrained():
    """Networks for a provider of which they do not matter."""
    return [nn.Linear(1, 1) for _ in range(3)]


def test_a_turn_times_waiting_and_training_and_throws_away_what_was_ready():
    asked, trained = [], []

    def batches():
        for number in range(1000):
            asked.append(number)
            time.sleep(0.01)
            yield number

    def step(batch):
        trained.append(batch)
        time.sleep(0.03)
        return torch.zeros(())

    peer = peer_trainers.Peer(*untrained(), batches(), step, ahead=6, together=4)
    taken = peers.turn(peer, CPU, seconds=0, steps=5)
    assert taken["steps"] == 8  # two times the four that come together
    assert trained == list(range(6, 6 + 4 + 8)) and asked[-1] == trained[-1]
    assert 0.04 <= taken["seconds"] / 8 < 0.08 and 10 <= taken["data_wait_ms"] < 25
    assert peers.turn(peer, CPU, seconds=0.3, steps=1)["seconds"] >= 0.3


@pytest.mark.gpu
@pytest.mark.parametrize(("host", "sleeps", "least", "most"), [(0.01, 0, 0, 2), (0, 10_000_000, 4, 20)])
def test_waiting_on_a_gpu_is_the_gpus(host, sleeps, least, most):
    """It is busy while the host waits 10 ms; then the host does not wait, and the GPU does, for some 10^7 cycles."""

    def batches():
        while True:
            time.sleep(host)
            torch.cuda._sleep(sleeps)
            yield None

    def step(batch):
        torch.cuda._sleep(40_000_000)
        return torch.zeros(())

    taken = peers.turn(
        peer_trainers.Peer(*untrained(), batches(), step, ahead=0), torch.device("cuda", 0), seconds=0, steps=20
    )
    assert least <= taken["data_wait_ms"] <= most


class Measured:
    """A worker whose turns are known beforehand; its provider's name says when it fails."""

    def __init__(self, name, setting):
        self.name, self.turns, self.gpu_memory_mb = name, [], None

    def build(self):
        if self.name == "lightly":
            raise peers.LeftOutError("it is not installed", failed=False)

    def turn(self, seconds, steps):
        if self.name == "msbreg_k4" and self.turns:
            raise peers.LeftOutError("its process ended", failed=True)
        self.turns.append({"steps": 2, "seconds": 1.0, "data_wait_ms": 0.0, "memory_mb": 1.0, "power_w": None})
        return self.turns[-1]

    def dismiss(self):
        """Nothing to end."""

    close = dismiss


def test_there_is_a_result_after_every_turn(monkeypatch, swatches):
    monkeypatch.setattr(peers, "Worker", Measured)
    turns = peers.measure(["lightly", "msbreg_k2", "msbreg_k4"], setting(swatches), rounds=2, seconds=1, steps=1)
    found = [({row["provider"]: len(row["turns"]) for row in one["rows"]}, dict(one["left_out"])) for one in turns]
    without = {"lightly": "it is not installed"}
    assert found == [
        ({}, without),
        ({"msbreg_k2": 1}, without),
        ({"msbreg_k2": 1, "msbreg_k4": 1}, without),
        ({"msbreg_k2": 2, "msbreg_k4": 1}, without),
        ({"msbreg_k2": 2}, without | {"msbreg_k4": "its process ended"}),
    ]


def test_an_interrupted_comparison_shows_what_it_has(monkeypatch, capsys, swatches):
    def measure(*_, **__):
        yield {"rows": [], "left_out": {"lightly": "it is not installed"}, "failed": False}
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--device", "cpu", "--data", str(swatches)])
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    assert "Left out: lightly: it is not installed." in capsys.readouterr().out


def test_workers_that_would_have_no_room_for_their_batches_are_not_started(swatches):
    pytest.importorskip("lightly.transforms", reason="lightly is not installed")
    with pytest.raises(peers.MSBRegError, match="of 1000000000 workers need"):
        peer_trainers.lightly_byol(setting(swatches)._replace(threads=10**9))


def answer(name, wanted):
    here, there = multiprocessing.Pipe()
    here.send({})
    peers.serve(name, wanted, there)
    return here.recv()


def test_a_provider_that_fails_says_why(swatches):
    assert "--model.hidden is 0" in answer("msbreg_k2", setting(swatches, hidden=0))["failed"]


def test_a_provider_whose_package_is_missing_says_so(swatches, monkeypatch):
    def build(setting):
        import there_is_no_such_package  # noqa: F401

    monkeypatch.setitem(peer_trainers.PROVIDERS, "lightly", peer_trainers.Provider("", 2, build))
    assert "not installed: No module named 'there_is_no" in answer("lightly", setting(swatches))["missing"]


def test_memory_counts_the_processes_of_a_loader(child):
    before = peers.memory_megabytes(CPU)
    child(eval, "(b'x' * 400 * 2**20, __import__('time').sleep(200))")
    patience = time.monotonic() + 60  # until it has started
    while (grown := peers.memory_megabytes(CPU) - before) < 200 and time.monotonic() < patience:
        time.sleep(0.1)
    assert grown >= 200


@pytest.mark.parametrize("asked", [True, False])
def test_a_provider_whose_process_dies_is_left_out(child, asked):
    worker = peers.Worker.__new__(peers.Worker)
    worker.pipe, theirs = multiprocessing.Pipe()
    worker.process, worker.turns = child(time.sleep, 200), []
    worker.process.kill()
    if asked:  # it dies with the request unread
        threading.Timer(0.5, theirs.close).start()
    else:
        theirs.close()
    with pytest.raises(peers.LeftOutError, match="its process ended with status -9") as left_out:
        worker.turn(seconds=0, steps=1)
    assert left_out.value.failed


def test_without_lightly_nothing_is_compared_with_it():
    rows = [{"provider": "solo_style", "views_per_second": 3.0}, {"provider": "lightly", "views_per_second": 2.0}]
    assert [row["over_lightly"] for row in peers.compared(rows)] == [1.5, 1.0]
    assert peers.compared(rows[:1])[0]["over_lightly"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        peers.parse()
    assert "torch sees no GPU here" in capsys.readouterr().err
