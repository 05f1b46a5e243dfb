# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of texts and squared error of velocities, weighted and averaged over all ranks.

Source: published behaviour, points 31 and 34.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..sequence import LATENT_TOKEN, document_runs


# A target weighs n ** -exponent, if its sample has n targets of its kind.
LOSS_REDUCTIONS = {"token": 0.0, "square_root": 0.5, "sample": 1.0}

IGNORED_LABEL = -100


def next_labels(labels: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
    """What each token is to predict: the label of the token after it, -100 at the end of a row or sample.

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
    labels: torch.Tensor, document_ids: torch.Tensor | None, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        labels, document_ids (`torch.LongTensor` of shape `(batch, tokens)`)
        reduction (`str`): See [`target_weights`].

    Returns:
        What each token is to predict, `(batch, tokens)`, -100 if nothing; and the weight of each target `(targets,)`.
    """
    following = next_labels(labels, document_ids)
    return following, target_weights(_samples(labels, document_ids)[following != IGNORED_LABEL], reduction)


def latent_weights(
    token_types: torch.Tensor,
    document_ids: torch.Tensor | None,
    timesteps: torch.Tensor,
    latent_grid_hw: torch.Tensor,
    reduction: str,
) -> torch.Tensor:
    """Weight of each latent token in the loss of the velocity, `(latent_tokens,)`; 0 for conditions (timestep 0)."""
    lengths = latent_grid_hw.prod(-1).to(token_types.device)
    noised = (timesteps > 0).to(token_types.device).repeat_interleave(lengths)
    samples = _samples(token_types, document_ids)[token_types == LATENT_TOKEN]
    weights = torch.zeros(noised.shape, device=token_types.device)
    return weights.masked_scatter(noised, target_weights(samples[noised], reduction))


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
    squared = (velocity.float() - (noise - clean).float()).square().mean(-1)
    return (squared * weights.to(squared.device)).sum()


def over_ranks(totals: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum totals over all ranks.

    Returns:
        The sums, and the factor for the loss of a rank that makes the mean over the ranks, which data parallel takes of
        the gradients, the loss of the global batch.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return totals, 1
    totals = totals.clone()
    torch.distributed.all_reduce(totals)
    return totals, torch.distributed.get_world_size()


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
    documents = batch.get("document_ids")
    _, texts = text_targets(batch["labels"], documents, loss_reduction)
    total = torch.stack([texts.sum(), torch.zeros_like(texts.sum())])
    if "latents" in batch:
        weights = latent_weights(
            batch["mm_token_type_ids"], documents, batch["timesteps"], batch["latent_grid_hw"], loss_reduction
        )
        total[1] = weights.sum()
    return total


def _samples(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Sample of each token, `(batch, tokens)`: by default its row."""
    if document_ids is not None:
        return document_runs(document_ids)
    return torch.arange(len(tokens), device=tokens.device).unsqueeze(-1).expand_as(tokens)
