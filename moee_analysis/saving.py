"""Runs on disk: one safetensors file, one JSON file, and a refusal of anything else.

The JSON carries a checksum of itself and of the tensors, so that a file that was cut short,
edited by hand or put together from two runs is refused instead of loading as a wrong model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from moee_analysis.attention import LowRankAttention, Ranks, reduced_attentions, site_of
from moee_analysis.dense_layers import compute_in_blocks
from moee_analysis.errors import MoeeError
from moee_analysis.layers import MoeMlp, Readout, moe_names, replace_module
from moee_analysis.models import architecture, build_model
from moee_analysis.routers import ConstantRouter, CosineRouter, NearestRouter, TokenKindRouter
from moee_analysis.store import new_folder, write_json
from moee_analysis.weights import load_tensors, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

FORMAT = 5
KIND = "moee run"
TENSORS = "model.safetensors"
FACTS = "run.json"
KINDS = {
    CosineRouter: "cosine", ConstantRouter: "constant", NearestRouter: "nearest",
    TokenKindRouter: "token_kinds",
}  # fmt: skip
INPUT_FACTS = (
    "architecture", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode",
    "num_classes", "label_names", "classifier", "first_conv",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """What a run folder holds: the rebuilt model and the facts saved beside it."""

    model: nn.Module
    facts: dict[str, Any]


def write_run(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Save a model with routed layers and plain JSON ``facts`` as ``folder``, all or nothing.

    Raises
    ------
    MoeeError
        The folder holds something that is not an earlier run; the model cannot be rebuilt
        from its timm name.
    """
    check_target(folder)
    check_rebuilds(model)
    with new_folder(folder) as partial:
        fill_run(partial, model, facts)


def fill_run(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write the two files of a run into an existing ``folder``."""
    save_file(_tensors(model), folder / TENSORS, metadata={"format": "pt"})
    (folder / TENSORS).chmod(0o644)  # safetensors gives it to its owner alone
    content = {
        "kind": KIND,
        "format": FORMAT,
        "model": describe(model),
        "tensors_sha256": _file_hash(folder / TENSORS),
        **facts,
    }
    write_json(folder / FACTS, {**content, "checksum": _checksum(content)})


def read_run(folder: Path) -> SavedRun:
    """Load a run folder.

    Raises
    ------
    MoeeError
        Missing, truncated, foreign, edited or newer files.
    """
    facts = _read_facts(folder)
    tensors, _ = read_tensors(folder / TENSORS)
    if _file_hash(folder / TENSORS) != facts["tensors_sha256"]:
        raise MoeeError(
            f"the tensors that were saved with '{folder / FACTS}'",
            f"another content in {TENSORS}",
            "restore both files, or extract again",
        )
    model = _rebuild(facts["model"], tensors)
    load_tensors(model, tensors, source=str(folder / TENSORS))
    return SavedRun(model.eval(), facts)


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything :func:`read_run` needs to rebuild the model before loading its tensors."""
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k in INPUT_FACTS}
    return {
        "architecture": architecture(model),
        "num_classes": model.num_classes,
        "pretrained_cfg": json.loads(json.dumps(cfg)),
        "routers": {
            name: _describe_router(model.get_submodule(name).router)
            for name in moe_names(model).values()
        },
        "attentions": {
            name: asdict(m.ranks) | {"bias": m.bias is not None}
            for name, m in reduced_attentions(model).items()
        },
    }


def rebuilds(model: nn.Module) -> bool:
    """Whether a saved run of ``model`` could be loaded."""
    try:
        check_rebuilds(model)
    except MoeeError:
        return False
    return True


