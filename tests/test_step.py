"""The training step: what it makes the host wait for, how it is compiled, how it is recorded."""

import copy
import functools
import math
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")
pytest.importorskip("torchvision", reason="this needs the extra [train]")
pytest.importorskip("tqdm", reason="this needs the extra [train]")

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from msbreg import reference
from msbreg.batch_norm import CrossRankBatchNorm
from msbreg.compilation import compile_regions, regions
from msbreg.config import Config
from msbreg.data import Batch, ViewLoader
from msbreg.metrics import read_metrics
from msbreg.models import build_backbone, mlp_head
from msbreg.online_probe import OnlineProbe
from msbreg.processes import Processes
from msbreg.schedules import warmup_cosine
from msbreg.step import TrainingStep
from msbreg.stopwatch import Stopwatch
from msbreg.trainer import pretrain

BATCH, VIEWS, STEPS = 6, 2, 8


def build(device: str = "cpu", processes: Processes | None = None, **options) -> TrainingStep:
    config = Config()
    config.data.batch_size, config.data.views = BATCH, VIEWS
    config.model.hidden, config.model.dim, config.model.precision = 24, 8, "fp32"
    for name, value in options.items():
        group, option = name.split("__")
        assert hasattr(getattr(config, group), option)
        setattr(getattr(config, group), option, value)
    step = TrainingStep(config, processes or Processes(device), steps=STEPS, warmup_steps=1, classes=5)
    step.train()
    return step


def batch(device: str = "cpu", *, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(VIEWS * BATCH, 3, 16, 16, generator=generator).to(device)
    return Batch((views,), torch.arange(BATCH) % 5, torch.arange(BATCH))


class Reads(TorchDispatchMode):
    """Notes operations by which the host reads a tensor's numbers, but for tensors that are on the CPU anyway.

    What would copy to the host reads nothing where the tensor is there already, and never gets as far as an operator:
    `Copies` notes those.
    """

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero", "allclose")

    def __init__(self, on_the_cpu: Callable[[], list[torch.Tensor]]) -> None:
        super().__init__()
        self.on_the_cpu, self.found = on_the_cpu, []
        self.copies = Copies(self.found)

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.copies.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], (list, tuple)) else [])
        )
        if masked or (name in self.READING and all(args[0].data_ptr() != one.data_ptr() for one in self.on_the_cpu())):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Notes methods that hand a tensor's numbers to the host."""

    READING = ("cpu", "numpy", "tolist", "__array__")

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.READING or (name == "to" and "cpu" in [one for one in args[1:] if isinstance(one, str)]):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def counters(step: TrainingStep) -> list[torch.Tensor]:
    """Adam's numbers of steps, which stay on the CPU."""
    optimizers = (step.optimizer, step.probe._optimizer)
    return [state["step"] for optimizer in optimizers for state in optimizer.state.values() if "step" in state]


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("method", ["msbreg", "byol", "simsiam"])
def test_no_step_reads_a_number(monkeypatch, method, optimizer):
    monkeypatch.setattr(reference, "can_be_asked", lambda z: False)  # as on a GPU
    step = build(method__name=method, optim__name=optimizer)
    images = batch()
    step(images, 0)
    with Reads(lambda: counters(step)) as reads:
        step(images, 1)
    assert reads.found == []


def test_the_learning_rate_of_simsiams_predictor_is_constant():
    step = build(method__name="simsiam", optim__name="sgd")
    predictor = {id(weight) for weight in step.method.predictor.parameters()}
    for number in range(STEPS):
        step(batch(), number)
        for group in step.optimizer.param_groups:
            of_predictor = {id(weight) in predictor for weight in group["params"]}
            assert of_predictor == {group["lr"] == step.peak_lr} or number == 1  # where all are at the peak
        assert step.lr == warmup_cosine(number, STEPS, 1, step.peak_lr)
    assert len(build(method__name="byol").optimizer.param_groups) == 2


def test_no_step_of_several_processes_reads_a_number(monkeypatch, free_port):
    """Batch normalisation over processes included, which torch's own cannot do without."""
    monkeypatch.setattr(reference, "can_be_asked", lambda z: False)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        processes = Processes("cpu")
        processes.group = dist.group.WORLD
        step = build(processes=processes)
        assert any(isinstance(layer, CrossRankBatchNorm) for layer in step.method.modules())
        images = batch()
        step(images, 0)
        with Reads(lambda: counters(step)) as reads:
            step(images, 1)
        assert reads.found == []
    finally:
        dist.destroy_process_group()


READERS = {
    "_local_scalar_dense": lambda weight: float(weight.isfinite().all()),
    "index": lambda weight: weight[weight > 0],
    "index_put_": lambda weight: weight.clone().index_put_((weight > 0,), torch.zeros(())),
    "cpu": lambda weight: weight.cpu(),
    "to": lambda weight: weight.to("cpu"),
    "numpy": lambda weight: weight.numpy(),
    "tolist": lambda weight: weight.tolist(),
}


