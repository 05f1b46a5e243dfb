"""`/v1/responses`, by the official client."""

from __future__ import annotations

import openai
import pytest

from bagel_server import Engine

from .conftest import MODEL, SMALL, client_of, data_url, picture, served, user, wide


TOOL = {"type": "image_generation", "size": "64x48", "partial_images": 2}


def test_a_text_is_what_chat_completions_say(client):
    answer = client.responses.create(
        model=MODEL,
        instructions="be brief",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": data_url(wide()), "detail": "auto"},
                    {"type": "input_text", "text": "what is it?"},
                ],
            }
        ],
        max_output_tokens=6,
    )
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "system", "content": "be brief"}, user(wide(), "what is it?")], max_tokens=6
    )
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == 6


def test_a_tool_draws(client):
    answer = client.responses.create(
        model=MODEL,
        input="a red circle",
        tools=[TOOL | {"output_format": "webp"}],
        tool_choice={"type": "image_generation"},
        extra_body={"num_inference_steps": 3, "seed": 7},
    )
    (call,) = answer.output
    assert (call.type, call.status, answer.status) == ("image_generation_call", "completed", "completed")
    assert (picture(call.result).format, picture(call.result).size) == ("WEBP", (64, 48))


def test_items_of_an_answer_are_read_back(shapes):
    engine = Engine(shapes)
    with served(engine) as url:
        client = client_of(url)
        said = [{"role": "user", "content": "show the steps: a red star and a blue circle on white"}]
        settings = {"num_inference_steps": 10, "seed": 1}
        answer = client.responses.create(model=MODEL, input=said, tools=[TOOL | {"size": "auto"}], extra_body=settings)
        assert [item.type for item in answer.output] == ["message", "image_generation_call"] * 2
        later = client.responses.create(
            model=MODEL,
            input=[*said, *answer.output, {"role": "user", "content": "how many things are there?"}],
            reasoning={"effort": "low"},
        )
        assert [item.type for item in later.output] == ["reasoning", "message"]
        assert later.output_text == "two"
        assert later.usage.input_tokens_details.cached_tokens > 100
        assert later.usage.output_tokens_details.reasoning_tokens > 0
        last = client.responses.create(
            model=MODEL,
            input=[
                *said,
                *answer.output,
                {"role": "user", "content": "how many things are there?"},
                *later.output,
                {"role": "user", "content": "is there a red star?"},
            ],
        )
        # The thoughts are those of the words behind them, as the model wrote them.
        assert last.usage.input_tokens_details.cached_tokens > later.usage.input_tokens_details.cached_tokens + 10
    engine.close()


def test_events_have_the_names_that_the_client_knows(client):
    settings = {"model": MODEL, "input": "a red circle", "tools": [TOOL], "tool_choice": "required"}
    settings["extra_body"] = {"num_inference_steps": 6, "seed": 7}
    with client.responses.stream(**settings) as stream:
        events = list(stream)
        last = stream.get_final_response()
    kinds = [event.type for event in events]
    call = "response.image_generation_call"
    generating, partial = f"{call}.generating", f"{call}.partial_image"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        f"{call}.in_progress",
    ]
    assert [kind for kind in kinds[4:] if kind != generating] == [
        partial,
        partial,
        f"{call}.completed",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [(event.step, event.steps) for event in events if event.type == generating] == [
        (step, 6) for step in range(6)
    ]
    assert [event.partial_image_index for event in events if event.type == partial] == [0, 1]
    whole = client.responses.create(**settings)
    assert last.output[0].result == whole.output[0].result


def test_words_are_streamed(client):
    settings = {"model": MODEL, "input": "tell me more", "max_output_tokens": 8}
    events = list(client.responses.create(**settings, stream=True))
    words = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert words == client.responses.create(**settings).output_text
    done = next(event for event in events if event.type == "response.output_text.done")
    assert done.text == words
    assert events[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL | {"size": "x"}]}, "size"),
        ({"tools": [TOOL | {"input_fidelity": "high"}]}, "tools[0].input_fidelity"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0]"),
        ({"input": [{"type": "image_generation_call", "result": "?"}]}, "input[0].content[0].image_url"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"extra_body": SMALL | {"height": 17, "output": "image"}}, "height"),
    ],
)
def test_what_is_wrong_is_refused_by_name(settings, param, client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(**({"model": MODEL, "input": "x"} | settings))
    assert raised.value.body["param"] == param


def test_a_reference_to_an_item_is_refused_with_the_way_out(client):
    with pytest.raises(openai.BadRequestError, match="send the item itself, as with `store` false"):
        client.responses.create(model=MODEL, input=[{"type": "item_reference", "id": "msg_1"}])
