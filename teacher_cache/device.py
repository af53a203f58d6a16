"""The device that a command computes on."""

import torch

from ray_distill.first_line import first_line


def check_device(device: str) -> None:
    """Check that PyTorch can use a device on this machine.

    Raises:
        ValueError: it can't; the message names the device and PyTorch's reason.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA.
        raise ValueError(f"--device {device} can't be used on this machine ({first_line(error)})") from error
