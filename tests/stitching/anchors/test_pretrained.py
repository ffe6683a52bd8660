"""Loading of pretrained weights: reading, resizing, unused tensors and errors."""

import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmsnnet.errors import UserError
from mmsnnet.stitching import Anchor, StitchedNetwork, StitchSpace, create_anchor, load_pretrained
from mmsnnet.stitching.anchors.attention import resize_table
from tests.conftest import RunsCode

MakeAnchor = Callable[..., Anchor]

FAMILIES = {
    "deit3": dict(model="deit3_small_patch16_224"),
    "vit": dict(model="vit_tiny_patch16_224"),
    "no class token": dict(model="vit_base_patch16_gap_224"),
    "registers": dict(model="vit_little_patch16_reg4_gap_256"),
    "class token and registers": dict(model="vit_small_patch14_reg4_dinov2", patch_size=16),
}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as views of one storage, as programs that flatten parameters save them."""
    whole = torch.cat([tensor.flatten() for tensor in weights.values()])
    parts = whole.split([tensor.numel() for tensor in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


@pytest.mark.parametrize("family", ["deit3", "vit", "registers", "class token and registers", "no class token"])
@pytest.mark.parametrize(("made_at", "size"), [(32, (64, 96)), (64, (32, 48)), (48, 48), (64, (32, 128))])
def test_the_stored_position_embedding_is_resampled(
    family: str, made_at: int, size: int | tuple[int, int], make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    settings = {**FAMILIES[family]}
    source, anchor = make_anchor(img_size=made_at, **settings), make_anchor(img_size=size, **settings)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))

    grid = (size, size) if isinstance(size, int) else size
    expected = resample_abs_pos_embed(
        source.model.pos_embed,
        [grid[0] // 16, grid[1] // 16],
        old_size=[made_at // 16, made_at // 16],
        num_prefix_tokens=source.model.pos_embed.shape[1] - (made_at // 16) ** 2,
    )
    torch.testing.assert_close(anchor.model.pos_embed, expected)
    assert report.resized == (() if grid == (made_at, made_at) else ("pos_embed",))
    others = [{k: v for k, v in state(a.model).items() if k != "pos_embed"} for a in (source, anchor)]
    assert same(*others)


def test_the_patch_embedding_is_resized(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source = make_anchor()
    anchor = make_anchor(patch_size=8)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.resized) == {"patch_embed.proj.weight", "pos_embed"}
    assert "resized" in str(report) and "pos_embed" in str(report)


def deit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's weights as in DeiT-III's files."""
    return {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "deit names", "network", "backbone"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_files_may_look_like(wrap: str, suffix: str, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(), make_anchor()
    network = StitchedNetwork([source], StitchSpace.single(2))
    weights: dict[str, Any] = {
        "deit names": deit_names(source.model.state_dict()),
        "network": network.state_dict(),
        "backbone": {f"backbone.network.{k}": v for k, v in network.state_dict().items()}
        | {"decode_head.weight": torch.zeros(1)},
    }.get(wrap, source.model.state_dict())
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({wrap: weights, "epoch": 3} if wrap in ("model", "state_dict") else weights, path)
    report = load_pretrained(anchor, str(path))
    assert same(state(source.model), state(anchor.model))
    assert (report.source, report.loaded) == (str(path), len(source.model.state_dict()))
    assert report.resized == report.left_out == ()


def test_wrapped_deit_checkpoint_as_published(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """DeiT-III's files: its names under 'model', with a head."""
    source = make_anchor(classifier=True)
    anchor = make_anchor(img_size=(32, 64))
    torch.save({"model": deit_names(source.model.state_dict())}, tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.left_out) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert report.resized == ("pos_embed",)
    assert torch.equal(anchor.model.blocks[1].ls2.gamma, source.model.blocks[1].ls2.gamma)
    assert "left out" in str(report) and "head.bias" in str(report) and "w.pth" in str(report)


def openai_clip(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """OpenAI's and OpenCLIP's names, with a text tower."""
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("blocks.", "transformer.resblocks."),
        ("norm_pre", "ln_pre"),
        (".norm1", ".ln_1"),
        (".norm2", ".ln_2"),
        ("norm.", "ln_post."),
        ("qkv.", "in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    visual = {}
    for key, value in w.items():
        for ours, theirs in swaps:
            key = key.replace(ours, theirs)
        visual[f"visual.{key}"] = value
    visual["visual.class_embedding"] = visual.pop("visual.cls_token")[0, 0]
    visual["visual.positional_embedding"] = visual.pop("visual.pos_embed")[0]
    unused = {
        "visual.proj": torch.ones(32, 16),
        "positional_embedding": torch.ones(77, 8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "token_embedding.weight": torch.ones(10, 8),
        "logit_scale": torch.ones(()),
    }
    return visual | unused, {*unused, "visual.ln_post.weight", "visual.ln_post.bias"}


def test_views_of_one_storage_are_told_apart(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """As an optimizer with flat parameters saves them. They are known by their memory after timm has renamed them."""
    source, anchor = make_anchor(classifier=True), make_anchor()
    named = deit_names(source.model.state_dict())
    flat = torch.cat([tensor.flatten() for tensor in named.values()])
    parts = flat.split([tensor.numel() for tensor in named.values()])
    views = {name: part.view(tensor.shape) for (name, tensor), part in zip(named.items(), parts, strict=True)}
    torch.save({"model": views}, tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.left_out) == {"norm.weight", "norm.bias", "head.weight", "head.bias"} and report.resized == ()
    assert torch.equal(anchor.model.blocks[1].ls2.gamma, source.model.blocks[1].ls2.gamma)


def open_clip_trunk(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """OpenCLIP's names around a timm vision tower (SigLIP, EVA-02-CLIP)."""
    unused = {"visual.head.proj.weight": torch.ones(16, 32), "text.token_embedding.weight": torch.ones(10, 8)}
    trunk = {f"visual.trunk.{key}": value for key, value in w.items()}
    return trunk | unused, {*unused, *(key for key in trunk if key.split(".")[2] in ("norm", "fc_norm", "attn_pool"))}


def dinov2(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    return w | {"mask_token": torch.ones(1, 32)}, {"mask_token", "norm.weight", "norm.bias"}


def dinov2_registers(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The position embedding has a part for the class token, which timm adds to it, and none for the registers."""
    file, left_out = dinov2(w)
    of_class = torch.randn(1, 1, 32)
    file["register_tokens"] = file.pop("reg_token")
    file["cls_token"] = file["cls_token"] - of_class
    file["pos_embed"] = torch.cat([of_class, file["pos_embed"]], dim=1)
    return file, left_out


def dinov2_giant(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    file, left_out = dinov2(w)
    return {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in file.items()}, left_out


def dinov3(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """A joint bias whose part for the keys is masked, and rotary periods that follow from the configuration."""
    file = {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in w.items()}
    file["storage_tokens"] = file.pop("reg_token")
    unused = {
        "mask_token": torch.ones(1, 32),
        "rope_embed.periods": torch.ones(4),
        "local_cls_norm.weight": torch.ones(32),
    }
    for block in range(2):
        name = f"blocks.{block}.attn."
        queries, values = (file.pop(f"{name}{part}_bias", torch.zeros(32)) for part in "qv")
        file[f"{name}qkv.bias"] = torch.cat([queries, torch.randn(32), values])
        unused[f"{name}qkv.bias_mask"] = torch.full((96,), float("nan"))
    left_out = {*unused, "norm.weight", "norm.bias"}
    if "blocks.0.attn.q_bias" not in w:
        left_out |= {f"blocks.{block}.attn.qkv.bias" for block in range(2)}
    return file | unused, left_out


def eva02(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Files of masked image modelling, with a copy of the rotary angles in each block."""
    renamed = [("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc1.", "mlp.w12."), ("mlp.fc2", "mlp.w3")]
    renamed += [("mlp.norm", "mlp.ffn_ln"), ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias"), ("fc_norm", "norm")]
    file = {}
    for key, value in w.items():
        for ours, theirs in renamed:
            key = key.replace(ours, theirs)
        file[key] = value
    unused = {
        "mask_token": torch.ones(1, 1, 32),
        "lm_head.weight": torch.ones(8, 32),
        "rope.freqs_cos": torch.ones(4, 16),
    }
    unused |= {f"blocks.{block}.attn.rope.freqs_sin": torch.ones(4, 16) for block in range(2)}
    return file | unused, {*unused, "norm.weight", "norm.bias"}


def mae(w: dict[str, Tensor]) -> tuple[dict[str, Any], set[str]]:
    unused = {
        "mask_token": torch.ones(1, 1, 16),
        "decoder_pos_embed": torch.ones(1, 17, 16),
        "decoder_embed.weight": torch.ones(16, 32),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
        "decoder_norm.weight": torch.ones(16),
        "decoder_pred.bias": torch.ones(768),
    }
    return {"model": w | unused}, {*unused, "norm.weight", "norm.bias"}


def deit3(w: dict[str, Tensor]) -> tuple[dict[str, Any], set[str]]:
    head = {"head.weight": torch.ones(10, 32), "head.bias": torch.ones(10)}
    return {"model": deit_names(w) | head, "args": Namespace(lr=1e-3)}, {*head, "norm.weight", "norm.bias"}


def ijepa(w: dict[str, Tensor]) -> tuple[dict[str, Any], set[str]]:
    file = {"encoder": {f"module.{key}": value for key, value in w.items()}, "epoch": 300}
    left_out = {f"encoder.module.{key}" for key in w if key.split(".")[0] in ("norm", "fc_norm")}
    return file | {"predictor": {"module.norm": torch.ones(8)}}, left_out | {"predictor.module.norm"}


def parallel(w: dict[str, Tensor]) -> tuple[dict[str, Any], set[str]]:
    """As DistributedDataParallel prefixes them."""
    return {"state_dict": {f"module.{key}": value for key, value in w.items()}}, {"norm.weight", "norm.bias"}


FOREIGN = {
    "OpenAI's CLIP": (openai_clip, dict(model="vit_base_patch16_clip_224")),
    "OpenCLIP with timm's SigLIP": (open_clip_trunk, dict(model="vit_base_patch16_siglip_224")),
    "OpenCLIP with timm's EVA-02": (open_clip_trunk, dict(model="eva02_base_patch16_clip_224")),
    "DINOv2": (dinov2, dict(model="vit_small_patch14_dinov2", patch_size=16)),
    "DINOv2 with registers": (dinov2_registers, dict(model="vit_small_patch14_reg4_dinov2", patch_size=16)),
    "DINOv2 giant": (dinov2_giant, dict(model="vit_giant_patch14_dinov2", patch_size=16)),
    "DINOv3": (dinov3, dict(model="vit_small_patch16_dinov3_qkvb")),
    "DINOv3 with a bias of zero": (dinov3, dict(model="vit_small_patch16_dinov3")),
    "DINOv3 plus": (dinov3, dict(model="vit_small_plus_patch16_dinov3_qkvb")),
    "EVA-02 tiny": (eva02, dict(model="eva02_tiny_patch14_224", patch_size=16)),
    "EVA-02 base": (eva02, dict(model="eva02_base_patch14_224", patch_size=16)),
    "MAE": (mae, dict(model="vit_base_patch16_224")),
    "I-JEPA": (ijepa, dict(model="vit_huge_patch14_gap_224", patch_size=16)),
    "DeiT-III": (deit3, dict(model="deit3_small_patch16_224")),
    "DeiT, distilled": (deit3, dict(model="deit_tiny_distilled_patch16_224")),
    "DataParallel": (parallel, dict(model="vit_tiny_patch16_224")),
}


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 5)])
@pytest.mark.parametrize("family", FOREIGN)
def test_weights_as_their_authors_publish_them(
    family: str, grid: tuple[int, int], make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    """Every weight arrives, at the grid of the file, another of as many patches, and one of another number."""
    rename, settings = FOREIGN[family]
    source = make_anchor(img_size=64, classifier=True, num_classes=0, **settings)
    anchor = make_anchor(img_size=(grid[0] * 16, grid[1] * 16), **settings)
    file, left_out = rename(state(source.model))
    torch.save(file, tmp_path / "w.pth")
    report = load_pretrained(anchor, tmp_path / "w.pth")

    assert set(report.left_out) == left_out
    expected = {key: value for key, value in state(source.model).items() if key in anchor.model.state_dict()}
    if "pos_embed" in expected:
        prefix = expected["pos_embed"].shape[1] - 16
        expected["pos_embed"] = resample_abs_pos_embed(expected["pos_embed"], list(grid), [4, 4], prefix)
    assert report.resized == (("pos_embed",) if "pos_embed" in expected and grid != (4, 4) else ())
    assert report.loaded == len(expected) and not report.kept
    loaded = anchor.model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(loaded[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_a_renamed_patch_embedding_of_another_size(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    settings = dict(model="vit_base_patch16_clip_224")
    file, left_out = openai_clip(state(make_anchor(img_size=64, classifier=True, num_classes=0, **settings).model))
    torch.save(file, tmp_path / "w.pth")
    report = load_pretrained(make_anchor(img_size=64, patch_size=8, **settings), tmp_path / "w.pth")
    assert set(report.left_out) == left_out
    assert set(report.resized) == {"patch_embed.proj.weight", "pos_embed"}


@pytest.mark.parametrize("views", [False, True])
def test_a_bias_of_queries_is_not_dropped(views: bool, make_anchor: MakeAnchor, tmp_path: Path, capsys: Any) -> None:
    """DINOv3's models with a bias do not fit timm's models without one, for any memory layout."""
    file, _ = dinov3(state(make_anchor(model="vit_small_patch16_dinov3_qkvb").model))
    torch.save(flat(file) if views else file, tmp_path / "w.pth")
    message = refused(make_anchor(model="vit_small_patch16_dinov3"), tmp_path / "w.pth")
    assert "blocks.0.attn.qkv.bias" in message and "_qkvb" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", ["DeiT-III", "OpenAI's CLIP", "DINOv3", "EVA-02 base"])
@pytest.mark.parametrize("block", [0, 1])
def test_one_tensor_amiss(family: str, block: int, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """A tensor that is missing, renamed or of another shape is an error that lists its name."""
    rename, settings = FOREIGN[family]
    file, _ = rename(state(make_anchor(classifier=True, num_classes=0, **settings).model))
    file = file.get("model", file)
    theirs = next(key for key in file if re.search(rf"{block}\.mlp\.(fc1|c_fc|w1)\.weight", key))
    ours = rf"blocks\.{block}\.mlp\.fc1(_g)?\.weight"
    changes = {
        rf"missing: {ours} \([\d, ]+\)$": {},
        rf"missing: {ours} \([\d, ]+\); left over: .*blocks\.{block}\.mlp\.other\.weight": {
            re.sub(r"(fc1|c_fc|w1)\.weight", "other.weight", theirs): file[theirs]
        },
        rf"of another shape: {ours} \(7, 32\) instead of \(\d+, 32\)$": {theirs: file[theirs][:7]},
    }
    for says, change in changes.items():
        torch.save({key: value for key, value in file.items() if key != theirs} | change, tmp_path / "w.pth")
        assert re.search(says, refused(make_anchor(**settings), tmp_path / "w.pth").replace("resblocks", "blocks"))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight", "cls_token"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (1, 7, 32), (1, 17, 48), (0, 17, 32), (1, 0, 32)])
def test_a_stem_amiss(model: str, key: str, shape: tuple[int, ...], make_anchor: MakeAnchor, tmp_path: Path) -> None:
    settings = dict(model=model, patch_size=16)
    weights = make_anchor(img_size=64, **settings).model.state_dict()
    torch.save(weights | {key: torch.ones(shape)}, tmp_path / "w.pth")
    message = refused(make_anchor(img_size=(32, 80), **settings), tmp_path / "w.pth")
    assert f"of another shape: {key} (" in message or "is of another architecture" in message


def test_dinov2_from_its_size_to_a_rectangle(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """Position embeddings of DINOv2 are for 37 x 37 patches, for anchors of any size."""
    settings = dict(model="vit_small_patch14_reg4_dinov2")
    source, anchor = make_anchor(img_size=518, **settings), make_anchor(img_size=(224, 448), **settings)
    torch.save(dinov2_registers(state(source.model))[0], tmp_path / "w.pth")
    assert load_pretrained(anchor, tmp_path / "w.pth").resized == ("pos_embed",)
    expected = resample_abs_pos_embed(source.model.pos_embed, [16, 32], [37, 37], num_prefix_tokens=0)
    torch.testing.assert_close(anchor.model.pos_embed, expected)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """``hub(repository, file)``: the path of a file in the hub's cache; the hub is unreachable."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def place(repository: str, file: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("a" * 40)
        (folder / "snapshots" / ("a" * 40)).mkdir(parents=True, exist_ok=True)
        return folder / "snapshots" / ("a" * 40) / file

    return place


def test_true_is_where_timm_has_its_weights(
    hub: Callable[[str, str], Path], make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    """The tag in the model's name chooses them; an overlay of timm's configuration may name others: a file first, then
    the hub, then a URL."""
    source = make_anchor()
    with pytest.raises(FileNotFoundError, match=r"hf-hub:timm/deit3_small_patch16_224\.fb_in1k' cannot"):
        load_pretrained(make_anchor(model="deit3_small_patch16_224.fb_in1k"), True)
    tagged = "timm/deit3_small_patch16_224.fb_in22k_ft_in1k"
    safetensors.torch.save_file(source.model.state_dict(), hub(tagged, "model.safetensors"))
    torch.save(source.model.state_dict(), hub("owner/name", "sub.pth"))
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    expected = {
        f"hf-hub:{tagged}": dict(model="deit3_small_patch16_224.fb_in22k_ft_in1k"),
        "hf-hub:owner/name/sub.pth": dict(
            pretrained_cfg_overlay=dict(hf_hub_id="owner/name", hf_hub_filename="sub.pth", url="http://127.0.0.1:1/w")
        ),
        f"hf-hub:owner/name/sub.pth@{'a' * 40}": dict(
            pretrained_cfg_overlay=dict(hf_hub_id=f"owner/name@{'a' * 40}", hf_hub_filename="sub.pth")
        ),
        str(tmp_path / "w.pth"): dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth"))),
    }
    for where, settings in expected.items():
        anchor = make_anchor(**settings)
        assert load_pretrained(anchor, True).source == where
        assert same(state(source.model), state(anchor.model))
    overlay = dict(hf_hub_id=None, url="http://127.0.0.1:1/w.pth")
    with pytest.raises(FileNotFoundError, match=r"http://127\.0\.0\.1:1/w\.pth' cannot be downloaded"):
        load_pretrained(make_anchor(pretrained_cfg_overlay=overlay), True)


def test_a_model_without_weights_in_timm(make_anchor: MakeAnchor) -> None:
    nothing = dict(hf_hub_id=None, url="")
    with pytest.raises(ValueError, match=r"no weights for deit3_small\S+; .* a tag .*deit3_small_patch16_224\.fb_in1k"):
        load_pretrained(make_anchor(pretrained_cfg_overlay=nothing), True)
    with pytest.raises(ValueError, match=r"no weights for vit_small_patch16_36x1_224\S*; give a path or a URL$"):
        load_pretrained(make_anchor(model="vit_small_patch16_36x1_224"), True)


def test_a_classifier_is_loaded_where_it_is_kept(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(classifier=True), make_anchor(classifier=True)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    assert load_pretrained(anchor, str(tmp_path / "w.pth")).left_out == ()
    assert same(state(source.model), state(anchor.model))


def test_what_is_left_out_of_a_file_with_one_storage(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    weights = state(make_anchor(classifier=True, num_classes=3).model)
    torch.save(flat(weights), tmp_path / "w.pth")
    report = load_pretrained(make_anchor(patch_size=8), str(tmp_path / "w.pth"))
    assert set(report.left_out) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(report.resized) == {"patch_embed.proj.weight", "pos_embed"}


def test_a_head_for_other_classes_is_left_out(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(classifier=True), make_anchor(classifier=True, num_classes=5)
    head = state(anchor.model.head)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.left_out) == set(report.kept) == {"head.weight", "head.bias"}
    assert "kept as initialised: head.weight, head.bias" in str(report)
    assert same(state(anchor.model.head), head) and same(state(anchor.model.norm), state(source.model.norm))


def test_a_classifier_for_weights_without_a_head(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """Self-supervised weights for a new classifier."""
    make_anchor = partial(make_anchor, model="vit_base_patch16_224", classifier=True)
    weights = {k: v for k, v in make_anchor().model.state_dict().items() if not k.startswith("head.")}
    torch.save(weights, tmp_path / "w.pth")
    anchor = make_anchor()
    head = state(anchor.model.head)
    report = load_pretrained(anchor, tmp_path / "w.pth")
    assert set(report.kept) == {"head.weight", "head.bias"} and report.left_out == ()
    assert same(state(anchor.model.head), head) and torch.equal(anchor.model.norm.weight, weights["norm.weight"])

    report = load_pretrained(make_anchor(global_pool="avg"), tmp_path / "w.pth")
    assert set(report.kept) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(report.left_out) == {"norm.weight", "norm.bias"}

    torch.save(weights | {"head.weight": torch.ones(1000, 32)}, tmp_path / "w.pth")
    assert "missing: head.bias" in refused(anchor, tmp_path / "w.pth")


def test_a_bias_that_the_file_lacks_stays_zero(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source = make_anchor()
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    anchor = create_anchor("deit3_small_patch16_224", 64, rel_pos_bias=True, embed_dim=32, depth=2, num_heads=2)
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert report.kept == tuple(f"blocks.{block}.attn.relative_position_bias_table" for block in range(2))
    assert not any(block.attn.relative_position_bias_table.any() for block in anchor.model.blocks)


@pytest.mark.parametrize("one_anchor_checkpoint", [False, True])
def test_a_bias_is_resized_like_the_position_embedding(
    one_anchor_checkpoint: bool, make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    source, anchor = (make_anchor(img_size=size, rel_pos_bias=True) for size in (64, (32, 80)))
    weights = source.model.state_dict()
    if one_anchor_checkpoint:
        weights = StitchedNetwork([source], StitchSpace.single(2)).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert report.kept == ()
    for block, other in zip(anchor.model.blocks, source.model.blocks, strict=True):
        expected = resize_table(other.attn.relative_position_bias_table, (4, 4), (2, 5))
        torch.testing.assert_close(block.attn.relative_position_bias_table, expected)


def test_a_bias_of_a_rectangular_grid_is_loaded_at_its_own_size(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = (
        make_anchor(img_size=(32, 80), rel_pos_bias=True),
        make_anchor(img_size=(32, 80), rel_pos_bias=True),
    )
    torch.save(StitchedNetwork([source], StitchSpace.single(2)).state_dict(), tmp_path / "w.pth")
    assert load_pretrained(anchor, str(tmp_path / "w.pth")).resized == ()
    assert same(state(source.model), state(anchor.model))


def test_a_one_anchor_checkpoint_keeps_its_rectangle(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """7 x 28 patches are as many as the 14 x 14 of timm's default size."""
    source, anchor = make_anchor(img_size=(112, 448)), make_anchor(img_size=(112, 448))
    torch.save(StitchedNetwork([source], StitchSpace.single(2)).state_dict(), tmp_path / "w.pth")
    assert load_pretrained(anchor, tmp_path / "w.pth").resized == ()
    assert same(state(source.model), state(anchor.model))


def one_anchor(anchor: Anchor) -> dict[str, Tensor]:
    """The weights of a one-anchor backbone, as its training run saves them."""
    network = StitchedNetwork([anchor], StitchSpace.single(anchor.depth))
    return {f"backbone.network.{key}": value for key, value in network.state_dict().items()}


RECTANGLES = [
    ((96, 64), (64, 96)),
    ((32, 128), (64, 64)),
    ((64, 64), (32, 128)),
    ((96, 64), (48, 112)),
    ((48, 112), (64, 64)),
    ((80, 64), (32, 32)),
]


@pytest.mark.parametrize("family", ["deit3", "class token and registers", "no class token"])
@pytest.mark.parametrize(("made_at", "size"), RECTANGLES)
def test_any_rectangle_goes_into_any_other(
    made_at: tuple[int, int], size: tuple[int, int], family: str, make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    settings = {**FAMILIES[family], "rel_pos_bias": True}
    source, anchor = make_anchor(img_size=made_at, **settings), make_anchor(img_size=size, **settings)
    torch.save(one_anchor(source), tmp_path / "w.pth")
    report = load_pretrained(anchor, tmp_path / "w.pth")
    old, new = ([side // 16 for side in sides] for sides in (made_at, size))
    prefix = source.model.pos_embed.shape[1] - old[0] * old[1]
    expected = resample_abs_pos_embed(source.model.pos_embed, new, old, num_prefix_tokens=prefix)
    torch.testing.assert_close(anchor.model.pos_embed, expected)
    tables = [f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)]
    assert report.resized == ("pos_embed", *tables) and report.kept == report.left_out == ()
    for block, other in zip(anchor.model.blocks, source.model.blocks, strict=True):
        table = resize_table(other.attn.relative_position_bias_table, (old[0], old[1]), (new[0], new[1]))
        torch.testing.assert_close(block.attn.relative_position_bias_table, table)


def test_a_table_of_the_whole_image_goes_into_windows_and_back(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    plain = dict(img_size=(96, 64), rel_pos_bias=True)
    windows = plain | dict(window_size=3, global_blocks=[1])
    for settings, other in ((plain, windows), (windows, plain), (windows, windows)):
        source, anchor = make_anchor(**settings), make_anchor(**other)
        torch.save(one_anchor(source), tmp_path / "w.pth")
        report = load_pretrained(anchor, tmp_path / "w.pth")
        grids = [(3, 3) if "window_size" in keys else (6, 4) for keys in (settings, other)]
        table = resize_table(source.model.blocks[0].attn.relative_position_bias_table, *grids)
        torch.testing.assert_close(anchor.model.blocks[0].attn.relative_position_bias_table, table)
        assert len(report.resized) == (grids[0] != grids[1])
        assert torch.equal(*(a.model.blocks[1].attn.relative_position_bias_table for a in (source, anchor)))


@pytest.mark.parametrize("older", [False, True], ids=["timm's file", "older checkpoint"])
def test_a_grid_that_is_not_on_record(older: bool, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """The grid is a square if possible, else the anchor's grid, else unknown."""

    def saved(img_size: tuple[int, int]) -> Anchor:
        source = make_anchor(img_size=img_size, rel_pos_bias=True)
        weights = one_anchor(source) if older else dict(source.model.state_dict())
        torch.save({key: value for key, value in weights.items() if not key.endswith(".grid")}, tmp_path / "w.pth")
        return source

    source, anchor = saved((64, 64)), make_anchor(img_size=(32, 128), rel_pos_bias=True)
    assert len(load_pretrained(anchor, tmp_path / "w.pth").resized) == 3
    expected = resample_abs_pos_embed(source.model.pos_embed, [2, 8], [4, 4], num_prefix_tokens=0)
    torch.testing.assert_close(anchor.model.pos_embed, expected)
    source, anchor = saved((96, 64)), make_anchor(img_size=(96, 64), rel_pos_bias=True)
    assert load_pretrained(anchor, tmp_path / "w.pth").resized == ()
    assert same(state(source.model), state(anchor.model))
    message = refused(make_anchor(img_size=(64, 64), rel_pos_bias=True), tmp_path / "w.pth")
    assert "of another shape: pos_embed (1, 24, 32) instead of (1, 16, 32)" in message
    assert "neither a square nor this anchor's 4 x 4" in message and "which records the grid" in message


@pytest.mark.parametrize("record", [[6], [6.0, 4.0], [-6, -4], [5, 5]])
def test_a_record_amiss(record: list[float], make_anchor: MakeAnchor, tmp_path: Path) -> None:
    weights = one_anchor(make_anchor(img_size=(96, 64)))
    torch.save(weights | {"backbone.network.anchors.0.grid": torch.tensor(record)}, tmp_path / "w.pth")
    message = refused(make_anchor(img_size=(96, 64)), tmp_path / "w.pth")
    assert ("5 x 5 patches" if record == [5, 5] else "anchors.0.grid that is no grid") in message


def test_half_the_tables_of_a_bias(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    weights = make_anchor(rel_pos_bias=True).model.state_dict()
    del weights["blocks.1.attn.relative_position_bias_table"]
    torch.save(weights, tmp_path / "w.pth")
    message = refused(make_anchor(rel_pos_bias=True), tmp_path / "w.pth")
    assert "missing: blocks.1.attn.relative_position_bias_table" in message
    message = refused(make_anchor(), tmp_path / "w.pth")
    assert "left over: blocks.0.attn.relative_position_bias_table" in message


def refused(anchor: Anchor, path: Path | str, error: type[Exception] = ValueError) -> str:
    """The error message of loading; checks that the anchor stays unchanged."""
    before = state(anchor)
    with pytest.raises(error) as caught:
        load_pretrained(anchor, str(path))
    assert isinstance(caught.value, error) and isinstance(caught.value, UserError)
    assert same(before, state(anchor))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    refused(make_anchor(), tmp_path / "none.pth", FileNotFoundError)
    refused(make_anchor(), tmp_path, FileNotFoundError)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_file(suffix: str, keep: float, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    anchor, path = make_anchor(), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(anchor.model.state_dict(), path)
    else:
        torch.save(anchor.model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "cut short" in refused(anchor, path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, torch.zeros(3), {"epoch": 3}, {1: 2}])
def test_no_state_dict(content: Any, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused(make_anchor(), tmp_path / "w.pth")


def test_a_hostile_file_leaves_the_anchor_as_it_was(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """test_checkpoint.py tests more such files."""
    anchor, mark = make_anchor(), tmp_path / "mark"
    torch.save({"model": anchor.model.state_dict(), "args": RunsCode(mark)}, tmp_path / "w.pth")
    assert "run code" in refused(anchor, tmp_path / "w.pth")
    assert not mark.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # the check can fail: unpickled, it does make the file
    assert mark.exists()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(depth=3), r"left over: blocks\.2\.\S+"),
        (dict(depth=1), r"missing: blocks\.1\.\S+"),
        (dict(width=64), r"of another shape: cls_token \(1, 1, 64\) instead of \(1, 1, 32\)"),
        (dict(init_values=0.0), r"missing: blocks\.0\.ls1\.gamma \(32,\), .*blocks\.1\.ls2\.gamma \(32,\)$"),
        (dict(model="vit_base_patch16_clip_224"), r"left over: .*norm_pre\.weight"),
        (dict(model="vit_tiny_patch16_224"), "pos_embed"),
        (dict(model="vit_tiny_patch16_224", img_size=48), "pos_embed|missing: .*ls1"),
        (dict(model="vit_base_patch16_gap_224", img_size=48), "missing: cls_token"),
        (dict(model="vit_little_patch16_reg4_gap_256"), "reg_token"),
    ],
)
def test_another_architecture(other: dict[str, Any], says: str, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    torch.save(make_anchor(**other).model.state_dict(), tmp_path / "w.pth")
    message = refused(make_anchor(), tmp_path / "w.pth")
    assert re.search(says, message) and "2 blocks, width 32" in message


def test_a_network_of_two_anchors(make_network: Callable[..., StitchedNetwork], tmp_path: Path) -> None:
    network = make_network(depths=(2, 2))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert "2 anchors" in refused(network.anchor(0), tmp_path / "w.pth")


@pytest.mark.parametrize("source", [False, 3])
def test_a_source_is_a_string_or_true(source: Any, make_anchor: MakeAnchor) -> None:
    with pytest.raises(TypeError, match=str(source)):
        load_pretrained(make_anchor(), source)
