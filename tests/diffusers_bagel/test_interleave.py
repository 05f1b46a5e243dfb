"""Six fine-tunes' own loops, through sessions: the same contexts, positions, texts and pictures.

`BAGEL_INTERLEAVE_SET` and `BAGEL_INTERLEAVE_CHECKPOINT` name another set of the same format and its checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_bagel import BagelPipeline, answering
from diffusers_bagel.protocols import PROTOCOLS
from diffusers_bagel.session import BagelSession
from tests.conftest import GOLDEN, edges, load_processor, max_error


SET = Path(os.environ.get("BAGEL_INTERLEAVE_SET", GOLDEN.parent / "interleave"))
CHECKPOINT = Path(os.environ.get("BAGEL_INTERLEAVE_CHECKPOINT", GOLDEN / "checkpoint"))
TRACES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(SET.glob("*.json"))}
CASES = [(name, case) for name, trace in TRACES.items() for case in trace.get("cases", ())]
CONTEXTS = {"full": "full", "cfg_text": "no_text", "cfg_img": "no_image"}
SETTINGS = {
    "cfg_text_scale": "guidance_scale",
    "cfg_img_scale": "image_guidance_scale",
    "cfg_interval": "cfg_interval",
    "cfg_renorm_type": "cfg_renorm_type",
    "cfg_renorm_min": "cfg_renorm_min",
    "do_sample": "do_sample",
    "think": "think",
}
# Of the forks' loops: what bounds an answer.
LIMITS = {
    "max_rounds": "max_images",
    "max_round": "max_images",
    "max_iterations": "max_items",
    "max_inter_num": "max_texts",
}


def image(name: str) -> Image.Image:
    return Image.open(CHECKPOINT.parent / "inputs" / f"{name}.png")


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    trace = next(iter(TRACES.values()))
    sizes = {"size": edges(trace["vit_transform"]), "vae_size": edges(trace["vae_transform"])}
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, processor=load_processor(CHECKPOINT, **sizes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Script:
    """Picks the recorded tokens of one text after the other, whatever the scores are."""

    def __init__(self, texts: list[dict]):
        self.texts = iter(texts)
        self.tokens: list[int] = []

    def next_text(self) -> None:
        self.tokens = list(next(self.texts)["forced"])

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens.pop(0)] = 0.0
        return forced


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case["key"] for _, case in CASES])
def test_case(name, case, pipe, monkeypatch):
    arrays = load_file(SET / f"{name}.safetensors")
    trace, call = TRACES[name], case["call"]
    generated = [event for event in case["events"] if event["op"] == "generate"]
    drawn = [event for event in case["events"] if event["op"] == "draw"]
    protocol = PROTOCOLS[name]
    limits = {ours: call[theirs] for theirs, ours in LIMITS.items() if theirs in call}
    if "image_shapes" in call:
        limits["default_size"] = tuple(call["image_shapes"])
    elif "patched" in case:
        limits["default_size"] = tuple(drawn[0]["shape"])
    if "system_prompt" in call or name == "twiff":
        given = call.get("system_prompt")
        limits["system_prompt"] = trace["system_prompt"] if given == "default" else given
    protocol = protocol.with_changes(**limits)
    settings = {ours: call[theirs] for theirs, ours in SETTINGS.items() if theirs in call}
    settings["num_inference_steps"] = call["num_timesteps"] - 1
    settings["vae_sample_mode"] = "argmax"
    pipe.scheduler.set_shift(call.get("timestep_shift", 3.0))

    seen: dict[str, list] = {"reads": [], "draws": [], "latents": []}
    text, denoiser, decode = answering.Text, answering.Denoiser, pipe.decode_latents

    def watched_text(reader, context, text_settings):
        script.next_text()
        # Without the token that starts it.
        seen["reads"].append((context.length - 1, context.next_position - 1))
        return text(reader, context, text_settings)

    def watched_denoiser(transformer, contexts, grids, *args):
        seen["draws"].append((grids[0], {key: (c.length, c.next_position) for key, c in contexts[0].items()}))
        return denoiser(transformer, contexts, grids, *args)

    def watched_decode(latents, grid, output_type):
        event = drawn[len(seen["latents"])]
        seen["latents"].append(latents[0])
        if "depth" in event:
            return decode(latents, grid, output_type)
        # The recorded pixels go back, as a byte that is rounded another way changes all that follows.
        return (arrays[event["pixels"]].numpy()[None] + 0.5) / 255

    monkeypatch.setattr(answering, "Text", watched_text)
    monkeypatch.setattr(answering, "Denoiser", watched_denoiser)
    monkeypatch.setattr(pipe, "decode_latents", watched_decode)

    script = Script(generated)
    session = BagelSession(pipe, protocol)
    longest = generated[0]["max_length"]
    reply = session.send(
        [image(part[1:]) if part.startswith("@") else part for part in case["inputs"]],
        output="text" if call.get("understanding_output") else "interleaved",
        max_new_tokens=longest - 1,
        logits_processor=[script],
        latents=[arrays[event["noise"]] for event in drawn],
        **settings,
    )
    assert seen["reads"] == [(event["kv_len"], event["rope"]) for event in generated]
    for (grid, contexts), event in zip(seen["draws"], drawn, strict=True):
        assert [side * pipe.vae_scale_factor for side in grid] == event["shape"]
        assert contexts == {
            CONTEXTS[key]: (event["kv_lens"][key], event["ropes"][key])
            for key in event["kv_lens"]
            if CONTEXTS[key] in contexts
        }
    for latents, event in zip(seen["latents"], drawn, strict=True):
        assert max_error(latents, arrays[event["latent"]]) <= 5e-4
    output = case["output"]
    if name == "cooper":
        output = output[1 + len(case["inputs"]) :]
    texts = [item["text"] for item in output if "text" in item]
    assert [part["text"] for part in reply.content if part["type"] == "text"] == texts
    assert [part["type"] for part in reply.content] == ["text" if "text" in item else "image" for item in output]
    assert next(script.texts, None) is None
