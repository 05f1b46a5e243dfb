"""A session of many turns computes what one long prompt does that is read at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from diffusers_bagel import BagelSession
from diffusers_bagel.work import Decoding
from tests.conftest import golden_image, max_error
from tests.diffusers_bagel.conftest import seeded


DRAW = {"height": 48, "width": 64, "num_inference_steps": 3, "vae_sample_mode": "argmax"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scores:
    """Notes the scores of the first token of each text."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []

    def next_text(self) -> Scores:
        self.is_first = True
        return self

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.is_first:
            self.first.append(scores.clone())
        self.is_first = False
        return scores


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 12, 16, generator=seeded(seed))


def as_prompt(messages: Sequence[dict]) -> list[dict]:
    """Up to what the user said last."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return [message | {"content": list(message["content"])} for message in messages[: last + 1]]


def test_scores_of_texts(pipe):
    """Of the chat that is read at once: texts, images that are given, and a picture that was drawn."""
    session, scores = BagelSession(pipe), Scores()
    contents = ["what is a circle?", [golden_image("wide"), "and this?"], "why?", [golden_image("tall"), "or this?"]]
    for turn, content in enumerate(contents):
        if turn == 2:
            session.send("draw it", output="image", **DRAW)
        session.send(content, output="text", max_new_tokens=4, logits_processor=[scores.next_text()])
        inputs = pipe.processor.apply_chat_template(
            as_prompt(session.messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        pipe.transformer.generate(**inputs, max_new_tokens=1, do_sample=False, logits_processor=[scores.next_text()])
        own, expected = scores.first[-2:]
        assert max_error(own, expected) <= (1e-5 if turn else 0)


@pytest.fixture
def latents(monkeypatch) -> list[torch.Tensor]:
    """Of each picture of a session."""
    drawn: list[torch.Tensor] = []
    together = Decoding.together

    def watched(works: Sequence[Decoding]) -> list:
        drawn.extend(work.latents for work in works)
        return together(works)

    monkeypatch.setattr(Decoding, "together", staticmethod(watched))
    return drawn


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {}, {"image_guidance_scale": 1.5}], ids=str)
def test_latents_of_pictures(settings, pipe, latents):
    """Of the pipeline's call with all messages: texts, images given and pictures drawn, an answer between them."""
    session = BagelSession(pipe)
    contents = ["a red circle", [golden_image("wide"), "now this one"], "make it blue", "and larger"]
    for turn, content in enumerate(contents):
        session.send(content, output="image", latents=[noise(turn)[0]], **DRAW, **settings)
        expected = pipe(
            messages=as_prompt(session.messages), latents=noise(turn), output_type="latent", **DRAW, **settings
        ).images
        # What is read at once in both is the same to the bit.
        assert max_error(latents[-1], expected) <= (1e-5 if turn else 0)
        if turn == 1:
            session.send("what is it?", output="text", max_new_tokens=4, do_sample=False)
