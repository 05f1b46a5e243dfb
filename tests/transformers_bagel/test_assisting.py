# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Assistants behind images: the text of plain decoding, in fewer forwards where the assistant is right."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from diffusers_bagel import BagelPipeline
from tests.conftest import load_model
from transformers_bagel import BagelForConditionalGeneration, ForwardCounter


PROMPTS = {
    "no_image": ["what color is the square?"],
    "one_image": ["@wide", "how many shapes are there?"],
    "interleaved": ["a red circle", "@tall", "the circle is", "@square", "how many?"],
    "ends_with_image": ["look", "@square"],
}
STEPS = 12


def text_model(model: BagelForConditionalGeneration, vocab_size: int | None = None) -> Qwen3ForCausalLM:
    """The understanding expert as a model of text alone; with other rows in its vocabulary if asked."""
    config = model.config.text_config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    twin = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size or config.vocab_size,
            head_dim=config.hidden_size // config.num_attention_heads,
            attention_bias=True,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            **{name: getattr(config, name) for name in names},
        )
    ).eval()
    own = {name.replace("language_model.", ""): values for name, values in model.state_dict().items()}
    with torch.no_grad():
        for name, values in twin.state_dict().items():
            if name.endswith("o_proj.bias"):
                values.zero_()
            else:
                rows = min(len(values), len(own[name]))
                values[:rows] = own[name][:rows]
    return twin.to(model.device)


@pytest.fixture(scope="module")
def twin():
    """It thinks as the model does where there is no image. Its candidates are all tried, however unsure it is."""
    twin = text_model(load_model())
    twin.generation_config.assistant_confidence_threshold = 0.0
    return twin


@pytest.fixture(scope="module")
def stranger():
    """A random model of the same tokenizer, which is hardly ever right."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=440, intermediate_size=32, bos_token_id=421, eos_token_id=422, **sizes)
    stranger = Qwen2ForCausalLM(config).eval()
    stranger.generation_config.assistant_confidence_threshold = 0.0
    return stranger


def written(model, inputs, **kwargs) -> tuple[list[int], ForwardCounter]:
    """Tokens behind the prompt, and what each forward gave."""
    counter = ForwardCounter()
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    ids = model.generate(**inputs, **(settings | {"streamer": counter} | kwargs))
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), counter


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", ["twin", "stranger", "lookup"])
def test_the_text_is_that_of_plain_decoding(kind, prompt, model, encode, request):
    inputs = encode(PROMPTS[prompt])
    expected, plain = written(model, inputs)
    ways = {"prompt_lookup_num_tokens": 3}
    text, counter = written(
        model, inputs, **(ways if kind == "lookup" else {"assistant_model": request.getfixturevalue(kind)})
    )
    assert text == expected and plain.tokens == [1] * STEPS
    assert sum(counter.tokens) == STEPS


def test_an_assistant_that_is_right_saves_forwards(model, twin, encode):
    _, counter = written(model, encode(PROMPTS["no_image"]), assistant_model=twin)
    # All candidates but one, behind which the model has the last word.
    assert counter.tokens == [STEPS] and counter.rate == STEPS


def test_an_assistant_that_is_wrong_costs_no_forwards(model, stranger, encode):
    _, counter = written(model, encode(PROMPTS["one_image"]), assistant_model=stranger)
    assert 1 <= counter.rate < 1.5


def test_an_assistant_that_sees_is_given_the_images(model, encode):
    inputs = encode(PROMPTS["interleaved"])
    copy = load_model(visual_gen=False)
    copy.generation_config.assistant_confidence_threshold = 0.0
    text, counter = written(model, inputs, assistant_model=copy)
    assert text == written(model, inputs)[0] and counter.tokens == [STEPS]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_assistant_reads_the_words_and_each_of_them_once(prompt, model, twin, encode):
    """Also what it proposed itself, but for the last token of a forward."""
    inputs = encode(PROMPTS[prompt])
    read: list[list[int]] = []
    hook = twin.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    with hook:
        written(model, inputs, assistant_model=twin)
    assert read[0] == inputs["input_ids"][inputs["mm_token_type_ids"] == 0].tolist()
    assert all(len(ids) <= 2 for ids in read[1:])


def test_placeholders_are_known_without_their_types(model, twin, encode):
    inputs = encode(PROMPTS["one_image"])
    expected = written(model, inputs)[0]
    del inputs["mm_token_type_ids"]
    assert written(model, inputs, assistant_model=twin)[0] == expected
    assert written(model, inputs, prompt_lookup_num_tokens=3)[0] == expected


def test_padding_is_not_read(model, twin, encode):
    inputs = encode(PROMPTS["no_image"])
    padded = {name: torch.nn.functional.pad(values, (4, 0)) for name, values in inputs.items()}
    text, counter = written(model, padded, assistant_model=twin)
    assert text == written(model, inputs)[0] and counter.tokens == [STEPS]


@pytest.mark.parametrize("vocab_size", [430, 448, 500], ids=["fewer", "equal", "more"])
def test_spare_rows_of_a_vocabulary_do_not_matter(vocab_size, model, encode):
    """As Qwen2.5 has 151936 rows in its smaller models and 152064 in the larger ones."""
    inputs = encode(PROMPTS["one_image"])
    assistant = text_model(model, vocab_size)
    expected = written(model, inputs)[0]
    assert written(model, inputs, assistant_model=assistant)[0] == expected
    assert written(model, inputs, assistant_model=assistant, do_sample=True, top_k=1)[0] == expected


def test_a_second_turn_goes_on_from_the_cache(model, twin, encode):
    inputs = encode(PROMPTS["one_image"])
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    question = encode(["and now?"])["input_ids"]
    ids = torch.cat([out.sequences, question], dim=1)
    turn = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": inputs["mm_token_type_ids"],
    }
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    expected = written(model, turn | pixels)[0]
    text = written(model, turn, past_key_values=out.past_key_values, assistant_model=twin)[0]
    assert text == expected


@torch.no_grad()
def test_sampling_keeps_the_odds(model, stranger, encode):
    """How often each pair of tokens comes, against what the model's own scores say, behind an assistant with other odds."""
    inputs = encode(["@square", "hi"])
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 2, "max_new_tokens": 3, "min_new_tokens": 3}
    torch.manual_seed(0)
    runs = 150
    texts = Counter(tuple(written(model, inputs, assistant_model=stranger, **settings)[0][:2]) for _ in range(runs))

    def chances(*tokens: int) -> dict[int, float]:
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long, device=model.device)], dim=1)
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(tokens)))
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
        best = model(input_ids=ids, mm_token_type_ids=types, **images).logits[0, -1].div(2.0).topk(2)
        return dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    odds = {(a, b): p * q for a, p in chances().items() for b, q in chances(a).items()}
    distance = sum((texts[pair] - runs * chance) ** 2 / (runs * chance) for pair, chance in odds.items())
    # Of chi-square with three degrees of freedom, one in a thousand is above.
    assert set(texts) <= set(odds) and distance < 16.3


