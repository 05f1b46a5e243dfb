"""Streamed datasets, which have neither a length nor items."""

from __future__ import annotations

import io
import threading

import datasets
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from tests.conftest import load_model, training_samples, turn
from transformers_bagel import BagelDataLoader
from transformers_bagel.training.trainer import BagelTrainer


NAMES = ("talk", "look", "draw", "edit", "chat")


class Stream(torch.utils.data.IterableDataset):
    """Samples in an order that depends on the epoch, if it is told one."""

    def __init__(self, samples: list[dict]):
        self.samples = samples
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        yield from self.samples[self.epoch % 2 :] + self.samples[: self.epoch % 2]


STREAMS = {
    "torch": lambda: Stream(training_samples(*NAMES)),
    "datasets": lambda: datasets.IterableDataset.from_generator(lambda: iter(training_samples(*NAMES))),
}


def ids(loader: BagelDataLoader, count: int) -> list[torch.Tensor]:
    batches = iter(loader)
    return [next(batches)["input_ids"] for _ in range(count)]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_gives_what_a_list_does(kind, collate):
    listed = BagelDataLoader(training_samples(*NAMES), collate(), batch_size=2, shuffle=False)
    streamed = BagelDataLoader(STREAMS[kind](), collate(), batch_size=2)
    for expected, given in zip(ids(listed, 2), ids(streamed, 2), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_stream_do_not_depend_on_workers_and_go_on_from_a_state(workers, collate):
    def loader() -> BagelDataLoader:
        return BagelDataLoader(Stream(training_samples(*NAMES)), collate(), batch_size=2, num_workers=workers)

    expected = ids(BagelDataLoader(Stream(training_samples(*NAMES)), collate(), batch_size=2), 5)
    first = loader()
    batches = iter(first)
    begun = [next(batches)["input_ids"] for _ in range(3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    for given, wanted in zip([*begun, *ids(second, 2)], expected, strict=True):
        assert torch.equal(given, wanted)


def broken_image() -> Image.Image:
    """As `datasets` gives images: opened, and not yet read."""
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(content, "PNG")
    return Image.open(io.BytesIO(content.getvalue()[:200]))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_stream_that_cannot_be_read_are_those_of_their_sample(workers, collate):
    def loader(**settings) -> BagelDataLoader:
        broken = {"id": "seven", "messages": [turn("user", broken_image(), "what?"), turn("assistant", "nothing")]}
        stream = Stream([*training_samples("talk", "look"), broken])
        return BagelDataLoader(stream, collate(**settings), batch_size=1, num_workers=workers)

    left_out = loader(on_error="skip")
    given, expected = ids(left_out, 2), ids(BagelDataLoader(Stream(training_samples("talk", "look")), collate(), 1), 2)
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    (skipped,) = left_out.collator.skipped
    assert skipped.name.startswith("sample 2") and "truncated" in skipped.reason
    batches = iter(loader())
    next(batches)
    with pytest.raises(OSError, match="Sample 2.*truncated"):
        next(batches)


def test_a_sample_of_a_stream_that_no_worker_can_take_is_told(collate):
    samples = [*training_samples("talk"), training_samples("talk")[0] | {"note": lambda: None}]
    batches = iter(BagelDataLoader(Stream(samples), collate(), batch_size=1, num_workers=1))
    with pytest.raises(RuntimeError, match="Sample 1: It cannot be handed to a worker.*lambda"):
        next(batches)


def test_images_of_a_stream_are_packed_for_workers_one_after_the_other(collate):
    """Two threads at once would read an image that two samples share, which fails in one of them."""
    threads = []

    class Told(dict):
        def __reduce__(self):
            threads.append(threading.current_thread())
            return dict, (dict(self),)

    stream = Stream([Told(sample) for sample in training_samples(*NAMES)])
    ids(BagelDataLoader(stream, collate(), batch_size=2, num_workers=2), 3)
    assert len(threads) > 5 and set(threads) == {threading.current_thread()}


def test_ranks_share_a_stream(collate):
    names = []
    for rank in range(2):
        loader = BagelDataLoader(Stream(training_samples(*NAMES)), collate(), batch_size=1, rank=rank, world_size=2)
        batches = iter(loader)
        next(batches)
        names.append([*loader.names, *(next(batches) and loader.names)])
    assert names == [["sample 0", "sample 2"], ["sample 1", "sample 3"]]


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (lambda: Stream([]), "no sample in epoch 0"),
        (lambda: (sample for sample in training_samples("talk")), "no sample in epoch 1.*more than once"),
        (lambda: Stream([{"messages": "nonsense"}] * 3), "no sample that can be used"),
    ],
    ids=["empty", "read once", "useless"],
)
def test_a_stream_that_gives_nothing_ends(stream, match, collate):
    loader = BagelDataLoader(stream(), collate(on_error="skip"), batch_size=1)
    with pytest.raises(ValueError, match=match):
        ids(loader, 4)


@pytest.mark.parametrize("trainer", [Trainer, BagelTrainer])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_trainer_learns_from_a_stream(kind, trainer, collate, tmp_path):
    """The library's own cuts all tensors of a batch at the same row, since it may have to hand out parts."""

    def loss(dataset) -> float:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        collator = collate(generator=torch.Generator().manual_seed(0))
        trained = trainer(model=load_model(), args=arguments, train_dataset=dataset, data_collator=collator)
        return trained.train().training_loss

    assert loss(STREAMS[kind]()) == loss(training_samples(*NAMES))


def test_packed_batches_are_not_cut_for_several_processes(collate, tmp_path):
    arguments = TrainingArguments(str(tmp_path), accelerator_config={"dispatch_batches": True}, use_cpu=True)
    with pytest.raises(ValueError, match="`dispatch_batches=True`"):
        BagelTrainer(model=load_model(), args=arguments, data_collator=collate())
