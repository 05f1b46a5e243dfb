# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The pictures in the README, of what bagel-shapes really draws and says:
`python examples/shapes/strip.py strip.png --conversation conversation.png`.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from evaluate import answer
from parts import CHECKPOINT

from diffusers_bagel import BagelPipeline, BagelSession


PICTURE = 160
MARGIN = 12
LINE = 16
CHARACTERS = 25
PROMPTS = (
    "a large red star in the middle on a white background",
    "a small blue square at the left and a large orange circle at the right on black",
)
EDITS = ("make the red star green", "move the blue square to the top")
QUESTION = "what colour is the thing in the middle?"
RIDDLE = "something with five points in the colour of a lemon on blue"


@dataclass
class Panel:
    """A picture with what was said above it and below it."""

    title: str
    picture: PIL.Image.Image
    above: str
    below: str = ""


def panels(pipe: BagelPipeline) -> list[Panel]:
    """Draw, edit, ask and think, all with the pipeline's own defaults but for the seed."""

    def drawn(prompt: str, **settings: Any) -> tuple[PIL.Image.Image, str]:
        out = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings)
        return out.images[0], out.texts[0] if out.texts else ""

    pictures = [drawn(prompt)[0] for prompt in PROMPTS]
    edited = [drawn(edit, image=picture)[0] for edit, picture in zip(EDITS, pictures, strict=True)]
    solved, plan = drawn(RIDDLE, think=True)
    return [
        *(Panel("draw", picture, prompt) for prompt, picture in zip(PROMPTS, pictures, strict=True)),
        *(Panel("edit", picture, edit) for edit, picture in zip(EDITS, edited, strict=True)),
        Panel("ask", edited[0], QUESTION, answer(pipe, edited[:1], [QUESTION])[0]),
        Panel("think", solved, RIDDLE, plan),
    ]


# In each the model decides what it answers with.
CONVERSATIONS = (
    (
        "show the steps: a large red star at the top and a small purple circle in the middle and a medium blue cross at the "
        "bottom right on a white background",
    ),
    (
        "a large red star at the top and a small purple circle in the middle on a white background",
        "make the purple circle green",
        "what colour is the circle?",
    ),
)


def conversation_panels(pipe: BagelPipeline) -> list[Panel]:
    """All conversations: what was asked above the first panel of each answer."""
    made: list[Panel] = []
    for requests in CONVERSATIONS:
        session, generator = BagelSession(pipe), torch.Generator().manual_seed(0)
        for request in requests:
            said, words = request, ""
            for part in session.send(request, generator=generator, max_new_tokens=64).content:
                if part["type"] == "text":
                    words = part["text"]
                else:
                    made.append(Panel(said and "asked", part["image"], said, words))
                    said, words = "", ""
            if words:
                made.append(Panel(said and "asked", made[-1].picture, said, words))
    return made


def composed(strip: list[Panel]) -> PIL.Image.Image:
    """All panels side by side."""
    above = max(len(textwrap.wrap(panel.above, CHARACTERS)) for panel in strip)
    below = max(len(textwrap.wrap(panel.below, CHARACTERS)) for panel in strip)
    height = MARGIN * 2 + LINE * (2 + above + below) + PICTURE
    canvas = PIL.Image.new("RGB", (len(strip) * (PICTURE + MARGIN) + MARGIN, height), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    font, bold = PIL.ImageFont.load_default(12), PIL.ImageFont.load_default(14)
    for index, panel in enumerate(strip):
        x = MARGIN + index * (PICTURE + MARGIN)
        draw.text((x, MARGIN), panel.title, "black", bold)
        draw.multiline_text((x, MARGIN + LINE * 1.3), textwrap.fill(panel.above, CHARACTERS), "black", font)
        top = round(MARGIN + LINE * (1.5 + above))
        canvas.paste(panel.picture.resize((PICTURE, PICTURE), PIL.Image.Resampling.LANCZOS), (x, top))
        draw.rectangle([x, top, x + PICTURE - 1, top + PICTURE - 1], outline="gray")
        text = textwrap.fill(panel.below, CHARACTERS)
        draw.multiline_text((x, top + PICTURE + 4), text, "black", font)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="where to write the picture")
    parser.add_argument(
        "--conversation", required=True, help="where to write the other one, of an answer in words and pictures"
    )
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    args = parser.parse_args()
    pipe = BagelPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    for strip, output in ((panels(pipe), args.output), (conversation_panels(pipe), args.conversation)):
        composed(strip).save(output)
        for panel in strip:
            print(f"{panel.title}: {panel.above}" + (f" -> {panel.below}" if panel.below else ""))


if __name__ == "__main__":
    main()