@pytest.mark.parametrize("name", READERS)
def test_a_read_would_be_seen(monkeypatch, name):
    step = build()
    step(batch(), 0)
    after = step.method.after_step
    monkeypatch.setattr(step.method, "after_step", lambda tau: (READERS[name](step.probe.weight.detach()), after(tau)))
    with Reads(lambda: counters(step)) as reads:
        step(batch(), 1)
    assert name in reads.found


def test_no_round_of_the_loop_reads_a_number(monkeypatch, tmp_path):
    """The trainer's own part of a step: waiting for images, watching losses, looking for signals."""
    monkeypatch.setattr(reference, "can_be_asked", lambda z: False)  # as on a GPU
    config = Config()
    config.run.dir, config.data.size = str(tmp_path), 16
    config.data.batch_size, config.data.backend, config.data.cache = BATCH, "torchvision", str(tmp_path / "images")
    config.model.hidden, config.model.dim, config.eval.queries, config.eval.bank = 24, 8, 8, 8
    config.optim.steps, config.run.log_every, config.run.checkpoint_every, config.eval.every = 6, 100, 100, 0
    config.eval.linear, config.optim.name = False, "lars"  # neither a probe nor Adam, whose counters are on the CPU
    rounds, batches = [], ViewLoader.batches

    def watched(loader: ViewLoader, *steps: int) -> Iterator[Batch]:
        for batch in batches(loader, *steps):
            if not loader.shuffle:  # that of an evaluation
                yield batch
                continue
            with Reads(lambda: []) as reads:
                yield batch
            rounds.append(reads.found)

    monkeypatch.setattr(ViewLoader, "batches", watched)
    pretrain(config)
    assert rounds == [[]] * 5  # the sixth and last writes to metrics.jsonl


def test_steps_are_gradients_then_momentum_sgd_then_the_moving_average():
    step = build(optim__name="sgd", optim__lr=8.0, optim__weight_decay=0.1, method__tau=0.9)
    twin, probe = copy.deepcopy(step.method), OnlineProbe(step.method.online.backbone.num_features, 5)
    learning = [weight for weight in twin.parameters() if weight.requires_grad]
    momenta = [torch.zeros_like(weight) for weight in learning]
    for number in (3, 4):
        images, cosine = batch(seed=number), lambda at, whole: (1 + math.cos(math.pi * at / whole)) / 2
        out, expected = step(images, number), twin(images.views, BATCH)
        gradients = torch.autograd.grad(expected.loss, learning)
        lr, tau = 8.0 * BATCH / 256 * cosine(number - 1, STEPS - 1), 1 - 0.1 * cosine(number, STEPS)
        with torch.no_grad():
            for weight, gradient, momentum in zip(learning, gradients, momenta, strict=True):
                momentum.mul_(0.9).add_(gradient + (0.1 * weight if weight.ndim > 1 else 0.0))
                weight.sub_(lr * momentum)
            for follower, leader in zip(twin.target.parameters(), twin.online.parameters(), strict=True):
                follower.copy_(tau * follower + (1 - tau) * leader)
        probe.learn(expected.features, images.labels)
        torch.testing.assert_close(out.loss, expected.loss.detach())
        assert step.lr == pytest.approx(lr) and not out.loss.requires_grad
    for name, value in step.method.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.probe.weight, probe.weight)


def test_what_a_step_draws_depends_on_seed_number_and_rank_alone():
    step = build()

    def drawn(number: int, *, seed: int = 0, rank: int = 0) -> tuple[float, ...]:
        step.config.run.seed, step.processes.world, step.processes.rank = seed, 2, rank
        step(batch(), number)
        return tuple(torch.rand(4).tolist())  # what dropout in this step would have drawn: nothing else draws

    one = drawn(3)
    others = [drawn(4), drawn(3, rank=1), drawn(3, seed=1), drawn(43)]
    assert len({one, *others}) == 5 and drawn(3) == one


def test_half_precision_is_for_gpus_unless_it_is_asked_for():
    dtypes = {precision: build(model__precision=precision).input_dtype for precision in ("auto", "fp32", "bf16")}
    assert dtypes == {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def graphs(monkeypatch):
    """What torch counts of what it compiles; with a backend that needs no C++ compiler, which would be waited for."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.mark.parametrize("chunk", [0, 1])
def test_compiled_networks_compute_the_same(chunk, graphs):
    options = {"model__view_chunk": chunk, "optim__name": "sgd", "optim__lr": 0.1}
    eager, compiled = (build(model__compile=on, **options) for on in (False, True))
    for number in range(3):
        torch.testing.assert_close(eager(batch(), number).loss, compiled(batch(), number).loss, rtol=1e-4, atol=1e-5)
    state, other = eager.method.state_dict(), compiled.method.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], msg=name, rtol=1e-3, atol=1e-4)


def test_each_region_is_one_graph(graphs):
    """With a gradient and without one: backbone and projector; with one alone: the predictor."""
    step = build(model__compile=True)
    step(batch(), 0)
    assert graphs["stats"]["unique_graphs"] == graphs["aot_autograd"]["total"] == 2 + 2 + 1
    step.loss_alone(batch())()
    step(batch(), 1)
    assert graphs["stats"]["unique_graphs"] == 2 + 2 + 1


def test_blocks_that_take_keywords_are_compiled(graphs):
    """As those of timm's transformers."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)

        def forward(self, x, *, scale):
            return self.inner(x) * scale

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x, scale=2.0)
            return x

    network, x = Network(), torch.randn(2, 3)
    expected = network(x)
    compile_regions(network)
    torch.testing.assert_close(network(x), expected)
    assert graphs["stats"]["unique_graphs"] == 2  # of inputs with and without a gradient


