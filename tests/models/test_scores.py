from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdistill.models.scores import Scores, first_peak, random_scores
from fastdistill.sensitivity.weights import WeightScores
from tests import tiny

SCORES = Scores(
    [torch.tensor([0.5, 0.1]), torch.tensor([0.3, 0.2])],
    [torch.tensor([5.0, 1.0, 4.0, 9.0]), torch.tensor([8.0, 2.0, 3.0, 7.0])],
)


def lists(kept: list[torch.Tensor]) -> list[list[int]]:
    return [layer.tolist() for layer in kept]


def test_all_layers_are_ranked_together() -> None:
    heads, neurons = SCORES.kept(0.5)
    assert lists(heads) == [[0], [0]]
    assert lists(neurons) == [[0, 3], [0, 3]]
    heads, neurons = SCORES.kept(0.25)
    assert lists(heads) == [[0], [0, 1]]
    assert lists(neurons) == [[0, 2, 3], [0, 2, 3]]
    assert lists(SCORES.kept(0)[1]) == [[0, 1, 2, 3]] * 2
    assert lists(SCORES.kept(1)[1]) == [[], []]


def test_of_equals_the_first_go_first() -> None:
    equal = Scores([torch.ones(2), torch.ones(2)], [torch.ones(3), torch.ones(3)])
    heads, neurons = equal.kept(0.5)
    assert lists(heads) == [[], [0, 1]]
    assert lists(neurons) == [[], [0, 1, 2]]


def test_neurons_are_rounded_and_heads_are_not() -> None:
    heads, neurons = SCORES.kept(0.25, round_to=2)
    assert lists(heads) == [[0], [0, 1]]
    assert lists(neurons) == [[0, 1, 2, 3], [0, 1, 2, 3]]  # 3 to 4
    heads, neurons = SCORES.kept(0.6, round_to=4)  # 1 and 2 are left
    assert lists(neurons) == [[], [0, 1, 2, 3]]
    uneven = Scores([torch.ones(1)], [torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0])])
    assert lists(uneven.kept(0.0, round_to=4)[1]) == [[1, 2, 3, 4]]
    assert lists(uneven.kept(0.4, round_to=2)[1]) == [[1, 2, 3, 4]]


def test_normalised_by_layer_and_interpolated() -> None:
    mixed = SCORES.normalized().lerp(SCORES, 0.25)
    for units in ("heads", "neurons"):
        for found, values in zip(getattr(mixed, units), getattr(SCORES, units), strict=True):
            torch.testing.assert_close(found, 0.75 * values / values.square().sum().sqrt() + 0.25 * values)
    zero = Scores([torch.zeros(2)], [torch.zeros(3)]).normalized()
    assert zero.neurons[0].tolist() == [0, 0, 0]


def test_saved_and_loaded(tmp_path: Path) -> None:
    SCORES.save(tmp_path / "scores.safetensors")
    found = Scores.load(tmp_path / "scores.safetensors")
    for units in ("heads", "neurons"):
        assert lists(list(getattr(found, units))) == lists(list(getattr(SCORES, units)))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]
    content = (tmp_path / "scores.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match="cut.safetensors is no safetensors file, or damaged"):
        Scores.load(tmp_path / "cut.safetensors")
    tiny.bert().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model.safetensors is damaged, or of another program"):
        Scores.load(tmp_path / "model" / "model.safetensors")
    WeightScores({"matrix": torch.ones(2, 2)}).save(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="expected the scores of"):
        Scores.load(tmp_path / "weights.safetensors")


def test_random_scores_depend_on_the_seed_alone() -> None:
    model = tiny.bert(layers=3)
    first, again, other = (random_scores(model, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert [len(layer) for layer in first.neurons] == [32, 32, 32]
    assert all(map(torch.equal, first.neurons, again.neurons))
    assert not torch.equal(first.heads[0], other.heads[0])


def test_what_is_no_score() -> None:
    vector = torch.ones(2)
    with pytest.raises(ValueError, match="heads has 1 layers, neurons 0"):
        Scores([vector], [])
    with pytest.raises(ValueError, match=r"heads\[0\] is of shape \(1, 2\)"):
        Scores([vector[None]], [vector])
    with pytest.raises(ValueError, match=r"neurons\[0\] is of list"):
        Scores([vector], [[1.0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="the scores of heads hold NaN"):
        Scores([vector * torch.nan], [vector]).kept(0.5)
    for sparsity in (-0.1, 1.1, torch.nan):
        with pytest.raises(ValueError, match=f"sparsity is {sparsity}"):
            SCORES.kept(sparsity)
    for round_to in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"round_to is {round_to}"):
            SCORES.kept(0.5, round_to)  # type: ignore[arg-type]


def test_the_first_peak_of_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    low = 1 + 0.1 * torch.randn(3000, generator=generator)
    high = 3 + 0.1 * torch.randn(9000, generator=generator)
    two = Scores([torch.cat([low, high])], [torch.ones(2)])
    assert first_peak(two.heads[0].double()) == pytest.approx(1, abs=0.05)
    assert two.auto_sparsity() == pytest.approx(0.125, abs=0.03)  # half of the lower quarter
    with pytest.raises(ValueError, match="2 scores that are all equal"):
        two.auto_sparsity("neurons")
    with pytest.raises(ValueError, match="units is 'layers'"):
        two.auto_sparsity("layers")  # type: ignore[arg-type]


def test_a_density_that_rises_has_its_peak_near_the_end() -> None:
    assert first_peak(torch.linspace(0.2, 1, 400).double() ** 0.1) > 0.9
