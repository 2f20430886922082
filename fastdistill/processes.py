"""The processes of a data-parallel run (torchrun, accelerate launch), where there are several."""

from __future__ import annotations

import atexit
import functools
import time

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from torch import Tensor


def join() -> PartialState:
    """accelerate's state of them, which the first call makes: without a GPU they talk by gloo."""
    settle_at_exit()
    return PartialState(cpu=not torch.accelerator.is_available())


@functools.cache
def settle_at_exit() -> None:
    """Let gloo's threads finish before the interpreter ends.

    One that is still to release the last message's tensor waits for the interpreter to do so, and aborts the process if
    that ends first. Nothing can be waited for: a barrier would never end where another process has failed."""
    atexit.register(_settle)


def _settle() -> None:
    if _are_joined():
        time.sleep(0.1)  # without the interpreter's lock


def _are_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_number() -> tuple[int, int]:
    """This process's number, and how many there are. Makes none."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _are_joined() else (0, 1)


def sum_over_processes(*tensors: Tensor) -> None:
    """In place; nothing in a single process."""
    if _are_joined():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def sums_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """New tensors, summed in one message; these in a single process."""
    if rank_and_number()[1] == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    sum_over_processes(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
