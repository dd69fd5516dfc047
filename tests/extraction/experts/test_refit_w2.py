import pytest
import torch

from moee_analysis.extraction.experts.refit_w2 import mean_shift, shared_readout

EXPERTS, TOKENS, HIDDEN, DIM = 3, 80, 12, 5
RIDGE = 1e-12


def drawn(seed=0):
    """Hidden activations of each expert's tokens, W2, kept neurons, and a weight per expert."""
    draw = torch.Generator().manual_seed(seed)
    normal = {"generator": draw, "dtype": torch.float64}
    mixing = torch.randn(EXPERTS, HIDDEN, HIDDEN, **normal)
    tokens = torch.randn(EXPERTS, TOKENS, HIDDEN, **normal) @ mixing
    tokens = tokens + 3 * torch.randn(EXPERTS, 1, HIDDEN, **normal)
    kept = torch.rand(EXPERTS, HIDDEN, generator=draw) < 0.5
    return tokens, torch.randn(DIM, HIDDEN, **normal), kept, [0.5, 2.0, 1.0]


def refit(tokens, W2, kept, weights, *, ridge=RIDGE):
    """One W2 for all experts, fitted to explicit tokens."""
    given = list(zip(weights, [a.T.cov(correction=0).double() for a in tokens], kept, strict=True))
    sums = {
        "across": sum(w * C * D for w, C, D in given),
        "within": sum(w * C * D * D[:, None] for w, C, D in given),
    }
    return shared_readout(W2, kept, tokens.mean(dim=1), sums, ridge=ridge)


@pytest.mark.parametrize("seed", range(3))
def test_w2_is_the_least_squares_fit_of_all_tokens_at_once(seed):
    tokens, W2, kept, weights = drawn(seed)
    used, rows, targets = kept.any(dim=0), [], []
    for a, mask, weight in zip(tokens, kept, weights, strict=True):
        centred = (weight / TOKENS) ** 0.5 * (a - a.mean(dim=0))
        rows.append((centred * mask)[:, used])
        targets.append(centred @ W2.T)
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    found = refit(tokens, W2, kept, weights)
    torch.testing.assert_close(found.weight[:, used], expected, rtol=1e-6, atol=1e-6)
    for expert, (a, mask) in enumerate(zip(tokens, kept, strict=True)):  # and no mean is off
        outputs = (a * mask) @ found.weight.T + found.shift[expert]
        torch.testing.assert_close(outputs.mean(dim=0), (a @ W2.T).mean(dim=0))


def test_where_all_neurons_are_kept_or_none_or_the_ridge_is_large_w2_stays():
    tokens, W2, kept, weights = drawn()
    ridged = refit(tokens, W2, kept, weights, ridge=1e9)
    torch.testing.assert_close(ridged.weight, W2, rtol=0, atol=1e-6)
    shift = mean_shift(W2, kept, tokens.mean(dim=1))
    torch.testing.assert_close(ridged.shift, shift, rtol=0, atol=1e-5)
    whole = refit(tokens, W2, torch.ones_like(kept), weights)
    torch.testing.assert_close(whole.weight, W2)
    torch.testing.assert_close(whole.shift, torch.zeros(EXPERTS, DIM, dtype=torch.float64))
    bare = refit(tokens, W2, torch.zeros_like(kept), weights)
    torch.testing.assert_close(bare.weight, W2)
    torch.testing.assert_close(bare.shift, tokens.mean(dim=1) @ W2.T)
    kept[1] = False  # an expert without neurons gives its mean output
    found = refit(tokens, W2, kept, weights)
    torch.testing.assert_close(found.shift[1], (tokens[1] @ W2.T).mean(dim=0))


def test_neither_an_expert_without_tokens_nor_the_precision_changes_the_others():
    tokens, W2, kept, weights = drawn()
    nothing = torch.zeros_like(tokens[:1])
    more = (torch.cat([tokens, nothing]), W2, torch.cat([kept, kept[:1]]), [*weights, 0.0])
    with_it, without = refit(*more, ridge=1e-3), refit(tokens, W2, kept, weights, ridge=1e-3)
    torch.testing.assert_close(with_it.weight, without.weight)
    torch.testing.assert_close(with_it.shift[:EXPERTS], without.shift)
    assert not with_it.shift[EXPERTS].any()
    single = refit(tokens.float(), W2.float(), kept, weights, ridge=1e-3)  # of the layer's own
    assert single.weight.dtype == single.shift.dtype == torch.float32
    torch.testing.assert_close(single.weight.double(), without.weight, rtol=1e-3, atol=1e-3)
