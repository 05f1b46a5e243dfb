# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Published settings by name: all that changes the numbers of a benchmark, in one place (docs/presets.md)."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers_bagel.errors import shown


@dataclass(frozen=True)
class Preset:
    """
    Settings under a name. What it does not set is chosen by the task, as without a preset.

    Attributes:
        output (`str`): `"image"` or `"text"`: what is made with it.
        description (`str`): What it reproduces.
        source (`str`): Where the settings were published.
        settings (`Mapping[str, Any]`): By the names of the pipeline's `__call__`, or of [`BagelSession.stream`].
    """

    output: str
    description: str
    source: str
    settings: Mapping[str, Any]

    def of_pipeline(self, config: Any) -> dict[str, Any]:
        """
        Settings of the pipeline's `__call__`.

        Args:
            config ([`BagelConfig`]): Of the model, beyond whose tables of positions no image is enlarged.

        Raises:
            ValueError: if the preset is for answers in words.
        """
        if self.output != "image":
            raise ValueError(
                "`preset` is for answers in words, and the pipeline draws. Pass it to `BagelSession.send`, or choose one of "
                f"{', '.join(name for name, preset in PRESETS.items() if preset.output == 'image')}."
            )
        return self._for_model(config)

    def of_session(self, config: Any) -> dict[str, Any]:
        """Settings of [`BagelSession.stream`], see `of_pipeline`."""
        settings = self._for_model(config)
        if (steps := settings.pop("max_think_tokens", None)) is not None:
            # The published number counts the step that feeds the start token.
            settings["max_new_tokens"] = steps - 1
        return settings

    def _for_model(self, config: Any) -> dict[str, Any]:
        """The settings, as a copy, with sizes of images that a model knows."""
        settings = copy.deepcopy(dict(self.settings))
        if "images_kwargs" in settings:
            settings["images_kwargs"] = _within_tables(settings["images_kwargs"], config)
        return settings


