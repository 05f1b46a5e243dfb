"""`pipe.compile()`: layers and decoding, one graph for all lengths, and what undoing it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import GenerationConfig, GenerationMixin

from diffusers_bagel import BagelPipeline
from tests.conftest import max_error
from tests.diffusers_bagel.conftest import PLAN, SMALL, seeded
from transformers_bagel.cache import GrowingCache


@pytest.fixture
def own(own_pipe):
    torch._dynamo.reset()
    counters.clear()
    yield own_pipe
    torch._dynamo.reset()


def drawn(pipe, **settings) -> torch.Tensor:
    return pipe("a red circle", generator=seeded(0), **SMALL | settings).images


def written(pipe, length: int, **settings) -> torch.Tensor:
    ids = torch.randint(5, 400, (1, length), generator=seeded(length))
    return pipe.transformer.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **settings)


def test_it_says_what_it_does_and_undoing_leaves_nothing(own):
    expected, text = drawn(own), written(own, 9)
    report = own.compile(decode=True, max_cache_len=64, backend="eager")
    layers = [
        module for module in own.transformer.modules() if type(module).__name__ in own.transformer._no_split_modules
    ]
    assert report.layers == len(layers) and report.cache_len == 64
    assert [line.split(" ")[0] for line in str(report).splitlines()] == ["layers:", "decoding:", "products"]
    assert max_error(drawn(own), expected) <= 1e-4
    assert counters["stats"]["unique_graphs"] > 0
    own.undo_compile()
    counters.clear()
    assert torch.equal(drawn(own), expected)
    assert torch.equal(written(own, 9), text)
    assert counters["stats"]["unique_graphs"] == 0
    assert own.transformer.decoding_settings is None


def test_layers_that_were_compiled_before_stay_so(own):
    own.transformer.compile_repeated_blocks(backend="eager")
    drawn(own)
    own.compile(backend="eager")
    own.undo_compile()
    counters.clear()
    torch._dynamo.reset()
    drawn(own)
    assert counters["stats"]["unique_graphs"] > 0


def test_two_pipelines_are_compiled_each_for_itself(own, pipe):
    own.compile(backend="eager")
    with pytest.raises(RuntimeError, match="not compiled"):
        pipe.undo_compile()


def test_decoding_is_compiled_on_a_cpu_only_if_it_is_asked_for(own):
    report = own.compile(backend="eager")
    assert report.cache_len is None and own.transformer.decoding_settings is None
    assert "as before" in str(report)
    own.undo_compile()


def test_pipelines_of_one_transformer_are_compiled_together(own):
    other = copy.copy(own)
    own.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled already"):
        other.compile(backend="eager")
    other.undo_compile()
    with pytest.raises(RuntimeError, match="not compiled"):
        own.undo_compile()


def test_what_cannot_be_is_refused(own):
    with pytest.raises(TypeError, match="^`decode`"):
        own.compile(decode=torch.ones(2))
    for wrong in (0, 1.5, "long"):
        with pytest.raises((TypeError, ValueError), match="^`max_cache_len`"):
            own.compile(max_cache_len=wrong)
    with pytest.raises(RuntimeError, match="not compiled"):
        own.undo_compile()
    own.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled already"):
        own.compile()


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"cache_implementation": "static"}]
)
def test_what_is_said_of_a_cache_goes_first(settings, own):
    expected = written(own, 9, **settings)
    own.transformer.decoding_settings = {"cache_implementation": "no such cache"}
    assert torch.equal(written(own, 9, **settings), expected)


def test_what_a_call_says_goes_before_what_compile_has_set(own, monkeypatch):
    own.transformer.decoding_settings = {"cache_implementation": "static", "max_cache_len": 64}
    taken: list[tuple[GenerationConfig | None, dict]] = []
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda self, inputs, config, **kwargs: taken.append((config, kwargs))
    )
    written(own, 9)
    written(own, 9, max_cache_len=80)
    assert [kwargs["cache_implementation"] for _, kwargs in taken] == 2 * ["static"]
    assert [kwargs["max_cache_len"] for _, kwargs in taken] == [64, 80]
    # The library wants all in one place, and the caller's stays as it is.
    config = GenerationConfig(max_cache_len=96)
    written(own, 9, generation_config=config)
    found, kwargs = taken.pop()
    assert (found.cache_implementation, found.max_cache_len, config.cache_implementation) == ("static", 96, None)
    assert not kwargs.keys() & {"cache_implementation", "max_cache_len", "past_key_values"}
    taken.clear()
    written(own, 9, cache_implementation="dynamic")
    written(own, 9, generation_config=GenerationConfig(cache_implementation="dynamic"))
    written(own, 9, return_dict_in_generate=True)
    assert [type(kwargs["past_key_values"]) for _, kwargs in taken] == 3 * [GrowingCache]


def test_a_second_turn_goes_on_from_the_cache_as_without_compile(own):
    """A static cache would have no room for it."""

    def turns(**settings) -> torch.Tensor:
        first = written(own, 9, return_dict_in_generate=True)
        more = torch.randint(5, 400, (1, 70), generator=seeded(70))
        return own.transformer.generate(
            input_ids=torch.cat([first.sequences, more], 1),
            past_key_values=first.past_key_values,
            max_new_tokens=6,
            do_sample=False,
            **settings,
        )

    candidates = {"prompt_lookup_num_tokens": 3}
    expected = turns()
    assert torch.equal(turns(**candidates), expected)
    own.compile(decode=True, max_cache_len=64, backend="eager")
    assert torch.equal(turns(), expected)
    assert torch.equal(turns(**candidates), expected)


def test_undoing_puts_back_the_decoding_that_was_set_before(own):
    settings = {"cache_implementation": "static"}
    own.transformer.decoding_settings = settings
    own.compile(decode=True, max_cache_len=64, backend="eager")
    own.undo_compile()
    assert own.transformer.decoding_settings is settings


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_decoding_is_compiled_by_itself_only_where_the_weights_stay_on_an_accelerator(place, own, monkeypatch):
    """Offloaded ones are on the CPU, or nowhere, between forwards."""
    monkeypatch.setattr(BagelPipeline, "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(type(own.transformer), "device", torch.device(place))
    report = own.compile(backend="eager")
    assert report.cache_len is None and "the weights are elsewhere" in str(report)
    assert "on cuda: nothing to choose" in str(report)


def test_weights_that_are_offloaded_to_the_same_cpu(own):
    own.enable_sequential_cpu_offload(device="cpu")
    report = own.compile(backend="eager")
    assert report.cache_len is None and report.products.startswith("products of float32 by")


@pytest.mark.slow
def test_texts_are_equal_and_all_lengths_share_a_forward(own):
    lengths = (5, 9, 17, 21, 30)
    expected = [written(own, length) for length in lengths]
    plan = drawn(own, **PLAN)
    own.compile(decode=True, max_cache_len=64, backend="eager")
    for length, text in list(zip(lengths, expected, strict=True))[:2]:
        assert torch.equal(written(own, length), text)
    graphs = counters["stats"]["unique_graphs"]
    for length, text in list(zip(lengths, expected, strict=True))[2:]:
        assert torch.equal(written(own, length), text)
    assert counters["stats"]["unique_graphs"] == graphs
    assert max_error(drawn(own, **PLAN), plan) <= 1e-4
