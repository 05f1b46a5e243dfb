# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One velocity for all images of a call: which images and which branches of their guidance share a forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from transformers_bagel import (
    BagelForConditionalGeneration,
    PrefixBuffer,
    PrefixCache,
    PrefixView,
    SplitPrefixCache,
)
from transformers_bagel.image_processing_bagel import unpatchify

from .adapter_scale import AdapterScale
from .caching import TaylorSeerConfig, TaylorSeerSchedule, TaylorSeerState
from .contexts import BagelContext
from .denoising_layers import DenoisingLayers
from .guidance import BagelGuidance, HeldBranches
from .step_caches import Caching, LayerCaching, StepCache, all_or_nothing


# Most latent tokens of a denoising forward of several images or branches. On a CPU larger ones do not fit
# its caches (docs/images.md, "Batches"); elsewhere memory sets the bound.
MAX_STEP_TOKENS_CPU = 1536
MAX_STEP_TOKENS = 32768
# Forwards of several branches for which is kept what steps share, which is large: those of one image are at most four.
MAX_SELECTED = 8
# Of denoisers, none of which is told of another by itself: it would keep what that one holds.
_numbers = itertools.count()


@dataclass
class Drawing:
    """One image in the making.

    Attributes:
        grid (`tuple[int, int]`): Rows and columns of its tokens.
        guidance (`BagelGuidance`): How its branches are joined.
        branches (`dict[str, int]`): Place of each of its branches among those of all images; branches may share one.
        held (`HeldBranches`): What is known of branches that a step leaves out.
    """

    grid: tuple[int, int]
    guidance: BagelGuidance
    branches: dict[str, int]
    held: HeldBranches = field(default_factory=HeldBranches)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class Denoiser:
    """
    Predicts the velocity of all images of a call. What the steps share lives and dies with it.

    Args:
        transformer ([`BagelForConditionalGeneration`]): The model.
        contexts (`Sequence[dict[str, BagelContext]]`): Of each image, see `guidance_contexts`.
        grids (`Sequence[tuple[int, int]]`): Rows and columns of the tokens of each image.
        guidance (`Sequence[BagelGuidance]`): Of each image.
        caching (*optional*): By which most steps are predicted, or layers left out, see `StepCacheMixin`.
        group (`torch.distributed.ProcessGroup`, *optional*): Processes that share each step.
        attention_kwargs (`dict`, *optional*): Passed on to the attention layers; `scale` is that of the adapters.
    """

    def __init__(
        self,
        transformer: BagelForConditionalGeneration,
        contexts: Sequence[dict[str, BagelContext]],
        grids: Sequence[tuple[int, int]],
        guidance: Sequence[BagelGuidance],
        caching: Caching = None,
        group: torch.distributed.ProcessGroup | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ):
        self.transformer = transformer
        self.adapters = AdapterScale(transformer, attention_kwargs)
        self.drawings: list[Drawing] = []
        self._owners: list[int] = []
        self._selected: dict[tuple[tuple[int, int], ...], PrefixCache] = {}
        self._number = next(_numbers)
        views, positions = self._add_branches(contexts, grids, guidance)
        lengths = [self.drawings[owner].num_tokens for owner in self._owners]
        self.prefix: Any = PrefixCache(views) if group is None else SplitPrefixCache(views, lengths, group)
        self.positions = torch.tensor(positions)
        self.caching = caching
        # Of the loop that asks, if it is known.
        self.num_steps: int | None = None
        self._num_begun = 0
        self.states: list[TaylorSeerState] | None = None
        if isinstance(caching, TaylorSeerConfig | TaylorSeerSchedule):
            self.states = [TaylorSeerState(caching) for _ in views]
        self._caches: dict[int, StepCache] = {}

    def _add_branches(
        self,
        contexts: Sequence[dict[str, BagelContext]],
        grids: Sequence[tuple[int, int]],
        guidance: Sequence[BagelGuidance],
    ) -> tuple[list[PrefixView], list[int]]:
        """Lay the prefixes of all contexts into buffers, each once; returns a view and a position for each branch."""
        views: list[PrefixView] = []
        positions: list[int] = []
        buffers: dict[int, PrefixBuffer] = {}

        def buffer_of(context: BagelContext, scratch: int, common: int | None = None) -> PrefixBuffer | None:
            if context.cache is None:
                return None
            if id(context) not in buffers:
                buffers[id(context)] = PrefixBuffer.from_cache(context.own_cache, scratch, common=common)
            return buffers[id(context)]

        for index, (sample, grid, settings) in enumerate(zip(contexts, grids, guidance, strict=True)):
            full, scratch = sample["full"], grid[0] * grid[1] + 2
            # The longest one that the full context begins with shares its keys and values.
            prefix = max(
                (context for context in sample.values() if context is not full and context.begins(full)),
                key=lambda context: context.length,
                default=None,
            )
            places: dict[int, int] = {}
            branches = {}
            for name, context in sample.items():
                if id(context) not in places:
                    if context is not full and context is prefix:
                        # The tokens that only the full context has stand first in the buffer.
                        view = PrefixView(buffer_of(full, scratch), full.length - context.length)
                    else:
                        common = prefix.length if context is full and prefix is not None else None
                        view = PrefixView(buffer_of(context, scratch, common))
                    places[id(context)] = len(views)
                    views.append(view)
                    positions.append(context.next_position)
                    self._owners.append(index)
                branches[name] = places[id(context)]
            self.drawings.append(Drawing(grid, settings, branches))
        return views, positions

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, device_sigma: torch.Tensor, text_scale: float
    ) -> torch.Tensor:
        """
        Guided velocity of all images.

        Args:
            latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`): Packed latents, in float32.
            sigma (`torch.Tensor` of shape `()`): Sigma on the CPU, where guidance reads it.
            device_sigma (`torch.Tensor` of shape `()`): The same where the model computes.
            text_scale (`float`): Of the guidance at this step.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, latent_dim)`, float32, zero behind the tokens of smaller images.
        """
        return velocities([self.step(latents, sigma, device_sigma, text_scale)])[0]

    def step(
        self, latents: torch.Tensor, sigma: torch.Tensor, device_sigma: torch.Tensor, text_scale: float
    ) -> DenoisingStep:
        """What the next velocity, for which [`velocities`] asks, takes. The arguments are those of `velocity`."""
        guidance = [drawing.guidance.with_changes(text_scale=text_scale) for drawing in self.drawings]
        needed = [
            {name: drawing.branches[name] for name in settings.branches(sigma) if name in drawing.branches}
            for drawing, settings in zip(self.drawings, guidance, strict=True)
        ]
        drawings = zip(self.drawings, guidance, needed, strict=True)
        active = sorted(set().union(*(own.held.due(settings, names, sigma) for own, settings, names in drawings)))
        computed, predicted = active, []
        if self.states is not None:
            due = {branch: self.states[branch].advance() for branch in active}
            computed = [branch for branch in active if due[branch]]
            predicted = [branch for branch in active if not due[branch]]
        self._num_begun += 1
        place = {
            "step_index": self._num_begun - 1,
            "num_inference_steps": self.num_steps,
            "sigma": float(sigma),
        }
        return DenoisingStep(self, latents, device_sigma, guidance, needed, computed, predicted, place)

    def num_tokens(self, branch: int) -> int:
        """Latent tokens of a branch."""
        return self.drawings[self._owners[branch]].num_tokens

    def owner(self, branch: int) -> int:
        """The image that a branch is of."""
        return self._owners[branch]

    def name(self, branch: int) -> str:
        """What a branch is called, by the first of its names."""
        branches = self.drawings[self._owners[branch]].branches
        return next(name for name, place in branches.items() if place == branch)

    def cache(self, branch: int) -> StepCache | None:
        """What a branch keeps from step to step, if layers are left out."""
        if branch not in self._caches and isinstance(self.caching, LayerCaching):
            num_layers = self.transformer.config.text_config.num_hidden_layers
            self._caches[branch] = self.caching.new(num_layers, self.num_steps)
        return self._caches.get(branch)

    def selected(self, branches: Sequence[tuple[Denoiser, int]]) -> PrefixCache:
        """What the blocks of a forward attend to: the same object at each step, which keeps what the steps share."""
        key = tuple((denoiser._number, branch) for denoiser, branch in branches)
        if key not in self._selected:
            present = {number for number, _ in key}
            # Nothing is kept of those that are no longer drawn.
            self._selected = {
                other: cache for other, cache in self._selected.items() if present.issuperset(own for own, _ in other)
            }
            views = [denoiser.prefix.views[branch] for denoiser, branch in branches]
            lengths = [denoiser.num_tokens(branch) for denoiser, branch in branches]
            shared = [other for other in self._selected if len(other) > 1]
            if len(shared) >= MAX_SELECTED:
                del self._selected[shared[0]]
            is_split = isinstance(self.prefix, SplitPrefixCache)
            self._selected[key] = (
                SplitPrefixCache(views, lengths, self.prefix.group) if is_split else PrefixCache(views)
            )
        return self._selected[key]


