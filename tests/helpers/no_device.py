"""For tests that compile kernels for a device that is not there."""

import subprocess
import sys

import pytest
import torch

from flr_kernels.backends import triton_config

#: Marks of a test file that compiles kernels for no device.
NEEDS_NO_DEVICE = [
    pytest.mark.skipif(triton_config.interpreted(), reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels compiled for no device must not meet one"),
    pytest.mark.skipif(
        subprocess.run([sys.executable, "-c", "import triton"], capture_output=True).returncode != 0,
        reason="triton is not installed",
    ),
]
