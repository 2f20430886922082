"""Differentiable functions for any training loop."""

from fastdistill.ops.kd_ce_loss import kd_ce_loss

__all__ = ["kd_ce_loss"]
