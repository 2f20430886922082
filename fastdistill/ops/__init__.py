"""Differentiable functions for any training loop."""

from fastdistill.ops.accumulate_sensitivity import accumulate_sensitivity_
from fastdistill.ops.active_neurons import ActiveNeurons
from fastdistill.ops.dkd_loss import dkd_loss
from fastdistill.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastdistill.ops.gated_attention import gated_attention
from fastdistill.ops.gated_ffn import gated_ffn
from fastdistill.ops.kd_ce_loss import kd_ce_loss
from fastdistill.ops.proximity_conv import proximity_conv
from fastdistill.ops.select_uncertain import select_uncertain
from fastdistill.ops.uncertainty import hidden_entropy, uncertainty

__all__ = [
    "ActiveNeurons",
    "accumulate_sensitivity_",
    "dkd_loss",
    "dropout_add_layer_norm",
    "gated_attention",
    "gated_ffn",
    "hidden_entropy",
    "kd_ce_loss",
    "proximity_conv",
    "select_uncertain",
    "uncertainty",
]
