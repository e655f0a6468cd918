"""Free choices: rotations of the values inside attention heads, which change nothing but how well weights can be cut.

What a head reads as values reaches its output projection linearly: O (sum of attention weights * (V x + b)). So for
any orthogonal Q inside a head, V -> Q V, b -> Q b and O -> O Q^T leave the model's function as it is. Ours turns each
head to the principal directions of what O does with its input, O_h C_h^1/2, and lays them out so that every second,
fourth, eighth, ... position holds the most important ones: a Kronecker factor of 1 x q on the right then mixes groups
of q neighbours of which one matters.

Measured on the output projections of all-MiniLM-L6-v2 (128 texts, data-aware Kronecker fits, 1 x q on the right against
the better of both sides unrotated; weighted error, mean of 4 layers): q = 2 .307 for .375, 4 .498 for .560, 8 .648 for
.696, 16 .760 for .795. Not kept: permutations of the FFN's units by linear assignment, alternating with the fit. The
first FFN weight of layer 0 goes from .618 to .617 with 2 x 2, from .843 to .806 with 4 x 4, where 1 x 16 has .776
unpermuted, and from .902 to .747 with 8 x 2; but the shape must be known before the budget chooses it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from compresskit.calibration.moments import Calibration, Use, fingerprint_of
from compresskit.errors import PlanError
from compresskit.surgery.sites import Site, find_sites, site_weight

PAIRS: Mapping[str, str] = {
    "attention.self.value": "attention.output.dense",
    "attention.v_lin": "attention.out_lin",
    "attention.value": "attention.dense",
    "v_proj": "o_proj",
    ".v_proj": ".out_proj",
    "SelfAttention.v": "SelfAttention.o",
    "EncDecAttention.v": "EncDecAttention.o",
}
"""Names of value and output projections, from their common parent on: BERT and its kin, DistilBERT, ALBERT, ViT and
LLaMA and its kin, BART, OPT and Whisper, T5."""


def rotate_values_(model: nn.Module, calibration: Calibration) -> tuple[Calibration, tuple[str, ...]]:
    """Rotate the values of all heads, in place, before a compression; the model computes what it computed before.

    Args:
        model: attention of a known layout; where several heads share their values it is left alone.
        calibration: of this model.

    Returns:
        The calibration of the rotated model (no further pass is needed), and the names of the output projections that
        were rotated.

    Raises:
        CalibrationError: the calibration was made for another model.
        PlanError: no attention of a known layout is in the model.
    """
    survey = find_sites(model)
    calibration.check(model, survey)
    pairs = list(_pairs(model, {site.name: site for site in survey.sites}))
    if not pairs:
        raise PlanError(
            f"no value and output projections were found that can be rotated; known are {', '.join(PAIRS)} as linear "
            "layers that nothing else shares, with as many values as heads"
        )
    uses = dict(calibration.uses)
    for value, output, heads in pairs:
        turn = _turn(site_weight(model, output), uses.get(output.name), heads)
        _apply_(model, value.name, output.name, turn)
        if output.name in uses:
            uses[output.name] = _inputs_turned(uses[output.name], turn)
        if value.name in uses:
            uses[value.name] = _gradients_turned(uses[value.name], turn)
    turned = replace(calibration, uses=uses, fingerprint=fingerprint_of(model, survey))
    return turned, tuple(output.name for _, output, _ in pairs)


def _pairs(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[tuple[Site, Site, int]]:
    """Value and output projections that nothing else shares, of as many values as the output reads, and their heads."""
    for name, value in sites.items():
        for ending, other in PAIRS.items():
            output = sites.get(name.removesuffix(ending) + other) if name.endswith(ending) else None
            heads = _heads(model.get_submodule(name.rpartition(".")[0]), value.rows)
            if output is None or heads is None or output.cols != value.rows:
                continue
            if value.kinds == output.kinds == ("linear",):
                yield value, output, heads
                break


def _heads(attention: nn.Module, size: int) -> int | None:
    """Number of heads of the module that holds a value projection; None if it does not say."""
    for name in ("num_attention_heads", "num_heads", "n_heads"):
        heads = getattr(attention, name, None)
        if isinstance(heads, int) and size % heads == 0:
            return heads
    width = getattr(attention, "head_dim", None)
    return size // width if isinstance(width, int) and size % width == 0 else None


def _turn(output: Tensor, use: Use | None, heads: int) -> Tensor:
    """Orthogonal (heads, size, size), float64: rows are new directions in terms of old ones."""
    size = output.shape[1] // heads
    weight = output.double().view(len(output), heads, size).transpose(0, 1)  # (heads, rows, size)
    inputs = None if use is None else use.inputs
    moment = torch.eye(output.shape[1]) if inputs is None else inputs if inputs.dim() == 2 else inputs.diag()
    moment = moment.to(output.device, torch.float64).view(heads, size, heads, size)
    values, vectors = torch.linalg.eigh(torch.stack([moment[h, :, h] for h in range(heads)]))
    root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT
    directions: Tensor = torch.linalg.eigh(root @ (weight.mT @ weight) @ root).eigenvectors.flip(-1).mT
    return directions[:, torch.argsort(torch.tensor(_layout(size), device=output.device))]


def _layout(size: int) -> list[int]:
    """Positions in the order in which directions take them: multiples of the highest power of two first."""
    return sorted(range(size), key=lambda position: (-((position & -position) or size), position))


def _apply_(model: nn.Module, value: str, output: str, turn: Tensor) -> None:
    values, outputs = model.get_submodule(value), model.get_submodule(output)
    assert isinstance(values.weight, Tensor)
    assert isinstance(outputs.weight, Tensor)
    with torch.no_grad():
        values.weight.copy_(_rows_turned(values.weight, turn))
        if isinstance(values.bias, Tensor):
            values.bias.copy_(_rows_turned(values.bias[:, None], turn)[:, 0])
        outputs.weight.copy_(_rows_turned(outputs.weight.T, turn).T)


def _rows_turned(matrix: Tensor, turn: Tensor) -> Tensor:
    """Q @ matrix, head by head, in float64."""
    heads, size, _ = turn.shape
    turned: Tensor = (turn @ matrix.to(turn).reshape(heads, size, -1)).reshape(matrix.shape)
    return turned


def _moment_turned(moment: Tensor | None, turn: Tensor) -> Tensor | None:
    """Q M Q^T; of a diagonal its new diagonal, as far as a diagonal tells."""
    if moment is None:
        return None
    turn = turn.to(moment.device)
    if moment.dim() == 1:
        return (turn.square() @ moment.to(turn).view(len(turn), -1, 1)).reshape(-1).to(moment.dtype)
    turned = _rows_turned(_rows_turned(moment.to(turn), turn).T, turn)
    turned.diagonal().clamp_min_(0)  # what rounding may leave below
    return turned.to(moment.dtype)


def _inputs_turned(use: Use, turn: Tensor) -> Use:
    mean = None if use.mean is None else _rows_turned(use.mean[:, None], turn.to(use.mean.device))[:, 0]
    mean = mean if mean is None or use.mean is None else mean.to(use.mean.dtype)
    return replace(use, inputs=_moment_turned(use.inputs, turn), mean=mean)


def _gradients_turned(use: Use, turn: Tensor) -> Use:
    return replace(use, gradients=_moment_turned(use.gradients, turn))
