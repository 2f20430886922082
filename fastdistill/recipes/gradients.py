"""How strongly each term of a loss pulls at a student before it has learned anything."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from rich.table import Table

from fastdistill.models.attention_scores import call
from fastdistill.models.drawing import draw_anew
from fastdistill.models.first_token import first_token_only
from fastdistill.models.inputs import inputs_of
from fastdistill.objectives.base import as_needed
from fastdistill.objectives.dekd import DeKD
from fastdistill.recipes.training import Training
from fastdistill.sensitivity.units import evaluating
from fastdistill.teachers.outputs import TeacherOutputs, stored_outputs
from fastdistill.training.checks import TEACHER, own_columns

if TYPE_CHECKING:
    from datasets import Dataset

    from fastdistill.teachers.store import Collate

Norms = Mapping[str, Mapping[str, float]]
"""By term: its "loss", weighted, and the l2 norm of its "gradient" with respect to the student's parameters."""


def gradient_norms(training: Training, data: Dataset, collate: Collate, seed: int = 0) -> Norms:
    """Of the terms whose sum is the objective's loss, on the first batch of the data; models are in eval mode.
    What of the student is not pretrained is drawn by the seed."""
    device = PartialState().device
    objective, student = copy.deepcopy((training.objective, training.model))
    draw_anew(student, seed)
    student.to(device)
    if isinstance(objective, DeKD) and objective.select_per == "epoch":
        objective = replace(objective, select_per="batch")  # there is no choice yet
    teachers = training.teacher if isinstance(training.teacher, Mapping) else {TEACHER: training.teacher}
    rows = data.select(range(min(len(data), training.batch_size)))
    rows = rows.select_columns([name for name in rows.column_names if name != "length"])
    batch = send_to_device(dict(collate(list(rows))), device)
    features = {name: value for name, value in batch.items() if name not in own_columns(objective)}
    asked_too = objective.needs.asked

    def said(name: str) -> TeacherOutputs:
        teacher: Any = teachers.get(name)
        if teacher is None:
            return TeacherOutputs(None, features, stored=stored_outputs(name, batch))
        return TeacherOutputs(teacher.to(device).eval(), inputs_of(teacher, features) | asked_too)

    asked = {name: said(name) for name in objective.needs.teachers or (TEACHER,)} if objective.needs.teacher else {}
    outputs: Any = asked if objective.needs.teachers else asked.get(TEACHER)
    columns = {name: batch[name] for name in objective.needs.columns}
    weights = list(student.parameters())
    narrowed = () if objective.needs.all_tokens else (student, *filter(None, teachers.values()))
    with evaluating(student, trained=weights), first_token_only(*narrowed):
        ours = call(student, inputs_of(student, features) | asked_too)
        found = objective.summands(ours, as_needed(objective, outputs), batch["labels"], **columns)
        norms = {}
        for name, loss in found.items():
            given = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            squares = [gradient.double().square().sum() for gradient in given if gradient is not None]
            norms[name] = {"loss": loss.item(), "gradient": float(sum(squares)) ** 0.5}
    return norms


def gradients_table(found: Mapping[str, Norms]) -> Table:
    """A term a row: its loss and gradient, and the gradient's share of the sum of all terms' norms."""
    table = Table("model", "term", title="gradients before the first step")
    for column in ("weighted loss", "gradient", "share %"):
        table.add_column(column, justify="right")
    for model, norms in found.items():
        total = sum(norm["gradient"] for norm in norms.values()) or float("nan")
        for name, norm in norms.items():
            share = 100 * norm["gradient"] / total
            table.add_row(model, name, f"{norm['loss']:.4g}", f"{norm['gradient']:.4g}", f"{share:.1f}")
    return table
