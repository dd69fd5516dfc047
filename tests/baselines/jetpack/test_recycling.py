import numpy as np
import pytest
import torch

from moee_analysis.baselines.jetpack.recycling import (
    BATCH,
    Units,
    choose_shared,
    draw_order,
    draw_units,
    profile,
    worth_of,
)
from moee_analysis.models.capture import capture
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit
from tests.helpers.widened import convnext, lively_ones


def units(total=64):
    rng = np.random.default_rng(0)
    active = rng.uniform(size=(500, total)) < rng.uniform(0.1, 0.9, size=total)
    together = active.T.astype(float) @ active
    return Units(total, rng.uniform(size=total), together)


@pytest.mark.parametrize("method", ["importance", "graph", "uniform", "random"])
@pytest.mark.parametrize("choose", [draw_units, choose_shared])
@pytest.mark.parametrize("size", [1, 13, 64])
def test_ids_are_as_many_as_wanted_unique_and_ascending(method, choose, size):
    among = units()
    ids = choose(method, among, size, np.random.default_rng(0))
    assert len(ids) == size
    assert (np.diff(ids) > 0).all()
    assert 0 <= ids.min() <= ids.max() < 64
    if choose is choose_shared and method in ("importance", "graph"):  # those worth most
        assert among.worth[ids].min() >= np.delete(among.worth, ids).max(initial=0)


def test_draws_follow_the_weights_without_replacement():
    weights, rng = np.array([1.0, 2.0, 5.0]), np.random.default_rng(0)
    orders = np.array([draw_order(weights, rng) for _ in range(20000)])
    first = np.bincount(orders[:, 0], minlength=3) / len(orders)
    np.testing.assert_allclose(first, weights / 8, atol=0.015)
    after_last = orders[orders[:, 0] == 2, 1]
    assert (after_last == 1).mean() == pytest.approx(2 / 3, abs=0.015)
    order = draw_order(np.array([0.0, 1.0, 0.0, 1e-9]), rng)
    assert set(order[:2]) == {1, 3}  # nothing comes last


def test_the_parts_are_those_that_are_active_together():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(8), 8))
    now, noise = rng.integers(0, 8, size=(1000, 1)), rng.uniform(size=(1000, 64))
    active = (now == truth) | (noise < 0.02)
    among = Units(64, together=active.T.astype(float) @ active)
    parts = [tuple(np.flatnonzero(truth == part)) for part in range(8)]
    assert sorted(map(tuple, among.parts)) == sorted(parts)
    whole = draw_units("graph", among, 16, rng)
    assert len(set(truth[whole])) == 2  # two parts, each as a whole
    (few,) = Units(5, together=np.ones((5, 5))).parts
    assert few.tolist() == list(range(5))


IMAGES = toy_images(BATCH + 5)  # more than a batch


@pytest.mark.parametrize(("make", "places"), [  # and the modules that get what is counted there
    (toy_vit, {"blocks.1.mlp": ".fc2", "blocks.2.mlp.fc1": "", "blocks.0.attn": ".proj"}),
    (lambda: lively_ones(convnext(16)),
     {"stages.1.blocks.1.mlp": ".fc2", "stages.0.blocks.0.mlp.fc1": ""}),
])  # fmt: skip
def test_sums_are_those_of_all_tokens_at_once_and_found_again(make, places, tmp_path):
    model = make().train()
    found = profile(model, IMAGES, together=True, store=tmp_path)
    assert (hooks_of(model), model.training) == (0, True)
    again = profile(model, IMAGES, together=True, store=tmp_path)
    assert all(torch.equal(again[name], t) for name, t in found.items())
    assert len(list(tmp_path.iterdir())) == 1
    profile(model, IMAGES, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    modules = {place: place + own for place, own in places.items()}
    with capture(model.eval(), modules.values()) as seen, torch.inference_mode():
        model(torch.cat(list(IMAGES.batches(model))))
    for place, module in modules.items():
        tokens = seen[module].flatten(0, -2).double()
        active = (tokens > 0).double()
        expected = tokens.square().mean(0).sqrt()
        np.testing.assert_allclose(worth_of(found, place), expected, rtol=1e-4)
        if "mlp" in place:
            counts = found[f"{place}.together"].numpy()
            assert np.abs(counts - (active.T @ active).numpy()).max() <= 2  # rounding about 0
            np.testing.assert_array_equal(counts, counts.T)
