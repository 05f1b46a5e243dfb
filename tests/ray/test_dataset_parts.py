"""What `examples/draw_dataset.py` plans, keeps and does again, without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import draw_dataset  # noqa: E402  # the scripts are no package
from draw_dataset import Dataset, draw_shard, is_whole, plan, rows_of  # noqa: E402


SETTINGS = {"model": "tiny", "size": 16, "steps": 2, "guidance_scale": 3.0, "seed": 0}
PROMPTS = ["a red circle", "a blue cross", "a red circle", "a green star", "a black square"]


class Draws:
    """A pipeline whose pictures are one colour, which follows from the generator."""

    def __init__(self):
        self.calls: list[str] = []

    def __call__(self, prompt, height, width, num_inference_steps, guidance_scale, generator):
        self.calls.append(prompt)
        colour = generator.initial_seed().to_bytes(8, "big")[-3:]
        return type("Output", (), {"images": [Image.new("RGB", (width, height), tuple(colour))]})


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return Dataset(tmp_path / "dataset", plan(PROMPTS, 0), SETTINGS, 2)


def draw_all(dataset: Dataset, numbers=None) -> Draws:
    pipe = Draws()
    for number in dataset.clean() if numbers is None else numbers:
        assert draw_shard(pipe, dataset.shards[number], dataset.place(number), SETTINGS)
    return pipe


class TestSeeds:
    def test_follow_from_the_prompt_wherever_it_stands(self):
        seeds = {task.prompt: task.seed for task in plan(PROMPTS[1:], 0)}
        assert all(seeds[task.prompt] == task.seed for task in plan(list(reversed(PROMPTS[1:])), 0))

    def test_of_the_same_prompt_differ_each_time(self):
        assert len({task.seed for task in plan(["a red circle"] * 5, 0)}) == 5

    def test_differ_with_the_seed_of_the_whole(self):
        assert all(a.seed != b.seed for a, b in zip(plan(PROMPTS, 0), plan(PROMPTS, 1), strict=True))

    def test_are_those_of_before(self):
        """Datasets that were begun go on with the next release."""
        assert plan(["a red circle"], 0)[0].seed == 32524592483814117


class TestResuming:
    def test_nothing_is_left_of_a_whole_dataset(self, dataset):
        assert draw_all(dataset).calls == PROMPTS
        assert dataset.clean() == []

    def test_manifest_has_every_prompt_once_in_order(self, dataset):
        draw_all(dataset, [2, 0, 1])
        rows = [json.loads(line) for line in dataset.merge().read_text().splitlines()]
        assert [row["prompt"] for row in rows] == PROMPTS
        assert [row["index"] for row in rows] == list(range(5))
        assert all((dataset.folder / row["file"]).stat().st_size == row["bytes"] for row in rows)

    @pytest.mark.parametrize(
        "lose",
        [
            lambda shard: (shard / "00000003.png").unlink(),
            lambda shard: (shard / "00000003.png").write_bytes(b"cut"),
            lambda shard: (shard / "manifest.jsonl").unlink(),
            lambda shard: (shard / "manifest.jsonl").write_bytes((shard / "manifest.jsonl").read_bytes()[:-20]),
        ],
        ids=["picture", "half_a_picture", "manifest", "half_a_manifest"],
    )
    def test_a_shard_that_lost_a_file_is_done_again_and_no_other(self, lose, dataset):
        draw_all(dataset)
        before = {file: file.read_bytes() for file in dataset.folder.glob("shards/*/*")}
        lose(dataset.place(1))
        assert draw_all(dataset).calls == PROMPTS[2:4]
        assert {file: file.read_bytes() for file in dataset.folder.glob("shards/*/*")} == before

    def test_what_a_dead_worker_left_is_taken_away(self, dataset):
        class Dies(Draws):
            def __call__(self, prompt, **settings):
                if self.calls:
                    raise MemoryError
                return super().__call__(prompt, **settings)

        with pytest.raises(MemoryError):
            draw_shard(Dies(), dataset.shards[0], dataset.place(0), SETTINGS)
        assert len(list(dataset.folder.glob("shards/.partial-*"))) == 1
        assert dataset.clean() == [0, 1, 2]
        assert list(dataset.folder.glob("shards/*")) == []

    def test_of_two_workers_on_one_shard_the_first_is_kept(self, dataset):
        draw_all(dataset)
        before = dataset.place(0).stat().st_ino
        assert not draw_shard(Draws(), dataset.shards[0], dataset.place(0), SETTINGS)
        assert dataset.place(0).stat().st_ino == before
        assert is_whole(dataset.place(0), dataset.shards[0])
        assert list(dataset.folder.glob("shards/.partial-*")) == []

    def test_the_size_of_the_shards_changes_no_picture(self, dataset, tmp_path):
        other = Dataset(tmp_path / "other", plan(PROMPTS, 0), SETTINGS, 5)
        draw_all(dataset)
        draw_all(other)
        pictures = [row["sha256"] for number in range(3) for row in rows_of(dataset.place(number))]
        assert pictures == [row["sha256"] for row in rows_of(other.place(0))]


class TestRefused:
    @pytest.mark.parametrize(
        ("prompts", "changed", "named"),
        [
            (PROMPTS[:4], {}, "pictures, prompts_sha256"),
            (PROMPTS, {"steps": 3}, "steps"),
            (PROMPTS, {"model": "large", "seed": 1}, "model, seed"),
        ],
        ids=["prompts", "steps", "several"],
    )
    def test_to_go_on_with_something_else(self, prompts, changed, named, dataset):
        with pytest.raises(ValueError, match=f"was begun with other {named}: name another folder"):
            Dataset(dataset.folder, plan(prompts, 0), SETTINGS | changed, 2)

    def test_an_empty_line_is_named(self):
        with pytest.raises(ValueError, match="line 2 of the prompts is empty"):
            plan(["a", " ", "b"], 0)

    def test_the_command_says_so_before_it_loads_anything(self, tmp_path):
        (tmp_path / "prompts.txt").write_text("a\n\n")
        with pytest.raises(SystemExit, match="error: line 2"):
            draw_dataset.main([str(tmp_path / "prompts.txt"), str(tmp_path / "dataset")])
        assert not (tmp_path / "dataset").exists()
