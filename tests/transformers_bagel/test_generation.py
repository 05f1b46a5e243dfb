"""Text through `generate()`: what users expect of every model of the library, for prompts with any mix of images."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.conftest import conversation, golden_image, load_model, max_error


PROMPTS = {
    "no_image": ["what color is the square?"],
    "one_image": ["@wide", "how many shapes are there?"],
    "two_images": ["@wide", "@square", "what color?"],
    "interleaved": ["a red circle", "@tall", "the circle is", "@square", "how many?"],
    "ends_with_image": ["look", "@square"],
}
BATCH = list(PROMPTS.values())
STEPS = 6


def generate(model, inputs, **kwargs):
    """Greedy tokens and raw logits; the end token is suppressed, so that all runs have the same length."""
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    return model.generate(
        **inputs,
        **(settings | {"return_dict_in_generate": True, "output_logits": True, "output_scores": True} | kwargs),
    )


def new_tokens(out, inputs) -> torch.Tensor:
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def grown(inputs, tokens: torch.Tensor):
    """The inputs with text tokens appended."""
    ones = torch.ones_like(tokens)
    return dict(inputs) | {
        "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], 0 * ones], dim=1),
    }


@torch.no_grad()
def without_cache(model, inputs, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each new token, from one plain forward over the whole sequence."""
    logits = model(**grown(inputs, tokens)).logits
    return logits[:, inputs["input_ids"].shape[1] - 1 : -1].transpose(0, 1)


def assert_same(out, expected, inputs, tolerance: float = 1e-5):
    assert new_tokens(out, inputs).tolist() == new_tokens(expected, inputs).tolist()
    assert max_error(torch.stack(out.logits), torch.stack(expected.logits)) <= tolerance


