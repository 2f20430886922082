"""Every op in plain PyTorch: the definition, the tests' oracle, and what runs where no kernel does.

Each function has its op's schema. Gradients are written out, so that a test of them against autograd is a test of the
formulas that the kernels share.
"""

from fastdistill.ops.reference.accumulate_sensitivity import accumulate_sensitivity_
from fastdistill.ops.reference.bias_act_gate import bias_act_gate, bias_act_gate_backward
from fastdistill.ops.reference.dropout_add_layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_backward
from fastdistill.ops.reference.dtypes import accumulation_dtype, promoted_dtype
from fastdistill.ops.reference.gated_attention import dropout_factors, gated_attention, gated_attention_backward
from fastdistill.ops.reference.losses import dkd_loss, kd_ce_loss
from fastdistill.ops.reference.proximity_conv import proximity_conv, proximity_conv_backward
from fastdistill.ops.reference.scale_rows import scale_rows, scale_rows_
from fastdistill.ops.reference.uncertainty import rank, uncertainty, uncertainty_backward

__all__ = [
    "accumulate_sensitivity_",
    "accumulation_dtype",
    "bias_act_gate",
    "bias_act_gate_backward",
    "dkd_loss",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_backward",
    "dropout_factors",
    "gated_attention",
    "gated_attention_backward",
    "kd_ce_loss",
    "promoted_dtype",
    "proximity_conv",
    "proximity_conv_backward",
    "rank",
    "scale_rows",
    "scale_rows_",
    "uncertainty",
    "uncertainty_backward",
]
