"""`/v1/chat/completions`, by the official client."""

from __future__ import annotations

import openai
import pytest
import torch

from bagel_server import Engine

from .conftest import MODEL, SMALL, client_of, picture, served, session_of, user, wide


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_text_is_what_a_session_says(client, pipe):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "system", "content": "be brief"}, user(wide(), "what is it?")], max_tokens=6
    )
    reply = session_of(pipe).send(
        ["be brief", wide(), "what is it?"],
        output="text",
        max_new_tokens=6,
        sanitize_control_tokens=True,
        vae_sample_mode="argmax",
    )
    choice = answer.choices[0]
    assert choice.message.content == reply.text
    assert (choice.message.role, choice.finish_reason, answer.object) == ("assistant", "length", "chat.completion")
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_a_picture_is_what_a_session_draws(client, pipe):
    answer = client.chat.completions.create(
        model=MODEL, messages=[user(wide(), "make it red")], modalities=["image"], seed=7, extra_body=SMALL
    )
    reply = session_of(pipe).send(
        [wide(), "make it red"],
        output="image",
        generator=seeded(7),
        sanitize_control_tokens=True,
        vae_sample_mode="argmax",
        **SMALL,
    )
    message = answer.choices[0].message
    assert message.content is None
    assert picture(message.images[0]["image_url"]["url"]).tobytes() == reply.images[0].tobytes()
    assert message.parts == [{"type": "image", "index": 0}]
    assert answer.usage.completion_tokens_details.image_tokens == answer.usage.completion_tokens == 12


def test_texts_and_pictures_come_in_turn_and_are_read_back(shapes):
    engine = Engine(shapes)
    with served(engine) as url:
        client = client_of(url)
        said = [user("show the steps: a red star and a blue circle on white")]
        answer = client.chat.completions.create(
            model=MODEL, messages=said, modalities=["text", "image"], seed=1, extra_body={"num_inference_steps": 10}
        )
        message = answer.choices[0].message
        assert [part["type"] for part in message.parts] == ["text", "image", "text", "image"]
        assert len(message.images) == 2
        assert message.content == "\n".join(part["text"] for part in message.parts if "text" in part)
        later = client.chat.completions.create(
            model=MODEL, messages=[*said, message, user("how many things are there?")], max_tokens=8
        )
        assert later.choices[0].message.content == "two"
        assert later.choices[0].finish_reason == "stop"
        assert later.usage.prompt_tokens_details.cached_tokens > 100
    engine.close()


def test_a_message_as_litellm_keeps_it_is_read_back(client):
    said = [user("a red circle")]
    asked = {"model": MODEL, "modalities": ["image"], "seed": 1, "extra_body": SMALL}
    message = client.chat.completions.create(messages=said, **asked).choices[0].message.model_dump()
    kept = {name: message[name] for name in ("role", "content", "images")}
    kept |= {"tool_calls": None, "function_call": None, "provider_specific_fields": {"parts": message["parts"]}}
    first, second = (
        client.chat.completions.create(model=MODEL, messages=[*said, answer, user("what is it?")], max_tokens=6)
        for answer in (message, kept)
    )
    assert second.choices[0].message == first.choices[0].message
    assert second.usage.prompt_tokens == first.usage.prompt_tokens


def test_thoughts_that_litellm_keeps_stand_where_the_model_wrote_them(client):
    written = "<think>a circle</think>red"
    answers = [
        {"role": "assistant", "content": "red", "reasoning_content": "a circle", **kept}
        for kept in (
            {"parts": [{"type": "text", "text": written}]},
            {"provider_specific_fields": {"parts": [{"type": "text", "text": written}]}},
            {"provider_specific_fields": {"refusal": None}},
            {"provider_specific_fields": None},
        )
    ]
    asked = {"model": MODEL, "max_tokens": 1}
    counts = {
        client.chat.completions.create(messages=[user("x"), answer, user("y")], **asked).usage.prompt_tokens
        for answer in answers
    }
    assert len(counts) == 1