@pytest.fixture
def encode_latents(encode):
    """Prompts for drawing: every image is there twice, as clean latents and as ViT tokens."""

    def apply(inputs: list, **kwargs):
        encoded = encode(inputs, generation_mode="image", **kwargs)
        pixels = encoded.pop("vae_pixel_values")
        grid = torch.tensor([[image.shape[1] // 16, image.shape[2] // 16] for image in pixels])
        tables = [
            torch.randn(rows * columns, 16, generator=torch.Generator().manual_seed(rows + 10 * columns))
            for rows, columns in grid.tolist()
        ]
        encoded |= {"latents": torch.cat(tables), "latent_grid_hw": grid, "timesteps": torch.zeros(len(grid))}
        return encoded

    return apply


@pytest.fixture(scope="module")
def assistant():
    """A model that often guesses wrong."""
    model = load_model()
    with torch.no_grad():
        for parameter in model.model.language_model.layers[-1].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.fixture
def language_model_calls(model):
    """Lengths of the sequences that the language model is called with."""
    lengths = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield lengths
    handle.remove()


# One prompt


@pytest.mark.parametrize("think", [False, True], ids=["plain", "think"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_equals_plain_forwards(prompt, think, model, encode):
    inputs = encode(PROMPTS[prompt], think=think)
    out = generate(model, inputs)
    tokens = new_tokens(out, inputs)
    logits = without_cache(model, inputs, tokens)
    assert max_error(torch.stack(out.logits), logits) <= 1e-5
    end = model.config.text_config.eos_token_id
    logits[..., end] = -torch.inf
    assert logits.argmax(-1).T.tolist() == tokens.tolist()


def test_roles_do_not_change_the_sequence(model, processor, encode):
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "image", "image": golden_image("wide")}, {"type": "text", "text": "hi"}],
        },
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "what color?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = encode(["be brief", "@wide", "hi", "hello", "what color?"])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert_same(generate(model, inputs), generate(model, expected), expected)


def test_stops_at_the_end_token(model, encode):
    inputs = encode(PROMPTS["one_image"])
    end = model.config.text_config.eos_token_id
    third = int(new_tokens(generate(model, inputs), inputs)[0, 2])

    class Stop(torch.nn.Module):
        def forward(self, input_ids, scores):
            if input_ids.shape[1] == inputs["input_ids"].shape[1] + 3:
                scores[:, end] = 1e9
            return scores

    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, logits_processor=[Stop()])
    assert out[0, -1] == end and out[0, -2] == third
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4


def test_prompt_prefills_in_one_forward(model, encode, encode_latents, language_model_calls):
    for inputs in (encode(PROMPTS["interleaved"]), encode_latents(["@wide", "@tall", "green"])):
        language_model_calls.clear()
        generate(model, inputs, max_new_tokens=3, min_new_tokens=3)
        assert language_model_calls == [inputs["input_ids"].shape[1], 1, 1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_use_cache_false_changes_nothing(prompt, model, encode):
    inputs = encode(PROMPTS[prompt])
    assert_same(generate(model, inputs, use_cache=False), generate(model, inputs), inputs)


def test_prefill_chunks_of_text_change_nothing(model, encode, language_model_calls):
    inputs = encode(PROMPTS["no_image"])
    expected = generate(model, inputs)
    language_model_calls.clear()
    out = generate(model, inputs, prefill_chunk_size=4)
    assert max(language_model_calls) == 4
    assert_same(out, expected, inputs)


def test_prefill_chunks_of_images_are_refused(model, encode, encode_latents):
    for inputs in (encode(PROMPTS["one_image"]), encode_latents(["@tall", "green"])):
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4)


def test_text_from_inputs_embeds(model, encode):
    inputs = encode(PROMPTS["no_image"])
    expected = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    out = generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert out.sequences.tolist() == new_tokens(expected, inputs).tolist()
    assert max_error(torch.stack(out.logits), torch.stack(expected.logits)) <= 1e-5


@pytest.mark.parametrize("beams", [1, 2])
def test_images_from_inputs_embeds(beams, model, encode):
    """Embeddings that hold the images already need the token types, nothing else."""
    inputs = encode(PROMPTS["interleaved"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    types = inputs["mm_token_type_ids"]
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "mm_token_type_ids": types}
    given |= {key: inputs[key] for key in ("pixel_values", "image_grid_hw")}
    expected, out = generate(model, inputs, num_beams=beams), generate(model, given, num_beams=beams)
    assert out.sequences.tolist() == new_tokens(expected, inputs).tolist()
    assert max_error(torch.stack(out.logits), torch.stack(expected.logits)) <= 1e-5


def test_images_encoded_before(model, encode):
    inputs = encode(PROMPTS["two_images"])
    expected = generate(model, inputs)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_hw"))
    assert_same(generate(model, inputs, mm_encoder_outputs={"image": features}), expected, inputs)


# Batches


@pytest.mark.parametrize("think", [False, True], ids=["plain", "think"])
def test_batch_equals_single_runs(think, model, encode):
    inputs = encode(BATCH, think=think)
    assert (inputs["attention_mask"][:, 0] == 0).any() and inputs["attention_mask"][:, -1].all()
    out = generate(model, inputs)
    for index, prompt in enumerate(BATCH):
        single = encode(prompt, think=think)
        expected = generate(model, single)
        assert new_tokens(out, inputs)[index].tolist() == new_tokens(expected, single)[0].tolist()
        assert max_error(torch.stack(out.logits)[:, index], torch.stack(expected.logits)[:, 0]) <= 1e-5


def test_finished_text_of_a_batch_is_padded(model, encode):
    inputs = encode([PROMPTS["no_image"], PROMPTS["one_image"]])
    end = int(new_tokens(generate(model, inputs), inputs)[0, 1])
    texts = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=end)
    texts = texts[:, inputs["input_ids"].shape[1] :]
    stop = texts[0].tolist().index(end)
    assert (texts[0, stop + 1 :] == model.config.text_config.pad_token_id).all()


# Strategies


def test_sampling_depends_on_the_seed_alone(model, encode):
    inputs = encode(PROMPTS["interleaved"])
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(generate(model, inputs, do_sample=True, temperature=1.5).sequences.tolist())
    assert runs[0] == runs[1] != runs[2]


def test_return_sequences_keep_the_order_of_the_prompts(model, encode):
    inputs = encode(BATCH)
    expected = new_tokens(generate(model, inputs), inputs).repeat_interleave(3, dim=0)
    out = generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert new_tokens(out, inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_beams_of_a_batch_equal_single_runs(use_cache, model, encode):
    inputs = encode(BATCH)
    settings = {"num_beams": 3, "num_return_sequences": 2}
    out = generate(model, inputs, use_cache=use_cache, **settings)
    assert out.sequences.shape[0] == 2 * len(BATCH)
    for index, prompt in enumerate(BATCH):
        single = encode(prompt)
        expected = generate(model, single, **settings)
        own = slice(2 * index, 2 * index + 2)
        assert new_tokens(out, inputs)[own].tolist() == new_tokens(expected, single).tolist()
        assert max_error(out.sequences_scores[own], expected.sequences_scores) <= 1e-5


def test_beams_have_the_scores_of_plain_forwards(model, encode):
    inputs = encode(PROMPTS["interleaved"])
    out = generate(model, inputs, num_beams=3, length_penalty=0.0, min_new_tokens=None)
    tokens = new_tokens(out, inputs)
    chances = without_cache(model, inputs, tokens)[:, 0].log_softmax(-1)
    score = chances.gather(-1, tokens[0][:, None]).sum()
    assert max_error(out.sequences_scores[0], score) <= 1e-4


def test_streamer_gives_the_answer_piece_by_piece(model, processor, encode):
    inputs = encode(PROMPTS["one_image"])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    settings = {"max_new_tokens": STEPS, "do_sample": False}
    thread = Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    answer = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == processor.decode(answer, skip_special_tokens=True)
    assert len(pieces) > 1


@pytest.mark.parametrize("kind", ["name", "object"])
@pytest.mark.parametrize("inputs", [*PROMPTS.values(), BATCH], ids=[*PROMPTS, "batch"])
def test_static_cache_equals_dynamic(inputs, kind, model, encode):
    inputs = encode(inputs)
    length = inputs["input_ids"].shape[1] + STEPS + 3
    settings = {"cache_implementation": "static"}
    if kind == "object":
        settings = {"past_key_values": StaticCache(config=model.config, max_cache_len=length)}
    assert_same(generate(model, inputs, **settings), generate(model, inputs), inputs)


def test_static_cache_with_beams(model, encode):
    inputs = encode(BATCH)
    expected = generate(model, inputs, num_beams=2)
    assert_same(generate(model, inputs, num_beams=2, cache_implementation="static"), expected, inputs)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_assisted_decoding_equals_greedy(prompt, model, assistant, encode):
    inputs = encode(PROMPTS[prompt])
    assert_same(generate(model, inputs, assistant_model=assistant), generate(model, inputs), inputs)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_lookup_equals_greedy(prompt, model, encode):
    inputs = encode(PROMPTS[prompt])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12}
    expected = generate(model, inputs, **settings)
    assert_same(generate(model, inputs, prompt_lookup_num_tokens=3, **settings), expected, inputs)


def test_compiled_decode_equals_eager(encode):
    model = load_model()
    # One layer compiles faster than three, and shows the same.
    model.model.language_model.layers = model.model.language_model.layers[:1]
    inputs = encode(PROMPTS["one_image"])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "cache_implementation": "static"}
    expected = generate(model, inputs, **settings, disable_compile=True)
    compile_config = CompileConfig(fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = generate(model, inputs, **settings, compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same(out, expected, inputs)


# Prompts that hold latents


LATENT_PROMPTS = {"one": ["@tall", "make it green"], "two": ["@wide", "and", "@square", "merge them"]}


@pytest.mark.parametrize("think", [False, True], ids=["plain", "think"])
@pytest.mark.parametrize("prompt", LATENT_PROMPTS)
def test_latents_in_the_prompt_equal_plain_forwards(prompt, think, model, encode_latents):
    inputs = encode_latents(LATENT_PROMPTS[prompt], think=think)
    out = generate(model, inputs)
    assert max_error(torch.stack(out.logits), without_cache(model, inputs, new_tokens(out, inputs))) <= 1e-5


def test_latents_change_the_answer(model, encode_latents):
    inputs = encode_latents(LATENT_PROMPTS["one"])
    first = generate(model, inputs).logits[0]
    inputs["latents"] = inputs["latents"] + 1
    assert max_error(generate(model, inputs).logits[0], first) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda settings: next(iter(settings)),
)
def test_latents_with_other_strategies(settings, model, encode_latents):
    inputs = encode_latents(LATENT_PROMPTS["two"])
    assert_same(generate(model, inputs, **settings), generate(model, inputs), inputs)


def test_latents_with_an_assistant(model, assistant, encode_latents):
    inputs = encode_latents(LATENT_PROMPTS["two"])
    assert_same(generate(model, inputs, assistant_model=assistant), generate(model, inputs), inputs)


@pytest.mark.parametrize("beams", [1, 3])
def test_batch_with_latents_equals_single_runs(beams, model, encode_latents):
    prompts = list(LATENT_PROMPTS.values())
    inputs = encode_latents(prompts)
    out = generate(model, inputs, num_beams=beams, num_return_sequences=beams)
    for index, prompt in enumerate(prompts):
        single = encode_latents(prompt)
        expected = generate(model, single, num_beams=beams, num_return_sequences=beams)
        own = slice(beams * index, beams * index + beams)
        assert new_tokens(out, inputs)[own].tolist() == new_tokens(expected, single).tolist()
        if beams > 1:
            assert max_error(out.sequences_scores[own], expected.sequences_scores) <= 1e-5


def test_return_sequences_with_latents(model, encode_latents):
    inputs = encode_latents(list(LATENT_PROMPTS.values()))
    expected = new_tokens(generate(model, inputs), inputs).repeat_interleave(2, dim=0)
    out = generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert new_tokens(out, inputs).tolist() == expected.tolist()


# A second turn


def second_turn(out, first, second):
    """The inputs of a conversation that goes on behind the answer of `first`."""
    answer = out.sequences[:, first["input_ids"].shape[1] :]
    whole = grown(first, answer)
    for key, fill in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", None)):
        part = torch.ones_like(second["input_ids"]) if fill else second[key]
        whole[key] = torch.cat([whole[key], part], dim=1)
    for key in ("pixel_values", "image_grid_hw", "latents", "latent_grid_hw", "timesteps"):
        parts = [inputs[key] for inputs in (first, second) if key in inputs]
        if parts:
            whole[key] = torch.cat(parts)
    return whole


@pytest.mark.parametrize("turn", [["and now?"], ["@tall", "and this?"]], ids=["text", "new_image"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_second_turn_continues_the_cache(prompt, turn, model, encode, language_model_calls):
    first = encode(PROMPTS[prompt])
    out = generate(model, first)
    cached = out.past_key_values.get_seq_length()
    whole = second_turn(out, first, encode(turn))
    expected = generate(model, whole)
    language_model_calls.clear()
    assert_same(generate(model, whole, past_key_values=out.past_key_values), expected, whole)
    assert language_model_calls[0] == whole["input_ids"].shape[1] - cached


@pytest.mark.parametrize("turn", [["and now?"], ["@square", "and this?"]], ids=["text", "new_image"])
def test_second_turn_with_latents_continues_the_cache(turn, model, encode, encode_latents):
    first = encode_latents(LATENT_PROMPTS["one"])
    out = generate(model, first)
    second = encode(turn) if len(turn) == 1 else encode_latents(turn)
    whole = second_turn(out, first, second)
    expected = generate(model, whole)
    assert_same(generate(model, whole, past_key_values=out.past_key_values), expected, whole)


def test_second_turn_of_a_batch(model, encode):
    prompts = [PROMPTS["one_image"], PROMPTS["no_image"]]
    first = encode(prompts)
    out = generate(model, first)
    whole = second_turn(out, first, encode([["and now?"], ["and now?"]]))
    expected = generate(model, whole)
    assert_same(generate(model, whole, past_key_values=out.past_key_values), expected, whole)


def test_second_turn_of_text_alone_takes_the_new_tokens(model, encode):
    first = encode(PROMPTS["no_image"])
    out = generate(model, first)
    whole = second_turn(out, first, encode(["and now?"]))
    expected = generate(model, whole)
    fed = {
        "input_ids": whole["input_ids"][:, out.past_key_values.get_seq_length() :],
        "attention_mask": whole["attention_mask"],
    }
    again = generate(model, fed, past_key_values=out.past_key_values)
    assert new_tokens(again, fed).tolist() == new_tokens(expected, whole).tolist()
    assert max_error(torch.stack(again.logits), torch.stack(expected.logits)) <= 1e-5


@pytest.mark.parametrize("repeated", [True, False], ids=["images_again", "tokens_alone"])
@pytest.mark.parametrize("prompt", ["one_image", "interleaved", "no_image", "ends_with_image"])
def test_what_was_written_goes_on_with_the_token_types_of_the_prompt(prompt, repeated, model, encode):
    """`generate(input_ids=sequences, past_key_values=..., mm_token_type_ids=those of the prompt)`."""
    inputs = encode(PROMPTS[prompt])
    whole = generate(model, inputs, max_new_tokens=2 * STEPS, min_new_tokens=2 * STEPS)
    first = generate(model, inputs)
    attention_mask = torch.ones_like(first.sequences)
    names = inputs.keys() if repeated else ["mm_token_type_ids"]
    again = {name: inputs[name] for name in names} | {"input_ids": first.sequences, "attention_mask": attention_mask}
    rest = generate(model, again, past_key_values=first.past_key_values)
    assert rest.sequences.tolist() == whole.sequences.tolist()
    assert max_error(torch.stack(rest.logits), torch.stack(whole.logits[STEPS:])) <= 1e-5


def test_what_was_written_goes_on_without_a_cache(model, encode):
    inputs = encode(PROMPTS["one_image"])
    whole = generate(model, inputs, max_new_tokens=2 * STEPS, min_new_tokens=2 * STEPS)
    written = generate(model, inputs).sequences
    again = dict(inputs) | {"input_ids": written, "attention_mask": torch.ones_like(written)}
    assert generate(model, again).sequences.tolist() == whole.sequences.tolist()


def test_second_turn_behind_images_refuses_the_new_tokens_alone(model, encode):
    first = encode(PROMPTS["one_image"])
    out = generate(model, first)
    new = encode(["and now?"])
    length = out.past_key_values.get_seq_length() + new["input_ids"].shape[1]
    with pytest.raises(ValueError, match="images"):
        model.generate(
            input_ids=new["input_ids"],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            past_key_values=out.past_key_values,
            max_new_tokens=2,
        )


def test_prompt_can_be_prefilled_before(model, encode):
    """The library's recipe for a shared prefix: fill a cache with it, then generate the whole."""
    inputs = encode(["@wide", "what color?"])
    prefix = encode(["@wide"], add_generation_prompt=False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prefix, past_key_values=cache)
    assert_same(generate(model, inputs, past_key_values=cache), generate(model, inputs), inputs)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("prompt", [PROMPTS["interleaved"], BATCH], ids=["single", "batch"])
def test_token_types_may_be_left_out(prompt, settings, model, encode):
    inputs = dict(encode(prompt))
    expected = generate(model, inputs, **settings)
    del inputs["mm_token_type_ids"]
    assert_same(generate(model, inputs, **settings), expected, inputs)


# The library's pipeline


def test_image_text_to_text_pipeline(model, processor, encode):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": STEPS, "do_sample": False}
    answer = pipe(text=conversation(PROMPTS["two_images"]), return_full_text=False, generate_kwargs=settings)
    inputs = encode(PROMPTS["two_images"])
    tokens = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"] == processor.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_continuous_batching_equals_generate(backend, encode):
    model = load_model(attn_implementation=backend)
    prompts = [encode([text])["input_ids"][0].tolist() for text in ("a red circle", "what is it?")]
    expected = [model.generate(torch.tensor([ids]), max_new_tokens=6)[0, len(ids) :].tolist() for ids in prompts]
    found = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=model.generation_config.eos_token_id
        ),
        # The default takes most of the memory.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
        warmup=False,
    )
    assert [result.generated_tokens for result in found.values()] == expected


@pytest.mark.parametrize(("given", "meant"), [(0, False), (1, True), (None, True), (torch.tensor(0), False)], ids=str)
def test_whatever_is_true_or_false_says_whether_to_use_a_cache(given, meant, model, encode):
    inputs = encode(["@wide", "what?"])
    expected = model.generate(**inputs, max_new_tokens=4, use_cache=meant)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, use_cache=given), expected)


def test_a_configuration_stays_the_only_place_of_settings(model, monkeypatch):
    """The library warns who passes some beside it."""
    taken: list[set[str]] = []
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, inputs, config, **kwargs: taken.append(set(kwargs)))
    model.generate(input_ids=torch.tensor([[70, 71]]), generation_config=GenerationConfig(max_new_tokens=3))
    assert taken == [{"input_ids", "past_key_values"}]


def test_a_kind_of_cache_that_the_models_own_configuration_names(model, monkeypatch):
    """From which the library takes what another one leaves open."""
    ids, config = torch.tensor([[70, 71]]), GenerationConfig(max_new_tokens=3, do_sample=False)
    expected = model.generate(input_ids=ids, generation_config=config)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "dynamic")
    assert torch.equal(model.generate(input_ids=ids, generation_config=config), expected)
