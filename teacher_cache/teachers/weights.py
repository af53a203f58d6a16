"""Weights of a checkpoint into a model, complete or refused."""

from torch import Tensor, nn

from ray_distill.teacher_cache.teachers.teacher import TeacherError


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads a complete state dict into the model, in float32.

    Raises:
        TeacherError: weights are missing, left over or of another shape; the message names some of them.
    """
    expected = model.state_dict()
    problems = {
        "lacks weights that its configuration needs": sorted(expected.keys() - weights.keys()),
        "has weights that its configuration doesn't know": sorted(weights.keys() - expected.keys()),
        "has weights of other shapes than its configuration says": sorted(
            key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
        ),
    }
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise TeacherError(f"{source} {problem}: {', '.join(keys[:3])}{more}")
    model.load_state_dict(weights)


def checked_mask_embedding(mask_embedding: Tensor | None, dim: int, source: str) -> Tensor | None:
    """The mask embedding, if it has the encoder's width.

    Raises:
        TeacherError: it is there and not of shape (dim,).
    """
    if mask_embedding is not None and mask_embedding.shape != (dim,):
        raise TeacherError(f"{source} has a mask embedding of shape {tuple(mask_embedding.shape)}, not ({dim},)")
    return mask_embedding
