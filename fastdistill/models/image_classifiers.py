"""Classifiers of small images, by name: wide residual networks, and transformers' ResNet in the size that fits them."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers import ResNetForImageClassification as ResNet
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from fastdistill.data.tasks import Task


class WideResNetConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Of a `WideResNetForImageClassification`.

    Args:
        depth: 6 n + 4 convolutions deep: n blocks of two in each of three stages.
        width: the stages have 16, 32 and 64 times so many channels.
    """

    model_type = "wide_resnet"
    depth: int = 16
    width: int = 1


class WideResNetForImageClassification(PreTrainedModel):
    """A wide residual network (Zagoruyko and Komodakis 2016, "Wide Residual Networks", table 1) for images of about
    32x32 pixels, without dropout: batch norm and ReLU before each convolution.

    ``model(pixel_values, labels=None)``: pixel_values ``[B, 3, H, W]``; with labels the loss is cross-entropy.
    """

    config_class = WideResNetConfig
    config: WideResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        if config.depth < 10 or config.depth % 6 != 4:
            raise ValueError(f"depth is {config.depth}; expected 10, 16, 22 or another 6 n + 4")
        if config.width < 1:
            raise ValueError(f"width is {config.width}; expected 1 or more")
        channels = [16, *(size * config.width for size in (16, 32, 64))]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for stage, (inside, outside) in enumerate(zip(channels, channels[1:], strict=False)):
            for place in range((config.depth - 4) // 6):
                first = place == 0
                blocks.append(_Block(inside if first else outside, outside, stride=2 if first and stage else 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels[-1])
        self.classifier = nn.Linear(channels[-1], len(config.id2label or ()))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        features = F.relu(self.norm(self.blocks(self.stem(pixel_values))))
        logits = self.classifier(features.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class _Block(nn.Module):
    """Two convolutions beside the identity or, where the size changes, beside a convolution of one pixel."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        same = inside == outside and stride == 1
        self.shortcut = None if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = beside + self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out


AutoConfig.register(WideResNetConfig.model_type, WideResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(WideResNetConfig, WideResNetForImageClassification, exist_ok=True)

NAMES = "wrn-DEPTH-WIDTH (depth 10, 16, 22, ...) or resnet-DEPTH (depth 8, 14, 20, ...)"


def image_classifier(name: str, task: Task, *, seed: int = 0) -> PreTrainedModel:
    """A classifier of the task's labels, with weights drawn from `seed`.

    Args:
        name: "wrn-16-2", a wide residual network 16 convolutions deep and twice as wide; or "resnet-20", transformers'
            ResNet with basic blocks, as many and as wide as He et al. (2015, section 4.2) have for CIFAR-10. (Its stem
            is that for large images, which leaves a quarter of each side.)

    Raises ValueError for another name.
    """
    assert task.label_names is not None
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {label: place for place, label in enumerate(task.label_names)},
    }
    wide, plain = re.fullmatch(r"wrn-(\d+)-(\d+)", name), re.fullmatch(r"resnet-(\d+)", name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if wide:
            return WideResNetForImageClassification(WideResNetConfig(depth=int(wide[1]), width=int(wide[2]), **labels))
        if plain and int(plain[1]) >= 8 and int(plain[1]) % 6 == 2:
            sizes: dict[str, Any] = {
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 64],
                "depths": [(int(plain[1]) - 2) // 6] * 3,
            }
            return ResNet(ResNetConfig(**sizes, layer_type="basic", **labels))
    raise ValueError(f"{name!r} is no image classifier; expected {NAMES}")
