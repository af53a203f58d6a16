"""Run the student for the service: one inference at a time, off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from student import Student
from teacher_cache.frames import RECEPTIVE_FIELD

Array = npt.NDArray[np.float32]


class FeatureEngine:
    """A student in evaluation mode and the one thread that runs it.

    Example:
        >>> engine = FeatureEngine(load_student("runs/demo/export"))
        >>> features = await engine.features(waveform)  # (L, T, d)

    Args:
        student: the model; moved to the device and put into evaluation mode.
        device: where it runs, such as ``cpu`` or ``cuda:0``.

    Raises:
        ValueError: there is no such device.
    """

    def __init__(self, student: Student, device: str | torch.device = "cpu") -> None:
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            # PyTorch's own messages run over many lines; builds without CUDA raise AssertionError.
            raise ValueError(f"Can't use device '{device}': PyTorch finds no such device on this machine.") from error
        self._student = student.to(self.device).eval()
        self.num_parameters = sum(parameter.numel() for parameter in self._student.parameters())
        # One frame of silence: warms the model up and shows its shape.
        layers, _, dim = self._infer(np.zeros(RECEPTIVE_FIELD, np.float32), None).shape
        self.num_layers: int = layers
        self.dim: int = dim
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")

    async def features(self, waveform: Array, layer: int | None = None) -> Array:
        """The student's encoder hidden states for one utterance; they depend on nothing else.

        A caller that is cancelled while it waits for its turn is dropped without inference.

        Args:
            waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
            layer: 1-based Transformer layer, or None for all.

        Returns:
            (T, d) float32, or (L, T, d) for all layers; T counts real frames only.
        """
        assert layer is None or 1 <= layer <= self.num_layers
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._infer, waveform, layer)

    def close(self) -> None:
        """Finish what is queued and stop the thread."""
        self._thread.shutdown()

    @torch.inference_mode()
    def _infer(self, waveform: Array, layer: int | None) -> Array:
        waveforms = torch.from_numpy(waveform)[None].to(self.device)
        lengths = torch.tensor([len(waveform)], device=self.device)
        hidden_states, num_frames = self._student.encode(waveforms, lengths)
        real = hidden_states[0, :, : int(num_frames[0])]
        chosen = real if layer is None else real[layer - 1]
        # A copy, so that an answer being sent doesn't keep the other layers alive.
        features: Array = chosen.float().cpu().numpy().copy()
        return features
