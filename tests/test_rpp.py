"""The routing path predictor: its steps are its model, and it follows a sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from predictor_cases import NEW_TOKENS, generate, random_rpp
from tiny_models import prompt_ids, tiny_model

import moe_offload
from moe_offload.predictors.rpp_model import RppConfig, RppModel
from moe_offload.predictors.rpp_session import RppDecoder, RppSession


def test_rpp_steps_equal_the_whole_sequence() -> None:
    torch.manual_seed(1)
    config = RppConfig(50, 3, 8, 2, d_model=16, d_ff=32, max_decoded=12)
    model = RppModel(config).eval()
    torch.nn.init.normal_(model.head.weight)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)):
        # Folded into the next matrix, which is rounded to bfloat16: powers of two round nothing.
        norm.weight.data = 2.0 ** torch.randint(-1, 2, norm.weight.shape)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    prompt = torch.randint(0, 50, (2, 5))
    keep = torch.tensor([[False, False, True, True, True], [True] * 5])
    decoded = torch.randint(0, 50, (2, 9))
    session = RppSession(RppDecoder(model), prompt, keep)
    steps = [session.step(decoded[:, i]) for i in range(9)]
    with torch.no_grad():
        whole = model(prompt, decoded, keep)
    for i, logits in enumerate(steps):  # fp32 sums in another order
        torch.testing.assert_close(torch.from_numpy(logits), whole[:, i], rtol=1e-4, atol=1e-4)
    # padding is not read
    with torch.no_grad():
        short = model(prompt[:1, 2:], decoded[:1])
    torch.testing.assert_close(short[0], whole[0], rtol=1e-4, atol=1e-4)
    for i in range(20):  # past its room: the older half leaves, steps go on
        assert np.isfinite(session.step(decoded[:, i % 9])).all()


def test_rpp_follows_a_sequence_and_gives_up_when_it_lost_it() -> None:
    model = tiny_model("qwen3_moe")
    with moe_offload.offload(model, device_budget="50%") as offloader:
        offloader.predict_with(model, random_rpp(2))
        generate(model, batch=2)
        stats = offloader.stats()["predictor"]
        assert stats["recall"]["token"]["tokens"] == 2 * (NEW_TOKENS - 1)
        assert stats["calls_without_history"] == 0
        out = model(prompt_ids(8), use_cache=True)
        cache = out.past_key_values
        offloader.predict_with(model, random_rpp(2))  # has not seen the prompt
        model(prompt_ids(1), past_key_values=cache)
        assert offloader.stats()["predictor"]["calls_without_history"] == 1
