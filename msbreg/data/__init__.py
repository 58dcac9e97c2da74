"""Images in, batches of views out."""

from msbreg.data.loader import Batch, ViewLoader
from msbreg.data.recipes import View, byol, cifar, evaluation, load_recipe, multi_crop
from msbreg.data.sources import ImageFolder, IndexFile, Source, TarShards, open_source, open_split, with_classes_of

__all__ = [
    "Batch", "ImageFolder", "IndexFile", "Source", "TarShards", "View", "ViewLoader", "byol", "cifar", "evaluation",
    "load_recipe", "multi_crop", "open_source", "open_split", "with_classes_of",
]  # fmt: skip
