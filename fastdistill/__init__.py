"""Compiled kernels and a training API for distilling and pruning transformers.

``fastdistill.ops`` holds differentiable functions for any training loop; the names below work on Hugging Face models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill import ops as ops
    from fastdistill.data.load import load_task as load_task
    from fastdistill.data.load import tokenize as tokenize
    from fastdistill.models.architectures import Architecture as Architecture
    from fastdistill.models.cpu_kernels import cpu_kernels as cpu_kernels
    from fastdistill.models.export import export as export
    from fastdistill.models.first_token import first_token_only as first_token_only
    from fastdistill.models.gates import gate as gate
    from fastdistill.models.loading import from_pretrained as from_pretrained
    from fastdistill.models.pruning import prune as prune
    from fastdistill.models.registering import register_architecture as register_architecture
    from fastdistill.models.scores import Scores as Scores
    from fastdistill.models.students import first_layers as first_layers
    from fastdistill.models.students import parameter_pruned as parameter_pruned
    from fastdistill.models.students import shuffled_sharing as shuffled_sharing
    from fastdistill.models.tokenizers import shared_tokens as shared_tokens
    from fastdistill.models.vocabulary import compact_vocabulary as compact_vocabulary
    from fastdistill.objectives.base import Needs as Needs
    from fastdistill.objectives.base import Objective as Objective
    from fastdistill.objectives.base import WeightedSum as WeightedSum
    from fastdistill.objectives.ckd import CKD as CKD
    from fastdistill.objectives.dekd import DeKD as DeKD
    from fastdistill.objectives.distilbert import DistilBERT as DistilBERT
    from fastdistill.objectives.dkd import DKD as DKD
    from fastdistill.objectives.logits import MSE as MSE
    from fastdistill.objectives.logits import LogitsKD as LogitsKD
    from fastdistill.objectives.logits import MultiLabelKD as MultiLabelKD
    from fastdistill.objectives.logits import TaskLoss as TaskLoss
    from fastdistill.objectives.metakd import MetaKD as MetaKD
    from fastdistill.objectives.pkd import PKD as PKD
    from fastdistill.objectives.team import MTBERT as MTBERT
    from fastdistill.objectives.team import AvgKD as AvgKD
    from fastdistill.objectives.team import SampledTeacher as SampledTeacher
    from fastdistill.objectives.tinybert import TinyBERT as TinyBERT
    from fastdistill.ops.accumulate_sensitivity import accumulate_sensitivity_ as accumulate_sensitivity_
    from fastdistill.ops.dkd_loss import dkd_loss as dkd_loss
    from fastdistill.ops.doctor import doctor as doctor
    from fastdistill.ops.dropout_add_layer_norm import dropout_add_layer_norm as dropout_add_layer_norm
    from fastdistill.ops.gated_attention import gated_attention as gated_attention
    from fastdistill.ops.gated_ffn import gated_ffn as gated_ffn
    from fastdistill.ops.kd_ce_loss import kd_ce_loss as kd_ce_loss
    from fastdistill.ops.proximity_conv import proximity_conv as proximity_conv
    from fastdistill.ops.select_uncertain import select_uncertain as select_uncertain
    from fastdistill.ops.uncertainty import hidden_entropy as hidden_entropy
    from fastdistill.ops.uncertainty import uncertainty as uncertainty
    from fastdistill.sensitivity.units import score as score
    from fastdistill.sensitivity.weights import mask_weights as mask_weights
    from fastdistill.sensitivity.weights import score_weights as score_weights
    from fastdistill.teachers.outputs import TeacherOutputs as TeacherOutputs
    from fastdistill.teachers.store import store as store
    from fastdistill.teachers.team import TeacherTeam as TeacherTeam
    from fastdistill.training.config import DistillationConfig as DistillationConfig
    from fastdistill.training.each_epoch import SelectEachEpoch as SelectEachEpoch
    from fastdistill.training.meta import MetaTrainer as MetaTrainer
    from fastdistill.training.seq2seq import Seq2SeqDistillationConfig as Seq2SeqDistillationConfig
    from fastdistill.training.seq2seq import Seq2SeqDistillationTrainer as Seq2SeqDistillationTrainer
    from fastdistill.training.trainer import DistillationTrainer as DistillationTrainer

__version__ = "0.1.0"

# Imported when first used: they bring PyTorch, transformers and datasets with them.
_LAZY = {
    "Architecture": "models.architectures",
    "AvgKD": "objectives.team",
    "CKD": "objectives.ckd",
    "DKD": "objectives.dkd",
    "DeKD": "objectives.dekd",
    "DistilBERT": "objectives.distilbert",
    "DistillationConfig": "training.config",
    "DistillationTrainer": "training.trainer",
    "LogitsKD": "objectives.logits",
    "MSE": "objectives.logits",
    "MTBERT": "objectives.team",
    "MetaKD": "objectives.metakd",
    "MetaTrainer": "training.meta",
    "MultiLabelKD": "objectives.logits",
    "Needs": "objectives.base",
    "Objective": "objectives.base",
    "PKD": "objectives.pkd",
    "SampledTeacher": "objectives.team",
    "Scores": "models.scores",
    "SelectEachEpoch": "training.each_epoch",
    "Seq2SeqDistillationConfig": "training.seq2seq",
    "Seq2SeqDistillationTrainer": "training.seq2seq",
    "TaskLoss": "objectives.logits",
    "TeacherOutputs": "teachers.outputs",
    "TeacherTeam": "teachers.team",
    "TinyBERT": "objectives.tinybert",
    "WeightedSum": "objectives.base",
    "accumulate_sensitivity_": "ops.accumulate_sensitivity",
    "compact_vocabulary": "models.vocabulary",
    "cpu_kernels": "models.cpu_kernels",
    "dkd_loss": "ops.dkd_loss",
    "doctor": "ops.doctor",
    "dropout_add_layer_norm": "ops.dropout_add_layer_norm",
    "export": "models.export",
    "first_layers": "models.students",
    "first_token_only": "models.first_token",
    "from_pretrained": "models.loading",
    "gate": "models.gates",
    "gated_attention": "ops.gated_attention",
    "gated_ffn": "ops.gated_ffn",
    "hidden_entropy": "ops.uncertainty",
    "kd_ce_loss": "ops.kd_ce_loss",
    "load_task": "data.load",
    "mask_weights": "sensitivity.weights",
    "parameter_pruned": "models.students",
    "proximity_conv": "ops.proximity_conv",
    "prune": "models.pruning",
    "register_architecture": "models.registering",
    "score": "sensitivity.units",
    "score_weights": "sensitivity.weights",
    "select_uncertain": "ops.select_uncertain",
    "shared_tokens": "models.tokenizers",
    "shuffled_sharing": "models.students",
    "store": "teachers.store",
    "tokenize": "data.load",
    "uncertainty": "ops.uncertainty",
}
__all__ = ["__version__", "ops", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fastdistill.ops")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"fastdistill.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
