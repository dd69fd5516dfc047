"""A model as a file: whole and checked, or absent."""

import pytest
import torch

from moee_analysis.baselines.controls import randomly_merged
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models import exporting
from moee_analysis.models.exporting import FORMATS, NEEDED, export_model
from moee_analysis.models.merge_costs import KeyCosts
from moee_analysis.models.merging import merge_tokens
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, pixels_of, toy_kinds, toy_swin, toy_vit
from tests.helpers.runs import best

SETTINGS = {"attention": "low_rank", "merging": "budget", "merges": (2, 3, 0)}


@pytest.fixture(scope="module")
def stacked():
    """Experts, smaller heads and merged tokens."""
    return extract(toy_vit(), toy_images(24), best(macs_reduction=0.4, **SETTINGS))


@pytest.fixture
def models(stacked):
    by_keys = merge_tokens(toy_vit(depth=2), (3, 2), lambda _: KeyCosts(by_importance=True))
    return {
        "stacked": stacked.model, "kinds": toy_kinds(toy_vit(depth=1)), "keys": by_keys,
        "Swin": toy_swin(), "half": toy_kinds(toy_vit(depth=1)).half(),
    }  # fmt: skip


def needed(form):
    for package in NEEDED[form]:
        pytest.importorskip(package, reason=f"{package} is optional: pip install '.[deploy]'")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["stacked", "kinds", "keys", "Swin", "half"])
def test_a_file_computes_what_the_model_does_for_any_number_of_images(models, name, form, tmp_path):
    needed(form)
    model, out = models[name], tmp_path / f"model.{form}"
    like = next(model.parameters())
    model.train()
    far = export_model(model, pixels_of(model, count=3).to(like), out, form=form)
    assert model.training
    assert hooks_of(model.eval()) == 0
    most = 1e-4 if like.dtype == torch.float32 else 1e-2
    assert far.shape == (3,)
    assert far.max() < most
    outputs = FORMATS[form][1](out)
    for count in (1, 2, 5):
        x = pixels_of(model, count=count, seed=count).to(like)
        with torch.no_grad():
            torch.testing.assert_close(outputs(x), model(x), rtol=most, atol=10 * most)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_other_outputs_leave_no_file_and_a_single_token_that_goes_another_way_is_let_through(
    tmp_path, monkeypatch
):
    model, out = toy_vit(depth=1), tmp_path / "model.pt2"
    write, open_file = FORMATS["pt2"]
    x = pixels_of(model, count=8)

    def changed(share):
        factor = 1 + 0.1 * (torch.arange(8) < 8 * share)[:, None]

        def open_changed(file):
            found = open_file(file)(x) * factor
            return lambda given: found[:1] if len(given) == 1 else found[1:]

        return open_changed

    out.write_text("an older file")
    nothing = lambda _: lambda given: torch.full((len(given), 6), torch.nan)  # noqa: E731
    for other in (changed(1), changed(0.5), nothing):
        monkeypatch.setitem(FORMATS, "pt2", (write, other))
        with pytest.raises(MoeeError, match="a file with the model's outputs"):
            export_model(model, x, out, form="pt2")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["an older file"]
    monkeypatch.setitem(FORMATS, "pt2", (write, changed(1 / 8)))
    assert export_model(model, x, out, form="pt2").max() == pytest.approx(0.1)


def test_what_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    model = toy_vit(depth=1)
    x, out = pixels_of(model), tmp_path / "new"
    monkeypatch.setattr(exporting, "trace", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(MoeeError, match=r"no onnx\..*pip install 'moee-analysis\[deploy\]'"):
        export_model(model, x, out, form="onnx")
    monkeypatch.setattr(exporting, "find_spec", str)
    with pytest.raises(MoeeError, match=r"bfloat16.*take pt2"):
        export_model(model.bfloat16(), x.bfloat16(), out, form="onnx")
    monkeypatch.setattr(exporting, "LARGEST", 1)
    with pytest.raises(MoeeError, match="up to 2 GB"):
        export_model(model.float(), x, out, form="onnx")
    with pytest.raises(MoeeError, match="a place to write"):
        export_model(model, x, tmp_path / "missing" / "new", form="pt2")
    assert not list(tmp_path.iterdir())


def test_a_network_that_looks_at_values_cannot_be_traced(tmp_path):
    model = toy_vit(depth=1)
    model.norm.register_forward_hook(lambda _m, _x, out: out if out.sum() > 0 else -out)
    with pytest.raises(MoeeError, match=r"a VisionTransformer that torch\.export can trace"):
        export_model(model, pixels_of(model), tmp_path / "new", form="pt2")
    assert not list(tmp_path.iterdir())


def test_merging_by_chance_is_told_from_the_model(stacked, tmp_path):
    needed("onnx")  # costs there depend on the last bit
    model = randomly_merged(stacked, seed=0)
    with pytest.raises(MoeeError, match="a file with the model's outputs"):
        export_model(model, pixels_of(model, count=8), tmp_path / "new", form="onnx")