# What is refused


def test_an_assistant_of_another_tokenizer_is_refused(model, encode):
    other = text_model(model, 2000)
    with pytest.raises(
        ValueError, match="`assistant_model` has 2000 tokens and this model 448, so its tokenizer is an"
    ):
        model.generate(**encode(PROMPTS["one_image"]), assistant_model=other)


def test_an_assistant_of_another_tokenizer_is_translated(model, processor, encode):
    """The library goes by the text."""
    inputs = encode(PROMPTS["one_image"])
    tokenizers = {"tokenizer": processor.tokenizer, "assistant_tokenizer": processor.tokenizer}
    text, _ = written(model, inputs, assistant_model=text_model(model, 2000), **tokenizers)
    assert text == written(model, inputs)[0]


def test_a_tokenizer_that_is_not_its_models_is_refused(model, processor, encode):
    tokenizers = {"tokenizer": processor.tokenizer, "assistant_tokenizer": processor.tokenizer}
    with pytest.raises(
        ValueError, match=r"^`assistant_tokenizer` has \d+ tokens and its model 17: pass the model's own"
    ):
        model.generate(**encode(PROMPTS["one_image"]), assistant_model=text_model(model, 17), **tokenizers)


def test_embeddings_have_no_words_for_an_assistant(model, twin, encode):
    inputs = encode(PROMPTS["no_image"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="pass the prompt as `input_ids`"):
        model.generate(inputs_embeds=embeds, assistant_model=twin, max_new_tokens=2)


def test_early_exit_is_refused(model, encode):
    inputs = encode(PROMPTS["one_image"])
    for settings in ({"assistant_early_exit": 1}, {"generation_config": GenerationConfig(assistant_early_exit=1)}):
        with pytest.raises(ValueError, match="`assistant_early_exit=1` needs a model that was trained"):
            model.generate(**inputs, **settings)


@pytest.mark.parametrize("kind", ["assistant_model", "prompt_lookup_num_tokens"])
def test_batches_are_refused_as_the_library_does(kind, model, twin, encode):
    inputs = encode([PROMPTS["one_image"], PROMPTS["no_image"]])
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model.generate(**inputs, **{kind: twin if kind == "assistant_model" else 3})


# Plans of pictures


def test_plans_are_looked_up_in_their_prompts(processor, vae):
    pipe = BagelPipeline(load_model(), vae, FlowMatchEulerDiscreteScheduler(shift=3.0), processor)
    pipe.set_progress_bar_config(disable=True)
    config, plans = pipe.transformer.generation_config, []
    for tokens in (None, 3):
        config.prompt_lookup_num_tokens = tokens
        settings = {"think": True, "max_think_tokens": STEPS, "do_sample": False, "num_inference_steps": 1}
        plans.append(pipe(["a red circle", "two blue squares"], height=32, width=32, **settings).texts)
    assert plans[0] == plans[1] and all(plans[0])


@pytest.mark.parametrize("assistant", ["Qwen/Qwen2.5-0.5B", True])
def test_what_is_no_model_assists_nobody(assistant, model, encode):
    with pytest.raises(TypeError, match=f"`assistant_model` must be a model, got {assistant!r}"):
        model.generate(**encode("hi"), max_new_tokens=3, assistant_model=assistant)


def test_a_counter_of_no_forward():
    assert ForwardCounter().rate == 0
