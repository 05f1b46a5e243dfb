"""Both scripts take answers in which texts and pictures alternate as they are, and learn what follows what."""

from __future__ import annotations

import pytest
import train_full
import train_lora

from tests.examples.conftest import image, last_metrics, save_pictures, talk, text, write_lines


@pytest.mark.parametrize("script", [train_full, train_lora])
def test_answers_in_texts_and_pictures(script, train, tmp_path):
    one, other, *_ = save_pictures(tmp_path)
    answer = [text("first"), image(one), text("then"), image(other), text("done")]
    rows = [talk([text("in steps")], answer), talk([image(other), text("more")], answer[2:])]
    data = write_lines(tmp_path / "interleaved.jsonl", rows)
    losses = {}
    for next_action in ("none", "text"):
        folder = tmp_path / next_action
        train(script, folder, train_data_file=data, max_train_steps=1, next_action=next_action)
        losses[next_action] = last_metrics(folder)
    # The pictures are the same, and the texts have targets more.
    assert losses["none"]["mse_loss"] == pytest.approx(losses["text"]["mse_loss"], rel=1e-5)
    assert losses["none"]["ce_loss"] != pytest.approx(losses["text"]["ce_loss"], rel=1e-3)
