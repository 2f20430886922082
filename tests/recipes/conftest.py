from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.cli import main
from tests import tiny


@pytest.fixture(scope="module")
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of classes, one of scores, and the encoder that the module's ENCODER describes."""
    folder = tmp_path_factory.mktemp("sources")
    tiny.task_folder(folder / "task", train=getattr(request.module, "EXAMPLES", 48))
    tiny.task_folder(folder / "scores", train=48, regression=True)
    tiny.model_folder(folder / "encoder", tiny.bert(**request.module.ENCODER).bert)
    return folder


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the module's `command` with EVERYTHING."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(request.module.command(sources, output, *request.module.EVERYTHING)) == 0
    return output