@dataclass(frozen=True, eq=False)
class DenoisingStep:
    """
    What the velocity of a denoiser's images takes at one step.

    Attributes:
        denoiser (`Denoiser`)
        latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`), sigma (`torch.Tensor` of shape `()`):
            Where the model computes.
        guidance (`list[BagelGuidance]`): Of each image.
        needed (`list[dict[str, int]]`): The branches that it joins.
        computed, predicted (`list[int]`): Branches that are computed now, and those that TaylorSeer predicts.
        place (`dict`): Where the step is among the others, in the words of diffusers' `cache_context`.
    """

    denoiser: Denoiser
    latents: torch.Tensor
    sigma: torch.Tensor
    guidance: list[BagelGuidance]
    needed: list[dict[str, int]]
    computed: list[int]
    predicted: list[int]
    place: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Latent tokens that are computed."""
        return sum(map(self.denoiser.num_tokens, self.computed))

    def own_latents(self, branch: int) -> torch.Tensor:
        """Packed latents of the image that a branch is of, `(tokens, latent_dim)`."""
        return self.latents[self.denoiser.owner(branch), : self.denoiser.num_tokens(branch)]

    def layers(self, branch: int) -> dict[str, Any]:
        """What the model is told of a branch that leaves layers out."""
        denoiser = self.denoiser
        if isinstance(caching := denoiser.caching, DenoisingLayers):
            return {"run_layers": caching.of_branch(denoiser.name(branch), denoiser, not self.place["step_index"])}
        if (cache := denoiser.cache(branch)) is None:
            return {}
        grid = denoiser.drawings[denoiser.owner(branch)].grid
        latents = unpatchify(self.own_latents(branch), grid, denoiser.transformer.config.latent_patch_size)
        return {"run_layers": cache.at(latents.unsqueeze(1), **self.place)}

    def joined(self, velocities: dict[int, torch.Tensor]) -> torch.Tensor:
        """The guided velocity, from that of each branch."""
        velocity = torch.zeros_like(self.latents)
        for index, (drawing, settings, found) in enumerate(self._found(velocities)):
            completed = drawing.held.completed(found, self.needed[index])
            velocity[index, : drawing.num_tokens] = settings(completed)
        return velocity

    def hold(self, velocities: dict[int, torch.Tensor]) -> None:
        """Keep what the next steps may leave out, when the velocity of this one is known."""
        for drawing, settings, found in self._found(velocities):
            drawing.held.update(settings, found)

    def _found(
        self, velocities: dict[int, torch.Tensor]
    ) -> Iterator[tuple[Drawing, BagelGuidance, dict[str, torch.Tensor]]]:
        """Of each image, the velocities of those of its branches that were computed."""
        for drawing, settings, branches in zip(self.denoiser.drawings, self.guidance, self.needed, strict=True):
            found = {name: velocities[branch] for name, branch in branches.items() if branch in velocities}
            yield drawing, settings, found


def velocities(steps: Sequence[DenoisingStep]) -> list[torch.Tensor]:
    """
    Guided velocities of several denoisers of one transformer, each at a noise level of its own, in forwards that they share.

    All have the same step cache. If it fails, for want of memory, the same steps can be taken again.
    """
    due = [(place, branch) for place, step in enumerate(steps) for branch in step.computed]
    caches = [cache for place, branch in due if (cache := steps[place].denoiser.cache(branch)) is not None]
    with all_or_nothing(caches):
        joined = _velocities(steps, due)
    if isinstance(caching := steps[0].denoiser.caching, LayerCaching):
        caching.note(caches)
    return joined


def _velocities(steps: Sequence[DenoisingStep], due: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The same; `due` names the branches to compute, by the place of their step."""
    features: dict[tuple[int, int], torch.Tensor] = {}
    found: dict[tuple[int, int], torch.Tensor] = {}
    for branches in _shared(steps, due):
        outputs = _forward(steps, branches)
        counts = [steps[place].denoiser.num_tokens(branch) for place, branch in branches]
        found |= dict(zip(branches, outputs.velocity.split(counts), strict=True))
        if steps[0].denoiser.states is not None:
            features |= dict(zip(branches, outputs.latent_hidden_states.split(counts), strict=True))
    if predicted := [(place, branch) for place, step in enumerate(steps) for branch in step.predicted]:
        states = [steps[place].denoiser.states for place, _ in predicted]
        expected = [own[branch].predict() for own, (_, branch) in zip(states, predicted, strict=True) if own]
        first = steps[0].denoiser
        outputs = first.transformer(
            latent_hidden_states=torch.cat(expected), residual_dtype=first.adapters.residual_dtype
        )
        found |= dict(zip(predicted, outputs.velocity.split([len(item) for item in expected]), strict=True))
    of_steps = [
        {branch: found[place, branch] for branch in (*step.computed, *step.predicted)}
        for place, step in enumerate(steps)
    ]
    joined = [step.joined(own) for step, own in zip(steps, of_steps, strict=True)]
    for step, own in zip(steps, of_steps, strict=True):
        step.hold(own)
    for (place, branch), own in features.items():
        if (of_denoiser := steps[place].denoiser.states) is not None:
            of_denoiser[branch].update(own)
    return joined


