"""Every option of a run: typed, with its default, unit and meaning.

The defaults are the embedded default run: images that the package renders, a small network, a few minutes on two CPU
cores. `msbreg/configs/*.yaml` hold others; `--config NAME` loads one and dotted options override it.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from msbreg import functional
from msbreg.errors import MSBRegError

__all__ = [
    "LIMITS", "NONE", "Config", "DataConfig", "EvalConfig", "MethodConfig", "ModelConfig", "OptimConfig", "RunConfig",
    "config_of", "flatten", "option_types", "packaged_configs", "require_text", "with_absolute_paths",
]  # fmt: skip

NONE = "none"
"""As `data.eval_path`: no images are held out."""
MANY = 10**9
LIMITS: dict[str, tuple[float, float]] = {
    "run.seed": (0, 2**63 - 1), "run.threads": (0, 1024), "run.checkpoint_every": (1, MANY), "run.log_every": (1, MANY),
    "run.keep_every": (0, MANY),
    "run.timeout": (1, MANY),
    "data.images": (0, MANY), "data.size": (8, 10_000), "data.views": (2, 1000), "data.batch_size": (2, 10**6),
    "data.threads": (0, 1024), "data.prefetch": (1, 1000), "data.timeout": (0, MANY),
    "model.hidden": (1, 10**5), "model.dim": (2, 10**5), "model.view_chunk": (0, 1000),
    "method.lambda_m": (0, MANY), "method.lambda_s": (0, MANY), "method.lambda_b": (0, MANY), "method.tau": (0, 1),
    "optim.lr": (0, 10**15), "optim.weight_decay": (0, 10**15), "optim.epochs": (0, 10**6), "optim.steps": (0, MANY),
    "optim.warmup_epochs": (0, 10**6),
    "eval.every": (0, 10**6), "eval.k": (1, MANY), "eval.temperature": (1e-9, MANY), "eval.bank": (1, MANY),
    "eval.queries": (1, MANY),
}  # fmt: skip
"""The least and the most of every number. Most is far above any use: beyond it torch or Python fail in odd ways."""

ONLY_MSBREG = [
    f"method.{name}" for name in ("lambda_m", "lambda_s", "lambda_b", "leave_one_out", "disperse", "spectrum")
]
"""Options of the losses, which the methods that msbreg is compared with fix."""


@dataclass
class RunConfig:
    """Where the run lives and how it reports."""

    dir: str = "runs/default"
    """Folder of the run: metrics, checkpoints, curves, the exported backbone. Resumed where it holds a checkpoint."""
    seed: int = 0
    """Seed of initial weights, order of images, augmentation and noise."""
    resume: bool = True
    """Go on from the checkpoint in the run folder; false refuses a folder that holds one."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one."""
    threads: int = 0
    """CPU threads of the networks in each process; 0 leaves torch's own choice. Where other programs keep cores busy,
    fewer are faster, or OMP_WAIT_POLICY=PASSIVE in the environment."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end, before each evaluation but the first, and on Ctrl-C,
    SIGTERM, SIGHUP (a terminal that closes) or SIGUSR1, which torchrun passes on where its --signals-to-handle names
    it."""
    keep_every: int = 0
    """Steps between checkpoints that are kept as checkpoint-STEP.pt, beside the last two; 0: none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl, which is also how often ranks compare notes on bad losses."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before it gives up. They wait for the first one's evaluations too."""
    tensorboard: bool = False
    """Write TensorBoard files to the run folder too; needs the tensorboard package."""


@dataclass
class DataConfig:
    """Which images, and which views of them."""

    path: str | None = None
    """Image folder, folder or pattern of tar shards, or index file; unset: images that msbreg renders itself."""
    eval_path: str | None = None
    """Held-out images for evaluation; unset: val/, valid/, validation/ or test/ beside train/, or shards of one folder
    with these words in their names, else as many labelled images as eval.queries, a tenth at the most; none: no
    images, and all are trained on. They are classified where they have labels of two classes or more, and the training
    images too, four images a class; else each, of the training images where there are no others, is to be recognised
    again."""
    images: int = 0
    """Images of an epoch, for --dry-run where there is no --data.path to count; 0: as many as msbreg renders.
    Where it is set, training wants a --data.path."""
    recipe: str = "auto"
    """byol, cifar, multi_crop, or a YAML file with a block a view, or fewer, taken in turn; auto: cifar below 96
    pixels, else byol."""
    size: int = 32
    """Side of a view, in pixels."""
    views: int = 2
    """K, views of each image in a step."""
    batch_size: int = 128
    """Images in a step, over all processes."""
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes and augments; auto: DALI where it is installed, but torchvision on a CPU from views of 128 pixels
    on; at 224 it is faster there."""
    threads: int = 0
    """Threads that decode and augment in each process; 0: its cores, divided among the processes that may use them."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    timeout: float = 600.0
    """Seconds that a step waits for its images before the run ends, as on a stalled disk; 0: for ever."""
    cache: str | None = None
    """Folder for rendered images and listings of tar shards; unset: msbreg/ in the user's cache (XDG_CACHE_HOME)."""