def test_no_bucket_of_ddp_cuts_a_region(graphs, free_port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        processes = Processes("cpu")
        processes.group = dist.group.WORLD
        step = build(processes=processes, model__compile=True, model__hidden=2048, model__dim=256)
        head = step.method.online.projector
        assert sum(weight.nbytes for weight in head.parameters()) > 2**20  # of DDP's first bucket
        step(batch(), 0)
        assert graphs["aot_autograd"]["total"] == graphs["stats"]["unique_graphs"] > 0
    finally:
        dist.destroy_process_group()


def test_regions_are_blocks_or_whole_networks():
    resnet = build_backbone("resnet18")
    assert {type(region).__name__ for region in regions(resnet)} == {"BasicBlock"} and len(regions(resnet)) == 8
    convnet, perceptron = build_backbone("convnet"), mlp_head(8, 16, 4)
    assert regions(convnet) == [convnet.layers] and regions(perceptron) == [perceptron]
    method = build(model__backbone="resnet18").method
    assert len(regions(method)) == 2 * (8 + 1) + 1  # online and target: blocks and projector; the predictor


@pytest.mark.parametrize(
    ("option", "device", "compiles"),
    [
        (False, "cpu", False), (True, "cpu", True), ("auto", "cpu", False),
        pytest.param("auto", "cuda", True, marks=pytest.mark.gpu),
    ],
)  # fmt: skip
def test_the_option_compiles_every_region(option, device, compiles):
    found = regions(build(device, model__backbone="resnet18", model__compile=option).method)
    assert {region._compiled_call_impl is not None for region in found} == {compiles}


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_waiting_is_counted_once(name):
    watch = Stopwatch(torch.device(name), 3.0, 1.0)
    watch.start()
    for _ in range(2):
        with watch.waiting():
            torch.ones(8, device=name).sum()
    waited = watch.waited
    assert 1.0 < waited < 3.0 and watch.waited == waited
    seconds, wait = watch.lap()
    assert 0 < wait == pytest.approx(waited - 1.0) and wait <= seconds
    assert watch.lap()[1] == 0


@pytest.mark.parametrize("name", ["msbreg", "byol", "simsiam"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_recorded_step_is_the_step(device, name):
    """Losses, weights and noise of steps that replay a graph, against those of steps that do not."""
    eager, recorded = (
        build(device, method__name=name, model__cuda_graph=graph, optim__name="sgd", optim__lr=0.1)
        for graph in (False, True)
    )
    for number in range(STEPS):
        images = batch(device, seed=number)
        out, other = eager(images, number), recorded(images, number)
        torch.testing.assert_close(out.loss, other.loss, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(out.terms, other.terms, rtol=1e-2, atol=1e-3)
    state, other_state = eager.method.state_dict(), recorded.method.state_dict()
    for key, value in state.items():
        torch.testing.assert_close(value, other_state[key], msg=key, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_step_makes_the_host_wait_for_the_gpu(device, optimizer, graph):
    step = build(device, optim__name=optimizer, model__cuda_graph=graph)
    for number in range(5):  # compiling, choosing algorithms and recording may
        step(batch(device), number)
    images = batch(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_regions_on_a_gpu(device):
    eager, compiled = (
        build(device, model__backbone="resnet18", model__stem="cifar", model__compile=on, optim__name="sgd")
        for on in (False, True)
    )
    for number in range(3):
        images = batch(device, seed=number)
        torch.testing.assert_close(eager(images, number).loss, compiled(images, number).loss, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_records_its_graph_while_dali_is_at_work(device, tmp_path, swatches):
    """DALI's threads go on calling CUDA for the batches ahead."""
    pytest.importorskip("nvidia.dali")
    config = Config()
    config.run.dir, config.run.device, config.run.log_every = str(tmp_path), device, 1
    config.data.path, config.data.size, config.data.backend = str(swatches), 96, "dali"
    config.data.views, config.data.batch_size, config.data.prefetch = 8, 64, 4
    config.model.hidden, config.model.dim, config.model.cuda_graph = 24, 8, True
    config.optim.steps, config.eval.every, config.eval.linear = STEPS, 0, False
    assert pretrain(config)["finished"]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "train"]
    assert len({row["loss"] for row in rows}) == STEPS and None not in {row["loss"] for row in rows}
