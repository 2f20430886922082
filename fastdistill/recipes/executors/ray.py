"""Trainings as tasks of Ray, on a machine or a cluster."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import PreTrainedModel

from fastdistill.processes import join
from fastdistill.recipes.executors.local import Local, Trial
from fastdistill.recipes.stages import Stages
from fastdistill.recipes.training import Trained, Training

RETRIES = 2
"""How often a training that failed, or whose process died, is tried again."""


class Ray(Local):
    """Trains as many at a time as the Ray cluster has room for, each on a GPU if the cluster has any, else on a CPU.

    Each is sent as soon as what it needs is there, such as a sparse teacher and what it says, which is made here, once;
    those that are done already are not sent. Processes that have trained take the next one. One that fails, or whose
    process dies, is tried again and goes on from its last checkpoint; when that was to no avail, the others are
    trained, and then ValueError, OSError or RuntimeError names it. The cluster is the one that is connected, else that
    of RAY_ADDRESS or of ``ray start`` on this machine, else this machine alone, until this is no longer used. The
    stages' folders and the cache of `datasets` (HF_HOME) must be on a file system that all its machines share, under
    the same paths.

    Raises ImportError if Ray is not there, ValueError in one of several processes (torchrun).
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ImportError("--executor ray needs Ray, which an extra brings: pip install 'fastdistill[ray]'")
        if (number := PartialState().num_processes) > 1:
            raise ValueError(f"--executor ray was started in {number} processes; expected one, which starts the others")

    def in_turn(self, trials: Iterable[Trial]) -> Iterator[Trained]:
        """As `Local` has it, but all are trained before the first is given."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        places, running, shared = [], dict[Any, str](), _Shared()
        try:
            for trial in trials:
                stages, name = trial.stages, trial.training.name
                places.append((stages, name))
                if stages.prepare(trial.training) is not None:
                    self._connect()
                    sent = shared.put({"stages": stages, "training": vars(trial.training)})
                    gpus = 1 if ray.cluster_resources().get("GPU") else 0
                    task = _task().options(num_gpus=gpus, max_retries=RETRIES, retry_exceptions=True)
                    running[task.remote(sent)] = f"{stages.output.name}/{name}"
            _wait_for(running)
        except BaseException:
            # only what runs: a task that ends while it is cancelled takes this process down (Ray 2.60)
            left = ray.wait(list(running), num_returns=len(running), timeout=0)[1] if running else []
            for task in left:
                ray.cancel(task, force=True)
            raise
        for stages, name in places:
            yield stages.load(name)

    def _connect(self) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            weakref.finalize(self, ray.shutdown)


@functools.cache
def _task() -> Any:
    import ray

    return ray.remote(_train)


def _wait_for(running: Mapping[Any, str]) -> None:
    """Raises the first one's error, in their order, once all have ended."""
    import ray

    left, errors = list(running), {}
    while left:
        (task,), left = ray.wait(left)
        try:
            ray.get(task)
            Console(stderr=True).print(f"{running[task]}: trained")
        except ray.exceptions.RayError as error:
            errors[task] = error
    for task, name in running.items():
        if task in errors:
            cause = getattr(errors[task], "cause", None) or errors[task]
            kind = next((kind for kind in (ValueError, OSError) if isinstance(cause, kind)), RuntimeError)
            raise kind(f"{name}: {cause}") from errors[task]


def _train(sent: Mapping[str, Any]) -> None:
    """In a process of the cluster."""
    join()
    trial = _fetched(sent)
    Trial(trial["stages"], Training(**trial["training"])).train()


class _Shared:
    """Puts models and stages into Ray's store, each once, where processes fetch them from; none is held here."""

    def __init__(self) -> None:
        self.stored: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def put(self, value: Any) -> Any:
        import ray

        if isinstance(value, Mapping):
            return {key: self.put(item) for key, item in value.items()}
        if not isinstance(value, PreTrainedModel | Stages):
            return value
        if value not in self.stored:
            self.stored[value] = ray.put(value)
        return self.stored[value]


def _fetched(value: Any) -> Any:
    import ray

    if isinstance(value, Mapping):
        return {key: _fetched(item) for key, item in value.items()}
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value
