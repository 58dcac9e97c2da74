"""What bench/peers.py compares: lightly's BYOL, BYOL on DALI in the manner of solo-learn, and msbreg's own trainer."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loader import PREFETCH, require_shared_memory
from torch import Tensor, nn
from torch.nn.functional import normalize

from msbreg.config import Config, DataConfig, EvalConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from msbreg.data import ImageFolder, load_recipe
from msbreg.data.recipes import MEAN, STD, View
from msbreg.models import build_backbone, mlp_head
from msbreg.processes import Processes
from msbreg.schedules import scaled_lr
from msbreg.trainer import Trainer

__all__ = [
    "CASES", "MANY", "PROVIDERS", "Case", "Peer", "Provider", "Setting", "byol", "dali_batches", "squared_distance",
]  # fmt: skip

LR, MOMENTUM, WEIGHT_DECAY = 0.06, 0.9, 1e-4
"""Learning rate for 256 images: lightly's example of BYOL. It matters only in that all of them train."""
TAU = 0.996
"""BYOL's for 1000 epochs."""
MANY = 10**9
"""Steps or images that no run comes to the end of."""


class Case(NamedTuple):
    """What is trained."""

    backbone: str
    stem: str
    size: int
    """Side of a view, pixels."""
    batch: int
    hidden: int = 4096
    dim: int = 256
    view_chunk: int = 0
    """Most views that msbreg takes through the networks at a time; 0: all."""
    images: int = 5000
    """Rendered where no folder is given."""
    side: int = 32
    """Of a rendered image, pixels."""


CASES = {
    "small": Case("resnet18", "cifar", 32, 256),
    # 448 x 448 is 0.2 megapixels, ImageNet's mean. Activations of 8 x 256 views at once are more than a GPU holds.
    "imagenet": Case("resnet50", "imagenet", 224, 256, view_chunk=4, images=256, side=448),
    "tiny": Case("convnet", "imagenet", 32, 16, hidden=64, dim=32, images=256),
}


class Setting(NamedTuple):
    """What all providers have in common."""

    case: Case
    data: str
    """Image folder."""
    device: str
    """cpu or cuda."""
    bf16: bool
    compile: bool
    cuda_graph: bool
    """msbreg's step alone."""
    threads: int
    """That load images: processes of a DataLoader, threads of DALI."""


@dataclass
class Peer:
    """A provider at work."""

    online: nn.Module
    predictor: nn.Module
    target: nn.Module
    batches: Iterator[Any]
    step: Callable[[Any], Tensor]
    """Trains on a batch and returns the loss."""
    ahead: int
    """Batches that are ready when nobody has asked for one for a while."""
    together: int = 1
    """Batches that become ready at about the same time, since as many workers each make one."""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Provider:
    """A way to train."""

    about: str
    views: int
    build: Callable[[Setting], Peer]


def train_folder(data: str) -> Path:
    """The folder of training images: `train` where there is one."""
    folder = Path(data, "train")
    return folder if folder.is_dir() else Path(data)


def lightly_byol(setting: Setting) -> Peer:
    """BYOL of lightly's parts, in the manner of its PyTorch example; pinned memory, which that leaves out, is added.

    Images are drawn with replacement, without end: at the end of an epoch a DataLoader would start anew, which a large
    data set does seldom and the rendered one at every second step.
    """
    from lightly.data import LightlyDataset
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from torch.utils.data import DataLoader, RandomSampler

    case = setting.case
    require_shared_memory(setting.threads, case.batch * 2 * 3 * case.size**2 * 4)  # two views, float32
    first, second = load_recipe("auto", 2, case.size)
    transform = BYOLTransform(
        BYOLView1Transform(input_size=case.size, gaussian_blur=first.blur, solarization_prob=first.solarize),
        BYOLView2Transform(input_size=case.size, gaussian_blur=second.blur, solarization_prob=second.solarize),
    )
    dataset = LightlyDataset(str(train_folder(setting.data)), transform=transform)
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]  # it has all that a Dataset needs
        batch_size=case.batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=MANY),
        num_workers=setting.threads,
        prefetch_factor=PREFETCH,
        drop_last=True,
        pin_memory=setting.device == "cuda",
    )
    backbone = build_backbone(case.backbone, stem=case.stem)
    online = nn.Sequential(backbone, BYOLProjectionHead(backbone.num_features, case.hidden, case.dim))
    similarity = NegativeCosineSimilarity()
    return byol(
        setting,
        online,
        BYOLPredictionHead(case.dim, case.hidden, case.dim),
        lambda p, t: 0.5 * similarity(p, t),
        lambda online, target: update_momentum(online, target, m=TAU),
        (views for views, _, _ in loader),
        ahead=PREFETCH * setting.threads,
        together=setting.threads,
    )


