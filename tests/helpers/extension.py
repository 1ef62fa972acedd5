"""The C++ and CUDA extension, where it is built."""

import pytest

from flr_kernels.backends import extension

BUILT = not isinstance(extension._load(), str)
needs_extension = pytest.mark.skipif(not BUILT, reason=f"no extension: {extension._load()}")
