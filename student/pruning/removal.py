"""Removal of what hard gates have closed: a smaller student that computes the same."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_distill.student.checkpoints import save_student
from ray_distill.student.model.student import Student
from ray_distill.student.pruning.gates import Gates


@torch.no_grad()
def prune(student: Student, gates: Gates) -> Student:
    """Return the student without what the hard gates of the step close. The values of open gates become part of the weights.

    Args:
        student: Student with its weights, which are not changed.
        gates: Its gates.

    Returns:
        A student on the same device, whose outputs are those of ``student`` with the hard gates.
    """
    training = gates.training
    gates.eval()
    gates.set_gates(student)
    gates.train(training)
    config, state = student.config, {name: tensor.clone() for name, tensor in student.state_dict().items()}
    conv_layers = [list(layer) for layer in config.conv_layers]
    for number, block in enumerate(student.conv_blocks):
        gate: Any = block.input_gate
        if gate is None:
            continue
        (kept,) = gate.nonzero(as_tuple=True)
        conv_layers[number - 1][0] = len(kept)
        name = f"conv_blocks.{number}.conv.weight"
        state[name] = (state[name] * gate[:, None])[:, kept]
        before = f"conv_blocks.{number - 1}."
        state |= {key: tensor[kept] for key, tensor in state.items() if key.startswith(before)}
    heads, units = list(config.heads_of_layers), list(config.ffn_dims_of_layers)
    for number, layer in enumerate(student.layers):
        parts: Any = layer
        if parts.attention is not None and (gate := parts.attention.out.input_gate) is not None:
            open_heads = gate.view(heads[number], -1)[:, 0].nonzero()[:, 0]
            heads[number] = len(open_heads)
            prefix = f"layers.{number}.attention."
            _fold(state, prefix + "out", parts.attention.out)
            _keep_heads(state, prefix, open_heads, gate.nonzero()[:, 0])
            if not len(open_heads) and config.layer_norm_first:
                _drop(state, f"layers.{number}.attention_norm.")
        if parts.down is not None and (gate := parts.down.input_gate) is not None:
            (kept,) = gate.nonzero(as_tuple=True)
            units[number] = len(kept)
            prefix = f"layers.{number}."
            _fold(state, prefix + "down", parts.down)
            state[prefix + "down.weight"] = state[prefix + "down.weight"][:, kept]
            state |= {f"{prefix}up.{key}": state[f"{prefix}up.{key}"][kept] for key in ("weight", "bias")}
            if not len(kept):
                _drop(
                    state,
                    prefix + "down.",
                    prefix + "up.",
                    *([prefix + "final_norm."] if config.layer_norm_first else []),
                )
    changes = {
        "conv_layers": tuple(map(tuple, conv_layers)),
        "layer_heads": tuple(heads),
        "layer_ffn_dims": tuple(units),
    }
    if any(config.reuses):
        del changes["layer_heads"]  # Gates of heads are refused then, so all layers have all.
    with torch.random.fork_rng(devices=[]):
        smaller = Student(type(config).model_validate(config.model_dump() | changes))
    smaller.load_state_dict(state)
    return smaller.to(gates.log_alpha.device).train(student.training)


def save_pruned(student: Student, gates: Gates, folder: Path) -> None:
    """Save the student that is left at the end of a pruning, with its sparsity, the one that the gates had reached before the last
    ones were removed, and its number of parameters without heads.

    Args:
        student: Student with its weights.
        gates: Its gates, whose step becomes the last.
        folder: Receives the files of `save_student`.
    """
    gates.step = gates.settings.steps
    pruned = prune(student, gates)
    count = sum(parameter.numel() for parameter in pruned.without_heads().parameters())
    record = {
        "step": gates.step,
        "sparsity": 1 - count / gates.total,
        "expected_sparsity": float(gates.expected_sparsity().detach()),
        "parameters": count,
        "parameters_before": gates.total,
    }
    save_student(pruned, folder, record)


def _fold(state: dict[str, Tensor], name: str, linear: Any) -> None:
    """Multiply the weights of a gated linear layer by its gates."""
    state[f"{name}.weight"] = state[f"{name}.weight"] * linear.input_gate
    state[f"{name}.bias"] = state[f"{name}.bias"] * linear.output_gate


def _keep_heads(state: dict[str, Tensor], prefix: str, heads: Tensor, rows: Tensor) -> None:
    """Keep some heads of an attention: their numbers, and their places in the concatenation of all heads."""
    if not len(heads):
        _drop(state, prefix)
        return
    for name in [name for name in state if name.startswith(prefix)]:
        part = name.removeprefix(prefix)
        if part in ("content_bias", "distance_bias"):
            state[name] = state[name][heads]
        elif part == "out.weight":
            state[name] = state[name][:, rows]
        elif part != "out.bias":
            state[name] = state[name][rows]


def _drop(state: dict[str, Tensor], *prefixes: str) -> None:
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
