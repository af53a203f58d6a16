"""The device that a command computes on."""

import torch


def check_device(device: str) -> None:
    """Check that PyTorch can use a device on this machine.

    Raises:
        ValueError: it can't; the message names the device and PyTorch's reason.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--device {device} can't be used on this machine ({reason})") from error
