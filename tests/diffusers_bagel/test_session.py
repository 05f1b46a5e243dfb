"""Conversations that go on: each turn reads what is new, and the contexts are those of one long prompt."""

from __future__ import annotations

import pytest
import torch

from diffusers_bagel.session import BagelSession
from tests.conftest import golden_image, max_error


DRAW = {"num_inference_steps": 3, "vae_sample_mode": "argmax"}


@pytest.fixture
def tokens_read(pipe):
    """How many tokens each forward of the transformer read."""
    counts: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(
            0 if kwargs.get("input_ids") is None else kwargs["input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    yield counts
    hook.remove()


def answer(pipe, *parts, **settings) -> str:
    """Of a conversation that is read at once."""
    messages = [{"role": role, "content": content} for role, content in parts]
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = pipe.transformer.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    return pipe.processor.decode(ids, skip_special_tokens=True)


def test_a_turn_reads_its_own_tokens(pipe, tokens_read):
    session = BagelSession(pipe)
    session.send(
        [golden_image("wide"), "what is it, and what else do you see in it?"], output="text", max_new_tokens=3
    )
    read = session._read.context(session._reader(None), session._said.seen.full).length
    tokens_read.clear()
    session.send("a", output="text", max_new_tokens=3)
    assert sum(tokens_read) < 16 < read


def test_turns_answer_as_one_long_prompt(pipe):
    session = BagelSession(pipe)
    settings = {"max_new_tokens": 6, "do_sample": False}
    first = session.send([golden_image("wide"), "what is it?"], output="text", **settings)
    second = session.send("and what else?", output="text", **settings)
    said = [("user", [{"type": "image", "image": golden_image("wide")}, {"type": "text", "text": "what is it?"}])]
    assert first.text == answer(pipe, *said, **settings)
    said += [("assistant", first.text), ("user", "and what else?")]
    assert second.text == answer(pipe, *said, **settings)
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]


def test_edits_draw_from_the_whole_conversation(pipe):
    noise = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    session = BagelSession(pipe)
    first = session.send("a red circle", output="image", height=48, width=64, latents=noise[:1], **DRAW).images[0]
    second = session.send("now make it blue", output="image", height=48, width=64, latents=noise[1:], **DRAW).images[0]
    messages = [
        {"role": "user", "content": "a red circle"},
        {"role": "assistant", "content": [{"type": "image", "image": first}]},
        {"role": "user", "content": "now make it blue"},
    ]
    size = {"height": 48, "width": 64, "output_type": "pt"}
    expected = pipe(messages=messages, latents=noise[1:], **size, **DRAW).images
    found = torch.from_numpy(__import__("numpy").asarray(second)).permute(2, 0, 1)[None] / 255
    assert max_error(found, expected) <= 1 / 255


def test_forks_go_on_by_themselves(pipe):
    session = BagelSession(pipe)
    session.send([golden_image("wide"), "what is it?"], output="text", max_new_tokens=4)
    fork = session.fork()
    answers = {}
    for name, each, question in (("first", session, "what colour?"), ("fork", fork, "how many are there?")):
        answers[name] = each.send(question, output="text", max_new_tokens=6).text
    again = BagelSession(pipe)
    again.send([golden_image("wide"), "what is it?"], output="text", max_new_tokens=4)
    assert again.send("how many are there?", output="text", max_new_tokens=6).text == answers["fork"]
    assert len(session.messages) == len(fork.messages) == 4
    assert session.messages[2] != fork.messages[2]
