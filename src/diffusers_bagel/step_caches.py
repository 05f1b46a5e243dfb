# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""diffusers' step caches around the decoder layers of a denoising step, one of its own for each branch of each drawing.

The library hangs a cache's hooks on a model. This one is shared by threads, sessions and texts. So the hooks hang on modules that
stand for its layers, and are made and dropped with the drawing; the model is told in each forward what leads through its layers.
"""

from __future__ import annotations

import functools
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from diffusers import CacheMixin
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.utils import logging
from torch import nn

from transformers_bagel.errors import shown
from transformers_bagel.layers import run_in_turn

from .caching import TaylorSeerConfig, TaylorSeerSchedule
from .denoising_layers import DenoisingLayers
from .inputs import check_number, check_whole_number


logger = logging.get_logger(__name__)

LayerCacheConfig: TypeAlias = FirstBlockCacheConfig | MagCacheConfig | SeaCacheConfig

REFUSED = {
    FasterCacheConfig: "it makes the unguided half of a batch from the guided one, and BAGEL's branches read contexts of their own",
    PyramidAttentionBroadcastConfig: "it keeps what diffusers' own attention classes give, and BAGEL's layers have none of them",
    TextKVCacheConfig: "the keys and values of texts are kept in any case",
}
# One cache serves one branch.
_CONTEXT = "branch"


class _Layer(nn.Module):
    """Stands for one of the model's layers, which it is given."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, hidden_states: torch.Tensor, layers: Sequence[nn.Module], **given: Any) -> torch.Tensor:
        return layers[self.index](hidden_states, **given)


TransformerBlockRegistry.register(_Layer, TransformerBlockMetadata(return_hidden_states_index=0))


class _Layers(nn.Module, CacheMixin):
    """Stands for all layers of the model."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(index) for index in range(count))

    def forward(self, hidden_states: torch.Tensor, latents: torch.Tensor, **given: Any) -> torch.Tensor:
        return run_in_turn(self.layers, hidden_states, **given)


class StepCache:
    """
    What one branch of a drawing keeps from step to step, as long as it is drawn.

    Args:
        config (`FirstBlockCacheConfig`, `MagCacheConfig` or `SeaCacheConfig`)
        num_layers (`int`): Of the model.
    """

    def __init__(self, config: LayerCacheConfig, num_layers: int):
        self.config = config
        self._layers = _Layers(num_layers)
        self._layers.enable_cache(config)
        (hook,) = HookRegistry.check_if_exists_or_initialize(self._layers.layers[0]).hooks.values()
        with self._layers.cache_context(_CONTEXT):
            self.state = hook.state_manager.get_state()
        # Hooks and modules refer to each other: their tensors would stay until garbage is collected.
        registry = HookRegistry.check_if_exists_or_initialize(self._layers)
        weakref.finalize(self, registry.reset_stateful_hooks).atexit = False

    def at(self, latents: torch.Tensor, **place: Any) -> Callable[..., torch.Tensor]:
        """
        What leads through the layers at one step, as `run_layers` of [`BagelTextModel`].

        Args:
            latents (`torch.Tensor` of shape `(channels, 1, height, width)`): What is denoised.
            place: Of the step, as diffusers' `cache_context` takes it.
        """
        return functools.partial(self._run, latents, place)

    def _run(
        self, latents: torch.Tensor, place: dict[str, Any], layers: Any, *args: Any, **given: Any
    ) -> torch.Tensor:
        if len(layers) != len(self._layers.layers):
            raise ValueError(
                f"The transformer has {len(layers)} layers in the place of its {len(self._layers.layers)}, as it does while cache-dit "
                "is enabled on them. Disable one of the two caches."
            )
        with self._layers.cache_context(_CONTEXT, **place):
            return self._layers(*args, latents=latents, layers=layers, **given)


@contextmanager
def all_or_nothing(caches: Sequence[StepCache]) -> Iterator[None]:
    """Forwards of which all count, or, if one of them fails, none: then the same step can be taken again."""
    before = [
        {name: value.copy() if isinstance(value, list) else value for name, value in vars(cache.state).items()}
        for cache in caches
    ]
    try:
        yield
    except BaseException:
        for cache, values in zip(caches, before, strict=True):
            vars(cache.state).update(values)
        raise


class LayerCaching:
    """
    Makes the caches of drawings.

    Args:
        config (`FirstBlockCacheConfig`, `MagCacheConfig` or `SeaCacheConfig`)

    Raises:
        TypeError, ValueError: if it cannot work.
    """

    def __init__(self, config: LayerCacheConfig):
        if isinstance(config, MagCacheConfig):
            _check_mag_cache(config)
        elif isinstance(config, FirstBlockCacheConfig):
            check_number("threshold", config.threshold, 0)
        elif config.raw_vision_callback is not None:
            raise ValueError("`raw_vision_callback`: the pipeline gives SeaCache its latents by itself. Leave it out.")
        else:
            check_number("threshold", config.threshold, 0)
            for name in ("retention_steps", "cache_end_steps"):
                check_whole_number(name, getattr(config, name), 0)
            config = replace(config, raw_vision_callback=_latents)
        self._configs: dict[int | None, LayerCacheConfig] = {None: replace(config)}
        # By the number of steps, on which they depend, and the step.
        self._ratios: dict[int, dict[int, list[float]]] = {}
        self._calibrated = 0

    @property
    def config(self) -> LayerCacheConfig:
        return self._configs[None]

    @property
    def is_calibrating(self) -> bool:
        """Whether nothing is left out, and MagCache's ratios are measured."""
        return isinstance(self.config, MagCacheConfig) and self.config.calibrate

    @property
    def mag_ratios(self) -> list[float]:
        """Of each step, the mean over the branches and pictures of as many steps as the last one that was calibrated."""
        ratios = self._ratios.get(self._calibrated, {})
        return [statistics.fmean(each) for _, each in sorted(ratios.items())]

    def new(self, num_layers: int, num_steps: int | None) -> StepCache:
        """A cache for a branch of a drawing of some steps."""
        return StepCache(self._config_of(num_steps), num_layers)

    def _config_of(self, num_steps: int | None) -> LayerCacheConfig:
        config = self.config
        if not isinstance(config, MagCacheConfig) or num_steps is None:
            return config
        if config.calibrate:
            # The library prints the ratios of a branch behind its last step, which those of guidance do not take.
            return replace(config, num_inference_steps=num_steps + 1)
        if config.num_inference_steps != num_steps and num_steps not in self._configs:
            logger.warning(
                f"MagCache's ratios are of {config.num_inference_steps} steps, and are interpolated for {num_steps}. They depend on how "
                f"far steps are apart: calibrate with {num_steps}."
            )
            self._configs[num_steps] = replace(config, num_inference_steps=num_steps)
        return self._configs.get(num_steps, config)

    def note(self, caches: Sequence[StepCache]) -> None:
        """Note the ratios that caches have measured at a step."""
        for cache in caches if self.is_calibrating else ():
            ratios = cache.state.calibration_ratios
            self._calibrated = steps = cache.config.num_inference_steps
            # Threads may calibrate at the same time.
            self._ratios.setdefault(steps, {}).setdefault(len(ratios), []).append(ratios[-1])


