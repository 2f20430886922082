"""Trainings as trials of Ray Tune, on a machine or a cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
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
"""How often a trial that failed, or whose process died, is tried again."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # stages keep their own logs
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption ends the run; Tune would go on as if all trials were done
}


class Ray(Local):
    """Trains as many at a time as the Ray cluster has room for, each on a GPU if the cluster has any, else on a CPU.

    What teachers say is stored here before, once. Trials that are done already are not sent. One that fails, or whose
    process dies, is tried again and goes on from its last checkpoint; when that was to no avail, the others are
    trained, and then ValueError, OSError or RuntimeError names it. The cluster is the one that is connected, else that
    of RAY_ADDRESS or of ``ray start`` on this machine, else this machine alone.

    Args:
        folder: of Ray's own files. It, the stages' folders and the cache of `datasets` (HF_HOME) must be on a file
            system that all machines share, under the same paths.

    Raises ImportError if Ray is not there, ValueError in one of several processes (torchrun).
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ImportError("--executor ray needs Ray, which an extra brings: pip install 'fastdistill[ray]'")
        if (number := PartialState().num_processes) > 1:
            raise ValueError(f"--executor ray was started in {number} processes; expected one, which starts the others")
        self.folder = folder.absolute()

    def in_turn(self, trials: Iterable[Trial]) -> Iterator[Trained]:
        """As `Local` has it, but all are trained before the first is given."""
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import ray

        places, waiting, shared = [], {}, _Shared()
        with contextlib.ExitStack() as started:
            for trial in trials:
                places.append((trial.stages, trial.training.name))
                if trial.stages.prepare(trial.training) is not None:
                    if not ray.is_initialized():
                        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
                        started.callback(ray.shutdown)
                    name = os.path.relpath(trial.stages.output / trial.training.name, self.folder.parent)
                    waiting[name] = shared.put({"stages": trial.stages, "training": vars(trial.training)})
            if waiting:
                self._fit(waiting)
        for stages, name in places:
            yield stages.load(name)

    def _fit(self, trials: Mapping[str, Any]) -> None:
        import ray
        from ray import tune

        class Told(tune.Callback):
            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
                Console(stderr=True).print(f"{trial.config['trial']}: trained")

        resources = {"cpu": 1.0, "gpu": 1.0 if ray.cluster_resources().get("GPU") else 0.0}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_train, trials=trials), resources),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=str(self.folder),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Told()],
                verbose=0,
            ),
        )
        results = tuner.fit()
        for place, name in enumerate(trials):
            error = results[place].error
            if error is not None:
                cause = getattr(error, "cause", None) or error
                kind = next((kind for kind in (ValueError, OSError) if isinstance(cause, kind)), RuntimeError)
                raise kind(f"{name}: {cause}") from error


def _train(config: Mapping[str, Any], trials: Mapping[str, Any]) -> None:
    """A trial, in a process of the cluster."""
    join()
    trial = _fetched(trials[config["trial"]])
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