def solo_style_byol(setting: Setting) -> Peer:
    """BYOL in plain PyTorch, fed by DALI's own reader and random operators, in the manner of solo-learn."""
    case = setting.case
    batches = dali_batches(load_recipe("auto", 2, case.size), setting)
    backbone = build_backbone(case.backbone, stem=case.stem)
    online = nn.Sequential(backbone, mlp_head(backbone.num_features, case.hidden, case.dim))

    def follow(online: nn.Module, target: nn.Module) -> None:
        with torch.no_grad():
            for theirs, ours in zip(target.parameters(), online.parameters(), strict=True):
                theirs.lerp_(ours, 1 - TAU)

    return byol(
        setting,
        online,
        mlp_head(case.dim, case.hidden, case.dim),
        squared_distance,
        follow,
        batches,
        ahead=3,  # DALI's default of two, and the one that the iterator holds
    )


def squared_distance(p: Tensor, t: Tensor) -> Tensor:
    """2 - 2 cos, the mean over the rows."""
    return 2 - 2 * (normalize(p.float(), dim=-1) * normalize(t.float(), dim=-1)).sum(dim=-1).mean()


def dali_batches(recipe: tuple[View, ...], setting: Setting) -> Iterator[list[Tensor]]:
    """Batches without end, one tensor (B, 3, H, W) for each view."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    names = [f"view{number}" for number in range(len(recipe))]
    iterator = DALIGenericIterator([dali_views(recipe, setting)], names)
    return ([batch[name] for name in names] for (batch,) in iterator)


def dali_views(recipe: tuple[View, ...], setting: Setting) -> Any:
    """A DALI pipeline without end: each image decoded once, then for each view a (B, 3, H, W) float32 tensor."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = setting.device == "cuda"
    source = ImageFolder(train_folder(setting.data))
    files = [source.name(index) for index in range(len(source))]

    def maybe(probability: float) -> Any:
        return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)

    def within(strength: float) -> Any:
        return fn.random.uniform(range=(-strength, strength))

    def augmented(images: Any, view: View) -> Any:
        x = fn.random_resized_crop(
            images,
            size=view.size,
            random_area=view.area,
            random_aspect_ratio=view.ratio,
            interp_type=types.INTERP_CUBIC,
        )
        jitter, coloured = maybe(view.jitter), 1 - maybe(view.grayscale)
        x = fn.color_twist(
            x,
            brightness=1 + jitter * within(view.brightness),
            contrast=1 + jitter * within(view.contrast),
            saturation=coloured * (1 + jitter * within(view.saturation)),
            hue=jitter * within(360 * view.hue),
        )
        if view.blur > 0:  # noqa: SIM102 - the inner one is a branch of DALI's graph
            if fn.random.coin_flip(probability=view.blur, dtype=types.BOOL):
                x = fn.gaussian_blur(x, window_size=23, sigma=fn.random.uniform(range=view.sigma))
        if view.solarize > 0:  # noqa: SIM102
            if fn.random.coin_flip(probability=view.solarize, dtype=types.BOOL):
                x = x ^ (fn.cast(x >= 128, dtype=types.UINT8) * types.Constant(255, dtype=types.UINT8))
        return fn.crop_mirror_normalize(
            x,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            mirror=fn.random.coin_flip(probability=view.flip),
        )

    @pipeline_def(enable_conditionals=True)
    def views() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(files=files, shuffle_after_epoch=True)
        images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        return tuple(augmented(images, view) for view in recipe)

    device_id = 0 if gpu else None
    return views(batch_size=setting.case.batch, num_threads=setting.threads, device_id=device_id, seed=0)


