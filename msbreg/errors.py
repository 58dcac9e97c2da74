"""The errors that are meant for the person at the keyboard."""

import torch

__all__ = ["DataError", "MSBRegError", "is_of_a_compiler", "is_of_memory"]


class MSBRegError(Exception):
    """A problem that the user can mend. Its text is one sentence or two: what was expected, what came, what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class DataError(MSBRegError):
    """Images that cannot be trained on: no such folder, nothing in it, too many that cannot be read."""


def is_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; of a CPU's errors only the text tells."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_of_a_compiler(error: RuntimeError) -> bool:
    """Whether `torch.compile` raised it."""
    from torch._dynamo.exc import TorchDynamoException  # a second's work

    return isinstance(error, TorchDynamoException)
