"""Images in, batches of views out."""

try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
except ImportError as error:
    raise ImportError(f"msbreg.data needs {error.name}: pip install 'msbreg[train]'", name=error.name) from error

from msbreg.data.folders import ImageFolder, IndexFile
from msbreg.data.loader import Batch, ViewLoader
from msbreg.data.opening import open_source, open_split, with_classes_of
from msbreg.data.pixels import pixelwise
from msbreg.data.recipes import View, byol, cifar, evaluation, load_recipe, multi_crop
from msbreg.data.shards import TarShards
from msbreg.data.source import Source

__all__ = [
    "Batch", "ImageFolder", "IndexFile", "Source", "TarShards", "View", "ViewLoader", "byol", "cifar", "evaluation",
    "load_recipe", "multi_crop", "open_source", "open_split", "pixelwise", "with_classes_of",
]  # fmt: skip
