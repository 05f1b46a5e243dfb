"""What runs together in a call with several prompts; and each image is what it is alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from diffusers_bagel import BagelPipeline, pipeline_bagel
from diffusers_bagel.batches import batches_of, join_caches, pad_rows, runs_of, split_cache
from diffusers_bagel.guidance import RENORM_TYPES
from tests.conftest import conversation, golden_image, max_error
from tests.diffusers_bagel.conftest import EDIT, SMALL, seeded


TEXTS = ["a", "a red circle", "two small yellow squares", "many small yellow squares left of a large green triangle"]
PLAN = {"think": True, "max_think_tokens": 8}
# Texts alone, one image, several, texts between images, an image at the end, several turns; in no order of length.
MIXED = [
    conversation(["@wide", "make it green"]),
    conversation(["a red circle"]),
    conversation(["@square", "and", "@tall", "join them, side by side"]),
    conversation(["many small yellow squares left of a large green triangle"]),
    conversation(["make it like", "@square"]),
    [*conversation(["a red circle"]), *conversation(["@tall", "now blue"])],
]


def close(batch: torch.Tensor, single: torch.Tensor) -> bool:
    return max_error(batch, single) <= 1e-5 * single.abs().max().item()


def assert_equals_single_runs(pipe: BagelPipeline, messages: list, **settings) -> None:
    """Each conversation of a batch gives the image and the plan that it gives alone."""
    batch = pipe(messages=messages, generator=seeded(*range(len(messages))), **settings)
    for index, item in enumerate(messages):
        single = pipe(messages=item, generator=seeded(index), **settings)
        assert close(batch.images[index], single.images[0])
        if settings.get("think"):
            assert batch.texts[index] == single.texts[0]


@pytest.fixture
def forwards(monkeypatch):
    """Arguments of the forwards of a pipeline that fill contexts, and those of its calls of `generate()`."""
    hooks = []

    def watch(pipe: BagelPipeline) -> tuple[list[dict], list[dict]]:
        filling: list[dict] = []
        writing: list[dict] = []
        is_writing: list[bool] = []
        generate = pipe.transformer.generate

        def note(module, args, kwargs):
            if kwargs.get("input_ids") is not None and not is_writing:
                filling.append(kwargs)

        def watched_generate(**kwargs):
            writing.append(kwargs)
            is_writing.append(True)
            sequences = generate(**kwargs)
            is_writing.clear()
            return sequences

        hooks.append(pipe.transformer.register_forward_pre_hook(note, with_kwargs=True))
        monkeypatch.setattr(pipe.transformer, "generate", watched_generate)
        return filling, writing

    yield watch
    for hook in hooks:
        hook.remove()


def shapes(calls: list[dict]) -> list[tuple[int, ...]]:
    return [tuple(call["input_ids"].shape) for call in calls]


class TestResults:
    @pytest.mark.parametrize("renorm", RENORM_TYPES)
    def test_texts_of_mixed_lengths(self, pipe, renorm):
        messages = [conversation([text]) for text in TEXTS]
        assert_equals_single_runs(pipe, messages, cfg_renorm_type=renorm, cfg_interval=(0.0, 1.0), **SMALL)

    @pytest.mark.parametrize("renorm", RENORM_TYPES)
    def test_mixed_sizes(self, pipe, renorm):
        messages = [MIXED[0], conversation(["@tall", "swap the two shapes"]), MIXED[2]]
        assert_equals_single_runs(pipe, messages, cfg_renorm_type=renorm, image_guidance_scale=1.5, **EDIT)

    @pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"image_guidance_scale": 1.5}])
    def test_drawing_and_editing_together_keep_their_own_presets(self, pipe, settings):
        assert_equals_single_runs(pipe, MIXED, **SMALL, **settings)

    def test_prompts_with_lists_of_images_some_empty(self, pipe):
        images = [[golden_image("wide")], [], [golden_image("square"), golden_image("tall")]]
        prompts = TEXTS[:3]
        batch = pipe(prompts, image=images, generator=seeded(0, 1, 2), **SMALL).images
        for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            single = pipe(prompt, image=image or None, generator=seeded(index), **SMALL).images
            assert close(batch[index], single[0])

    @pytest.mark.parametrize("image_guidance_scale", [None, 1.5])
    def test_greedy_plans(self, pipe, image_guidance_scale):
        assert_equals_single_runs(pipe, MIXED, image_guidance_scale=image_guidance_scale, **SMALL, **PLAN)

    def test_plans_of_different_lengths(self, own_pipe):
        """The tiny model ends no plan by itself: a token that only some plans hold ends them, as a second stop."""
        plans = own_pipe(messages=MIXED, **(SMALL | PLAN | {"num_inference_steps": 1})).texts
        ids = [own_pipe.processor.tokenizer(plan)["input_ids"] for plan in plans]
        stop = next(token for row in ids for token in row[1:] if any(token not in other for other in ids))
        config = own_pipe.transformer.generation_config
        config.eos_token_id = [config.eos_token_id, stop]
        lengths = {len(plan) for plan in own_pipe(messages=MIXED, **(SMALL | PLAN | {"num_inference_steps": 1})).texts}
        assert len(lengths) > 1
        assert_equals_single_runs(own_pipe, MIXED, **SMALL, **PLAN)

    def test_penalised_plans(self, own_pipe):
        own_pipe.transformer.generation_config.repetition_penalty = 1.5
        assert_equals_single_runs(own_pipe, MIXED[:4], **SMALL, **PLAN)

    def test_sampled_plans_follow_their_own_generators(self, pipe):
        settings = {"do_sample": True, "temperature": 1.0}
        assert_equals_single_runs(pipe, MIXED[:4], **SMALL, **PLAN, **settings)
        texts = pipe(["x", "x"], generator=seeded(1, 2), **SMALL, **PLAN, **settings).texts
        assert texts[0] != texts[1]

    @pytest.mark.parametrize("think", [False, True])
    def test_num_images_per_prompt_draws_each_from_its_own_noise(self, pipe, think, forwards):
        settings = SMALL | (PLAN if think else {})
        singles = [
            pipe(prompt, generator=seeded(seed), **settings).images[0]
            for prompt, seed in (("a", 1), ("a", 2), ("b c d", 3), ("b c d", 4))
        ]
        _, writing = forwards(pipe)
        images = pipe(["a", "b c d"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **settings).images
        assert all(close(image, single) for image, single in zip(images, singles, strict=True))
        assert [rows for rows, _ in shapes(writing)] == ([2] if think else [])

    def test_one_generator_samples_all_images_given_and_then_all_noise(self, pipe, monkeypatch):
        names = ["wide", "tall"]
        expected = seeded(7)
        for name in names:
            (pixels,) = pipe.preprocess(conversation([f"@{name}", "x"]), False)["vae_pixel_values"]
            pipe.encode_image(pixels, expected)
        noise = [torch.randn(count, 16, generator=expected) for count in (40, 28)]
        seen = []
        step = pipe.scheduler.step
        monkeypatch.setattr(pipe.scheduler, "step", lambda v, t, x, **kw: seen.append(x) or step(v, t, x, **kw))
        pipe(["x", "yy"], image=[[golden_image(name)] for name in names], generator=seeded(7), **EDIT, **PLAN)
        assert torch.equal(seen[0][0], noise[0])
        assert torch.equal(seen[0][1, :28], noise[1])

    def test_taylorseer(self, own_pipe):
        own_pipe.enable_taylorseer(interval=2, warmup_steps=3, max_order=2)
        assert_equals_single_runs(own_pipe, MIXED[:4], **(SMALL | {"num_inference_steps": 8}))

    def test_callback_sees_all_images(self, pipe):
        seen = []

        def keep_the_first(pipeline, step, timestep, tensors):
            seen.append(tuple(tensors["latents"].shape))
            latents = tensors["latents"].clone()
            latents[1:] = 0
            return {"latents": latents}

        images = pipe(
            messages=MIXED[:3], generator=seeded(0, 1, 2), callback_on_step_end=keep_the_first, **EDIT
        ).images
        # The second has the default size, the largest.
        assert seen == [(3, 64, 16)] * 3
        assert close(images[0], pipe(messages=MIXED[0], generator=seeded(0), **EDIT).images[0])
        assert all(image.abs().max() == 0 for image in images[1:])

    def test_flash_attention(self, pipe, flash):
        own = BagelPipeline(**(pipe.components | {"transformer": flash}))
        own.set_progress_bar_config(disable=True)
        settings = SMALL | PLAN | {"generator": seeded(*range(len(MIXED)))}
        batch = own(messages=MIXED, **settings)
        for index, item in enumerate(MIXED):
            single = pipe(messages=item, **(settings | {"generator": seeded(index)}))
            assert close(batch.images[index], single.images[0])
            assert batch.texts[index] == single.texts[0]

    def test_offload(self, own_pipe):
        plain = own_pipe(messages=MIXED[:3], generator=seeded(0, 1, 2), **SMALL, **PLAN)
        own_pipe.enable_model_cpu_offload(device="cpu")
        offloaded = own_pipe(messages=MIXED[:3], generator=seeded(0, 1, 2), **SMALL, **PLAN)
        assert torch.equal(plain.images, offloaded.images)
        assert plain.texts == offloaded.texts


class TestForwards:
    def test_texts_share_a_forward(self, pipe, forwards):
        filling, _ = forwards(pipe)
        pipe(TEXTS[:3], **SMALL)
        assert [rows for rows, _ in shapes(filling)] == [3]

    def test_images_run_one_by_one_and_their_texts_together(self, pipe, forwards):
        filling, _ = forwards(pipe)
        pipe(messages=[MIXED[0], MIXED[2], MIXED[5]], **EDIT)
        assert [rows for rows, _ in shapes(filling)] == [1, 1, 1, 3]
        assert ["pixel_values" in call for call in filling] == [True, True, True, False]

    def test_plans_are_written_and_added_together(self, pipe, forwards):
        filling, writing = forwards(pipe)
        pipe(messages=MIXED[:4], **SMALL, **PLAN, guidance_scale=1.0)
        assert [rows for rows, _ in shapes(writing)] == [4]
        assert shapes(filling)[-1][0] == 4

    def test_sampled_plans_are_written_one_by_one(self, pipe, forwards):
        _, writing = forwards(pipe)
        pipe(TEXTS[:3], **SMALL, **PLAN, do_sample=True)
        assert [rows for rows, _ in shapes(writing)] == [1, 1, 1]

    def test_a_single_prompt_has_neither_padding_nor_mask(self, pipe, forwards):
        filling, writing = forwards(pipe)
        pipe(messages=MIXED[0], **SMALL, **PLAN)
        assert all(call.get("attention_mask") is None for call in filling)
        assert writing[0]["attention_mask"].all()

    def test_the_bounds_hold(self, pipe, forwards, monkeypatch):
        filling, writing = forwards(pipe)
        lengths = [pipe.preprocess(conversation([text]), True)["input_ids"].shape[1] for text in TEXTS]
        monkeypatch.setattr(pipeline_bagel, "MAX_PREFILL_TOKENS", 2 * lengths[1])
        monkeypatch.setattr(pipeline_bagel, "MAX_PLAN_TOKENS", 3 * (lengths[2] + 8))
        images = pipe(TEXTS, generator=seeded(0, 1, 2, 3), **SMALL, **PLAN).images
        assert shapes(filling)[:3] == [(2, lengths[1]), (1, lengths[2]), (1, lengths[3])]
        assert [rows for rows, _ in shapes(writing)] == [3, 1]
        monkeypatch.undo()
        assert close(images, pipe(TEXTS, generator=seeded(0, 1, 2, 3), **SMALL, **PLAN).images)

    def test_branches_share_a_forward_inside_the_bound(self, pipe, monkeypatch):
        counts = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(len(kwargs.get("latent_grid_hw", []))), with_kwargs=True
        )
        settings = SMALL | {"num_inference_steps": 1}
        together = pipe(TEXTS[:3], generator=seeded(0, 1, 2), **settings).images
        assert counts == [0, 6]
        counts.clear()
        # Four branches of 12 tokens each.
        monkeypatch.setattr(pipeline_bagel, "MAX_STEP_TOKENS_CPU", 48)
        parted = pipe(TEXTS[:3], generator=seeded(0, 1, 2), **settings).images
        hook.remove()
        assert counts == [0, 4, 2]
        assert close(parted, together)


class TestParts:
    def test_runs_keep_the_order_inside_the_bound(self):
        assert runs_of([4, 4, 9, 1, 2], 8) == [[0, 1], [2], [3, 4]]
        assert runs_of([], 8) == []

    @pytest.mark.parametrize(
        ("lengths", "max_tokens", "max_padding", "expected"),
        [
            ([], 10, 0, []),
            ([5], 1, 0, [[0]]),
            ([3, 1, 2], 9, 9, [[1, 2, 0]]),
            ([3, 1, 2], 8, 9, [[1, 2], [0]]),
            # The third row would bring the padding of two.
            ([1, 2, 4], 99, 3, [[0, 1], [2]]),
            ([4, 4, 4, 4], 8, 0, [[0, 1], [2, 3]]),
        ],
    )
    def test_batches_go_from_short_to_long_inside_the_bounds(self, lengths, max_tokens, max_padding, expected):
        assert batches_of(lengths, max_tokens, max_padding) == expected

    def test_rows_are_padded_on_either_side_and_a_single_one_is_not_copied(self):
        rows = [torch.tensor([[1, 2]]), torch.tensor([[3]])]
        assert pad_rows(rows, 0).tolist() == [[1, 2], [3, 0]]
        assert pad_rows(rows, 9, side="left").tolist() == [[1, 2], [9, 3]]
        assert pad_rows(rows[:1], 0) is rows[0]

    def test_caches_are_joined_and_parted(self):
        rows = [cache_of(torch.randn(1, 2, length, 4)) for length in (3, 5)]
        joined = join_caches(rows)
        assert joined.layers[0].keys.shape == (2, 2, 5, 4)
        assert joined.layers[0].keys[0, :, :2].abs().max() == 0
        parted = split_cache(joined, [2, 0], [3, 5])
        for row, part in zip(rows, parted, strict=True):
            assert torch.equal(part.layers[0].keys, row.layers[0].keys)
            assert torch.equal(part.layers[0].values, row.layers[0].values)
            assert (
                part.layers[0].keys.untyped_storage().data_ptr() == joined.layers[0].keys.untyped_storage().data_ptr()
            )

    def test_a_single_cache_is_not_copied_and_grows_apart(self):
        cache = cache_of(torch.randn(1, 2, 3, 4))
        (joined,) = split_cache(join_caches([cache]), [0], [3])
        assert joined.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
        joined.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), 0)
        assert (joined.get_seq_length(), cache.get_seq_length()) == (4, 3)


def cache_of(states: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    cache.update(states, states + 1, 0)
    return cache