@dataclass
class ModelConfig:
    """The networks."""

    backbone: str = "convnet"
    """convnet (small, for CPUs), a torchvision model such as resnet50, or timm/NAME."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet, or cifar (3x3 convolution, stride 1, no pooling) for images of 32 pixels."""
    weights: str | None = None
    """File with weights that the backbone begins with: backbone.safetensors or backbone.pt of another run, or what
    state_dict() of the same network of torchvision or timm gives, saved by torch.save. Unset: random ones."""
    hidden: int = 256
    """Width of the hidden layer of projector and predictor; simsiam's predictor has a quarter of D instead."""
    dim: int = 128
    """D, dimension of the embeddings."""
    predictor: bool = True
    """A predictor after the online projector, as in BYOL."""
    view_chunk: int = 0
    """Views that go through backbone and projector together, recomputed in the backward pass so that many views fit in
    memory, each chunk with its own batch statistics; 0: all at once, as the predictor has them."""
    compile: bool | Literal["auto"] = False
    """true, false or auto (on a GPU): torch.compile the networks block by block. The first step takes a minute then."""
    cuda_graph: bool = False
    """Record forward and backward pass as one CUDA graph, for networks too small to keep a GPU busy; one process."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; auto: bf16 autocast on a GPU, fp32 on a CPU. Losses are always at least fp32."""


@dataclass
class MethodConfig:
    """What a step computes."""

    name: Literal["msbreg", "byol", "simsiam"] = "msbreg"
    """msbreg; byol (two views, the other view's target, no dispersion); simsiam (byol without the EMA network,
    with its own heads and a predictor whose learning rate is constant)."""
    lambda_m: float = functional.LAMBDA_M
    """Weight of the multiview centroid loss; at 0, for an ablation, it is in the log alone."""
    lambda_s: float = functional.LAMBDA_S
    """Weight of the singular value loss (the paper's, as others quote it: up to 0.004 at K = 4 and 8)."""
    lambda_b: float = functional.LAMBDA_B
    """Weight of the Brownian diffusive loss (the same: up to 0.5)."""
    leave_one_out: bool = functional.LEAVE_ONE_OUT
    """Compare each view with the centroid of the other views' targets instead of all views'."""
    disperse: Literal["projector", "predictor"] = "projector"
    """Whose output the singular value and Brownian losses act on."""
    spectrum: functional.Spectrum = functional.SPECTRUM
    """Form of the singular value loss; whitening wants about a tenth of lambda_s."""
    tau: float = 0.9
    """Momentum of the EMA network at the start, rising to 1 by a cosine. 0.9 suits a few hundred steps; BYOL has 0.99
    for 100 epochs of ImageNet and 0.996 for 1000, in batches of 4096; in batches of B tau ** (B / 4096) is
    alike."""


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["lars", "sgd", "adamw"] = "adamw"
    """lars (You et al. 2017) for large batches, sgd with momentum 0.9, adamw."""
    lr: float = 2e-2
    """Peak learning rate for a batch of 256 images; scaled linearly with the batch."""
    weight_decay: float = 1e-4
    """Weight decay; biases, normalisation parameters and what a timm network excepts have none."""
    epochs: float = 8.0
    """Passes over the images."""
    steps: int = 0
    """Optimizer steps; where above 0 it replaces epochs."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly from 0, before it falls to 0 by a cosine; that of simsiam's
    predictor stays at the peak."""


