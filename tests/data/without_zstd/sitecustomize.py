"""Hides the zstd library from a child that runs with this directory in PYTHONPATH."""

import ctypes
import sys
from typing import Any

sys.modules["compression.zstd"] = None  # type: ignore[assignment]  # its import fails


class Hidden(ctypes.CDLL):
    def __init__(self, name: Any, *args: Any, **kw: Any) -> None:
        if "zstd" in str(name):
            raise OSError(f"{name}: hidden")
        super().__init__(name, *args, **kw)


ctypes.CDLL = Hidden  # type: ignore[misc]  # that is the purpose
