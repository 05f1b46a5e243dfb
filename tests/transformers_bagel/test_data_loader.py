"""Batches without end: budgets, epochs, ranks, workers, places that are saved and taken up again."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from tests.conftest import PickyVae, training_samples, turn
from transformers_bagel import BagelDataLoader


def numbered(count: int) -> list[dict]:
    """Samples of text whose answers tell them apart."""
    return [
        {"messages": [turn("user", "a" * (index % 4 + 1)), turn("assistant", f"n{index}")]} for index in range(count)
    ]


class Folder:
    """A dataset that reads its samples when asked, some of which are broken; it is no list."""

    def __init__(self, samples: list[dict], broken: tuple[int, ...] = ()):
        self.samples = samples
        self.broken = broken

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        if index in self.broken:
            raise OSError("broken file")
        return self.samples[index]


@pytest.fixture
def load(collate):
    """A loader with dropout and noise of its own, so that every choice can be compared."""

    def make(dataset, collator: dict | None = None, **kwargs) -> BagelDataLoader:
        choices = {"text_dropout": 0.5, "vit_dropout": 0.5, "vae_dropout": 0.5, "vae_sample_mode": "sample"}
        return BagelDataLoader(dataset, collate(**(choices | (collator or {}))), **kwargs)

    return make


def take(loader, count: int) -> list:
    return list(itertools.islice(loader, count))


def numbers(loader: BagelDataLoader, batch) -> list[int]:
    """Which of the `numbered` samples a batch holds, in order."""
    decode = loader.collator.processor.tokenizer.decode
    found = []
    for sample in batch["document_ids"].unique():
        labels = batch["labels"][batch["document_ids"] == sample]
        if sample >= 0:
            found.append(int(decode(labels[labels != -100]).removeprefix("n").removesuffix("<|im_end|>")))
    return found


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_has_so_many_samples(load):
    loader = load(numbered(5), batch_size=2, shuffle=False)
    # The batch at the end of an epoch is filled from the next one.
    assert [numbers(loader, batch) for batch in take(loader, 5)] == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_a_batch_is_one_row_within_the_budget(load):
    dataset = numbered(20)
    loader = load(dataset, {"max_tokens": 40}, shuffle=False)
    lengths = [len(loader.collator.encode(sample, 0)) for sample in dataset]
    seen = []
    for batch in take(loader, 10):
        rows, tokens = batch["input_ids"].shape
        own = numbers(loader, batch)
        assert rows == 1
        assert tokens == sum(lengths[index] for index in own) <= 40
        seen.append(own)
    flat = list(itertools.chain(*seen))
    # In the dataset's order, and no batch stops while the next sample would fit.
    assert flat == [index % 20 for index in range(len(flat))]
    for own, following in itertools.pairwise(seen):
        assert sum(lengths[index] for index in own) + lengths[following[0]] > 40


def test_both_bounds_hold(load):
    loader = load(numbered(20), {"max_tokens": 60}, batch_size=2, shuffle=False)
    assert {len(numbers(loader, batch)) for batch in take(loader, 10)} == {2}


def test_every_epoch_has_each_sample_once_in_its_own_order(load):
    loader = load(numbered(12), batch_size=3, seed=1)
    order = list(itertools.chain(*(numbers(loader, batch) for batch in take(loader, 12))))
    epochs = [order[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(12)) not in epochs
    other = load(numbered(12), batch_size=12, seed=2)
    assert numbers(other, take(other, 1)[0]) != epochs[0]


def test_the_seed_decides_everything(load):
    samples = training_samples("edit", "chat", "draw")
    torch.manual_seed(0)
    first = take(load(samples, batch_size=2, seed=3), 4)
    torch.manual_seed(1)
    assert_same(take(load(samples, batch_size=2, seed=3), 4), first)
    other = take(load(samples, batch_size=2, seed=4, shuffle=False), 1)[0]
    assert other["timesteps"].tolist() != take(load(samples, batch_size=2, shuffle=False), 1)[0]["timesteps"].tolist()


def test_a_sample_gets_new_noise_every_epoch_and_none_shares_another_ones(load):
    samples = training_samples("draw") * 3
    drawn = [batch["timesteps"].item() for batch in take(load(samples, batch_size=1), 9)]
    assert len(set(drawn)) == 9


@pytest.mark.parametrize("size", [9, 10])
def test_ranks_share_an_epoch_without_overlap(size, load):
    loaders = [load(numbered(size), batch_size=1, rank=rank, world_size=3, seed=5) for rank in range(3)]
    shares = [list(range(size))[rank::3] for rank in range(3)]
    epochs = []
    for loader, share in zip(loaders, shares, strict=True):
        own = [numbers(loader, batch)[0] for batch in take(loader, len(share))]
        epochs += own
        assert len(own) == len(share)
    assert sorted(epochs) == list(range(size))


def test_the_number_of_ranks_changes_no_choice_for_a_sample(load):
    samples = training_samples("draw", "edit", "chat", "draw")
    alone = take(load(samples, batch_size=1, shuffle=False), 4)
    ranks = [take(load(samples, batch_size=1, shuffle=False, rank=rank, world_size=2), 2) for rank in range(2)]
    assert_same([ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]], alone)


def test_workers_give_the_same_batches(load):
    samples = training_samples("edit", "chat", "draw", "talk", "look")
    expected = take(load(samples, {"max_tokens": 300}, num_workers=0), 5)
    assert_same(take(load(samples, {"max_tokens": 300}, num_workers=2), 5), expected)


@pytest.mark.parametrize("bounds", [{"batch_size": 2}, {"collator": {"max_tokens": 300}}])
@pytest.mark.parametrize("done", [0, 1, 2, 4])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(bounds, done, load):
    samples = training_samples("edit", "chat", "draw", "talk", "look")
    whole = take(load(samples, **bounds), done + 3)
    stopped = load(samples, **bounds)
    batches = iter(stopped)
    assert_same([next(batches) for _ in range(done)], whole[:done])
    # A state is written to a file of a checkpoint.
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = load(samples, **bounds)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 3), whole[done:])


def test_a_state_with_workers_is_that_of_the_batches_given_out(load):
    # The workers have read further than what was given out.
    samples = training_samples("edit", "draw", "talk", "look")
    whole = take(load(samples, batch_size=1), 6)
    stopped = load(samples, batch_size=1, num_workers=2)
    batches = iter(stopped)
    for _ in range(3):
        next(batches)
    resumed = load(samples, batch_size=1, num_workers=1)
    resumed.load_state_dict(stopped.state_dict())
    assert_same(take(resumed, 3), whole[3:])


def test_a_state_of_a_resumed_run_goes_on_again(load):
    samples = numbered(7)
    whole = take(load(samples, batch_size=3), 6)
    state, seen = load(samples, batch_size=3).state_dict(), []
    for _ in range(6):
        loader = load(samples, batch_size=3)
        loader.load_state_dict(state)
        seen += take(loader, 1)
        state = loader.state_dict()
    assert_same(seen, whole)


def test_a_resumed_run_knows_what_was_left_out(load):
    dataset = Folder(numbered(8), broken=(1, 4))
    whole = load(dataset, {"on_error": "skip"}, batch_size=2, shuffle=False)
    expected = take(whole, 6)
    stopped = load(dataset, {"on_error": "skip"}, batch_size=2, shuffle=False)
    take(stopped, 2)
    resumed = load(dataset, {"on_error": "skip"}, batch_size=2, shuffle=False)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert [item.name for item in resumed.collator.skipped] == ["sample 1", "sample 4"]
    assert_same(take(resumed, 4), expected[2:])
    assert resumed.collator.skipped == whole.collator.skipped


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"shuffle": False},
        {"batch_size": 3},
        {"rank": 1, "world_size": 2},
        {"dataset": numbered(5)},
        {"collator": {"max_tokens": 100}},
    ],
)
def test_a_state_of_another_run_is_refused(change, load):
    same = {"dataset": numbered(6), "batch_size": 2}
    state = load(**same).state_dict()
    with pytest.raises(ValueError, match="`state` was saved with"):
        load(**(same | change)).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_file_in_the_middle_is_left_out_once(num_workers, load):
    dataset = Folder(numbered(6), broken=(2, 3))
    loader = load(dataset, {"on_error": "skip"}, batch_size=2, shuffle=False, num_workers=num_workers)
    assert [numbers(loader, batch) for batch in take(loader, 4)] == [[0, 1], [4, 5], [0, 1], [4, 5]]
    assert [(item.name, item.reason) for item in loader.collator.skipped] == [
        ("sample 2", "broken file"),
        ("sample 3", "broken file"),
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_file_in_the_middle_stops_with_its_name(num_workers, load):
    loader = load(Folder(numbered(6), broken=(2,)), batch_size=1, shuffle=False, num_workers=num_workers)
    batches = iter(loader)
    assert numbers(loader, next(batches)) == [0]
    with pytest.raises(OSError, match="Sample 2: broken file"):
        take(batches, 2)


def test_bad_samples_are_told_by_id_and_number(load):
    samples = numbered(4)
    samples[3] = {"id": "last", "messages": [turn("user", "a")]}
    samples[1] = {"id": 7, "messages": [turn("user", "a"), turn("assistant", "b" * 200)]}
    loader = load(samples, {"on_error": "skip", "max_tokens": 40}, shuffle=False)
    take(loader, 3)
    reasons = {item.name: item.reason for item in loader.collator.skipped}
    assert set(reasons) == {"sample 1 (id 7)", "sample 3 (id 'last')"}
    assert "`max_tokens` (40)" in reasons["sample 1 (id 7)"]
    assert "no target" in reasons["sample 3 (id 'last')"]


def test_a_dataset_of_bad_samples_alone_ends(load):
    loader = load(Folder(numbered(3), broken=(0, 1, 2)), {"on_error": "skip"}, batch_size=1)
    with pytest.raises(ValueError, match="no sample that can be used"):
        take(loader, 1)
    assert len(loader.collator.skipped) == 3


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank"),
        ({"batch_size": 1, "rank": -1}, "rank"),
        ({"batch_size": 1, "rank": 0, "world_size": 4}, "dataset"),
    ],
)
def test_settings_that_cannot_be_used_are_named(kwargs, word, load):
    with pytest.raises(ValueError, match=f"`{word}`"):
        load(numbered(3), **kwargs)


def test_an_empty_dataset_is_refused(load):
    with pytest.raises(ValueError, match="`dataset`"):
        load([], batch_size=1)


# ---- Found in review


def test_one_good_sample_suffices(load):
    loader = load(Folder(numbered(6), broken=(0, 1, 2, 4, 5)), {"on_error": "skip"}, batch_size=2)
    # It comes once an epoch: first in one and last in the next, up to 2 * 5 broken ones lie between.
    batches = take(loader, 3)
    assert [numbers(loader, batch) for batch in batches] == [[3, 3]] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
def test_any_error_of_a_dataset_names_the_sample(error, load):
    # A broken archive or column is no OSError; it passes without a name, and stops a run that leaves out bad samples.
    class Broken(Folder):
        def __getitem__(self, index: int) -> dict:
            if index == 1:
                raise error("broken record")
            return super().__getitem__(index)

    dataset = Broken(numbered(3))
    with pytest.raises(Exception, match="Sample 1: "):
        take(load(dataset, batch_size=3), 1)
    loader = load(dataset, {"on_error": "skip"}, batch_size=2)
    take(loader, 1)
    assert [item.name for item in loader.collator.skipped] == ["sample 1"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("collator", [{}, {"max_tokens": 300}], ids=["unpacked", "packed"])
def test_an_image_that_the_vae_cannot_encode_is_one_sample_less(num_workers, collator, load, vae):
    samples = training_samples("draw", "edit", "talk", "draw", "look")
    settings = {"batch_size": 2, "shuffle": False, "num_workers": num_workers}
    picky = PickyVae(vae)
    with pytest.raises(ValueError, match="^Sample 1: The VAE encoded an image to NaN"):
        take(load(samples, collator | {"vae": picky}, **settings), 2)
    loader = load(samples, collator | {"vae": picky, "on_error": "skip"}, **settings)
    seen = []
    for _, batch in zip(range(2), loader, strict=False):
        assert batch["input_ids"].shape[0] == 1
        seen += loader.names
    assert seen == ["sample 0", "sample 2", "sample 3", "sample 4"]
    (skipped,) = loader.collator.skipped
    assert skipped.name == "sample 1" and skipped.reason.startswith("The VAE encoded an image to NaN or infinity")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_of_nothing_are_left_out_like_others(num_workers, load):
    dataset = [*numbered(2), None, {"messages": None}, {}, *numbered(1)]
    loader = load(dataset, {"on_error": "skip"}, batch_size=3, shuffle=False, num_workers=num_workers)
    take(loader, 1)
    assert [item.name for item in loader.collator.skipped] == ["sample 2", "sample 3", "sample 4"]


def test_a_batch_tells_its_samples(load):
    samples = numbered(5)
    samples[3]["id"] = "three"
    loader = load(samples, batch_size=2, shuffle=False)
    names = [loader.names for _ in zip(range(3), loader, strict=False)]
    assert names == [["sample 0", "sample 1"], ["sample 2", "sample 3 (id 'three')"], ["sample 4", "sample 0"]]
