"""The predictors' own products (csrc/predictors): right on every instruction set, and alone."""

import numpy as np
import pytest
import torch

from moe_offload import _core
from moe_offload.predictors.rpp_model import RppConfig, RppModel
from moe_offload.predictors.rpp_session import RppDecoder, RppSession, packed


@pytest.mark.parametrize("isa", _core.dense_isas())
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 32, 192), (7, 5, 67), (4, 2048, 32)])
def test_dense_against_fp64(isa: str, rows: int, inner: int, columns: int) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, inner)).astype(np.float32)
    w = random.standard_normal((inner, columns)).astype(np.float32)
    found = _core.dense(x, w, isa)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    bound = np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)) * inner * 2.0**-24
    assert (np.abs(found - exact) <= bound).all()
    for row in range(rows):  # a row's bits do not depend on its neighbours
        np.testing.assert_array_equal(_core.dense(x[row : row + 1], w, isa)[0], found[row])


@pytest.mark.parametrize("isa", _core.dense_isas())
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 32, 192), (7, 5, 67), (4, 640, 31)])
def test_packed_products_against_fp64(isa: str, rows: int, inner: int, columns: int) -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((rows, inner)).astype(np.float32)
    w = random.standard_normal((inner, columns)).astype(np.float32)
    found = _core.packed_product(x, packed(w), columns, isa)
    rounded = torch.from_numpy(w).bfloat16().double().numpy()
    exact = x.astype(np.float64) @ rounded
    bound = np.abs(x.astype(np.float64)) @ np.abs(rounded) * inner * 2.0**-24
    assert (np.abs(found - exact) <= bound).all()
    for row in range(rows):
        alone = _core.packed_product(x[row : row + 1], packed(w), columns, isa)
        np.testing.assert_array_equal(alone[0], found[row])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected x .* got \(2, 3\) and \(4, 5\)"):
        _core.dense(np.zeros((2, 3)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match="packed_product: expected x"):
        _core.packed_product(np.zeros((2, 3)), packed(np.zeros((4, 5), np.float32)), 5)
    with pytest.raises(ValueError, match="this machine has no abacus"):
        _core.dense(np.zeros((2, 3)), np.zeros((3, 5)), "abacus")


def random_model() -> RppModel:
    torch.manual_seed(3)
    config = RppConfig(50, 3, 8, 2, d_model=16, d_ff=40, num_heads=3, d_kv=6, max_decoded=12)
    model = RppModel(config).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_a_sequence_does_not_see_its_neighbours() -> None:
    decoder = RppDecoder(random_model())
    prompts, tokens = torch.randint(0, 50, (5, 7)), torch.randint(0, 50, (5, 20))
    together = RppSession(decoder, prompts)
    alone = [RppSession(decoder, prompts[i : i + 1]) for i in range(5)]
    for t in range(20):  # past max_decoded: the older half left
        found = together.chances(tokens[:, t])
        for i, session in enumerate(alone):
            np.testing.assert_allclose(
                session.chances(tokens[i : i + 1, t])[0], found[i], rtol=1e-5, atol=1e-6
            )


def test_chances_are_the_logistic_of_the_logits() -> None:
    decoder = RppDecoder(random_model())
    prompt = torch.randint(0, 50, (2, 7))
    one, other = RppSession(decoder, prompt), RppSession(decoder, prompt)
    tokens = torch.tensor([3, 49])
    logits = one.step(tokens).astype(np.float64)
    np.testing.assert_allclose(other.chances(tokens), 1 / (1 + np.exp(-logits)), rtol=1e-6)


def test_only_the_end_of_a_long_prompt_is_read() -> None:
    model = random_model()
    limit = model.config.max_prompt
    prompt = torch.randint(0, 50, (1, limit + 9))
    keep = torch.ones(1, limit + 9, dtype=torch.bool)
    keep[0, : limit // 2] = False
    decoder, token = RppDecoder(model), torch.tensor([7])
    long = RppSession(decoder, prompt, keep).step(token)
    short = RppSession(decoder, prompt[:, limit // 2 :]).step(token)
    np.testing.assert_allclose(long, short, rtol=1e-4, atol=1e-5)


def test_matrices_of_other_shapes_are_refused() -> None:
    decoder = RppDecoder(random_model())
    decoder.blocks[0][4] = decoder.blocks[0][4][:, 1:].copy()
    with pytest.raises(ValueError, match=r"expected up packed as \[1, 16, 64\], got \(1, 15, 64\)"):
        RppSession(decoder, torch.randint(0, 50, (2, 4)))


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    session = RppSession(RppDecoder(random_model()), torch.randint(0, 50, (2, 4)))
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 50\), got 50"):
        session.step(torch.tensor([1, 50]))
    with pytest.raises(ValueError, match="expected 2 token ids, one per sequence, got 3"):
        session.step(torch.tensor([1, 2, 3]))
