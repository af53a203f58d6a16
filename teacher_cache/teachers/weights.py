"""Loading of a checkpoint's weights into a model, with a check that they are complete."""

from torch import Tensor, nn

from ray_distill.teacher_cache.teachers.teacher import TeacherError


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a complete state dict into a model, in float32.

    Raises:
        TeacherError: If weights are missing, unexpected or of another shape. The message names some of them.
    """
    expected = model.state_dict()
    problems = {
        "lacks weights that its configuration needs": sorted(expected.keys() - weights.keys()),
        "has weights that its configuration doesn't know": sorted(weights.keys() - expected.keys()),
        "has weights whose shapes don't fit its configuration": sorted(
            key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
        ),
    }
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise TeacherError(f"{source} {problem}: {', '.join(keys[:3])}{more}")
    model.load_state_dict(weights)


def checked_mask_embedding(mask_embedding: Tensor | None, dim: int, source: str) -> Tensor | None:
    """Return the mask embedding unchanged.

    Raises:
        TeacherError: If it is not None and not of shape (dim,).
    """
    if mask_embedding is not None and mask_embedding.shape != (dim,):
        raise TeacherError(f"{source} has a mask embedding of shape {tuple(mask_embedding.shape)}, not ({dim},)")
    return mask_embedding
