# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of texts and squared error of velocities, weighted and averaged over a batch.

Source: original behaviour, points 31 and 34.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..segments import IGNORED_LABEL, LATENT_TOKEN, TEXT_TOKEN
from ..sequence import SequenceLayout, document_runs


# A target weighs n ** -exponent, if its sample has n targets of its kind.
LOSS_REDUCTIONS = {"token": 0.0, "square_root": 0.5, "sample": 1.0}


@dataclass
class Losses:
    """Losses of a batch, each `()` in float32; `None` without targets of its kind.

    Attributes:
        loss: The two others, weighted and added.
        ce_loss: Cross-entropy of the texts.
        mse_loss: Squared error of the velocities.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mse_loss: torch.Tensor | None = None


def next_labels(labels: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
    """What each token is to predict: the label of the token after it, -100 at the end of a sample.

    `(batch, tokens)` -> `(batch, tokens)`.
    """
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if document_ids is None:
        return following
    ends = torch.ones_like(document_ids, dtype=torch.bool)
    ends[:, :-1] = document_ids[:, 1:] != document_ids[:, :-1]
    return following.masked_fill(ends, IGNORED_LABEL)


def target_weights(samples: torch.Tensor, reduction: str) -> torch.Tensor:
    """Weight of each target, from the number of targets that its sample has.

    Args:
        samples (`torch.LongTensor` of shape `(targets,)`): Sample of each target.
        reduction (`str`): `"token"`, `"square_root"` or `"sample"`: every token, the square root of a sample's number
            of tokens, or every sample counts alike.

    Returns:
        `torch.FloatTensor` of shape `(targets,)`.
    """
    _, inverse, counts = samples.unique(return_inverse=True, return_counts=True)
    return counts.float()[inverse] ** -LOSS_REDUCTIONS[reduction]


def text_targets(
    labels: torch.Tensor | None, layout: SequenceLayout, reduction: str, shift_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What is to be predicted, on the CPU. Placeholders of images never are targets.

    Args:
        labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            See [`next_labels`]; read back from their device if the layout has none.
        layout (`SequenceLayout`): Of the batch.
        reduction (`str`): See [`target_weights`].
        shift_labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            What each token is to predict, instead of what follows from `labels`.

    Returns:
        Where the predictions stand in the flattened batch, what they are to be, and their weights, each `(targets,)`.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = next_labels(labels.cpu() if layout.labels is None else layout.labels, layout.document_ids)
    shift_labels = shift_labels.cpu()
    is_text = nn.functional.pad(layout.token_types[:, 1:] == TEXT_TOKEN, (0, 1), value=True)
    is_target = is_text & (shift_labels != IGNORED_LABEL)
    samples = _samples(layout)[is_target]
    return is_target.flatten().nonzero().squeeze(-1), shift_labels[is_target], target_weights(samples, reduction)


def latent_weights(layout: SequenceLayout, reduction: str) -> torch.Tensor:
    """Weight of each latent token in the loss of the velocity, `(latent_tokens,)` on the CPU; 0 for conditions."""
    is_latent = layout.token_types == LATENT_TOKEN
    weights = torch.zeros(int(is_latent.sum()))
    if layout.noised is not None:
        noised = layout.noised[is_latent]
        samples = _samples(layout)[is_latent]
        weights[noised] = target_weights(samples[noised], reduction)
    return weights


def text_loss(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the cross-entropies, and sum of the weights; scores are made for the targets only.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): Output of the language model.
        head (`Callable`): Scores of hidden states, `(targets, hidden)` -> `(targets, vocab)`.
        targets (`tuple`): See [`text_targets`].
    """
    places, ids, weights = targets
    logits = head(hidden_states.flatten(0, 1)[places.to(hidden_states.device, non_blocking=True)])
    ids, device_weights = (values.to(logits.device, non_blocking=True) for values in (ids, weights))
    losses = nn.functional.cross_entropy(logits.float(), ids, reduction="none")
    return (losses * device_weights).sum(), weights.sum()


