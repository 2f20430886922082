"""Steps whose shapes come again and again, captured as CUDA graphs and replayed: the host launches one thing a step."""

from __future__ import annotations

import functools
import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers.utils import import_utils

T = TypeVar("T")

AFTER = 3
"""A shape is captured when it comes for that time: one that comes less often is not worth it."""

MOST = 32
"""Graphs of a step at most, of the shapes that come first: each holds some megabytes of launches."""


class Graphs(Protocol):
    """What captures on one device; tests have one that runs the function again."""

    device: torch.device

    @property
    def are_whole(self) -> bool:
        """Whether what was captured can still be replayed."""

    def warm_up(self, run: Callable[[], T]) -> T:
        """Run it where it is then captured."""

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        """Does not compute anything, but gives what computes it anew, each time into the same tensors."""


class GraphedStep(Generic[T]):
    """A function of tensors that is replayed as a CUDA graph where its inputs have shapes that it knows.

    Called with the function's inputs it gives the function's result, or None where the caller is to compute it without
    a graph: the first two times that a shape comes. The third time the function runs on the stream on which it is
    then captured, so that kernels are compiled and workspaces there; from then on the inputs are copied into those that
    it was captured with, the graph is replayed, and its results, which the next replay writes over, are copied. Shapes
    are the same where shapes and dtypes of all tensors, all other inputs, autocast, gradient mode and `state` are.

    Dropout draws new numbers in each replay, of PyTorch's own generator and as many as without graphs. All graphs share
    one memory pool, which holds about what the largest step does, beside what steps without a graph keep in PyTorch's
    cache.

    What cannot be captured (it asks the device for a value, or memory runs out) ends it: this step's result is that of
    the run before, or where that failed the caller's; all graphs are given up with their memory, none is tried again,
    and a line on stderr says why, once. Where memory runs out in a step without a graph that is an error as ever, and
    less of it is needed without graphs.

    Args:
        function: of tensors, and of numbers, texts and None, in tuples, lists and dictionaries; its result is such of
            tensors that need no gradient. Nothing but its inputs and what stays in its place may matter to it, and it
            may change tensors in their place, but nothing else.
        graphs: captures it.
        name: what the line on stderr calls it.
    """

    def __init__(self, function: Callable[..., T], graphs: Graphs, name: str) -> None:
        self.function, self.graphs, self.name = function, graphs, name
        self.is_on = True
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured[T]] = {}

    def __call__(self, *inputs: Any, state: Hashable = ()) -> T | None:
        leaves, form = tree_flatten(inputs)
        if self._captured and not self.graphs.are_whole:
            self.end("a capture of others was broken off")
        if not self.is_on or not self._takes(leaves):
            return None
        key = form, tuple(map(_described, leaves)), _modes(self.graphs.device.type), state
        known = self._captured.get(key)
        if known is not None:
            for static, given in zip(known.inputs, leaves, strict=True):
                if isinstance(given, Tensor):
                    static.copy_(given, non_blocking=True)
            return tree_map_only(Tensor, Tensor.clone, known.replay())  # type: ignore[no-any-return]
        self._seen[key] += 1
        if self._seen[key] < AFTER:
            return None
        if len(self._captured) >= MOST:
            tell(f"{self.name}: {MOST} shapes are captured as CUDA graphs; others run without")
            return None
        return self._begin(key, leaves, form)

    def _takes(self, leaves: list[Any]) -> bool:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device.type != self.graphs.device.type:
                    self.end(f"an input is on {leaf.device}")
            elif not isinstance(leaf, bool | int | float | str | None):
                self.end(f"an input is a {type(leaf).__name__}")
        return self.is_on

    def _begin(self, key: Hashable, leaves: list[Any], form: Any) -> T | None:
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run() -> T:
            return self.function(*tree_unflatten(static, form))

        result = None
        try:
            result = self.graphs.warm_up(run)
            self._captured[key] = _Captured(self.graphs.capture(run), static)
        except Exception as error:  # of any kind: without graphs it is raised again, or it was of the capture alone
            self.end(_told(error))
        return result

    def end(self, reason: str) -> None:
        """Capture and replay nothing any more."""
        self.is_on = False
        self._captured.clear()
        tell(f"{self.name}: no CUDA graphs: {reason}")


@dataclass(frozen=True)
class _Captured(Generic[T]):
    replay: Callable[[], T]
    inputs: list[Any]


class CudaGraphs:
    """PyTorch's, on one stream and with one memory pool. Other threads may use the device while one is captured."""

    _broken: ClassVar[int] = 0  # captures of all

    def __init__(self, device: torch.device) -> None:
        self.born = CudaGraphs._broken
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = _stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    @property
    def are_whole(self) -> bool:
        return self.born == CudaGraphs._broken

    def warm_up(self, run: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream), as_if_captured():
                return run()
        finally:
            current.wait_stream(self.stream)

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        gc.collect(1)  # an autograd graph that is still there has its weights' nodes, and these their stream
        torch.clear_autocast_cache()  # what is in it has other addresses, and is not of the next step's weights
        cause: Exception | None = None
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    outputs = run()
                except Exception as error:
                    cause = error
                    raise
        except BaseException as error:
            self._mend(current)
            raise (cause or error) from None  # PyTorch's own, at the end, says less than what broke it off
        finally:
            torch.clear_autocast_cache()
            cause = None  # which has this frame, and what is on the device in those that it came through

        def replay() -> T:
            graph.replay()
            return outputs

        return replay

    def _mend(self, current: torch.cuda.Stream) -> None:
        """PyTorch does not finish a capture that CUDA has broken off: its stream stays the current one, the generator
        refuses to draw, and the allocator neither frees nor looks at events while it believes that it is going on.
        With a new state of the generator, graphs that were captured with the old one cannot be replayed."""
        CudaGraphs._broken += 1
        torch.cuda.set_stream(current)
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        try:
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        except (AttributeError, RuntimeError):
            pass  # it did finish: the function raised an error of its own


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for every stream that it was ever called on."""
    return torch.cuda.Stream(device)


@contextmanager
def as_if_captured() -> Iterator[None]:
    """Within it transformers looks at no mask, as while a stream is captured: the same kernels run."""
    capturing = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: True
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = capturing


def graphs_on(device: torch.device, name: str = "", obstacle: Callable[[], str | None] = lambda: None) -> Graphs | None:
    """What captures there; None where there are no CUDA graphs, or for an obstacle, which a line of that name tells."""
    graphs = capturing(device)
    if graphs is None or (reason := obstacle()) is None:
        return graphs
    tell(f"{name}: no CUDA graphs: {reason}")
    return None


def capturing(device: torch.device) -> Graphs | None:
    return CudaGraphs(device) if device.type == "cuda" else None


def replaying(function: Callable[..., T], graphs: Graphs | None, name: str) -> Callable[..., T]:
    """The function as `GraphedStep` replays it, and by itself where that does not, or without graphs. It also takes
    that one's `state`."""
    step = None if graphs is None else GraphedStep(function, graphs, name)

    def run(*inputs: Any, state: Hashable = ()) -> T:
        found = None if step is None else step(*inputs, state=state)
        return function(*inputs) if found is None else found

    return run


@functools.cache
def tell(text: str) -> None:
    """Once, on stderr."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def _described(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _modes(device: str) -> Hashable:
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _told(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