@dataclass
class EvalConfig:
    """How the frozen backbone is judged."""

    every: float = 2.0
    """Epochs between kNN evaluations during training; 0: at the start and end only."""
    k: int = 20
    """Neighbours in the weighted kNN vote (200 is usual on ImageNet)."""
    temperature: float = 0.1
    """Temperature of the kNN vote's weights."""
    bank: int = 5000
    """Labelled training images that vote and that the linear probe is fitted to, at the most."""
    queries: int = 2000
    """Held-out images that are classified, at the most."""
    linear: bool = True
    """Also fit a linear probe to frozen features at the end, and train one alongside. Neither is ImageNet's published
    protocol, which trains on all images with augmentation."""


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> None:
        """Raises MSBRegError where an option cannot be or contradicts another; data and devices are checked later."""
        options = flatten(self)
        for name, kind in option_types().items():
            require_type(f"--{name}", options[name], kind)
        if self.method.name in ("byol", "simsiam") and self.data.views != 2:
            raise MSBRegError(
                f"--data.views is {self.data.views}, but {self.method.name} is defined for exactly 2 views; "
                "use --method.name msbreg for more."
            )
        if self.method.disperse == "predictor" and not self.model.predictor:
            raise MSBRegError("--method.disperse predictor needs --model.predictor true.")
        if self.method.name in ("byol", "simsiam") and not self.model.predictor:
            raise MSBRegError(f"{self.method.name} collapses without a predictor; leave --model.predictor true.")
        if self.method.name != "msbreg":
            defaults = flatten(Config())
            for name in ONLY_MSBREG:
                if options[name] != defaults[name]:
                    raise MSBRegError(f"--{name} is for --method.name msbreg; {self.method.name} does not have it.")
        for name, (least, most) in LIMITS.items():
            require_number(f"--{name}", options[name], least, most)
        if not (self.optim.steps or self.optim.epochs):
            raise MSBRegError("--optim.epochs and --optim.steps are both 0, which leaves nothing to do.")
        if self.model.cuda_graph and self.model.view_chunk:
            raise MSBRegError(
                "--model.cuda_graph is for networks with memory to spare, and cannot record what --model.view_chunk "
                "recomputes; leave out one of them."
            )


def option_types() -> dict[str, Any]:
    """Type hints by option: {"run.dir": str, ...}."""
    groups = get_type_hints(Config)
    return {f"{group}.{name}": kind for group, cls in groups.items() for name, kind in get_type_hints(cls).items()}


def require_type(name: str, value: Any, kind: Any) -> None:
    """Raises MSBRegError where a value is not of its option's type; an int is taken where a float is expected.

    Types derived from these, as NumPy's are, are none: a checkpoint that holds them would be refused when it is read.
    """
    words = [word for each in (kind, *get_args(kind)) if get_origin(each) is Literal for word in get_args(each)]
    if type(value) is str and value in words:
        return
    if get_origin(kind) is Literal:
        raise MSBRegError(f"{name} is {value!r}, but must be one of {', '.join(words)}.")
    kinds = get_args(kind) or ((int, float) if kind is float else (kind,))
    if type(value) not in kinds:
        called = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        expected = ", or ".join([called[each] for each in (get_args(kind) or (kind,)) if each in called] + words)
        of = "" if type(value).__module__ == "builtins" else f" of {type(value).__module__}"
        raise MSBRegError(f"{name} is {value!r}{of}, but must be {expected}.")
    require_text(name, value)


def require_text(name: str, value: Any) -> None:
    """Raises MSBRegError where a text is empty, as a shell's variable may be: as a path it would mean this folder."""
    if value == "":
        raise MSBRegError(f"{name} is empty; give it a value, or leave it out.")


def require_number(name: str, value: float, least: float, most: float) -> None:
    """Raises MSBRegError where a number is outside its limits, or none."""
    if not least <= value <= most:
        raise MSBRegError(f"{name} is {value}, but must lie between {least} and {most}.")


def flatten(config: "Config | dict[str, Any]") -> dict[str, Any]:
    """A config, or its `asdict`, as {"run.dir": ..., "data.path": ...}."""
    groups = asdict(config) if isinstance(config, Config) else config
    return {f"{group}.{name}": value for group, options in groups.items() for name, value in options.items()}


def with_absolute_paths(config: Config) -> Config:
    """The config with the places of its images, weights and recipe as they are to be found from any folder."""

    def absolute(path: str | None) -> str | None:
        return path and os.path.abspath(os.path.expanduser(path))

    eval_path = config.data.eval_path if config.data.eval_path == NONE else absolute(config.data.eval_path)
    data = replace(config.data, path=absolute(config.data.path), eval_path=eval_path)
    if data.recipe.lower().endswith((".yaml", ".yml")):  # else it is a name
        data = replace(data, recipe=absolute(data.recipe) or "")
    return replace(config, data=data, model=replace(config.model, weights=absolute(config.model.weights)))


def config_of(state: dict[str, Any]) -> Config:
    """The config of the run that wrote a checkpoint.

    Raises:
        MSBRegError: the checkpoint has other options than this version.
    """
    groups = vars(Config())
    try:
        return Config(**{name: type(groups[name])(**options) for name, options in state["config"].items()})
    except (KeyError, TypeError) as error:
        raise MSBRegError(f"the checkpoint has options of another version of msbreg ({error}).") from error


def packaged_configs() -> dict[str, Path]:
    """Name to file of the configs that come with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
