"""Conversations that are kept: the answers are the same with and without them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from bagel_server import Engine
from bagel_server.session_cache import SessionCache, keys_of
from diffusers_bagel import BagelSession
from diffusers_bagel.recalling import Turn, turns_of
from tests.conftest import golden_image

from .conftest import MODEL, SMALL, client_of, picture, png, served, user, wide


def metric(client, name: str) -> float:
    text = client.get("/../metrics", cast_to=str)
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


def converse(client, *settings: dict) -> list:
    """A conversation of several turns, whose answers are sent back as they came."""
    messages, answers = [], []
    for place, own in enumerate(settings):
        messages.append(user(*([wide()] if place == 0 else []), f"question {place}"))
        answer = client.chat.completions.create(model=MODEL, messages=messages, seed=place, max_tokens=6, **own)
        messages.append(answer.choices[0].message)
        answers.append(answer)
    return answers


TEXT, PICTURE = {}, {"modalities": ["image"], "extra_body": SMALL}
BOTH = {"modalities": ["text", "image"], "extra_body": SMALL | {"max_images": 1}}
# Which sees images in its own size.
PRESET = {"modalities": ["image"], "extra_body": SMALL | {"preset": "gedit"}}
PLANNED = {"modalities": ["image"], "extra_body": SMALL | {"think": True}}


@pytest.mark.parametrize(
    "turns", [[TEXT, TEXT, PICTURE], [PICTURE, TEXT, PICTURE], [BOTH, TEXT], [PLANNED, PICTURE, TEXT], [PRESET, TEXT]]
)
def test_a_conversation_goes_on_alike_from_the_cache_and_from_nothing(turns, engine):
    with served(engine) as cached, served(engine, max_cache_bytes=0) as plain:
        one, other = (converse(client_of(url), *turns) for url in (cached, plain))
    for mine, its in zip(one, other, strict=True):
        found, expected = (answer.choices[0].message.model_dump() for answer in (mine, its))
        pictures = [
            [np.asarray(picture(image["image_url"]["url"]), int) for image in message.pop("images", ())]
            for message in (found, expected)
        ]
        assert found == expected
        # What is read in other pieces is rounded otherwise, so that a pixel may fall to the next level.
        for drawn, its_own in zip(*pictures, strict=True):
            assert np.abs(drawn - its_own).max() <= 1
        assert mine.usage.prompt_tokens == its.usage.prompt_tokens
    assert not any(answer.usage.prompt_tokens_details.cached_tokens for answer in other)


def test_what_was_said_is_not_read_again(engine):
    with served(engine) as url:
        client = client_of(url)
        answers = converse(client, TEXT, PICTURE, TEXT)
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
        assert cached[0] == 0
        assert all(
            0 < count < answer.usage.prompt_tokens for count, answer in zip(cached[1:], answers[1:], strict=True)
        )
        assert metric(client, "bagel_session_cache_hits_total") == 2
        assert metric(client, "bagel_session_cache_sessions") == 3
        assert metric(client, "bagel_session_cache_bytes") > 0


def test_thoughts_that_are_sent_back_are_found_and_those_that_are_not_are_not(shapes):
    engine = Engine(shapes)
    with served(engine) as url:
        client = client_of(url)
        asked = [user("how many things are in: a red star and a blue circle?")]
        answer = client.chat.completions.create(model=MODEL, messages=asked, reasoning_effort="low", max_tokens=64)
        message = answer.choices[0].message
        assert message.reasoning_content
        by_hand = {"role": "assistant", "content": message.content, "reasoning_content": message.reasoning_content}
        forgetful = {"role": "assistant", "content": message.content}
        found = []
        for history in (message, by_hand, forgetful):
            later = client.chat.completions.create(
                model=MODEL, messages=[*asked, history, user("really?")], max_tokens=8
            )
            found.append(later.usage.prompt_tokens_details.cached_tokens > 0)
        assert found == [True, True, False]
    engine.close()


def test_a_changed_picture_is_another_conversation(engine):
    with served(engine) as url:
        client = client_of(url)
        said = [user(wide(), "look"), {"role": "assistant", "content": "yes"}]
        first = client.chat.completions.create(model=MODEL, messages=[user(wide(), "look")], max_tokens=4)
        said = [user(golden_image("tall").convert("RGB"), "look"), first.choices[0].message, user("and?")]
        later = client.chat.completions.create(model=MODEL, messages=said, max_tokens=4)
        assert later.usage.prompt_tokens_details.cached_tokens == 0


def test_two_go_on_from_one_conversation_at_once(engine):
    with served(engine) as url, served(engine, max_cache_bytes=0) as plain:
        first = client_of(url).chat.completions.create(model=MODEL, messages=[user("say")], max_tokens=6)
        history = [user("say"), first.choices[0].message]
        found: dict[str, str] = {}

        def ask(word: str) -> None:
            answer = client_of(url).chat.completions.create(model=MODEL, messages=[*history, user(word)], max_tokens=6)
            found[word] = answer.choices[0].message.content

        threads = [threading.Thread(target=ask, args=(word,)) for word in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for word in "abcd":
            alone = client_of(plain).chat.completions.create(
                model=MODEL, messages=[*history, user(word)], max_tokens=6
            )
            assert found[word] == alone.choices[0].message.content


def said(pipe, *words: str) -> BagelSession:
    session = BagelSession(pipe)
    for word in words:
        session.send(word, output="text", max_new_tokens=2)
    return session


def test_a_cache_keeps_what_was_used_last_within_its_bytes(pipe):
    keys = [keys_of([Turn(({"type": "text", "text": word},))])[0] for word in "abc"]
    cache = SessionCache(10**9)
    cache.keep(keys[0], said(pipe, "a"))
    size = cache.stats().bytes
    cache = SessionCache(int(2.5 * size))
    for key, word in zip(keys[:2], "ab", strict=True):
        cache.keep(key, said(pipe, word))
    assert cache.find(keys[:1])[1] == 1
    cache.keep(keys[2], said(pipe, "c"))
    stats = cache.stats()
    assert (stats.sessions, stats.bytes, stats.evictions) == (2, 2 * size, 1)
    assert [cache.find([key])[1] for key in keys] == [1, 0, 1]
    # One that is larger than all of it leaves the others alone.
    SessionCache(1).keep(keys[0], said(pipe, "a"))
    assert SessionCache(1).stats().sessions == 0


def test_the_longest_beginning_that_is_known_is_found(pipe):
    session = said(pipe, "a", "b")
    keys = keys_of(turns_of(session.messages))
    cache = SessionCache(10**9)
    cache.keep(keys[0], said(pipe, "a"))
    assert cache.find(keys)[1] == 1
    cache.keep(keys[1], session)
    found, count = cache.find([*keys, b"another turn"])
    assert count == 2 and found is not session
    assert found.messages == session.messages


def test_pictures_of_the_images_interfaces_take_no_place_of_conversations(engine):
    with served(engine) as url:
        client = client_of(url)
        client.images.generate(model=MODEL, prompt="a circle", extra_body=SMALL)
        client.images.edit(model=MODEL, image=("wide.png", png(golden_image("wide"))), prompt="x", extra_body=SMALL)
        assert metric(client, "bagel_session_cache_sessions") == 0
        converse(client, TEXT)
        assert metric(client, "bagel_session_cache_sessions") == 1