def byol(
    setting: Setting,
    online: nn.Module,
    predictor: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    follow: Callable[[nn.Module, nn.Module], None],
    batches: Iterator[list[Tensor]],
    *,
    ahead: int,
    together: int = 1,
) -> Peer:
    """BYOL as training scripts have it: a pass for each of the two views through either network.

    Args:
        setting: what all providers have in common.
        online: images to projections.
        predictor: projections to predictions of the other view's.
        criterion: predictions and targets, both (B, D), to the loss.
        follow: moves the second network towards the first.
        batches: two views each, (B, 3, H, W).
        ahead: see `Peer`.
        together: see `Peer`.
    """
    target = copy.deepcopy(online).requires_grad_(False)
    for network in (online, predictor, target):
        network.to(setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if setting.compile:
            network.compile()
    optimizer = torch.optim.SGD(
        [*online.parameters(), *predictor.parameters()],
        scaled_lr(LR, setting.case.batch),
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )

    def step(batch: list[Tensor]) -> Tensor:
        follow(online, target)
        first, second = (
            view.to(setting.device, memory_format=torch.channels_last, non_blocking=True) for view in batch
        )
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
            predictions = predictor(online(first)), predictor(online(second))
            with torch.no_grad():
                targets = target(first), target(second)
            loss = criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Peer(online, predictor, target, batches, step, ahead, together)


def ours(method: str, views: int, setting: Setting) -> Peer:
    """msbreg's own trainer, without evaluation and probe."""
    case = setting.case
    config = Config(
        run=RunConfig(device=setting.device),
        data=DataConfig(
            path=setting.data, size=case.size, views=views, batch_size=case.batch, threads=setting.threads
        ),
        model=ModelConfig(
            backbone=case.backbone, stem=case.stem, hidden=case.hidden, dim=case.dim,
            view_chunk=case.view_chunk if views > case.view_chunk else 0, precision="bf16" if setting.bf16 else "fp32",
            compile=setting.compile, cuda_graph=setting.cuda_graph,
        ),
        method=MethodConfig(name=method, tau=TAU),
        optim=OptimConfig(name="sgd", lr=LR, weight_decay=WEIGHT_DECAY, steps=MANY, warmup_epochs=0),
        eval=EvalConfig(linear=False),
    )  # fmt: skip
    config.validate()
    opened = contextlib.ExitStack()
    processes = opened.enter_context(Processes(setting.device))
    trainer = Trainer(config, processes, Path(opened.enter_context(tempfile.TemporaryDirectory())))
    opened.callback(trainer.loader.close)
    trainer.step.train()
    steps = iter(range(MANY))
    networks = trainer.step.method
    return Peer(
        networks.online,
        networks.predictor,
        networks.target,
        trainer.loader.batches(),
        lambda batch: trainer.step(batch, next(steps)).loss.clone(),  # the next step may overwrite it
        ahead=2 * config.data.prefetch,
        close=opened.close,
    )


def our_provider(method: str, views: int) -> Provider:
    return Provider(f"msbreg's trainer: {method}", views, lambda setting: ours(method, views, setting))


PROVIDERS = {
    "lightly": Provider("lightly's BYOL, loss, heads, EMA, transforms, and a DataLoader", 2, lightly_byol),
    "solo_style": Provider("BYOL in plain PyTorch on a DALI pipeline in the manner of solo-learn", 2, solo_style_byol),
    "msbreg_byol": our_provider("byol", 2),
    "msbreg_k2": our_provider("msbreg", 2),
    "msbreg_k4": our_provider("msbreg", 4),
    "msbreg_k8": our_provider("msbreg", 8),
}
