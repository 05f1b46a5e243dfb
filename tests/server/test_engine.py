"""An engine: each answer is what its session gives alone, whatever runs beside it and whatever becomes of that."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from bagel_server import Engine, EngineClosed, EngineFull
from bagel_server.answers import Outbox
from bagel_server.rounds import Job
from diffusers_bagel import BagelPipeline, BagelReply, BagelSession
from diffusers_bagel.denoising import Denoiser
from diffusers_bagel.writing import _Batch
from tests.conftest import golden_image, load_processor
from tests.diffusers_bagel.conftest import seeded
from transformers_bagel import PrefixBuffer


DRAW = {"height": 48, "width": 64, "num_inference_steps": 3, "vae_sample_mode": "argmax"}
SAMPLE = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}
LONG = {"output": "text", "max_new_tokens": 200}


def never_ends(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    forced = torch.full_like(scores, -torch.inf)
    forced[:, 64] = 0.0
    return forced


@pytest.fixture
def engine(pipe) -> Iterator[Engine]:
    with Engine(pipe) as engine:
        yield engine


class Gate:
    """A logits processor at which the engine waits, once it has been passed so many times, until it is opened."""

    def __init__(self, free: int = 0):
        self.free, self.reached, self.opened = free, threading.Event(), threading.Event()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.free -= 1
        if self.free < 0:
            self.reached.set()
            assert self.opened.wait(60)
        return scores


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """An engine that waits in an answer of its own, until the end of the block."""
    gate = Gate()
    answer = engine.submit(BagelSession(engine.pipe), "a", "text", max_new_tokens=2, logits_processor=[gate])
    assert gate.reached.wait(60)
    try:
        yield
    finally:
        gate.opened.set()
        answer.result(60)


def parts(reply: BagelReply) -> list:
    return [part.get("text") if part["type"] == "text" else part["image"].size for part in reply.content]


def assert_equal(one: BagelReply, other: BagelReply) -> None:
    assert parts(one) == parts(other)
    for picture, expected in zip(one.images, other.images, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("It did not come to that within a minute.")


# Ten answers of all kinds: what is said, and settings, made anew for each run.
MIXED: list[Callable[[], tuple]] = [
    lambda: ("a", {"output": "text", "max_new_tokens": 12}),
    lambda: ("many small yellow squares left of a large green triangle", {"output": "text", "max_new_tokens": 30}),
    lambda: ([golden_image("wide"), "what is it?"], {"output": "text", "max_new_tokens": 9}),
    lambda: ("a", {"output": "text", "generator": seeded(3)} | SAMPLE),
    lambda: ("a", {"output": "text", "generator": seeded(4), "think": True} | SAMPLE),
    lambda: ("a red circle", {"output": "image", "generator": seeded(5)} | DRAW),
    lambda: ("a blue circle", {"output": "image", "generator": seeded(6)} | DRAW | {"num_inference_steps": 7}),
    lambda: ([golden_image("tall"), "make it green"], {"output": "image", "generator": seeded(7)} | DRAW),
    lambda: ("two", {"output": "image", "generator": seeded(8), "think": True, "guidance_scale": 1.0} | SAMPLE | DRAW),
    lambda: ("three", {"output": "auto", "generator": seeded(9), "max_images": 1} | SAMPLE | DRAW),
]


class TestAnswers:
    def test_ten_of_all_kinds_are_those_of_their_sessions_alone(self, engine, pipe):
        alone = [BagelSession(pipe) for _ in MIXED]
        together = [BagelSession(pipe) for _ in MIXED]
        for _ in range(2):
            expected = []
            for session, make in zip(alone, MIXED, strict=True):
                content, settings = make()
                expected.append(session.send(content, **settings))
            with held(engine):
                answers = []
                for session, make in zip(together, MIXED, strict=True):
                    content, settings = make()
                    answers.append(engine.submit(session, content, **settings))
            for answer, reply in zip(answers, expected, strict=True):
                assert_equal(answer.result(60), reply)
        for session, other in zip(together, alone, strict=True):
            lengths = [
                {name: (context.length, context.next_position) for name, context in each.contexts.items()}
                for each in (session, other)
            ]
            assert lengths[0] == lengths[1]

    def test_those_that_run_share_forwards(self, engine, pipe, forwards):
        seen = forwards(pipe)
        with held(engine):
            texts = [
                engine.submit(BagelSession(pipe), "a b", "text", max_new_tokens=4, logits_processor=[never_ends])
                for _ in range(3)
            ]
            pictures = [
                engine.submit(BagelSession(pipe), "a b", "image", **DRAW | {"num_inference_steps": steps})
                for steps in (3, 5)
            ]
        for answer in (*texts, *pictures):
            answer.result(60)
        # One token is chosen by the scores of the prompt.
        assert [len(call["input_ids"]) for call in seen.reading if call["input_ids"].shape[1] == 1].count(3) == 3
        # Two branches each while both are drawn, though at other noise levels.
        assert seen.branches[:3] == [4, 4, 4] and len(seen.branches) == 5

    def test_one_joins_others_in_the_middle(self, engine, pipe):
        gate = Gate(free=4)
        early = engine.submit(BagelSession(pipe), "a b", "text", max_new_tokens=20, logits_processor=[gate])
        assert gate.reached.wait(60)
        late = engine.submit(BagelSession(pipe), "many small yellow squares", "text", max_new_tokens=6)
        gate.opened.set()
        for answer, content, count in ((late, "many small yellow squares", 6), (early, "a b", 20)):
            assert_equal(answer.result(60), BagelSession(pipe).send(content, output="text", max_new_tokens=count))

    def test_events_are_those_of_the_session(self, engine, pipe):
        settings = {"output": "image", "preview_every": 2, "progress": True} | DRAW | {"num_inference_steps": 5}
        expected = BagelSession(pipe).stream("a", generator=seeded(0), **settings)
        events = list(engine.submit(BagelSession(pipe), "a", generator=seeded(0), **settings))
        assert [(event.type, event.step, event.steps) for event in events] == [
            (event.type, event.step, event.steps) for event in expected
        ]
        assert [event.step for event in events if event.type == "progress"] == [0, 1, 2, 3, 4]
        assert [event.step for event in events if event.type == "preview"] == [1, 3]

    def test_words_come_as_they_are_written(self, engine, pipe):
        gate = Gate(free=6)
        answer = engine.submit(
            BagelSession(pipe), "a", "text", max_new_tokens=12, logits_processor=[gate, spaced(pipe)]
        )
        events = iter(answer)
        first = next(events)
        assert first.text and not gate.opened.is_set()
        gate.opened.set()
        words = first.text + "".join(event.text or "" for event in events)
        assert words == answer.result().text

    def test_an_event_loop_waits_for_many(self, engine, pipe):
        async def read(content: str) -> list[str]:
            answer = engine.submit(BagelSession(pipe), content, "text", max_new_tokens=6)
            return [event.type async for event in answer]

        async def read_all() -> list[list[str]]:
            return await asyncio.gather(*(read(content) for content in "abcd"))

        before = threading.active_count()
        found = asyncio.run(read_all())
        assert all(types[-1] == "done" for types in found)
        assert threading.active_count() == before

    def test_the_progress_bar_of_the_pipeline_is_not_shown(self, own_pipe, capsys):
        own_pipe.set_progress_bar_config(disable=False)
        with Engine(own_pipe) as engine:
            engine.submit(BagelSession(own_pipe), "a", "image", **DRAW).result(60)
        assert "3/3" not in capsys.readouterr().err


def spaced(pipe: BagelPipeline):
    """Writes words of one letter."""
    letter, space = (pipe.processor.tokenizer(text)["input_ids"][0] for text in ("a", " "))

    def write(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, letter if ids[0, -1] == space else space] = 0.0
        return scores

    return write


class TestFairness:
    def test_texts_get_tokens_between_the_steps_of_pictures(self, engine, pipe):
        kinds: list[str] = []

        def note(module, args, kwargs):
            is_text = kwargs.get("input_ids") is not None
            kinds.append("token" if is_text and kwargs["input_ids"].shape[1] == 1 else "read" if is_text else "step")

        with held(engine):
            texts = [
                engine.submit(BagelSession(pipe), "a", **LONG | {"logits_processor": [never_ends]}) for _ in range(2)
            ]
            pictures = [
                engine.submit(BagelSession(pipe), "a", "image", **DRAW | {"num_inference_steps": 12}) for _ in range(2)
            ]
            hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        for answer in pictures:
            answer.result(60)
        for answer in texts:
            answer.cancel()
            answer.result(60)
        hook.remove()
        steps = [place for place, kind in enumerate(kinds) if kind == "step"]
        assert len(steps) == 12
        between = [kinds[start:stop].count("token") for start, stop in zip(steps, steps[1:], strict=False)]
        assert min(between) >= 1
        # As much time as a step took, which a text cannot use a hundred times over.
        assert max(between) <= 100

    def test_who_comes_first_is_drawn_first_where_not_all_fit_into_a_forward(self, engine, pipe, monkeypatch):
        monkeypatch.setattr("diffusers_bagel.denoising.MAX_STEP_TOKENS_CPU", 2 * 2 * 12)
        ended: list[int] = []
        with held(engine):
            answers = [engine.submit(BagelSession(pipe), "a", "image", **DRAW) for _ in range(5)]
        threads = [
            threading.Thread(target=lambda place=place, answer=answer: (answer.result(60), ended.append(place)))
            for place, answer in enumerate(answers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(ended[:2]) == {0, 1} and set(ended[2:4]) == {2, 3} and ended[4] == 4


class TestEnding:
    @pytest.mark.parametrize("way", ["cancel", "leave", "drop", "leave the loop"])
    def test_one_that_nobody_wants_frees_its_place_within_a_token(self, way, engine, pipe):
        gate, session = Gate(free=3), BagelSession(pipe)
        processors = [never_ends, gate]
        answer = engine.submit(session, "a b c", **LONG | {"logits_processor": processors})
        assert gate.reached.wait(60)
        if way == "cancel":
            answer.cancel()
        elif way == "leave":
            events = iter(answer)
            del answer
            # Nothing has come yet, so that a thread that waits for it would be in `wait`.
            events.close()
        elif way == "leave the loop":
            asyncio.run(left(answer))
        answer = events = None
        gc.collect()
        forwards = engine.stats().forwards
        gate.opened.set()
        until(lambda: engine.stats().running == 0)
        assert engine.stats().forwards - forwards <= 1
        assert engine.stats().cancelled == 1
        assert [message["role"] for message in session.messages] == ["user"]
        assert session.send("b", output="text", max_new_tokens=2).content

    def test_a_picture_that_nobody_wants_frees_its_place_within_a_step(self, engine, pipe):
        """The one that is being made when it is cancelled."""
        steps, answers = [], []

        def cancel_in_the_third(module, args, kwargs):
            steps.append(kwargs.get("latents") is not None and kwargs.get("input_ids") is None)
            if sum(steps) == 3:
                answers[0].cancel()

        with held(engine):
            answers.append(engine.submit(BagelSession(pipe), "a", "image", **DRAW | {"num_inference_steps": 500}))
            hook = pipe.transformer.register_forward_pre_hook(cancel_in_the_third, with_kwargs=True)
        try:
            answers[0].result(60)
        finally:
            hook.remove()
        assert engine.stats().steps == sum(steps) == 3
        assert engine.stats().pictures == 0

    def test_what_was_whole_of_a_cancelled_one_stays(self, engine, pipe):
        session = BagelSession(pipe, BagelSession(pipe).protocol)
        answer = engine.submit(
            session, "a", "image", think=True, progress=True, max_new_tokens=4, **DRAW | {"num_inference_steps": 500}
        )
        for event in answer:
            if event.type == "progress":
                answer.cancel()
        assert [part["type"] for part in event.reply.content] == ["text"]
        assert session.messages[-1]["content"] == event.reply.content
        assert answer.result().content == event.reply.content

    def test_one_that_is_cancelled_while_it_waits_says_nothing(self, pipe):
        with Engine(pipe, max_running=1) as engine:
            session = BagelSession(pipe)
            with held(engine):
                answer = engine.submit(session, "a", "text")
                answer.cancel()
            assert answer.result(60).content == []
            assert session.messages == []
            assert session.send("a", output="text", max_new_tokens=1).content

    def test_an_interrupted_session_ends_its_answer(self, engine, pipe):
        gate, session = Gate(free=2), BagelSession(pipe)
        answer = engine.submit(session, "a", **LONG | {"logits_processor": [never_ends, gate]})
        assert gate.reached.wait(60)
        session.interrupt()
        gate.opened.set()
        assert answer.result(60).content == []

    def test_one_whose_time_is_over(self, engine, pipe):
        session = BagelSession(pipe)
        answer = engine.submit(session, "a", timeout=0.3, **LONG | {"logits_processor": [slow, never_ends]})
        with pytest.raises(TimeoutError, match="The time for the answer is over"):
            list(answer)
        assert session.send("b", output="text", max_new_tokens=2).content

    def test_waiting_counts_in_its_time(self, pipe):
        with Engine(pipe, max_running=1) as engine:
            with held(engine):
                answer = engine.submit(BagelSession(pipe), "a", "text", timeout=0.05)
                time.sleep(0.1)
            with pytest.raises(TimeoutError):
                answer.result(60)
            assert engine.stats().errors == 1

    def test_a_result_that_is_not_there_yet(self, engine, pipe):
        with held(engine):
            answer = engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=2)
            with pytest.raises(TimeoutError, match="still being made"):
                answer.result(0.05)
        assert answer.result(60).content


async def left(answer) -> None:
    """Begin to listen in an event loop, and leave it."""

    async def listen() -> None:
        async for _ in answer:
            pass

    task = asyncio.create_task(listen())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def slow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    time.sleep(0.1)
    return scores


class TestFailures:
    @pytest.mark.parametrize("kind", [ValueError, SystemExit])
    def test_an_error_of_one_ends_it_alone(self, kind, engine, pipe):
        def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise kind("mine")

        noise = torch.full((12, 16), torch.nan)
        with held(engine):
            wrong = engine.submit(BagelSession(pipe), "a", "text", logits_processor=[fails])
            nan = engine.submit(BagelSession(pipe), "a", "image", latents=[noise], **DRAW)
            right = engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=9)
            drawn = engine.submit(BagelSession(pipe), "a", "image", generator=seeded(0), **DRAW)
        if kind is ValueError:
            with pytest.raises(ValueError, match="mine"):
                wrong.result(60)
            with pytest.raises(ValueError, match="NaN"):
                list(nan)
            assert_equal(right.result(60), BagelSession(pipe).send("a", output="text", max_new_tokens=9))
            expected = BagelSession(pipe).send("a", output="image", generator=seeded(0), **DRAW)
            assert_equal(drawn.result(60), expected)
        else:
            # What ends threads ends whatever runs, but not the engine.
            with pytest.raises(RuntimeError, match="SystemExit"):
                wrong.result(60)
        assert engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=2).result(60).content

    def test_an_error_that_leads_back_to_itself_ends_its_answer(self, pipe):
        def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            one, two = ValueError("one"), KeyError("two")
            one.__cause__, two.__context__ = two, one
            raise one

        with Engine(pipe) as engine:
            wrong = engine.submit(BagelSession(pipe), "a", "text", logits_processor=[fails])
            with pytest.raises(ValueError, match="one"):
                wrong.result(60)
            assert engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=2).result(60).content

    def test_a_decoding_that_fails_ends_its_picture_alone(self, own_pipe):
        decode, seen = own_pipe.decode_latents, []

        def watched(latents: torch.Tensor, *args):
            seen.append(latents)
            return decode(latents, *args)

        def picky(latents: torch.Tensor, *args):
            if min((own - seen[0]).abs().max() for own in latents.split(1)) < 1e-3:
                raise ValueError("not this one")
            return decode(latents, *args)

        own_pipe.decode_latents = watched
        BagelSession(own_pipe).send("a", output="image", generator=seeded(1), **DRAW)
        own_pipe.decode_latents = picky
        with Engine(own_pipe) as engine:
            with held(engine):
                answers = [
                    engine.submit(BagelSession(own_pipe), "a", "image", generator=seeded(seed), **DRAW)
                    for seed in range(3)
                ]
            with pytest.raises(ValueError, match="not this one"):
                answers[1].result(60)
            assert all(answers[place].result(60).images for place in (0, 2))

    @pytest.mark.parametrize("kind", ["text", "image"])
    def test_want_of_memory_ends_only_those_that_fail_alone(self, kind, engine, pipe):
        """Forwards of several fail, and then those of one of them."""
        broken = 0

        def fail(module, args, kwargs):
            nonlocal broken
            ids, latents = kwargs.get("input_ids"), kwargs.get("latents")
            is_shared = (ids is not None and ids.shape == (3, 1)) or (latents is not None and len(latents) > 3 * 12)
            is_longest = (ids is not None and ids.shape[1] == 1 and int(kwargs["position_ids"].max()) > 20) or (
                latents is not None and int(kwargs["position_ids"].max()) > 20
            )
            if is_shared or is_longest:
                broken += 1
                raise torch.OutOfMemoryError("no memory is left")

        contents = ["a", "b", "many small yellow squares left of a large green triangle, and many more"]
        settings = {"max_new_tokens": 6} if kind == "text" else DRAW
        expected = [
            BagelSession(pipe).send(content, output=kind, latents=None if kind == "text" else [noise_of()], **settings)
            for content in contents[:2]
        ]
        with held(engine):
            answers = [
                engine.submit(
                    BagelSession(pipe), content, kind, latents=None if kind == "text" else [noise_of()], **settings
                )
                for content in contents
            ]
            hook = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            for answer, reply in zip(answers[:2], expected, strict=True):
                assert_equal(answer.result(60), reply)
            with pytest.raises(torch.OutOfMemoryError):
                answers[2].result(60)
        finally:
            hook.remove()
        assert broken >= 2
        assert engine.stats().errors == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"output": "video"}, "`output`"),
            ({"steps": 3}, "steps: no setting"),
            ({"shows_bar": True}, "shows_bar: no setting"),
            ({"timeout": "soon"}, "`timeout`"),
            ({"progress": torch.ones(2)}, "`progress`"),
        ],
        ids=str,
    )
    def test_arguments_that_cannot_work_are_refused_before_anything_is_said(self, arguments, message, engine, pipe):
        session = BagelSession(pipe)
        with pytest.raises((TypeError, ValueError), match=message):
            engine.submit(session, "a", **{"output": "text"} | arguments)
        assert session.messages == []
        assert session.send("a", output="text", max_new_tokens=1).content

    def test_a_session_of_another_pipeline(self, engine, pipe):
        other = BagelPipeline(**(pipe.components | {"processor": load_processor()}))
        with pytest.raises(ValueError, match="another pipeline"):
            engine.submit(BagelSession(other), "a")
        with pytest.raises(TypeError, match="`session`"):
            engine.submit("me", "a")

    def test_a_session_that_is_answering(self, engine, pipe):
        session = BagelSession(pipe)
        with held(engine):
            answer = engine.submit(session, "a", "text", max_new_tokens=2)
            with pytest.raises(RuntimeError, match="The session is answering"):
                engine.submit(session, "b")
            with pytest.raises(RuntimeError, match="The session is answering"):
                session.send("b")
        assert answer.result(60).content
        assert len(session.messages) == 2


def noise_of() -> torch.Tensor:
    return torch.randn(12, 16, generator=seeded(0))


class TestBounds:
    def test_who_finds_it_full_is_told_when_to_come_again(self, pipe):
        with Engine(pipe, max_running=1, max_waiting=1) as engine:
            for _ in range(3):
                settings = {"max_new_tokens": 1, "logits_processor": [slow]}
                engine.submit(BagelSession(pipe), "a", "text", **settings).result(60)
            with held(engine):
                waits = engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=1)
                session = BagelSession(pipe)
                with pytest.raises(EngineFull, match="1 answers wait") as caught:
                    engine.submit(session, "a", "text")
                assert engine.stats().waiting == 1
            # Of answers that took a tenth of a second each.
            assert 0.1 <= caught.value.retry_after <= 2
            assert waits.result(60).content
            assert session.send("a", output="text", max_new_tokens=1).content

    def test_to_submit_goes_through_no_modules(self, own_pipe, monkeypatch):
        """In a large model they are many, and the thread that computes waits for who goes through them in Python."""
        with Engine(own_pipe) as engine, held(engine):
            session = BagelSession(own_pipe)
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.Module, "named_modules", None)
                answer = engine.submit(session, "a", "image", **DRAW)
        assert answer.result(60).images

    def test_a_full_one_does_not_open_what_it_is_shown(self, pipe, tmp_path):
        with Engine(pipe, max_running=1, max_waiting=0) as engine, held(engine):
            with pytest.raises(EngineFull):
                engine.submit(BagelSession(pipe), [str(tmp_path / "none.png"), "what is it?"], "text")

    @pytest.mark.parametrize("bounds", [{"max_running": 0}, {"max_waiting": -1}, {"max_running": 2.5}], ids=str)
    def test_bounds_that_are_none(self, bounds, pipe):
        with pytest.raises((TypeError, ValueError), match="`max_"):
            Engine(pipe, **bounds)


class TestClosing:
    def test_what_runs_and_waits_is_finished(self, pipe):
        engine = Engine(pipe, max_running=1)
        answers = [engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=4) for _ in range(3)]
        engine.close()
        assert all(answer.result(0).content for answer in answers)
        with pytest.raises(EngineClosed):
            engine.submit(BagelSession(pipe), "a")
        engine.close()

    def test_what_takes_too_long_is_broken_off(self, pipe):
        engine = Engine(pipe, max_running=1)
        settings = LONG | {"logits_processor": [slow, never_ends]}
        sessions = [BagelSession(pipe) for _ in range(2)]
        answers = [engine.submit(session, "a", **settings) for session in sessions]
        engine.close(timeout=0.2)
        for answer in answers:
            with pytest.raises(EngineClosed):
                answer.result(0)
        for session in sessions:
            assert session.send("a", output="text", max_new_tokens=1).content

    def test_models_that_are_offloaded_go_back_when_nothing_runs(self, own_pipe, monkeypatch):
        freed = threading.Event()
        monkeypatch.setattr(own_pipe, "maybe_free_model_hooks", freed.set)
        with Engine(own_pipe) as engine:
            with held(engine):
                assert not freed.is_set()
            assert freed.wait(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_whose_thread_has_died_takes_and_keeps_nobody_waiting(own_pipe, monkeypatch):
    engine = Engine(own_pipe)

    def dies(self, now: float) -> bool:
        raise MemoryError

    monkeypatch.setattr(Job, "is_over", dies)
    answer = engine.submit(BagelSession(own_pipe), "a", **LONG)
    with pytest.raises(EngineClosed):
        answer.result(30)
    with pytest.raises(EngineClosed):
        engine.submit(BagelSession(own_pipe), "a", **LONG)
    assert engine.is_closed
    engine.close()


def test_who_stops_listening_just_then_stops_nobody_else():
    """The event loop may leave between two looks of the engine's thread, which answers all others, too."""

    class Left(Outbox):
        _listener = property(lambda self: self._looks.pop(), lambda self, listener: None)

    outbox, called = Left(), []
    outbox._looks = [None, lambda: called.append(True)]
    outbox.end()
    assert outbox.has_ended and called == [True]


