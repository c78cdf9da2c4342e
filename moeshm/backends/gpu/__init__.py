"""Experts on a GPU: `backend` for calls, `choice` for what is tuned, `cupy_device` for the GPU."""