def _rebuild(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = build_model(
        described["architecture"],
        num_classes=described["num_classes"],
        pretrained_cfg=described["pretrained_cfg"],
    )
    for name, router in described["routers"].items():
        layer = _layer_like(_below(name, tensors), model.get_submodule(name), router)
        replace_module(model, name, layer)
    for name, ranks in described["attentions"].items():
        replace_module(model, name, _attention_like(model.get_submodule(name), name, ranks))
    compute_in_blocks(model)
    return model.requires_grad_(requires_grad=False)


def _attention_like(dense: nn.Module, name: str, shape: dict[str, Any]) -> LowRankAttention:
    """Build an attention of the saved ranks; its weights are loaded afterwards."""
    ranks = Ranks(shape["scores"], shape["values"], shape["queries"])
    return LowRankAttention(site_of(name, dense), ranks, bias=shape["bias"])


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of ``model``, those with several names once for each, as files want them."""
    tensors, seen = {}, set()
    for name, stored in model.state_dict().items():
        tensor = stored.detach().cpu().contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def _below(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the submodule called ``name``, under the names they have there."""
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def _layer_like(saved: dict[str, torch.Tensor], mlp: nn.Module, router: dict[str, Any]) -> MoeMlp:
    """Build a routed layer of the saved shape; its weights are loaded afterwards."""
    lists = saved["neurons"].split(saved["sizes"].tolist())
    experts = [saved["kept"][ids].numpy() for ids in lists]
    dense = mlp.fc2.weight
    own = dense.expand(len(experts), -1, -1) if "columns" in saved else None
    readout = Readout(weight=own, shift=saved.get("shift"))
    built = _router_like(router, _below("router", saved))
    return MoeMlp(mlp, built, experts, saved["shares"].numpy(), readout)


def _describe_router(router: nn.Module) -> dict[str, Any]:
    """Everything that the tensors of a router do not tell about it."""
    kind = KINDS.get(type(router))
    if kind is None:
        raise MoeeError(
            f"a router that can be saved ({', '.join(KINDS.values())})",
            type(router).__name__,
            "save the run itself, not a control made from it",
        )
    if kind != "token_kinds":
        return {"kind": kind}
    inner = _describe_router(router.inner)
    return {
        "kind": kind, "prefix": router.prefix.tolist(), "tokens": router.tokens, "inner": inner,
    }  # fmt: skip


def _router_like(described: dict[str, Any], saved: dict[str, torch.Tensor]) -> nn.Module:
    """Build a router of the saved shape; its tensors are loaded afterwards."""
    match described["kind"]:
        case "cosine":
            return CosineRouter(saved["centres"].clone())
        case "nearest":
            return NearestRouter(**{key: tensor.clone() for key, tensor in saved.items()})
        case "token_kinds":
            inner = _router_like(described["inner"], _below("inner", saved))
            return TokenKindRouter(described["prefix"], inner, tokens=described["tokens"])
        case _:
            return ConstantRouter(int(saved["expert"]))


def check_target(folder: Path) -> None:
    """Refuse to save over anything but an empty folder or an earlier run."""
    if folder.exists() and not folder.is_dir():
        raise MoeeError(f"a folder at '{folder}'", "a file", "choose another place")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present - {TENSORS, FACTS}:
        raise MoeeError(
            f"'{folder}' to be new, empty, or an earlier run",
            f"other files there ({', '.join(sorted(present)[:3])})",
            "choose another folder",
        )


def check_rebuilds(model: nn.Module) -> None:
    """Refuse to save what could not be loaded: a model that its timm name does not rebuild."""
    described, tensors = describe(model), _tensors(model)
    try:
        load_tensors(_rebuild(described, tensors), tensors, source="memory")
    except MoeeError as error:
        raise MoeeError(
            f"a model that timm.create_model('{described['architecture']}') rebuilds",
            error.found,
            "make it with timm's own arguments for this name",
        ) from None


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text())
    except OSError:
        raise MoeeError(
            f"a run folder with {FACTS} and {TENSORS}",
            f"no {FACTS} in '{folder}'",
            "check the path",
        ) from None
    except ValueError as error:
        raise MoeeError(
            f"complete JSON in '{path}'", str(error), "restore the file, or extract again"
        ) from None
    _check_facts(facts, path)
    return facts


def _check_facts(facts: Any, path: Path) -> None:
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise MoeeError(f"the facts of a run in '{path}'", "another JSON file", "check the path")
    if facts.get("format") != FORMAT:
        raise MoeeError(
            f"run format {FORMAT} in '{path}'", f"format {facts.get('format')}",
            "load it with the version of this package that saved it",
        )  # fmt: skip
    content = {key: value for key, value in facts.items() if key != "checksum"}
    if facts.get("checksum") != _checksum(content):
        raise MoeeError(
            f"'{path}' as it was saved", "a file edited since then",
            "restore the file, or extract again with other settings",
        )  # fmt: skip


def _checksum(content: dict[str, Any]) -> str:
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
