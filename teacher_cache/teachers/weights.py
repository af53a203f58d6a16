"""Loading of a checkpoint's weights into a model, with a check that they are complete and finite."""

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ray_distill.teacher_cache.shapes_only import shapes_only
from ray_distill.teacher_cache.teachers.teacher import TeacherError

Model = TypeVar("Model", bound=nn.Module)

# Parts that torch.compile, FSDP and checkpointing of activations put into the names of a model's weights, anywhere.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def without_wrappers(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return weights under the names of the plain model, without what wrappers add to them.

    These are the ``module.`` of DataParallel and DistributedDataParallel, at the beginning of all names, and the parts that
    torch.compile, FSDP and checkpointing of activations insert.

    Args:
        weights: The weights by name.
        source: Name of the checkpoint, for messages.

    Raises:
        TeacherError: Two weights have one name then.
    """
    names = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in weights]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    plain = dict(zip(names, weights.values(), strict=True))
    if len(plain) < len(weights):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        _refuse("has weights twice, in a wrapper such as torch.compile's and outside of it", twice, source)
    return plain


def load_model(build: Callable[[], Model], weights: dict[str, Tensor], modules: int, source: str) -> Model:
    """Build a model and load a complete state dict into it, in float32.

    The model is first built on the meta device, without memory, and compared with the weights. So a configuration with absurd
    sizes is refused before anything is allocated. The global random state does not change.

    Args:
        build: Function that builds the model with untrained weights on the default device.
        weights: The weights by name.
        modules: Number of layers and convolutions in the configuration; each has weights of its own.
        source: Name of the checkpoint, for messages.

    Raises:
        TeacherError: If weights are missing, unexpected, of another shape or not finite. The message names some of them.
    """
    if modules > len(weights):
        raise TeacherError(
            f"{source} has {modules:,} layers and convolutions in its configuration, but only {len(weights):,} weights"
        )
    with torch.random.fork_rng(devices=[]):
        with shapes_only():
            try:
                empty = build()
            except (RuntimeError, OverflowError) as error:
                raise TeacherError(f"{source} has a configuration from which no model can be built: {error}") from error
        _check_shapes(empty, weights, source)
        model = build()
    load_weights(model, weights, source)
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a complete state dict into a model, in float32.

    Raises:
        TeacherError: If weights are missing, unexpected, of another shape or not finite. The message names some of them.
    """
    _check_shapes(model, weights, source)
    if not any(parameter.is_meta for parameter in model.parameters()):
        _refuse("has weights that are not finite", [key for key in weights if not _is_finite(weights[key])], source)
    model.load_state_dict(weights)


def checked_mask_embedding(mask_embedding: Tensor | None, dim: int, source: str) -> Tensor | None:
    """Return the mask embedding unchanged.

    Raises:
        TeacherError: If it is not None and not finite or not of shape (dim,).
    """
    if mask_embedding is not None and mask_embedding.shape != (dim,):
        raise TeacherError(f"{source} has a mask embedding of shape {tuple(mask_embedding.shape)}, not ({dim},)")
    if mask_embedding is not None and not _is_finite(mask_embedding):
        raise TeacherError(f"{source} has a mask embedding that is not finite; restore the checkpoint from a copy")
    return mask_embedding


def _check_shapes(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    unknown = sorted(weights.keys() - expected.keys())
    others = f"; it has others instead, such as {unknown[0]}" if unknown else ""
    _refuse("lacks weights that its configuration needs", sorted(expected.keys() - weights.keys()), source, others)
    _refuse("has weights that its configuration doesn't know", unknown, source)
    wrong = sorted(key for key in expected if expected[key].shape != weights[key].shape)
    _refuse("has weights whose shapes don't fit its configuration", wrong, source)
    # Their scales are elsewhere, so as numbers they mean nothing.
    quantised = sorted(key for key in expected if expected[key].is_floating_point() and not _is_number(weights[key]))
    _refuse(
        "has quantised weights, not floating-point numbers of at least 16 bits",
        quantised,
        source,
        "; use the original model",
    )


def _is_number(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() > 1


def _refuse(problem: str, keys: list[str], source: str, advice: str = "") -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise TeacherError(f"{source} {problem}: {', '.join(keys[:3])}{more}{advice}")


def _is_finite(weight: Tensor) -> bool:
    # In float32, as the model has it, where a large float64 is infinite.
    return weight.is_meta or bool(weight.float().isfinite().all())
