"""Work in threads that end with it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from transformers_bagel import threads
from transformers_bagel.threads import in_own_thread, run_in_own_thread


def test_the_thread_ends_with_its_work_and_hands_over_the_result():
    thread = in_own_thread(threading.current_thread).result()
    thread.join(10)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()])
def test_errors_are_raised_where_it_is_waited_for(error):
    def fails() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        in_own_thread(fails).result()
    assert raised.value is error


def test_work_that_has_begun_ends_though_nobody_waits():
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait(10)
        ended.set()

    future = in_own_thread(work)
    began.wait(10)
    assert not future.cancel()
    may_end.set()
    assert ended.wait(10)


def test_what_nobody_waits_for_before_it_begins_is_not_done(monkeypatch):
    starts: list[threading.Thread] = []

    class Later(threading.Thread):
        def start(self) -> None:
            starts.append(self)

    monkeypatch.setattr(threads, "Thread", Later)
    done: list[int] = []
    future = in_own_thread(done.append, 1)
    assert future.cancel()
    starts[0].run()
    assert done == []


def test_an_event_loop_goes_on_while_a_thread_starts(monkeypatch):
    """To start a thread is to wait until it runs, which takes long where others compute."""

    class Slow(threading.Thread):
        def start(self) -> None:
            time.sleep(0.5)
            super().start()

    monkeypatch.setattr(threads, "Thread", Slow)

    async def turns_meanwhile() -> int:
        found = asyncio.ensure_future(run_in_own_thread(str.upper, "a"))
        turns = 0
        while not found.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert await found == "A"
        return turns

    assert asyncio.run(turns_meanwhile()) > 5
