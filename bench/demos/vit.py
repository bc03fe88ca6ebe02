"""The small vision transformer that the classification demo converts, and its shipped weights.

`python -m t5fx.bench.demos.train_vit` trained them, one file for each data set of `mnist`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from t5fx.errors import T5Error

from .mnist import CLASSES, SIDE

PATCH = 4
WEIGHTS = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class Training:
    """How a file of weights came about.

    Attributes:
        data: "fashion" or "digits".
        accuracy: of the weights as they are in the file on the whole test set, in 0..1.
        steps, batch, seed: of the training.
        torch: its version.
    """

    data: str
    accuracy: float
    steps: int
    batch: int
    seed: int
    torch: str


def new_vit() -> nn.Module:
    """A timm ViT of 6 layers, 3 heads of 32 channels and 50 tokens at 28 x 28, untrained.

    Returns:
        A module in train mode: images [B, 1, H, W] in 0..1, H and W multiples of 4, to logits
        [B, 10]. At other sizes than 28 x 28 its position table is resized.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=96,
        depth=6,
        num_heads=3,
        dynamic_img_size=True,
    )


def shipped(data: str) -> Path:
    """The file of the weights that come with the package, for "fashion" or "digits"."""
    return WEIGHTS / f"vit_{data}.safetensors"


def save_vit(path: Path, model: nn.Module, training: Training) -> None:
    """Writes a model's weights, with how they were trained."""
    save_half(path, model, asdict(training))


def save_half(path: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Writes a model's weights in float16, with what there is to say of them."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Every value as JSON, because safetensors keeps text only.
    save_file(weights, path, {name: json.dumps(value) for name, value in about.items()})


def load_half(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that `save_half` wrote, in float16, and what it said of them."""
    with safe_open(path, "pt") as file:
        about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def load_vit(path: Path) -> tuple[nn.Module, Training]:
    """The model in eval mode, in float32, and how it was trained.

    Raises:
        T5Error: there is no such file, or it does not hold this model's weights.
    """
    model = new_vit()
    try:
        weights, about = load_half(path)
        training = Training(**{one.name: about[one.name] for one in fields(Training)})
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise T5Error(
            f"expected the weights of a small ViT, as train_vit writes them, in {path}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return model.eval(), training


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 100) -> float:
    """The fraction of images [N, 1, H, W] whose largest logit is that of their label [N]."""
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    return sum((model(x).argmax(-1) == y).sum().item() for x, y in pairs) / len(labels)
