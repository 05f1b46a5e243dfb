# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of texts and squared error of velocities, weighted and averaged over a batch.

Source: original behaviour, points 31 and 34.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
        labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): See [`next_labels`].
        layout (`SequenceLayout`): Of the batch.
        reduction (`str`): See [`target_weights`].
        shift_labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Instead of what follows from `labels`.

    Returns:
        Where the predictions stand in the flattened batch, what they are to be, and their weights, each `(targets,)`.
    """
    if shift_labels is None:
        assert labels is not None
        labels = labels.masked_fill(layout.token_types != TEXT_TOKEN, IGNORED_LABEL)
        shift_labels = next_labels(labels, layout.document_ids)
    is_target = shift_labels != IGNORED_LABEL
    samples = _samples(layout.token_types, layout.document_ids)[is_target]
    return is_target.flatten().nonzero().squeeze(-1), shift_labels[is_target], target_weights(samples, reduction)


def latent_weights(layout: SequenceLayout, reduction: str) -> torch.Tensor:
    """Weight of each latent token in the loss of the velocity, `(latent_tokens,)` on the CPU; 0 for conditions."""
    is_latent = layout.token_types == LATENT_TOKEN
    weights = torch.zeros(int(is_latent.sum()))
    if layout.noised is not None:
        noised = layout.noised[is_latent]
        samples = _samples(layout.token_types, layout.document_ids)[is_latent]
        weights[noised] = target_weights(samples[noised], reduction)
    return weights


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the cross-entropies. `(targets, vocab)`, `(targets,)`, `(targets,)` -> `()`, float32."""
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum()


def flow_matching_sum(
    velocity: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the mean squared errors of the velocities, whose target is `noise - clean`.

    `(latent_tokens, latent_dim)` three times, `(latent_tokens,)` -> `()`, float32.
    """
    target = (noise - clean).float().to(velocity.device)
    squared = (velocity.float() - target).square().mean(-1)
    return (squared * weights.to(squared.device)).sum()


@dataclass
class LossSettings:
    """How the losses of a batch are added up.

    Attributes:
        ce_weight, mse_weight (`float`): Weights of the two losses.
        reduction (`str`): See [`target_weights`].
        totals (`torch.FloatTensor` of shape `(2,)`, *optional*):
            What the sums are divided by, see [`loss_totals`]; by default the totals of the batch.
    """

    ce_weight: float
    mse_weight: float
    reduction: str
    totals: torch.Tensor | None = None

    def mean(
        self,
        text: tuple[torch.Tensor, torch.Tensor] | None,
        latent: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Losses:
        """The losses, from a weighted sum and a sum of weights of each kind that has targets."""
        means: list[torch.Tensor | None] = []
        weighted = []
        for index, (part, weight) in enumerate(((text, self.ce_weight), (latent, self.mse_weight))):
            if part is None:
                means.append(None)
                continue
            total = part[1] if self.totals is None else self.totals[index]
            # Without a target the sum is zero, and has a graph.
            total = torch.where(total > 0, total, 1)
            means.append(part[0] / total.to(part[0].device))
            weighted.append(weight * means[-1])
        return Losses(torch.stack([loss.to(weighted[0].device) for loss in weighted]).sum(), means[0], means[1])


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
    return cross_entropy_sum(logits, ids, device_weights), weights.sum()


def latent_loss(
    velocity: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the squared errors of the velocities, and sum of the weights, see [`flow_matching_sum`]."""
    return flow_matching_sum(velocity, clean, noise, weights), weights.sum()


def loss_totals(batch: Mapping[str, torch.Tensor], loss_reduction: str = "token") -> torch.Tensor:
    """Sums of the weights of the targets of a batch: texts, latents.

    Added up over micro-batches and passed as `loss_totals`, they give a step of many micro-batches the loss of one large
    batch. Add them up over the ranks too, and multiply the loss by the number of ranks, since data parallel takes the
    mean of their gradients.

    Args:
        batch (`Mapping[str, torch.Tensor]`): Output of [`BagelDataCollator`].
        loss_reduction (`str`): That of the model's configuration.

    Returns:
        `torch.FloatTensor` of shape `(2,)`.
    """
    layout = batch.get("layout")
    if layout is None:
        layout = SequenceLayout.from_inputs(
            batch["mm_token_type_ids"],
            latent_grid_hw=batch.get("latent_grid_hw"),
            timesteps=batch.get("timesteps"),
            document_ids=batch.get("document_ids"),
        )
    _, _, texts = text_targets(batch["labels"].cpu(), layout, loss_reduction)
    totals = torch.stack([texts.sum(), latent_weights(layout, loss_reduction).sum()])
    return totals.to(batch["labels"].device)


def _samples(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Sample of each token, `(batch, tokens)`: by default its place in the batch."""
    if document_ids is not None:
        return document_runs(document_ids)
    return torch.arange(len(tokens)).unsqueeze(-1).expand_as(tokens)