def _shared(steps: Sequence[DenoisingStep], due: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Which branches share a forward."""
    caching = steps[0].denoiser.caching
    if isinstance(caching, LayerCaching | DenoisingLayers):
        # What is kept is of one branch of one picture, or of the branches of one name.
        is_own = isinstance(caching, LayerCaching)
        keys = [(place, branch) if is_own else steps[place].denoiser.name(branch) for place, branch in due]
        return [[own for own, other in zip(due, keys, strict=True) if other == key] for key in dict.fromkeys(keys)]
    lengths = [steps[place].denoiser.num_tokens(branch) for place, branch in due]
    chunks = chunk_in_order(lengths, step_limit(steps[0].latents.device))
    return [[due[index] for index in chunk] for chunk in chunks]


def _forward(steps: Sequence[DenoisingStep], branches: list[tuple[int, int]]) -> Any:
    """Velocities of branches, each named by the place of its step, in one forward."""
    first = steps[branches[0][0]].denoiser
    own = [(steps[place], branch) for place, branch in branches]
    owners = [step.denoiser.owner(branch) for step, branch in own]
    with first.adapters.applied():
        return first.transformer(
            latents=torch.cat([step.own_latents(branch) for step, branch in own]),
            latent_grid_hw=torch.tensor(
                [step.denoiser.drawings[owner].grid for (step, _), owner in zip(own, owners, strict=True)]
            ),
            timesteps=torch.stack([step.sigma for step, _ in own]),
            position_ids=torch.stack([step.denoiser.positions[branch] for step, branch in own]),
            past_key_values=first.selected([(step.denoiser, branch) for step, branch in own]),
            **first.adapters.attention_kwargs,
            **own[0][0].layers(own[0][1]),
        )


def step_limit(device: torch.device) -> int:
    """Most latent tokens of a denoising forward of several images or branches."""
    return MAX_STEP_TOKENS_CPU if device.type == "cpu" else MAX_STEP_TOKENS


class DenoisingLoop:
    """
    The steps from noise to latents, one for each `(step, timestep)` that it yields.

    Args:
        call (`BagelPipeline`): Holds the scheduler and the guidance scale, which callbacks may change.
        denoiser (`Denoiser`): Predicts velocities.
        latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`): The noise.
        timesteps (`torch.Tensor`): Of the scheduler.
        levels (`torch.Tensor`): The sigma of each, on the CPU.
        is_interrupted (`Callable[[], bool]`): Whether the remaining steps are to be left out.

    Attributes:
        latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`): As of the last step; whoever iterates may replace
            them.

    Raises:
        ValueError: while it is iterated, if the latents become infinite or NaN.
    """

    def __init__(
        self,
        call: Any,
        denoiser: Denoiser,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        levels: torch.Tensor,
        is_interrupted: Callable[[], bool],
    ):
        self.call = call
        self.denoiser = denoiser
        self.latents = latents
        denoiser.num_steps = len(timesteps)
        self._step: tuple[torch.Tensor, ...] = ()
        self._finite: dict[int, torch.Tensor] = {}
        self.timesteps = timesteps
        self.levels = levels
        self.is_interrupted = is_interrupted
        self.device_levels = levels.to(latents.device)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for step, timestep in enumerate(self.timesteps):
            if self.is_interrupted():
                continue
            (velocity,) = velocities([self.ask(step)])
            self.take(step, velocity)
            yield step, timestep
            self.check(step)
        self.check()

    def ask(self, step: int) -> DenoisingStep:
        """What the velocity of a step takes."""
        self.call._current_timestep = self.timesteps[step]
        return self.denoiser.step(self.latents, self.levels[step], self.device_levels[step], self.call.guidance_scale)

    def take(self, step: int, velocity: torch.Tensor) -> None:
        """Go on by a velocity."""
        self._step = (self.latents, self.device_levels[step], velocity)
        self.latents = self.call.scheduler.step(velocity, self.timesteps[step], self.latents, return_dict=False)[0]

    def check(self, step: int | None = None) -> None:
        """Raise a `ValueError` if latents were infinite or NaN, behind a step only where the host need not wait for that."""
        if step is not None:
            self._finite[step] = torch.isfinite(self.latents).all()
        # On a CPU an early stop costs nothing.
        if step is None or self.latents.device.type == "cpu":
            _check_finite(self._finite, self.levels)
            self._finite.clear()

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def clean_latents(self) -> torch.Tensor:
        """What the velocity of the last step predicts that the latents will be, of the same shape."""
        latents, level, velocity = self._step
        return latents - level * velocity

    def is_whole_step(self, step: int) -> bool:
        """Whether a step of the scheduler's ends one of the caller's: some schedulers take several for it."""
        order = self.call.scheduler.order
        warmup = max(len(self.timesteps) - len(self.levels) * order, 0)
        return step == len(self.timesteps) - 1 or (step + 1 > warmup and (step + 1) % order == 0)


def _check_finite(finite: dict[int, torch.Tensor], sigmas: torch.Tensor) -> None:
    """Raise a `ValueError` if the latents of a step were not finite. The host waits for the device to tell."""
    step = next((step for step, is_finite in finite.items() if not is_finite), None)
    if step is not None:
        raise ValueError(
            f"The latents are NaN or infinite after step {step} of {len(sigmas)} (noise level "
            f"{float(sigmas[step]):.3f}). Try float32 or bfloat16, or a lower `guidance_scale`."
        )


def chunk_in_order(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Items in their order, cut into chunks of at most `max_tokens`, without padding; a longer one stands alone.

    Args:
        lengths (`Sequence[int]`): Tokens of each item.
        max_tokens (`int`): Of a chunk of several items.

    Returns:
        `list[list[int]]`: Indices of the items of each chunk.
    """
    chunks: list[list[int]] = []
    total = 0
    for index, length in enumerate(lengths):
        total += length
        if chunks and total <= max_tokens:
            chunks[-1].append(index)
        else:
            chunks.append([index])
            total = length
    return chunks