def test_thoughts_stand_apart(shapes):
    engine = Engine(shapes)
    with served(engine) as url:
        asked = {
            "model": MODEL,
            "messages": [user("a circle in the colour of grass")],
            "modalities": ["image"],
            "reasoning_effort": "low",
            "seed": 1,
            "extra_body": {"num_inference_steps": 8},
        }
        answer = client_of(url).chat.completions.create(**asked)
        message = answer.choices[0].message
        assert message.reasoning_content.startswith("a large green circle")
        assert message.content is None and len(message.images) == 1
        assert answer.usage.completion_tokens_details.reasoning_tokens > 4
        chunks = list(client_of(url).chat.completions.create(**asked, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == message.reasoning_content
        assert [image for delta in deltas for image in getattr(delta, "images", [])] == message.images
    engine.close()


def test_a_stream_has_the_same_words_then_the_usage(client):
    asked = {
        "model": MODEL,
        "messages": [user("tell me more")],
        "max_completion_tokens": 12,
        "temperature": 1,
        "seed": 3,
    }
    whole = client.chat.completions.create(**asked)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage


def test_a_stream_shows_pictures_as_they_form(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[user("a red circle")],
        modalities=["image"],
        stream=True,
        seed=1,
        extra_body=SMALL | {"preview_every": 1},
    )
    chunks = list(stream)
    previews = [chunk.preview for chunk in chunks if hasattr(chunk, "preview")]
    assert [preview["step"] for preview in previews] == [0, 1]
    assert picture(previews[0]["image_url"]["url"]).size == (64, 48)
    steps = [(chunk.progress["step"], chunk.progress["steps"]) for chunk in chunks if hasattr(chunk, "progress")]
    assert steps == [(0, 3), (1, 3), (2, 3)]
    # What collects deltas has nothing to do with them.
    assert all(
        chunk.choices[0].delta.model_dump(exclude_unset=True) == {} for chunk in chunks if hasattr(chunk, "preview")
    )


def test_the_clients_own_collector_takes_the_stream(client):
    asked = {
        "model": MODEL,
        "messages": [user("a red circle")],
        "modalities": ["image"],
        "seed": 1,
        "extra_body": SMALL,
    }
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        collected = stream.get_final_completion()
    assert collected.choices[0].message.images == whole.choices[0].message.images
    assert collected.choices[0].finish_reason == "stop"


def test_choices_follow_their_seeds(client):
    def texts(**settings) -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL, messages=[user("say something")], max_tokens=8, temperature=2, top_p=0.99, **settings
        )
        return [choice.message.content for choice in answer.choices]

    first, second = texts(n=2, seed=5)
    assert first != second
    assert texts(seed=5) == [first]
    assert texts(seed=6) == [second]


def test_several_choices_are_streamed_side_by_side(client):
    asked = {"model": MODEL, "messages": [user("say")], "max_tokens": 8, "temperature": 2, "n": 2, "seed": 5}
    whole = client.chat.completions.create(**asked)
    words = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        words[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert words == [choice.message.content for choice in whole.choices]


def test_an_answer_without_a_seed_tells_its_own(client):
    asked = {"model": MODEL, "messages": [user("say something")], "max_tokens": 8, "temperature": 2}
    first = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked, seed=first.seed)
    assert again.choices[0].message.content == first.choices[0].message.content


def test_a_preset_is_what_it_is_in_a_session(client, pipe):
    asked = {"model": MODEL, "messages": [user(wide(), "make it red")], "modalities": ["image"], "seed": 7}
    answer = client.chat.completions.create(**asked, extra_body=SMALL | {"preset": "gedit"})
    reply = session_of(pipe).send(
        [wide(), "make it red"],
        output="image",
        preset="gedit",
        generator=seeded(7),
        sanitize_control_tokens=True,
        vae_sample_mode="argmax",
        **SMALL,
    )
    message = answer.choices[0].message
    assert picture(message.images[0]["image_url"]["url"]).tobytes() == reply.images[0].tobytes()


def test_a_stop_is_no_part_of_the_answer(client):
    asked = {"model": MODEL, "messages": [user("tell me more")], "max_tokens": 12}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    answer = client.chat.completions.create(**asked, stop=[stop, "never said"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_a_stop_ends_the_writing_and_no_vocabulary_is_looked_through(client, engine, monkeypatch):
    tokenizer = type(engine.pipe.processor.tokenizer)
    monkeypatch.setattr(tokenizer, "get_vocab", lambda *_: pytest.fail("The vocabulary was looked through."))
    asked = {"model": MODEL, "messages": [user("tell me more")], "max_tokens": 200}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    before = engine.stats().tokens
    client.chat.completions.create(**asked, stop=whole[:10])
    assert engine.stats().tokens - before < 20


REFUSED = {
    "messages": [
        ([], "messages"),
        (["x"], "messages[0]"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "secret": 1}], "messages[0].secret"),
        ([{"role": "assistant", "provider_specific_fields": 1}], "messages[0].provider_specific_fields"),
        ([{"role": "user", "content": "x"}] * 300, "messages"),
    ],
    "model": [("gpt-5", "model")],
    "temperature": [(-1, "temperature"), ("hot", "temperature")],
    "top_p": [(0, "top_p")],
    "n": [(0, "n"), (1000, "n")],
    "seed": [(2**64, "seed")],
    "stop": [([""], "stop"), (["a"] * 5, "stop")],
    "max_tokens": [(0, "max_tokens"), (10**9, "max_tokens")],
    "max_completion_tokens": [(2.5, "max_completion_tokens")],
    "modalities": [([], "modalities"), (["audio"], "modalities[0]")],
    "logprobs": [(True, "logprobs")],
    "tools": [([{"type": "function"}], "tools")],
    "response_format": [({"type": "json_object"}, "response_format")],
    "stream_options": [({"include_usage": True}, "stream_options")],
    "output": [("sound", "output")],
    "height": [(17, "height"), (10**6, "height")],
    "size": [("big", "size"), ("17x16", "size")],
    "num_inference_steps": [(0, "num_inference_steps"), (10**6, "num_inference_steps")],
    "guidance_scale": [(-1, "guidance_scale")],
    "preset": [("nothing", "preset")],
    "foo": [(1, "foo")],
}


@pytest.mark.parametrize(
    ("field", "value", "param"), [(field, *case) for field, cases in REFUSED.items() for case in cases]
)
def test_what_is_wrong_is_refused_by_name(field, value, param, client):
    asked = {"messages": [{"role": "user", "content": "x"}], "output": "image", field: value}
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model=MODEL, messages=[], extra_body=asked)
    assert raised.value.status_code == (404 if field == "model" else 400)
    error = raised.value.response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
