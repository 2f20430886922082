"""The folder of one stage, which is done, begun or another's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import PreTrainedModel

from fastdistill.digest import digest
from fastdistill.files import damage, digests, load_tensors, writing
from fastdistill.models.loading import from_pretrained
from fastdistill.recipes.report import write_json
from fastdistill.training.checkpoints import last_whole

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
        self._check(found)
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
                self._remove_damaged()
                self._write({"came_from": came_from})
        PartialState().wait_for_everyone()
        return found

    def read(self) -> dict[str, Any]:
        if not self.marker.is_file():
            unfinished = f".{MARKER}."  # a marker whose writing was cut off
            if self.path.is_file() or any(not p.name.startswith(unfinished) for p in self.path.glob("*")):
                raise ValueError(f"{self.path} holds something that is no stage of a run; give another output folder")
            return {}
        try:
            found = json.loads(self.marker.read_text())
        except ValueError as error:
            raise ValueError(f"{self.marker} is damaged ({error}); remove its folder to do the stage again") from None
        if not isinstance(found, dict) or found.pop("digest", None) != _digest(found):
            raise ValueError(
                f"{self.marker} is damaged (it is not as it was written); remove its folder to do the stage again"
            )
        return found

    def _write(self, found: Mapping[str, Any]) -> None:
        found = json.loads(json.dumps(found, default=str))  # as it will be read
        write_json(self.marker, {**found, "digest": _digest(found)})

    def close(
        self,
        came_from: Mapping[str, Any],
        result: Mapping[str, Any],
        log: Sequence[Mapping[str, float]],
        save: Callable[[], None],
    ) -> None:
        """Save what the stage made, and then say that it is done."""
        if PartialState().is_main_process:
            with writing(self.path):
                save()
            files = digests(self.path, self._files())
            self._write({"came_from": came_from, "result": result, "log": log, "files": files})
            self._remove_checkpoints()
        PartialState().wait_for_everyone()

    def _files(self) -> list[str]:
        """The names of those that the stage made."""
        hidden = (".", MARKER, UNFINISHED)
        return [path.name for path in self.path.iterdir() if path.is_file() and not path.name.startswith(hidden)]

    def _check(self, found: Mapping[str, Any]) -> None:
        """Raises ValueError for a stage that is done and has since been damaged."""
        if wrong := damage(self.path, found.get("files", {})):
            raise ValueError(f"{self.path} is damaged ({wrong}); remove it to do the stage again")

    def _remove_checkpoints(self) -> None:
        for checkpoint in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for unfinished in (*self.path.glob(f"{UNFINISHED}*"), *self.path.glob(f".{UNFINISHED}*")):
            unfinished.unlink()

    def _remove_damaged(self) -> None:
        """Work that is not as it was written: it begins anew."""
        for unfinished in self.path.glob(f"{UNFINISHED}*"):
            try:
                load_tensors(unfinished)
            except ValueError as error:
                told = f"{self.path.name}: begun anew: {error}"
                Console(stderr=True).print(told, highlight=False, soft_wrap=True)
                unfinished.unlink()

    def load(self) -> PreTrainedModel:
        """The stage's model, always as the disk has it: later stages then start from the same in every run."""
        self._check(self.read())
        try:
            return from_pretrained(self.path)
        except Exception as error:
            raise ValueError(f"{self.path} is damaged ({error}); remove it to do the stage again") from error

    def last_checkpoint(self) -> str | None:
        """The latest checkpoint that is as it was written."""
        return last_whole(self.path)


def _digest(found: Mapping[str, Any]) -> str:
    return digest([json.dumps(found, sort_keys=True)])
