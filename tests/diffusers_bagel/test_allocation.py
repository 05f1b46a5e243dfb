"""What a denoising step of the pipeline allocates."""

from __future__ import annotations

from tests.transformers_bagel.test_cache import allocated


def test_a_guided_step_allocates_the_same_for_a_longer_prompt(pipe, monkeypatch):
    bytes_of_steps = {}
    predict = pipe._predict_velocity

    # Above the block size of the attention kernel, whose scratch space grows up to it.
    for words in (1000, 3000):
        steps: list[int] = []

        def measured(*args, steps=steps):
            result = []
            steps.append(allocated(lambda: result.append(predict(*args))))
            return result[0]

        monkeypatch.setattr(pipe, "_predict_velocity", measured)
        pipe("a " * words, height=32, width=32, num_inference_steps=3, output_type="latent")
        bytes_of_steps[words] = steps[-2]
    # Tokens, keys and values, layers, heads, head_dim, float32.
    prefix_bytes = 2000 * 2 * 3 * 2 * 16 * 4
    assert bytes_of_steps[3000] - bytes_of_steps[1000] < 0.01 * prefix_bytes
