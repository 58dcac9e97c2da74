"""The comparison with peers: all train, by the same mathematics and on the same kind of views, and are timed right."""

import copy
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

pytest.importorskip("torchvision", reason="the comparison with peers needs torchvision")

import peers

from msbreg.methods import BYOL, Encoder
from msbreg.models import ConvNet, mlp_head

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


def setting(images, **changes):
    case = peers.CASES["tiny"]._replace(batch=8, **changes)
    return peers.Setting(case, str(images), "cpu", bf16=False, compile=False, cuda_graph=False, threads=1)


@pytest.fixture
def built(swatches):
    """A function that builds a provider, which is closed at the end."""
    opened = []

    def build(name, images=swatches, **changes):
        if name == "lightly":
            pytest.importorskip("lightly.transforms", reason="lightly is not installed")
        if name == "solo_style":
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        opened.append(peers.PROVIDERS[name].build(setting(images, **changes)))
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
        assert f"| {name} | {row['views']} |" in printed
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


@pytest.mark.parametrize("name", [name for name in peers.PROVIDERS if name != "lightly"])
def test_trains_with_its_number_of_views(name, built):
    peer = built(name)
    batch = next(peer.batches)
    views = torch.cat([*(batch if isinstance(batch, list) else batch.views)])
    assert views.shape == (8 * peers.PROVIDERS[name].views, 3, 32, 32)
    peers.check(peer)
    assert peers.turn(peer, CPU, seconds=0, steps=2)["steps"] == 2


def test_views_go_on_after_an_epoch_and_are_not_the_same_ones(built):
    batches = built("solo_style").batches
    first, *_, last = (next(batches)[0] for _ in range(2 * 240 // 8 + 2))
    assert first.shape == last.shape and not torch.equal(first, last)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Images of coloured noise, in which blur shows."""
    image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    folder, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for number in range(60):
        colour = random.integers(50, 206, 3)
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        pixels = random.integers(colour - 50, colour + 50, (96, 96, 3)).astype(np.uint8)
        image.fromarray(pixels).save(folder / f"{number % 2}" / f"{number}.png")
    return folder


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", ["solo_style", "lightly"])
def test_views_are_as_bright_rich_in_contrast_and_sharp_as_ours(name, size, built, noise):
    """By 96 of each. Blur, which views of 96 pixels have, takes more than half of the sharpness of the first of two;
    linear interpolation, which is lightly's, takes a quarter of that of either at the most.
    """

    def statistics(batches, part):
        views = torch.stack([part(next(batches)) for _ in range(12)])  # (12, 2, B, 3, H, W)
        sharpness = views.diff(dim=5).abs().mean((0, 2, 3, 4, 5))
        return views.mean((0, 1, 2, 4, 5)), views.std((0, 1, 2, 4, 5)), sharpness

    ours = statistics(built("msbreg_byol", noise, size=size).batches, lambda batch: batch.views[0].unflatten(0, (2, 8)))
    theirs = statistics(built(name, noise, size=size).batches, torch.stack)
    torch.testing.assert_close(theirs[0], ours[0], atol=0.3, rtol=0)
    torch.testing.assert_close(theirs[1:], ours[1:], atol=0, rtol=0.4)


def test_two_passes_are_byol(swatches):
    online, predictor = nn.Sequential(ConvNet(4), mlp_head(16, 32, 8)), nn.Linear(8, 8)
    oracle = BYOL(Encoder(*copy.deepcopy(online), view_chunk=1), copy.deepcopy(predictor))
    views = list(torch.randn(2, 8, 3, 16, 16))
    peer = peers.byol(setting(swatches), online, predictor, peers.squared_distance, lambda *_: None, iter(()), ahead=0)
    loss = oracle([torch.cat(views)], 8).loss
    torch.testing.assert_close(peer.step(views) / 2, loss.detach())


def broken(change):
    network, target, optimised = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    trained = optimised if change == "weights" else network
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)

    def step(batch):
        loss = network(batch).square().mean()
        loss.backward()
        optimizer.step()
        if change != "target":
            with torch.no_grad():
                target.weight.lerp_(network.weight, 0.1)
        return loss.detach() * (torch.nan if change == "loss" else 1)

    return peers.Peer(network, target, iter(lambda: torch.ones(2, 4), None), step, ahead=0)


@pytest.mark.parametrize(("change", "said"), [
    ("weights", "weight of the online network"), ("target", "weight of the target network"), ("loss", "first losses"),
])  # fmt: skip
def test_what_does_not_train_is_refused(change, said):
    peers.check(broken(None))
    with pytest.raises(peers.MSBRegError, match=said):
        peers.check(broken(change))


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

    peer = peers.Peer(nn.Linear(1, 1), nn.Linear(1, 1), batches(), step, ahead=6, together=4)
    taken = peers.turn(peer, CPU, seconds=0, steps=5)
    assert taken["steps"] == 8  # two times the four that come together
    assert trained == list(range(6, 6 + 4 + 8)) and asked[-1] == trained[-1]
    assert 0.04 <= taken["seconds"] / 8 < 0.08 and 10 <= taken["data_wait_ms"] < 25
    assert peers.turn(peer, CPU, seconds=0.3, steps=1)["seconds"] >= 0.3


def answer(name, wanted):
    here, there = multiprocessing.Pipe()
    peers.serve(name, wanted, there)
    return here.recv()


def test_a_provider_that_fails_says_why(swatches):
    assert "--model.hidden is 0" in answer("msbreg_k2", setting(swatches, hidden=0))["failed"]


def test_a_provider_whose_package_is_missing_says_so(swatches, monkeypatch):
    def build(setting):
        import there_is_no_such_package  # noqa: F401

    monkeypatch.setitem(peers.PROVIDERS, "lightly", peers.Provider("", 2, build))
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