def test_stats_count_what_was_done(engine, pipe):
    with held(engine):
        assert (engine.stats().running, engine.stats().waiting) == (1, 0)
        text = engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=5, logits_processor=[never_ends])
        picture = engine.submit(BagelSession(pipe), "a", "image", **DRAW)
    text.result(60), picture.result(60)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert (stats.answers, stats.errors, stats.cancelled) == (3, 0, 0)
    # Of the answer that held the engine, two.
    assert (stats.tokens, stats.steps, stats.pictures) == (5 + 2, 3, 1)
    # Prompts that share a forward make it fewer.
    assert 4 + 1 + 3 + 2 <= stats.forwards <= 4 + 1 + 3 + 3


@pytest.mark.parametrize("way", ["end", "cancel", "fail"])
def test_nothing_is_kept_of_what_has_ended(way, engine, pipe):
    """Not even until garbage is collected, which on a GPU may be late."""

    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if way == "fail" and ids.shape[1] > 8:
            raise ValueError("mine")
        return never_ends(ids, scores)

    def held_by_answers() -> list[str]:
        return [
            type(item).__name__ for item in gc.get_objects() if type(item) in (_Batch, Denoiser, PrefixBuffer, Job)
        ]

    gc.collect()
    # Of answers of other tests, whose errors somebody may hold.
    before = held_by_answers()
    gc.disable()
    steps = engine.stats().steps
    try:
        count = 10 if way == "end" else 200
        with held(engine):
            answers = [
                engine.submit(BagelSession(pipe), "a", "text", max_new_tokens=count, logits_processor=[fails])
                for _ in range(3)
            ] + [
                engine.submit(BagelSession(pipe), "a", "image", **DRAW | {"num_inference_steps": count})
                for _ in range(2)
            ]
        if way != "end":
            until(lambda: engine.stats().steps >= steps + 4)
            for answer in answers:
                answer.cancel()
        for answer in answers[3:]:
            answer.result(60)
        until(lambda: engine.stats().running == 0)
        until(lambda: held_by_answers() == before)
    finally:
        gc.enable()