def _latents(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [kwargs["latents"]]


def _check_mag_cache(config: MagCacheConfig) -> None:
    check_number("threshold", config.threshold, 0)
    check_whole_number("max_skip_steps", config.max_skip_steps, 0)
    check_number("retention_ratio", config.retention_ratio, 0, 1)
    check_whole_number("num_inference_steps", config.num_inference_steps, 1)
    if config.calibrate:
        return
    try:
        ratios = torch.as_tensor(config.mag_ratios, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`mag_ratios` must be a list of numbers, got {shown(config.mag_ratios)}.") from error
    if ratios.ndim != 1 or not len(ratios) or not (torch.isfinite(ratios) & (ratios >= 0)).all():
        raise ValueError(
            f"`mag_ratios` must be finite numbers of at least 0, one for each step, got {shown(config.mag_ratios)}."
        )


# What a drawing leaves out steps by.
Caching: TypeAlias = TaylorSeerConfig | TaylorSeerSchedule | LayerCaching | DenoisingLayers | None


class StepCacheMixin:
    """The pipeline's ways to leave out parts of steps, of which one can be enabled at a time."""

    transformer: Any
    _split_group: Any
    _step_cache: TaylorSeerConfig | TaylorSeerSchedule | LayerCaching | None = None
    _calibration: LayerCaching | None = None
    _denoising_layers: DenoisingLayers | None = None

    @property
    def denoising_layers(self) -> DenoisingLayers:
        """
        The layers as denoising steps go through them, a list for each branch of guidance, for step caches of other libraries.

        What hangs on them sees no texts. It keeps one state for all drawings, which must therefore follow one another.
        """
        layers, known = self.transformer.get_decoder().layers, self._denoising_layers
        if known is None or not (known.is_replaced or known.are_of(layers)):
            self._denoising_layers = known = DenoisingLayers(layers)
        return known

    @property
    def _caching(self) -> Caching:
        """What the next drawing leaves out steps by."""
        layers = self._denoising_layers
        return layers if layers is not None and layers.is_replaced else self._step_cache

    @property
    def is_cache_enabled(self) -> bool:
        """Whether [`enable_cache`] or [`enable_taylorseer`] was called."""
        return self._step_cache is not None

    def enable_cache(self, config: TaylorSeerCacheConfig | LayerCacheConfig) -> None:
        """
        Leave out parts of steps as a cache of diffusers does, which changes the images a little.

        What is kept from step to step is of one branch of one drawing, and gone with it.

        Args:
            config (`TaylorSeerCacheConfig`, `FirstBlockCacheConfig`, `MagCacheConfig` or `SeaCacheConfig`):
                With `MagCacheConfig(calibrate=True)` all is computed, and the ratios are in `mag_ratios` afterwards.

        Raises:
            TypeError, ValueError: if a cache is enabled, or for one that cannot work.
        """
        if self._step_cache is not None:
            raise ValueError("A step cache is enabled already. Call `disable_cache()` first.")
        for refused, reason in REFUSED.items():
            if isinstance(config, refused):
                raise ValueError(f"`{refused.__name__}` does nothing for BAGEL: {reason}.")
        if isinstance(config, TaylorSeerCacheConfig):
            self._step_cache = TaylorSeerSchedule.of(config)
        elif isinstance(config, LayerCacheConfig):
            self._step_cache = LayerCaching(config)
            if self._step_cache.is_calibrating:
                self._calibration = self._step_cache
        else:
            raise TypeError(
                "`config` must be a `TaylorSeerCacheConfig`, `FirstBlockCacheConfig`, `MagCacheConfig` or `SeaCacheConfig` of "
                f"diffusers, got {shown(config)}."
            )

    def disable_cache(self) -> None:
        """Compute every step again."""
        if self._step_cache is None:
            logger.warning("No step cache is enabled, so there is none to disable.")
        self._step_cache = None

    def enable_taylorseer(self, interval: int = 3, warmup_steps: int = 5, max_order: int = 6) -> None:
        """
        Predict the model's output on most steps instead of computing it, which changes the images a little.

        Args:
            interval (`int`, defaults to 3): After the warm-up, one step in `interval` is computed.
            warmup_steps (`int`, defaults to 5): First steps, which are all computed.
            max_order (`int`, defaults to 6): Highest order of the Taylor expansion.

        Raises:
            TypeError, ValueError: for numbers that cannot work, or if another cache is enabled.
        """
        config = TaylorSeerConfig(interval, warmup_steps, max_order)
        if not isinstance(self._step_cache, TaylorSeerConfig | None):
            raise ValueError("A step cache is enabled already. Call `disable_cache()` first.")
        self._step_cache = config

    def disable_taylorseer(self) -> None:
        """Compute every step again, if [`enable_taylorseer`] was called."""
        if isinstance(self._step_cache, TaylorSeerConfig):
            self._step_cache = None

    @property
    def mag_ratios(self) -> list[float]:
        """
        What `MagCacheConfig(calibrate=True)` has found so far: the `mag_ratios` of one that leaves out steps.

        Each is the mean over all branches and pictures since it was enabled, of as many steps as the last one.

        Raises:
            ValueError: if no picture was drawn with it.
        """
        if self._calibration is None or not self._calibration.mag_ratios:
            raise ValueError(
                "`mag_ratios`: nothing is calibrated. Draw after `enable_cache(MagCacheConfig(calibrate=True))`."
            )
        return self._calibration.mag_ratios

    def _check_step_cache(self) -> None:
        """
        Refuse to draw with a cache that could not do what it should.

        Raises:
            ValueError
        """
        if self._step_cache is not None and self._caching is not self._step_cache:
            raise ValueError(
                "Two step caches are enabled, of this pipeline and on its `denoising_layers`: disable one of the two."
            )
        layers = self.transformer.get_decoder().layers
        if isinstance(self._caching, DenoisingLayers) and not self._caching.are_of(layers):
            raise ValueError(
                "`denoising_layers` are others than the transformer has now. Disable the cache that hangs on them."
            )
        if self._split_group is not None and isinstance(self._caching, DenoisingLayers):
            raise ValueError(
                "The processes of a context split would have to leave out the same layers, which what hangs on `denoising_layers` "
                "does not see to. Call `disable_context_split()`, or use `enable_cache`."
            )
        if not isinstance(self._step_cache, LayerCaching):
            return
        if self.transformer.config.text_config.num_hidden_layers < 2:
            raise ValueError(
                "A step cache leaves out layers behind the first, and the transformer has one. Call `disable_cache()`."
            )
        if self._split_group is not None and (
            isinstance(self._step_cache.config, FirstBlockCacheConfig) or self._step_cache.is_calibrating
        ):
            raise ValueError(
                f"`{type(self._step_cache.config).__name__}` measures what a process computes, and in a context split each would "
                "find something else. Call `disable_context_split()`, or choose another cache."
            )
