"""Tokens merge first; all that is done with a run is done with this one."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.controls import (
    constantly_routed,
    randomly_merged,
    randomly_routed,
    statically_pruned,
)
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.merging import (
    MergedMacs,
    candidates,
    divergences,
    saved_by_merging,
)
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.extraction.record.tokens import leading_kinds
from moee_analysis.extraction.saving.rebuild import describe
from moee_analysis.measure.evaluation.evaluate import evaluate
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count
from moee_analysis.models.merge_costs import WardCosts
from moee_analysis.models.merging import merge_costs, merge_tokens, merging_blocks
from moee_analysis.moe.layer import moe_layers
from moee_analysis.training.finetune import FinetuneConfig, finetune
from tests.helpers.images import toy_images
from tests.helpers.models import pixels_of, toy_swin, toy_vit
from tests.helpers.runs import best, cost, quick, saved_and_loaded

MERGES = (3, 4, 0)
CALIBRATION, IMAGES = toy_images(72).take(range(36, 72)), toy_images(36)
KINDS = {
    "paper": quick(macs_reduction=0.35, merging="budget", merges=MERGES),
    "best": best(macs_reduction=0.36, merging="budget", merges=MERGES),
    "all three": best(macs_reduction=0.5, attention="low_rank", merging="budget", merges=MERGES),
    "one expert": best(macs_reduction=0.45, experts="one", merging="budget", merges=MERGES),
}


@cache
def taken_apart(kind):
    return extract(toy_vit(), CALIBRATION, KINDS[kind])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_budget_is_that_of_the_dense_model(kind):
    run = taken_apart(kind)
    assert merging_blocks(run.model).schedule == MERGES
    saved = 1 - cost(run) / count(run.dense()).total
    assert saved == pytest.approx(KINDS[kind].macs_reduction, abs=0.02)
    assert merging_blocks(run.dense()) is None


def test_experts_are_of_the_tokens_that_are_left(kind):
    run, seen = taken_apart(kind), {}
    with watch(moe_layers(run.model), seen.__setitem__), torch.no_grad():
        run.model(pixels_of(run.model, count=2))
    assert [x.shape[1] for x in seen.values()] == [14, 10, 10]


def test_tokens_count_for_the_patches_they_stand_for(tmp_path):
    merged = merge_tokens(toy_vit(), MERGES, lambda _: WardCosts(by_importance=True))
    config = best(tokens_per_image=5).resolved()
    for kept in (None, 5):
        tokens = calibration_tokens(
            merged, IMAGES, replace(config, tokens_per_image=kept), root=tmp_path
        )
        assert "sizes" in tokens.kinds
        for part in tokens.parts(tokens.sites):
            for layer in part.values():
                mass = layer.sample.mass(slice(None))
                found = np.bincount(layer.sample.image, mass)[layer.sample.image.min() :]
                np.testing.assert_allclose(found.mean(), 17, rtol=0 if kept is None else 0.1)
                if kept is None:
                    np.testing.assert_allclose(found, 17)
    dense = calibration_tokens(toy_vit(), IMAGES, config, root=tmp_path)
    assert "sizes" not in dense.kinds


def test_a_run_is_saved_and_loaded_with_its_schedule(kind, tmp_path):
    loaded = saved_and_loaded(taken_apart(kind), tmp_path, dense=toy_vit())
    assert merging_blocks(loaded.model).schedule == MERGES
    assert loaded.config.merges == MERGES


def test_what_each_stage_saves_adds_up(kind):
    run = taken_apart(kind)
    numbers, dense = evaluate(run, IMAGES), count(toy_vit()).total
    assert numbers["macs_dense"] == dense
    saved = numbers["macs_saved"]
    assert sum(saved.values()) == pytest.approx(dense - numbers["macs_moe"])
    if kind != "all three":  # whose heads ask for less
        costs = merging_blocks(run.model)[0].costs
        merged = merge_tokens(toy_vit(), MERGES, lambda _: costs)
        assert saved["merging"] == pytest.approx(dense - count(merged).total)
        of_pairs = 32 * (8 * 8 + 7 * 6)
        of_cls = sum(2 * 32 * 32 + 2 * 32 * tokens for tokens in (17, 14))
        assert numbers["macs_merging"] == of_pairs + of_cls
    assert (saved["attention"] > 0) == (kind == "all three")
    assert saved["experts"] > 0
    assert numbers["kl"] >= 0


def test_unread_macs_are_those_of_the_dense_model_and_of_the_tokens_left():
    table = measure.macs(taken_apart("paper").model).set_index("component")
    wasted = 2 * 32 * 64 + 2 * 32 * (32 + 17)
    assert table.loc["total", "macs_unread_dense"] == 16 * wasted
    attention = table.loc["everything else", "macs_unread"]
    assert attention == 9 * 2 * 32 * (32 + 10)


def test_every_patch_has_the_expert_of_the_token_it_went_into():
    model = taken_apart("best").model
    routes = measure.routes(model, IMAGES, batch_size=5)
    assert routes.tokens_per_image == {0: 14, 1: 10, 2: 10}
    assert routes.grid == {0: (4, 4), 1: (4, 4), 2: (4, 4)}
    blocks, layers = merging_blocks(model), moe_layers(model)
    left, chosen = {}, {}
    (x,) = IMAGES.batches(model, batch_size=len(IMAGES))
    routers = {layer: module.router for layer, module in layers.items()}
    with (
        watch(dict(enumerate(blocks)), left.__setitem__, "outputs"),
        watch(routers, chosen.__setitem__, "outputs"),
        torch.no_grad(),
    ):
        model(x)
    for layer in layers:
        own = chosen[layer].reshape(len(x), -1)
        for image in range(len(x)):
            wanted = [own[image, place].item() for place in left[layer].place[image]]
            assert routes.experts[layer][image].tolist() == wanted
        counted = [np.bincount(image, minlength=layers[layer].n_experts) for image in own.numpy()]
        np.testing.assert_array_equal(routes.counts[layer], counted)
        assert routes.shares(layer).sum() == pytest.approx(1)


def test_typical_patches_are_those_of_the_tokens_they_went_into():
    model = taken_apart("best").model
    routes, typical = measure.routes(model, IMAGES), measure.typical(model, IMAGES)
    table = measure.top_patches(model, IMAGES, routed=routes, known=typical)
    assert set(table["rows"]) == {4}
    for layer, cosines in typical.cosines.items():
        assert cosines.shape == routes.experts[layer].shape == (36, 17)


def test_knocking_out_starts_in_the_middle_and_changes_nothing_before():
    model = taken_apart("best").model
    table = measure.knock_out(model, IMAGES, CALIBRATION, layers=[1], resamples=10)
    assert set(table["layer"]) == {1}
    assert np.isfinite(table["change"]).all()


def test_controls_keep_the_schedule():
    run, x = taken_apart("best"), pixels_of(toy_vit())
    for control in (randomly_routed(run), constantly_routed(run), randomly_merged(run, seed=1)):
        assert merging_blocks(control).schedule == MERGES
        assert not torch.equal(control(x), run.model(x))
    again = randomly_merged(run, seed=1)(x)
    torch.testing.assert_close(randomly_merged(run, seed=1)(x), again)
    assert not torch.equal(randomly_merged(run, seed=2)(x), again)
    assert merging_blocks(statically_pruned(run, CALIBRATION).model).schedule == MERGES
    with pytest.raises(MoeeError, match="the run itself"):
        describe(randomly_merged(run))
    with pytest.raises(MoeeError, match="tokens merge"):
        randomly_merged(toy_vit())


def test_a_run_is_tuned():
    run = taken_apart("all three")
    config = FinetuneConfig(epochs=1, batch_size=6, held_out=0.25)
    tuned = finetune(run, CALIBRATION, config)
    assert merging_blocks(tuned.run.model).schedule == MERGES


def test_results_do_not_depend_on_the_batch(kind):
    model = taken_apart(kind).model
    x = pixels_of(model, count=6)
    each = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), each, rtol=1e-4, atol=1e-4)


def test_leading_tokens_are_known_where_as_many_tokens_are_left_as_patches():
    merged = merge_tokens(toy_vit(), (1, 0, 0), lambda _: None)
    merged.blocks[0].costs = merging_blocks(taken_apart("best").model)[0].costs
    names = [site.name for site in find_mlps(merged)]
    assert leading_kinds(merged, names) == dict.fromkeys(names, ("cls",))


def test_bad_settings_are_refused_before_anything_is_computed():
    for settings, told in (
        ({"merging": "budget", "merges": (9, 0, 0)}, "at most 8"),
        ({"merging": "budget", "merges": (1, 1)}, "3 blocks"),
        ({"merging": "none", "merges": MERGES}, "merging"),
        ({"merging": "budget", "merges": (-1, 0, 0)}, "merges"),
        ({"merging": "some"}, "merging among"),
    ):
        with pytest.raises(MoeeError, match=told):
            extract(toy_vit(), CALIBRATION, best(macs_reduction=0.4, **settings))
    with pytest.raises(MoeeError, match="plain attention"):
        extract(toy_swin(), CALIBRATION, best(macs_reduction=0.4, merging="budget"))


# The schedule


def test_a_schedule_is_searched_once_within_the_budget(tmp_path):
    config = best(macs_reduction=0.36, merging="budget")
    run = extract(toy_vit(), CALIBRATION, config, store=tmp_path)
    schedule = merging_blocks(run.model).schedule
    macs = MergedMacs.of(toy_vit(), unread="constant")
    assert schedule in candidates(toy_vit(), macs, saved_by_merging(config.resolved(), macs))
    assert 1 - cost(run) / count(toy_vit()).total == pytest.approx(0.36, abs=0.02)
    assert len(list(tmp_path.glob("merges-*"))) == 1
    again = extract(toy_vit(), CALIBRATION, replace(config, seed=1), store=tmp_path)
    assert merging_blocks(again.model).schedule == schedule
    assert len(list(tmp_path.glob("merges-*"))) == 1


def test_schedules_save_what_the_counter_counts_but_for_finding_pairs():
    model = toy_vit(depth=6)
    total, macs = count(model).total, MergedMacs.of(model, unread="routed")
    tried = candidates(model, macs, 0.2)
    assert len(tried) > 3
    for schedule in tried:
        merged = merge_tokens(model, schedule, lambda _: WardCosts(by_importance=False))
        finding = sum(count(merged).by_module[name] for name in merge_costs(merged))
        saved = 1 - (count(merged).total - finding) / total
        assert macs.saved(schedule) == pytest.approx(saved)
        assert 0.2 <= saved < 0.27


def test_small_steps_can_be_left_out():
    model = toy_vit(depth=6)
    macs = MergedMacs.of(model, unread="routed")
    for schedule in candidates(model, macs, 0.2, fewest=3):
        assert min(filter(None, schedule)) >= 3
        assert macs.saved(schedule) >= 0.2


def test_what_nothing_reads_is_not_saved_by_merging():
    model, free = toy_vit(), measure.macs(toy_vit()).iloc[-1]["macs_unread"]
    macs = MergedMacs.of(model, unread="constant")
    assert macs.whole - macs.total == free + 2 * 32 * 64  # the MLP of CLS stays, of a fixed cost
    assert macs.saved((0, 0, 8)) == 0
    averaged = toy_vit()
    averaged.global_pool = "avg"
    assert MergedMacs.of(averaged, unread="constant").total == count(model).total


def test_the_schedule_that_diverges_least_is_taken():
    model, tried = toy_vit(), [(0, 0, 4), (4, 4, 0), (1, 0, 0)]
    found = divergences(model, tried, CALIBRATION)
    for schedule, kl in zip(tried, found, strict=True):
        merged = merge_tokens(model, schedule, lambda _: WardCosts(by_importance=True))
        wanted = measure.accuracy(merged, CALIBRATION, reference=model)["kl"].iloc[0]
        assert kl == pytest.approx(wanted, abs=1e-6)
    assert found.argmin() == 0  # after the last attention nothing reads the patches


def test_what_merging_is_to_save_leaves_room_for_what_parameters_bind():
    macs = MergedMacs.of(toy_vit(), unread="constant")
    kept = 0.5 * macs.whole / macs.total
    free = saved_by_merging(best(macs_reduction=0.5), macs)
    bound = saved_by_merging(best(macs_reduction=0.5, params_reduction=0.3), macs)
    assert bound == pytest.approx(1 - kept / 0.7)
    assert 0 < bound < free < 0.5
    assert saved_by_merging(best(macs_reduction=0.2, params_reduction=0.3), macs) == 0
    assert saved_by_merging(best(macs_reduction=0.01), macs) == 0


def test_more_than_merging_can_save_is_refused():
    with pytest.raises(MoeeError, match="by merging"):
        candidates(toy_vit(), MergedMacs.of(toy_vit(), unread="routed"), 0.95)
    for settings in ({"recipe": "paper"}, {"recipe": "best", "params_reduction": 0.2}):
        with pytest.raises(MoeeError, match="macs_reduction with merging"):
            ExtractConfig(merging="budget", **settings)


def test_where_all_is_free_to_save_nothing_merges():
    run = extract(toy_vit(), CALIBRATION, best(macs_reduction=0.1, merging="budget"))
    assert merging_blocks(run.model) is None
    tried = [(0, 0, 0), (1, 0, 0)]
    assert divergences(toy_vit(), tried, CALIBRATION)[0] == pytest.approx(0, abs=1e-9)
