"""Where Triton's interpreter, which stands for a GPU, can run."""

from __future__ import annotations

import numpy
import pytest
import triton

from tests.kernels.conftest import DEVICE

OLD_INTERPRETER = DEVICE == "cpu" and triton.__version__ < "3.7"
interpreted = pytest.mark.skipif(
    OLD_INTERPRETER and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton does not run with this NumPy",
)
