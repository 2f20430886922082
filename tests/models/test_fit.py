from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdistill
from fastdistill.models.loading import load_classifier
from fastdistill.training.trainer import DistillationTrainer
from tests import tiny
from tests.encoders import CONFIGS, classifier

UNFIT = [
    ({"hidden_size": 32}, r"other sizes: .*LayerNorm.bias, \[32\] by the config but \[16\] in the file"),
    ({"num_hidden_layers": 5}, "missing keys .*layer.3"),
    ({"num_hidden_layers": 2}, "unexpected keys .*layer.2"),
    ({"max_position_embeddings": 16}, "position_embeddings"),
    ({"vocab_size": 20}, "word_embeddings"),
    ({"intermediate_size": 48}, "intermediate.dense"),
]


def saved(folder: Path, model: Any, **config: Any) -> Path:
    """A folder whose config says something else than its weights."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("config, message", UNFIT)
def test_a_config_that_does_not_fit_the_weights_is_an_error(
    tmp_path: Path, has_head: bool, config: dict[str, int], message: str
) -> None:
    model = tiny.bert(layers=3, num_labels=3)
    source = saved(tmp_path, model if has_head else model.bert, **config)
    with pytest.raises(ValueError, match=f"{source} has weights and a config that do not go together: .*{message}"):
        load_classifier(str(source), tiny.TASK)


@pytest.mark.parametrize("config", [config for config, _ in UNFIT])
def test_so_it_is_for_the_trainers_teacher(tmp_path: Path, config: dict[str, int]) -> None:
    source = saved(tmp_path / "teacher", tiny.bert(layers=3), **config)
    options = {"args": tiny.config(tmp_path), "train_dataset": tiny.dataset(8)}
    with pytest.raises(ValueError, match=f"teacher_model '{source}' has (no )?weights"):
        DistillationTrainer(model=tiny.bert(1), teacher_model=source, **options)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_head_alone_may_be_new(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(kind)
    if model.main_input_name != "input_ids":
        pytest.skip("is no teacher of text")
    prefix = model.base_model_prefix
    for place, found in enumerate((model.base_model, model)):
        found.save_pretrained(tmp_path / str(place))
        loaded = load_classifier(str(tmp_path / str(place)), tiny.TASK)
        theirs = {f"{prefix}.{name}": weight for name, weight in model.base_model.state_dict().items()}
        ours = loaded.state_dict()
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items() if name in ours)
        told = capsys.readouterr().out
        assert "has no weights of these sizes for classifier." in told or "which are drawn anew" not in told
    assert loaded.config.num_labels == 2


def test_a_head_that_the_config_names_must_be_there(tmp_path: Path) -> None:
    """Else a teacher would be taken as it is, with a head at random."""
    tiny.bert(3).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not go together: missing keys classifier.weight"):
        load_classifier(str(tmp_path), tiny.TASK)


def test_what_a_file_has_beside_the_encoder_does_no_harm(tmp_path: Path) -> None:
    model = tiny.bert(3)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"bert.embeddings.position_ids": torch.arange(32)[None], "cls.predictions.bias": torch.zeros(65)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for loaded in (load_classifier(str(tmp_path), tiny.TASK), fastdistill.from_pretrained(tmp_path)):
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
