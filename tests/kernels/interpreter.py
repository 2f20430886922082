"""Triton's interpreter, which stands for a GPU: where it can run, and how it runs in half the time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import triton
from triton import language
from triton.runtime import interpreter

from tests.kernels.conftest import DEVICE

OLD_INTERPRETER = DEVICE == "cpu" and triton.__version__ < "3.7"
interpreted = pytest.mark.skipif(
    OLD_INTERPRETER and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton does not run with this NumPy",
)

if DEVICE == "cpu":
    # It replaces all of `triton.language` at a launch and again at each call of a function in the kernel, which took
    # most of its time. So the launch alone does, and for all functions.
    patch = interpreter._patch_lang
    seen = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    interpreter._patch_lang = lambda function: patch(seen)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