def _within_tables(images_kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Sizes of images that a model knows positions for: those of the full-size model end where its tables do."""
    if config.interpolate_pos:
        return images_kwargs
    sides = {
        "size": config.vit_max_num_patch_per_side * config.vision_config.patch_size,
        "vae_size": config.max_latent_size * config.latent_stride,
    }
    return {
        name: {edge: min(pixels, sides[name]) for edge, pixels in value.items()} if name in sides else value
        for name, value in images_kwargs.items()
    }


def find_preset(preset: str | Preset) -> Preset:
    """
    A preset by its name, or as it is.

    Raises:
        TypeError: if it is something else.
        ValueError: if there is none of that name.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise TypeError(f"`preset` must be a name or a `Preset`, got {shown(preset)}.")
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {shown(preset)}.")
    return PRESETS[preset]


def merged(settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a preset, and what the caller gave, which wins; of `images_kwargs` one by one."""
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(own := given.get("images_kwargs"), dict):
        given["images_kwargs"] = settings.get("images_kwargs", {}) | own
    return settings | given


def with_defaults(method: Callable) -> Callable:
    """Let a pipeline's `__call__` take what the caller leaves out, or `None`, from a few-step adapter, else from `preset`."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("preset") is None and self.few_steps is None:
            return method(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        preset = given.pop("preset", None)
        few_steps = self.few_steps_of(given.get("attention_kwargs"))
        settings = {} if preset is None else find_preset(preset).of_pipeline(self.transformer.config)
        if few_steps is not None:
            settings = few_steps.over(settings, given, self.scheduler)
            few_steps.warn_of(given, self.scheduler)
        return method(**merged(settings, given))

    return called


def _images(vit_shortest: int, resize_before_vit: bool) -> dict[str, Any]:
    """How images are resized for the VAE and the ViT (original behaviour, points 24 and 25)."""
    return {
        "vae_size": {"longest_edge": 1024, "shortest_edge": 512},
        "size": {"longest_edge": 980, "shortest_edge": vit_shortest},
        "resize_before_vit": resize_before_vit,
        "max_pixels": 1_806_336,
    }


def _answers(steps: int) -> dict[str, Any]:
    """Of the publisher's understanding benchmarks, which differ in the longest answer."""
    size = {"longest_edge": 980, "shortest_edge": 378}
    images = {"size": size, "resize_before_vit": False, "max_pixels": 2_007_040}
    return _TEXT | _FLOAT32 | {"max_new_tokens": steps - 1, "images_kwargs": images}


# Whatever the published code writes, nothing but the temperature counts.
_TEXT = {"think": False, "do_sample": False, "temperature": 0.3, "temperature_only": True}
_DRAWING = _TEXT | {
    "num_inference_steps": 49,
    "timestep_shift": 3.0,
    "guidance_scale": 4.0,
    "cfg_renorm_min": 0.0,
    "max_think_tokens": 1024,
    "plan_in_no_image": False,
    "empty_no_text": False,
}
_TEXT_TO_IMAGE = {"image_guidance_scale": 1.0, "cfg_interval": (0.4, 1.0), "cfg_renorm_type": "global"}
_EDITING = {"image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
# Of the demo the task decides on these two, as it does in the pipeline without a preset.
_DEMO = _DRAWING | {"vae_sample_mode": "sample", "size_like": "last", "images_kwargs": _images(224, True)}
_NOTEBOOK = _DEMO | {"max_think_tokens": 1000}
# The publisher's benchmarks have weights of float32, whose layers compute in bfloat16.
_FLOAT32 = {"residual_dtype": "float32"}
_SAMPLED_PLAN = {"do_sample": True, "max_think_tokens": 2048}
_EDITING_BENCHMARK = (
    _DEMO
    | _EDITING
    | _FLOAT32
    | _SAMPLED_PLAN
    | {"image_guidance_scale": 1.5, "plan_in_no_image": True, "size_like": "first"}
    | {"images_kwargs": _images(378, False)}
)
_PUBLISHED = "github.com/ByteDance-Seed/Bagel, "

PRESETS = {
    "demo": Preset(
        "image",
        "Drawing and editing as in the web demo, the task deciding on guidance; without its image scale of 1.5 where there "
        "is no image.",
        _PUBLISHED + "app.py",
        _DEMO,
    ),
    "notebook": Preset(
        "image",
        "Drawing and editing as in the notebook: the demo with plans of 1000 tokens.",
        _PUBLISHED + "inference.ipynb",
        _NOTEBOOK,
    ),
    "geneval": Preset(
        "image",
        "GenEval. The script draws the long prompts (0.88); the original ones gave 0.82.",
        _PUBLISHED + "scripts/eval/run_geneval.sh, eval/gen/gen_images_mp.py",
        _DRAWING | _TEXT_TO_IMAGE | _FLOAT32 | {"cfg_interval": (0.0, 1.0)},
    ),
    "wise": Preset(
        "image",
        "WISE with thinking; guidance compares with an empty context. Without thinking: think=False.",
        _PUBLISHED + "scripts/eval/run_wise.sh, eval/gen/gen_images_mp_wise.py",
        _DRAWING | _TEXT_TO_IMAGE | _FLOAT32 | _SAMPLED_PLAN | {"think": True, "empty_no_text": True},
    ),
    "dpg": Preset(
        "image",
        "DPG-Bench as RecA runs it for BAGEL, whose publisher does not; its prompts begin with 'Generate an image: '.",
        "github.com/HorizonWind2004/reconstruction-alignment, BAGEL/scripts/eval/run_dpg.sh, eval/gen/gen_images_dpg.py",
        _DRAWING | _TEXT_TO_IMAGE | {"guidance_scale": 3.0, "cfg_interval": (0.0, 1.0)},
    ),
    "gedit": Preset(
        "image",
        "GEdit-Bench.",
        _PUBLISHED + "scripts/eval/run_gedit.sh, eval/gen/gedit/gen_images_gedit.py",
        _EDITING_BENCHMARK | {"cfg_interval": (0.4, 1.0), "max_think_tokens": 10240},
    ),
    "imgedit": Preset(
        "image",
        "ImgEdit-Bench.",
        _PUBLISHED + "scripts/eval/run_imgedit.sh, eval/gen/gen_images_mp_imgedit.py",
        _EDITING_BENCHMARK,
    ),
    "kris": Preset(
        "image",
        "KRIS-Bench with thinking, as its script runs. Without thinking: think=False.",
        _PUBLISHED + "scripts/eval/run_kris.sh, eval/gen/gen_images_mp_kris.py",
        _EDITING_BENCHMARK | {"think": True},
    ),
    "rise": Preset(
        "image",
        "RISEBench with thinking, as its script runs. Without thinking: think=False.",
        _PUBLISHED + "scripts/eval/run_rise.sh, eval/gen/gen_images_mp_rise.py",
        _EDITING_BENCHMARK | {"think": True, "image_guidance_scale": 2.0},
    ),
    "vlmevalkit_generate": Preset(
        "image",
        "Drawing as in VLMEvalKit, without renormalisation.",
        "github.com/open-compass/VLMEvalKit, vlmeval/vlm/bagel_umm.py",
        _DRAWING | _TEXT_TO_IMAGE | {"cfg_renorm_min": 1.0, "max_think_tokens": 1000},
    ),
    "vlmevalkit_edit": Preset(
        "image",
        "Editing as in VLMEvalKit.",
        "github.com/open-compass/VLMEvalKit, vlmeval/vlm/bagel_umm.py",
        _NOTEBOOK | _EDITING,
    ),
    "ask": Preset(
        "text",
        "Answers about images as in the web demo.",
        _PUBLISHED + "app.py",
        _TEXT | {"max_new_tokens": 511, "images_kwargs": _images(224, True)},
    ),
    "vqa": Preset(
        "text",
        "VQAv2, OK-VQA, TextVQA, VizWiz, GQA and AI2D.",
        _PUBLISHED + "eval/vlm/eval/vqa/evaluate_vqa.py",
        _answers(10),
    ),
    "docvqa": Preset(
        "text",
        "DocVQA, ChartQA, OCR-VQA and InfographicVQA.",
        _PUBLISHED + "eval/vlm/eval/vqa/evaluate_vqa.py",
        _answers(100),
    ),
    "mme": Preset("text", "MME.", _PUBLISHED + "eval/vlm/eval/mme/eval.py", _answers(20)),
    "mmbench": Preset("text", "MMBench.", _PUBLISHED + "eval/vlm/eval/mmbench/evaluate_mmbench.py", _answers(100)),
    "mmvp": Preset("text", "MMVP.", _PUBLISHED + "eval/vlm/eval/mmvp/evaluate_mmvp.py", _answers(100)),
    "pope": Preset("text", "POPE.", _PUBLISHED + "eval/vlm/eval/pope/evaluate_pope.py", _answers(100)),
    "mmvet": Preset("text", "MM-Vet.", _PUBLISHED + "eval/vlm/eval/mmvet/evaluate_mmvet.py", _answers(1000)),
    "mathvista": Preset(
        "text", "MathVista.", _PUBLISHED + "eval/vlm/eval/mathvista/evaluate_mathvista.py", _answers(4096)
    ),
    "mmmu": Preset("text", "MMMU.", _PUBLISHED + "eval/vlm/eval/mmmu/evaluate_mmmu.py", _answers(10)),
    "mmmu_cot": Preset(
        "text",
        "MMMU with reasoning that the question asks for.",
        _PUBLISHED + "eval/vlm/eval/mmmu/evaluate_mmmu_cot.py",
        _answers(16384),
    ),
}
