"""What a notebook has measured before: found again as it was, and only for the same question."""

import math
from inspect import signature

import numpy as np
import pandas as pd
import pytest
import torch

from moee_analysis import measure
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.models.capture import watch
from moee_analysis.moe.routers import ConstantRouter, CosineRouter
from moee_analysis.report.notebook import remember as remember_module
from moee_analysis.report.notebook.remember import decode, encode, remember, remembering
from tests.helpers.images import toy_images


def make_table(*values):
    table = pd.DataFrame({"layer": range(len(values)), "name": ["a", None], "value": values})
    return table.assign(right=table["layer"] > 0)


@pytest.mark.parametrize(
    "value",
    [
        make_table(math.nan, 0.1),
        [{"a": (1, 2.5, None), 3: np.int64(4)}, math.inf],
        np.arange(6, dtype=np.float32).reshape(2, 3),
    ],
)
def test_what_is_kept_comes_back_as_it_was(value):
    back = decode(encode(value))
    assert type(back) is type(value)
    if isinstance(value, pd.DataFrame):
        pd.testing.assert_frame_equal(back, value)
    else:
        np.testing.assert_equal(back, value)


@pytest.fixture
def ask(monkeypatch):
    """A measure that notes what it was asked."""
    monkeypatch.setattr(remember_module, "QUICK", -1)

    def ask(given, *, store=None, layers=()):
        ask.times += 1
        return given

    ask.times = 0
    return ask


def test_the_same_question_is_answered_once_and_another_one_anew(tmp_path, ask):
    table = make_table(0.1, 0.2)
    for _ in range(2):
        pd.testing.assert_frame_equal(remember(tmp_path, ask, table, store=tmp_path), table)
    assert ask.times == 1
    remember(tmp_path, ask, make_table(0.1, 0.3))
    remember(tmp_path, ask, table, layers=[0])
    assert ask.times == 3


@pytest.mark.parametrize("given", [lambda: None, {1, 2}])
def test_what_cannot_be_told_from_others_is_measured_each_time(tmp_path, ask, given):
    for _ in range(2):
        assert remember(tmp_path, ask, given) is given
    assert ask.times == 2
    assert not list(tmp_path.iterdir())


def test_a_network_whose_tokens_are_exchanged_is_another_one(tmp_path, ask, bundled):
    remember(tmp_path, ask, [1], layers=[bundled])
    with watch({0: bundled.norm}, lambda *_: None):
        remember(tmp_path, ask, [1], layers=[bundled])
    remember(tmp_path, ask, [1], layers=[bundled])
    assert ask.times == 2


def test_routers_are_told_by_their_tensors_and_settings(tmp_path, ask):
    routers = [ConstantRouter(0), ConstantRouter(1), ConstantRouter(1)]
    routers += [CosineRouter(torch.eye(2)), CosineRouter(2 * torch.eye(2))]
    for each in routers:
        remember(tmp_path, ask, [1], layers=[each])
    assert ask.times == 4


def test_measures_of_a_run_are_the_same_from_the_store(tmp_path, monkeypatch, small_run):
    monkeypatch.setattr(remember_module, "QUICK", -1)
    kept, images = remembering(measure, tmp_path), toy_images()
    first, again = (kept.routes(small_run, images) for _ in range(2))
    assert isinstance(again, Routes)
    np.testing.assert_equal(vars(again), vars(first))
    tables = [kept.balance([routed], resamples=10) for routed in (first, again)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[1].attrs == tables[0].attrs
    assert len(list(tmp_path.iterdir())) == 2
    assert kept.Routes is Routes
    assert kept.routes.__doc__ == measure.routes.__doc__
    assert signature(kept.routes) == signature(measure.routes)
