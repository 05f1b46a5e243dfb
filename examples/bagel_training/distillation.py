# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What an adapter of few steps learns: one step of its own for several guided ones of the model that it stands on.

The student, the model with the adapter, draws from noise. From each place that it comes to, the teacher, the model without it,
goes on with guidance to where the student's next step should end. The velocity between the two is what the student learns
there, which is progressive distillation (Salimans and Ho, https://arxiv.org/abs/2202.00512) in one round, on the places that
the student sees when it draws alone. Guidance is part of the teacher's steps, so the student needs none
(Meng and others, https://arxiv.org/abs/2210.03142).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import BatchFeature

from diffusers_bagel import BagelPipeline
from diffusers_bagel.contexts import BagelContext, ContextReader
from diffusers_bagel.denoising import Denoiser
from diffusers_bagel.guidance import EDITING, TEXT_TO_IMAGE, BagelGuidance
from diffusers_bagel.prompt_contexts import guidance_contexts
from transformers_bagel import BagelDataCollator
from transformers_bagel.segments import EncodedSegment, sample_segments
from transformers_bagel.training.samples import EncodedSample, LatentBlock


# By `attention_kwargs`: what the adapter is multiplied by.
TEACHER = {"scale": 0.0}
STUDENT: dict[str, float] = {}


@dataclass(frozen=True)
class DistilledSample(EncodedSample):
    """A sample that ends in a picture.

    Attributes:
        prompt (`list[EncodedSegment]`): What the picture is drawn from, without latents.
        plan (`list[EncodedSegment]`): The model's own words between the two, of which guidance knows.
    """

    prompt: list[EncodedSegment] = field(default_factory=list)
    plan: list[EncodedSegment] = field(default_factory=list)


@dataclass(frozen=True)
class Distillation:
    """
    How the teacher draws, and how the student is to.

    Args:
        num_steps (`int`): Of the student.
        teacher_steps (`int`): Of the teacher, for each of the student's.
        guidance_scale (`float`): Of the teacher.
        image_guidance_scale (`float`): Of the teacher, where there are images; 1 elsewhere.
    """

    num_steps: int
    teacher_steps: int
    guidance_scale: float
    image_guidance_scale: float

    def sigmas(self, scheduler: Any) -> torch.Tensor:
        """Those of the teacher's steps and the final 0, `(num_steps * teacher_steps + 1,)`; every `teacher_steps`-th is the
        student's."""
        scheduler = copy.deepcopy(scheduler)
        count = self.num_steps * self.teacher_steps
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, count + 1)[:-1].numpy())
        return scheduler.sigmas.float().cpu()

    def places(
        self, student: Denoiser, teacher: Denoiser, latents: torch.Tensor, sigmas: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each step of the student its sigma, the latents before it, and the velocity that it should have there.

        Args:
            student, teacher ([`Denoiser`]): Of the same pictures.
            latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`): The noise.
            sigmas (`torch.Tensor`): See `sigmas`.
        """
        places = []
        for start in range(0, len(sigmas) - 1, self.teacher_steps):
            own = sigmas[start : start + self.teacher_steps + 1]
            x = latents
            for sigma, following in pairwise(own):
                velocity = teacher.velocity(x, sigma, sigma.to(x.device), self.guidance_scale)
                x = x + (following - sigma) * velocity
            first, last = own[0], own[-1]
            places.append((first, latents.cpu(), ((x - latents) / (last - first)).cpu()))
            latents = latents + (last - first) * student.velocity(latents, first, first.to(x.device), 1.0)
        return places

    def guidance(self, segments: Sequence[EncodedSegment]) -> BagelGuidance:
        """The teacher's."""
        has_images = any(segment.grid for segment in segments)
        kind = EDITING if has_images else TEXT_TO_IMAGE
        return kind.with_changes(
            text_scale=self.guidance_scale, image_scale=self.image_guidance_scale if has_images else 1.0
        )


class DistillingCollator(BagelDataCollator):
    """
    Packs samples whose noised copies are the student's steps, and whose targets are the teacher's.

    Args:
        pipe ([`BagelPipeline`]): With the adapter that is trained.
        distillation ([`Distillation`])
        settings: As of [`BagelDataCollator`].
    """

    def __init__(self, pipe: BagelPipeline, distillation: Distillation, **settings: Any):
        super().__init__(
            vae=pipe.vae,
            text_dropout=0.0,
            vit_dropout=0.0,
            vae_dropout=0.0,
            noised_copies=distillation.num_steps,
            next_action="none",
            **settings,
        )
        self.pipe, self.distillation = pipe, distillation

    def for_workers(self) -> BagelDataCollator:
        """As the parent's; the model stays in this process, too."""
        other: Any = super().for_workers()
        other.pipe = None
        return other

    def encode(self, sample: Mapping[str, Any], seed: int) -> DistilledSample:
        """As the parent's, of which only the last picture is learned. No VAE encodes that, since only its size counts."""
        segments = sample_segments(sample, self.next_action)
        is_learned = [segment.loss for segment in segments]
        start = is_learned.index(True)
        if segments[-1].type != "vae_image" or not is_learned[-1] or any(s.type != "text" for s in segments[start:-1]):
            raise ValueError("It must end in an answer that is a picture, or a text and a picture, and have no other.")
        parts = [
            {"type": segment.type, "text" if segment.type == "text" else "image": segment.content, "dropout": False}
            for segment in segments
        ]
        parts[-1]["loss"] = True
        encoded = super().encode({"segments": parts}, seed)
        *before, _ = self.processor.encode_segments(segments)
        return DistilledSample(
            **vars(encoded) | {"latent_images": encoded.latent_images[:-1]}, prompt=before[:start], plan=before[start:]
        )

    def pack(self, samples: Sequence[EncodedSample]) -> BatchFeature:
        """As the parent's, after the student and the teacher have drawn."""
        distilled = [sample for sample in samples if isinstance(sample, DistilledSample)]
        return super().pack(self._drawn(distilled) if distilled else samples)

    @torch.no_grad()
    def _drawn(self, samples: Sequence[DistilledSample]) -> list[EncodedSample]:
        """The samples with the places that the student comes to as noised latents."""
        pipe, distillation = self.pipe, self.distillation
        sigmas = distillation.sigmas(pipe.scheduler)
        was_training = pipe.transformer.training
        pipe.transformer.eval()
        try:
            prompts = [_with_latents(sample) for sample in samples]
            guidance = [distillation.guidance(prompt) for prompt in prompts]
            none = [own.with_changes(text_scale=1.0) for own in guidance]
            plans = [sample.plan for sample in samples]
            targets = [next(block for block in sample.blocks if block.timestep > 0) for sample in samples]
            grids = [block.grid for block in targets]
            noise = torch.nn.utils.rnn.pad_sequence([block.noise for block in targets], batch_first=True)
            places = distillation.places(
                self._denoiser(prompts, plans, grids, none, STUDENT),
                self._denoiser(prompts, plans, grids, guidance, TEACHER),
                noise.to(pipe.device),
                sigmas,
            )
        finally:
            pipe.transformer.train(was_training)
        return [
            _with_targets(sample, [(sigma, x[index], velocity[index]) for sigma, x, velocity in places])
            for index, sample in enumerate(samples)
        ]

    def _denoiser(
        self,
        prompts: Sequence[list[EncodedSegment]],
        plans: Sequence[list[EncodedSegment]],
        grids: Sequence[tuple[int, int]],
        guidance: Sequence[BagelGuidance],
        attention_kwargs: dict[str, float],
    ) -> Denoiser:
        transformer = self.pipe.transformer
        reader = ContextReader(transformer, self.processor, self.pipe.device, attention_kwargs)
        whole = [[*prompt, *plan] for prompt, plan in zip(prompts, plans, strict=True)]
        full = reader.read([BagelContext()] * len(whole), whole)
        contexts = guidance_contexts(reader, prompts, full, guidance)
        return Denoiser(transformer, contexts, grids, guidance, attention_kwargs=attention_kwargs)


def _with_latents(sample: DistilledSample) -> list[EncodedSegment]:
    """What the picture is drawn from, with the latents that the sample is trained with."""
    latents = sample.latents or []
    conditions = iter([latents[block.image] for block in sample.blocks if block.timestep == 0])
    return [
        replace(segment, latents=next(conditions)) if segment.segment.type == "vae_image" else segment
        for segment in sample.prompt
    ]


def _with_targets(
    sample: DistilledSample, places: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> EncodedSample:
    """A sample whose noised latents are `x` at each sigma, and whose velocities there are those given.

    Latents are mixed as `x = (1 - sigma) clean + sigma noise`, and the velocity is `noise - clean`: of both follow the two.
    """
    latents, blocks, steps = list(sample.latents or []), [], iter(places)
    for block in sample.blocks:
        if block.timestep > 0:
            sigma, x, velocity = next(steps)
            count = len(block.noise)
            x, velocity = x[:count], velocity[:count]
            block = LatentBlock(len(latents), block.grid, sigma, x + (1 - sigma) * velocity)
            latents.append(x - sigma * velocity)
        blocks.append(block)
    return replace(sample, latents=latents, blocks=blocks)