def latent_loss(
    velocity: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the mean squared errors of the velocities, whose target is `noise - clean`, and of the weights.

    `(latent_tokens, latent_dim)` three times, `(latent_tokens,)` -> `()` twice, float32.
    """
    target = (noise - clean).float().to(velocity.device)
    squared = (velocity.float() - target).square().mean(-1)
    return (squared * weights.to(squared.device)).sum(), weights.sum()


def mean_losses(
    config: Any,
    text: tuple[torch.Tensor, torch.Tensor] | None,
    latent: tuple[torch.Tensor, torch.Tensor] | None,
    totals: Any = None,
    num_items_in_batch: Any = None,
) -> Losses:
    """
    The losses of a batch.

    Args:
        config (`BagelConfig`): Has their weights.
        text, latent (`tuple[torch.Tensor, torch.Tensor]`, *optional*): See [`text_loss`] and [`latent_loss`].
        totals (`torch.Tensor` of shape `(2,)`, *optional*): What the sums are divided by, see [`loss_totals`].
        num_items_in_batch (`int`, `float` or `torch.Tensor`, *optional*):
            The same by `Trainer`'s name; a single number is for the texts alone. By default each sum is divided by the
            sum of its weights.

    Raises:
        ValueError: for any other number of numbers.
    """
    means: dict[str, torch.Tensor] = {}
    divisors = _divisors(totals, num_items_in_batch)
    for name, part, divisor in (("ce", text, divisors[0]), ("mse", latent, divisors[1])):
        if part is not None:
            divisor = part[1] if divisor is None else divisor
            # Without a target the sum is zero, and has a graph.
            means[name] = part[0] / torch.where(divisor > 0, divisor, 1).to(part[0].device)
    weighted = [getattr(config, f"{name}_weight") * mean for name, mean in means.items()]
    loss = torch.stack([mean.to(weighted[0].device) for mean in weighted]).sum()
    return Losses(loss, means.get("ce"), means.get("mse"))


def _divisors(totals: Any, num_items_in_batch: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    name, given = ("loss_totals", totals) if totals is not None else ("num_items_in_batch", num_items_in_batch)
    if given is None:
        return None, None
    given = torch.as_tensor(given)
    if given.shape == (2,):
        return given[0], given[1]
    if given.numel() != 1 or totals is not None:
        raise ValueError(f"`{name}` must hold a total of texts and one of latents, got shape {tuple(given.shape)}.")
    return given.flatten()[0], None


def loss_totals(batch: Mapping[str, Any], loss_reduction: str = "token") -> torch.Tensor:
    """Sums of the weights of the targets of a batch: texts, latents.

    Added up over micro-batches and passed as `loss_totals`, they give a step of many micro-batches the loss of one large
    batch. With data parallel add them up over the ranks too, and scale each rank's loss by the number of ranks, so that
    the mean of the gradients equals the gradient of the global loss.

    Args:
        batch (`Mapping[str, Any]`): Output of [`BagelDataCollator`].
        loss_reduction (`str`): That of the model's configuration.

    Returns:
        `torch.FloatTensor` of shape `(2,)`, on the device of the batch.
    """
    labels, shift_labels, layout = (batch.get(name) for name in ("labels", "shift_labels", "layout"))
    device = batch["labels" if shift_labels is None else "shift_labels"].device
    if layout is None:
        layout = SequenceLayout.from_inputs(
            batch["mm_token_type_ids"],
            latent_grid_hw=batch.get("latent_grid_hw"),
            timesteps=batch.get("timesteps"),
            document_ids=batch.get("document_ids"),
        )
    _, _, texts = text_targets(labels, layout, loss_reduction, shift_labels)
    return torch.stack([texts.sum(), latent_weights(layout, loss_reduction).sum()]).to(device)


def _samples(layout: SequenceLayout) -> torch.Tensor:
    """Sample of each token, `(batch, tokens)`: by default its place in the batch."""
    if layout.document_ids is not None:
        return document_runs(layout.document_ids)
    return torch.arange(len(layout.token_types)).unsqueeze(-1).expand_as(layout.token_types)
