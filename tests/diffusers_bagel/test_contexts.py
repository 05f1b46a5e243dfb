"""What is read and written together in a call with several prompts; and each image is what it is alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from diffusers_bagel import BagelPipeline, contexts
from diffusers_bagel.contexts import bucket_by_length, pad
from diffusers_bagel.guidance import RENORM_TYPES
from tests.conftest import conversation, golden_image
from tests.diffusers_bagel.conftest import (
    EDIT,
    MIXED,
    PLAN,
    SMALL,
    TEXTS,
    assert_equals_single_runs,
    close,
    seeded,
)
from transformers_bagel.cache import join_caches, split_cache


def shapes(calls: list[dict]) -> list[tuple[int, ...]]:
    return [tuple(call["input_ids"].shape) for call in calls]


class TestResults:
    @pytest.mark.parametrize("renorm", RENORM_TYPES)
    def test_texts_of_mixed_lengths(self, pipe, renorm):
        messages = [conversation([text]) for text in TEXTS]
        assert_equals_single_runs(pipe, messages, cfg_renorm_type=renorm, cfg_interval=(0.0, 1.0), **SMALL)

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
        seen = forwards(pipe)
        images = pipe(["a", "b c d"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **settings).images
        assert all(close(image, single) for image, single in zip(images, singles, strict=True))
        assert [rows for rows, _ in shapes(seen.writing)] == ([2] if think else [])

    def test_one_generator_samples_all_images_given_and_then_all_noise(self, pipe, forwards):
        names = ["wide", "tall"]
        expected = seeded(7)
        for name in names:
            (pixels,) = [
                segment.pixels
                for segment in pipe.encode_conversation(conversation([f"@{name}", "x"]))
                if segment.segment.type == "vae_image"
            ]
            pipe.encode_image(pixels, expected)
        noise = [torch.randn(count, 16, generator=expected) for count in (40, 28)]
        seen = forwards(pipe)
        pipe(["x", "yy"], image=[[golden_image(name)] for name in names], generator=seeded(7), **EDIT, **PLAN)
        latents = seen.denoising[0]["latents"]
        assert torch.equal(latents[:40], noise[0])
        assert torch.equal(latents[-28:], noise[1])

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
        seen = forwards(pipe)
        pipe(TEXTS[:3], **SMALL)
        assert [rows for rows, _ in shapes(seen.reading)] == [3]

    def test_images_run_one_by_one_and_their_texts_together(self, pipe, forwards):
        seen = forwards(pipe)
        pipe(messages=[MIXED[0], MIXED[2], MIXED[5]], **EDIT)
        assert [rows for rows, _ in shapes(seen.reading)] == [1, 1, 1, 3]
        assert ["pixel_values" in call for call in seen.reading] == [True, True, True, False]

    def test_plans_are_written_and_added_together(self, pipe, forwards):
        seen = forwards(pipe)
        pipe(messages=MIXED[:4], **SMALL, **PLAN, guidance_scale=1.0)
        assert [rows for rows, _ in shapes(seen.writing)] == [4]
        assert shapes(seen.reading)[-1][0] == 4

    def test_sampled_plans_are_written_one_by_one(self, pipe, forwards):
        seen = forwards(pipe)
        pipe(TEXTS[:3], **SMALL, **PLAN, do_sample=True)
        assert [rows for rows, _ in shapes(seen.writing)] == [1, 1, 1]

    def test_a_single_prompt_has_neither_padding_nor_mask(self, pipe, forwards):
        seen = forwards(pipe)
        pipe(messages=MIXED[0], **SMALL, **PLAN)
        assert all(call.get("attention_mask") is None for call in seen.reading)
        assert seen.writing[0]["attention_mask"].all()

    def test_the_bounds_hold(self, pipe, forwards, monkeypatch):
        seen = forwards(pipe)
        prompts = [list(map(len, pipe.encode_conversation(conversation([text]), think=True))) for text in TEXTS]
        monkeypatch.setattr(contexts, "MAX_PREFILL_TOKENS", 2 * prompts[1][1])
        monkeypatch.setattr(contexts, "MAX_JOINED_TOKENS", 3 * (sum(prompts[2]) + 8))
        images = pipe(TEXTS, generator=seeded(0, 1, 2, 3), **SMALL, **PLAN).images
        # All begin with the request to think.
        ((system, _), (_, second), (_, third), (_, fourth)) = prompts
        assert shapes(seen.reading)[:4] == [(1, system), (2, second), (1, third), (1, fourth)]
        assert [rows for rows, _ in shapes(seen.writing)] == [3, 1]
        monkeypatch.undo()
        assert close(images, pipe(TEXTS, generator=seeded(0, 1, 2, 3), **SMALL, **PLAN).images)


class TestParts:
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
        assert bucket_by_length(lengths, max_tokens, max_padding) == expected

    def test_sequences_are_padded_on_either_side(self):
        sequences = [torch.tensor([1, 2]), torch.tensor([3])]
        assert pad(sequences, 0).tolist() == [[1, 2], [3, 0]]
        assert pad(sequences, 9, side="left").tolist() == [[1, 2], [9, 3]]

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
