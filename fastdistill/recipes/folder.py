"""The folder of one stage, which is done, begun or another's."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from fastdistill.models.loading import from_pretrained
from fastdistill.recipes.report import write_json

MARKER = "stage.json"

UNFINISHED = "unfinished.safetensors"
"""What `Stages.keep` removes, with all whose names begin so, when the stage is done."""


class Folder:
    """A stage's folder: the model, the marker, and while it trains the checkpoints. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path / MARKER
        self.removed = path.with_name(f".{path.name}.removed")

    def open(self, came_from: Mapping[str, Any]) -> dict[str, Any]:
        """Make the folder ready for this stage: {"result": ...} if it is done, {"changed": [...]} if what was there
        came from something else, and is removed."""
        found = self.read()
        before = found.pop("came_from", None)
        if before is not None and before != came_from:
            found = {"changed": [key for key in came_from if before.get(key) != came_from[key]]}
        PartialState().wait_for_everyone()  # all have read before one writes
        if PartialState().is_main_process:
            if "result" in found:
                self._remove_checkpoints()  # if it was done but cut off here
            else:
                shutil.rmtree(self.removed, ignore_errors=True)
                if "changed" in found:  # at once, as a later run would see it: half a stage is none
                    self.path.rename(self.removed)
                    shutil.rmtree(self.removed)
                self.path.mkdir(exist_ok=True)
                write_json(self.marker, {"came_from": came_from})
        PartialState().wait_for_everyone()
        return found

    def read(self) -> dict[str, Any]:
        if not self.marker.is_file():
            unfinished = f".{MARKER}."  # a marker whose writing was cut off
            if self.path.is_file() or any(not p.name.startswith(unfinished) for p in self.path.glob("*")):
                raise ValueError(f"{self.path} holds something that is no stage of a run; give another output folder")
            return {}
        try:
            return dict(json.loads(self.marker.read_text()))
        except ValueError as error:
            raise ValueError(f"{self.marker} is damaged ({error}); remove its folder to do the stage again") from None

    def close(
        self,
        came_from: Mapping[str, Any],
        result: Mapping[str, Any],
        log: Sequence[Mapping[str, float]],
        save: Callable[[], None],
    ) -> None:
        """Save what the stage made, and then say that it is done."""
        if PartialState().is_main_process:
            save()
            write_json(self.marker, {"came_from": came_from, "result": result, "log": log})
            self._remove_checkpoints()
        PartialState().wait_for_everyone()

    def _remove_checkpoints(self) -> None:
        for checkpoint in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for unfinished in (*self.path.glob(f"{UNFINISHED}*"), *self.path.glob(f".{UNFINISHED}*")):
            unfinished.unlink()

    def load(self) -> PreTrainedModel:
        """The stage's model, always as the disk has it: later stages then start from the same in every run."""
        try:
            return from_pretrained(self.path)
        except Exception as error:
            raise ValueError(f"{self.path} is damaged ({error}); remove it to do the stage again") from error

    def last_checkpoint(self) -> str | None:
        """The latest checkpoint that was written to its end; Trainer writes trainer_state.json last."""
        for checkpoint in sorted(self.path.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
            with contextlib.suppress(FileNotFoundError, ValueError):
                json.loads((checkpoint / "trainer_state.json").read_text())
                return str(checkpoint)
        return None
