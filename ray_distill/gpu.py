"""What PyTorch is told before it computes on a GPU."""

from typing import Any


def set_up_gpu(device: Any) -> None:
    """Choose for this process how PyTorch computes on a GPU. A CPU needs nothing.

    - cuDNN's attention is not used. PyTorch prefers it for half precision on recent GPUs (2.11 with an
      H100 or H200), but it builds a program for each new shape of a batch, which takes up to a second,
      and nearly every batch of utterances has a new one. It also rounds the rate of dropout to a
      multiple of 1/16, so 0.1 would be another rate.
    - Convolutions in float32 are not rounded to TF32, which has 10 bits, as PyTorch's default does with
      them but not with products. float32 then means the same on a GPU as on a CPU, up to the order of
      summation, and an utterance has the same features in any batch.

    Whoever wants other choices makes them after this, with ``torch.backends``.

    Args:
        device: The device, a `torch.device` or its name.
    """
    import torch  # Slow to import, and `ray_distill` is light.

    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = False
