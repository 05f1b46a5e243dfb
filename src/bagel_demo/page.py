# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The page: its parts, and what happens when somebody uses them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from diffusers_bagel import PRESETS

from . import views
from .choices import NO_PRESET, OUTPUTS, Choices, sizes
from .events import PLACEHOLDER, PRESET_INFO, SEND, Events, Parts


HERE = Path(__file__).parent
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
# In seconds: how often uploaded files are looked at, and how old they become.
CACHE = (3600, 86400)
# Of the presets: Gradio refuses what lies behind the end of a slider.
LONGEST = max(Choices.of_preset(name).max_new_tokens for name in PRESETS)
SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")
HEADER = "<header><h1>BAGEL</h1><p>sees, speaks and draws</p></header>"


class BagelPage(gr.Blocks):
    """A page with its own look, which serves the pictures of its conversations."""

    def __init__(self) -> None:
        super().__init__(title="BAGEL", analytics_enabled=False, fill_width=True, delete_cache=CACHE)
        self.folder = tempfile.TemporaryDirectory(prefix="bagel-demo-")

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """As [`gradio.Blocks.launch`]."""
        own: dict[str, Any] = {
            "theme": THEME,
            "css_paths": HERE / "page.css",
            "footer_links": [],
            "run_history": False,
            "ssr_mode": False,
            "allowed_paths": [self.folder.name, str(views.SHOWN)],
            "max_file_size": "20mb",
        }
        return super().launch(*args, **(own | kwargs))


def create_page(engine: Any) -> BagelPage:
    """
    A page with one conversation for each browser that opens it.

    Args:
        engine ([`Engine`]): Makes the answers of all browsers.

    Returns:
        [`BagelPage`]: A `gradio.Blocks`, with its `launch()`.

    Example:

    ```python
    >>> create_page(Engine(pipe)).launch()
    ```
    """
    with BagelPage() as page:
        parts = _laid_out(engine.pipe)
        Events(engine, parts, Path(page.folder.name)).attach(page)
    return page


def _laid_out(pipe: Any) -> Parts:
    with gr.Row(elem_id="header"):
        gr.HTML(HEADER, apply_default_css=False)
        new = gr.Button("New conversation", size="sm", elem_id="new")
    with gr.Row(elem_id="columns"):
        with gr.Column(scale=3, min_width=320):
            with gr.Column(elem_id="talk"):
                said = gr.HTML(
                    views.conversation([]), js_on_load=SCRIPT, apply_default_css=False, elem_classes="conversation"
                )
                answer = gr.HTML("", js_on_load=SCRIPT, apply_default_css=False, elem_classes="conversation")
            progress = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="progress")
            composer = gr.MultimodalTextbox(
                label="Message",
                show_label=False,
                placeholder=PLACEHOLDER,
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=100_000,
                submit_btn=SEND,
                autofocus=True,
                elem_id="composer",
            )
            with gr.Row(elem_id="how"):
                output = gr.Radio(
                    list(OUTPUTS), value="Picture", label="Answer with", container=False, elem_id="output"
                )
                think = gr.Checkbox(label="Think first", container=False, min_width=120, elem_id="think")
        with gr.Column(scale=1, min_width=300, elem_id="side"):
            gallery = gr.Gallery(
                label="Pictures",
                columns=3,
                fit_columns=False,
                object_fit="contain",
                height=280,
                buttons=["download", "fullscreen"],
                interactive=False,
                elem_id="gallery",
            )
            edit = gr.Button("Edit the chosen picture", size="sm", visible=False, elem_id="edit")
            others = _settings(pipe)
    return Parts(said, answer, progress, composer, gallery, edit, new, output, think, **others)


def _settings(pipe: Any) -> dict[str, Any]:
    usual = Choices.usual(pipe.few_steps)
    with gr.Accordion("Settings", open=True, elem_id="settings"):
        preset = gr.Dropdown(
            [NO_PRESET, *PRESETS], value=usual.preset, label="Preset", info=PRESET_INFO, elem_id="preset"
        )
        with gr.Row():
            seed = gr.Number(usual.seed, label="Seed", precision=0, minimum=0, maximum=2**63 - 1, min_width=120)
            is_new_seed = gr.Checkbox(True, label="New one each time", min_width=120, elem_id="new-seed")
        steps = gr.Slider(1, 100, usual.steps, step=1, label="Steps of a picture")
        guidance = gr.Slider(1, 10, usual.guidance_scale, step=0.1, label="Weight of the text")
        image_guidance = gr.Slider(
            0, 5, usual.image_guidance_scale, step=0.1, label="Weight of the pictures (0: as usual)"
        )
        names = sizes(pipe.default_sample_size, pipe.vae_scale_factor)
        size = gr.Dropdown(names, value=usual.size, label="Size of a picture")
        tokens = gr.Slider(1, LONGEST, usual.max_new_tokens, step=1, label="Tokens of a text, at most")
        temperature = gr.Slider(0, 2, usual.temperature, step=0.1, label="Temperature of words (0: the likeliest)")
    return {
        "preset": preset,
        "seed": seed,
        "is_new_seed": is_new_seed,
        "steps": steps,
        "guidance_scale": guidance,
        "image_guidance_scale": image_guidance,
        "size": size,
        "max_new_tokens": tokens,
        "temperature": temperature,
    }
