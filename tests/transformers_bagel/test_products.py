"""By what a CPU multiplies in float32: measured, in force while a forward runs, and put back."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.conftest import load_model
from transformers_bagel import BagelConfig, products
from transformers_bagel.products import LEAST_TOKENS, Products, measured, onednn_products, products_of, told_products


FAST, EXACT = Products(2.0, 1.0, 1e-6), Products(1.1, 1.0, 1e-6)
ROUNDED = Products(9.0, 1.0, 1e-3)


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def found(monkeypatch):
    """What is measured."""

    def set_found(products_found: Products | None) -> None:
        monkeypatch.setattr(products, "measured", lambda width, hidden: products_found)

    return set_found


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture
def seen(model):
    """The setting inside each forward."""
    during: list[str] = []
    hook = model.model.register_forward_pre_hook(lambda *args: during.append(precision()))
    yield during
    hook.remove()


def ids(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.long)


@pytest.mark.parametrize(
    ("choice", "words"),
    [(FAST, "by oneDNN: oneDNN is 2.0 times"), (EXACT, "by MKL: oneDNN is 1.1 times"), (ROUNDED, "would round them")],
)
def test_the_faster_is_chosen_if_it_is_clearly_faster_and_in_float32(choice, words):
    assert choice.by_onednn == (choice is FAST)
    assert words in str(choice)


def test_this_machine_is_measured_once_and_left_as_it_was():
    before = precision()
    choice = measured(512, 1408)
    assert choice is measured(512, 1408)
    assert choice is None or (choice.mkl > 0 and choice.onednn > 0 and choice.error > 0)
    assert precision() == before


@pytest.fixture
def chosen(monkeypatch):
    """Settings of the process, all of which are put back."""
    places = [torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    before = [place.fp32_precision for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("place", [torch.backends, torch.backends.mkldnn.matmul], ids=["of all", "of products"])
def test_what_somebody_has_chosen_is_told_and_not_measured(place, chosen, monkeypatch):
    """A measurement would be of that, and would write what is inherited where it was not said."""
    monkeypatch.setattr(products, "measured", lambda *args: pytest.fail("measured"))
    config = BagelConfig()
    place.fp32_precision = "ieee"
    assert told_products(config) == "products of float32 by the precision that was chosen for them, ieee"
    assert products_of(config) is None
    place.fp32_precision = "none"
    assert precision() == "none"


@torch.no_grad()
def test_a_forward_measures_nothing_where_somebody_has_chosen(chosen, model, seen, monkeypatch):
    monkeypatch.setattr(products, "measured", lambda *args: pytest.fail("measured"))
    torch.backends.fp32_precision = "ieee"
    model(input_ids=ids(LEAST_TOKENS))
    torch.backends.fp32_precision = "none"
    assert seen == ["ieee"] and precision() == "none"


def test_what_is_ours_counts_as_no_choice(monkeypatch, found):
    found(FAST)
    with onednn_products():
        assert told_products(load_model().config) == str(FAST)


def test_narrow_models_are_not_measured():
    assert measured(64, 96) is None
    assert "narrow" in told_products(load_model().config)


@pytest.mark.parametrize(("choice", "expected"), [(FAST, "bf16"), (EXACT, "none"), (ROUNDED, "none"), (None, "none")])
@torch.no_grad()
def test_it_holds_while_a_forward_runs(choice, expected, found, model, seen):
    found(choice)
    model(input_ids=ids(LEAST_TOKENS))
    assert seen == [expected]
    assert precision() == "none"


def test_few_tokens_gradients_and_other_types_are_as_they_were(found, model, seen):
    found(FAST)
    with torch.no_grad():
        model(input_ids=ids(LEAST_TOKENS - 1))
    model(input_ids=ids(LEAST_TOKENS))
    assert seen == ["none", "none"]
    with torch.no_grad():
        low = load_model().to(torch.bfloat16)
        low.model.register_forward_pre_hook(lambda *args: seen.append(precision()))
        low(input_ids=ids(LEAST_TOKENS))
    assert seen[2:] == ["none"]


@torch.no_grad()
def test_latents_and_embeddings_count_too(found, model, seen):
    found(FAST)
    model(inputs_embeds=torch.zeros(2, LEAST_TOKENS // 2, model.config.get_text_config().hidden_size))
    side = 4
    count = LEAST_TOKENS // side**2
    model(
        latents=torch.zeros(LEAST_TOKENS, model.config.latent_dim),
        latent_grid_hw=torch.tensor([[side, side]] * count),
        timesteps=torch.full((count,), 0.5),
        position_ids=torch.zeros(count, dtype=torch.long),
    )
    assert seen == ["bf16", "bf16"]


@torch.no_grad()
def test_an_error_puts_it_back(found, model):
    found(FAST)
    with pytest.raises(RuntimeError):
        model(input_ids=ids(LEAST_TOKENS), document_ids=torch.zeros(3, 3))
    assert precision() == "none"


def test_the_last_thread_puts_back_what_the_first_found():
    inside, leave = threading.Barrier(3), threading.Event()

    def use() -> None:
        with onednn_products():
            inside.wait(20)
            leave.wait(20)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(20)
    with onednn_products():
        assert precision() == "bf16"
    assert precision() == "bf16"
    leave.set()
    for thread in threads:
        thread.join()
    assert precision() == "none"


@pytest.mark.parametrize("chosen", ["ieee", "tf32", "bf16"])
@torch.no_grad()
def test_what_somebody_has_chosen_before_holds_inside_and_behind(chosen, found, model, seen):
    found(FAST)
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    try:
        model(input_ids=ids(LEAST_TOKENS))
        assert [*seen, precision()] == [chosen, chosen]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_measuring_beside_a_forward_of_another_thread_finds_the_same():
    measured.cache_clear()
    alone = measured(512, 1408)
    measured.cache_clear()
    with onednn_products():
        beside = measured(512, 1408)
        assert precision() == "bf16"
    assert (alone is None) == (beside is None)
    if alone is not None and alone.mkl > 1.5 * alone.onednn:
        assert beside.mkl > beside.onednn * products.LEAST_GAIN


def test_what_somebody_chooses_meanwhile_stays():
    try:
        with onednn_products():
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        assert precision() == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@torch.no_grad()
def test_numbers_are_those_of_float32(found, model):
    tokens = torch.arange(LEAST_TOKENS)[None] % 400
    found(None)
    expected = model(input_ids=tokens).logits
    if (choice := measured(512, 1408)) is None or choice.error > products.LARGEST_ERROR:
        pytest.skip("This CPU would round.")
    found(FAST)
    logits = model(input_ids=tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
