"""Runs the kernels of kernels/ on the host, without a GPU: a thread of a block is a fiber.

`compile` makes a `Module` of a source, `Module.launch` runs one of its kernels; the device's memory
is the host's, so that addresses of NumPy arrays go into `Call` and `Route`.
"""

from __future__ import annotations

from .memory import guarded
from .module import KernelError, Module, Order, compile, compile_text

__all__ = ["KernelError", "Module", "Order", "compile", "compile_text", "guarded"]
