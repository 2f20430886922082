"""Classifiers of small images, by name: residual networks as they were made for CIFAR, and wide ones."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
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


class _Classifier(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``model(pixel_values, labels=None)``: pixel_values ``[B, 3, H, W]``; with labels the loss is cross-entropy."""

    main_input_name = "pixel_values"
    classifier: nn.Linear

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def features(self, pixel_values: Tensor) -> Tensor:
        """``[B, channels, H / 4, W / 4]``."""
        raise NotImplementedError

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        logits = self.classifier(self.features(pixel_values).mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def _stages(block: type[nn.Module], channels: list[int], blocks: int) -> nn.Sequential:
    """Three stages of so many blocks; the second and the third begin with a stride of 2."""
    made: list[nn.Module] = []
    for stage, (inside, outside) in enumerate(zip(channels, channels[1:], strict=False)):
        for place in range(blocks):
            first = place == 0
            made.append(block(inside if first else outside, outside, stride=2 if first and stage else 1))
    return nn.Sequential(*made)


class WideResNetForImageClassification(_Classifier):
    """A wide residual network (Zagoruyko and Komodakis 2016, "Wide Residual Networks", table 1) for images of about
    32x32 pixels, without dropout: batch norm and ReLU before each convolution.

    ``model(pixel_values, labels=None)``: pixel_values ``[B, 3, H, W]``; with labels the loss is cross-entropy.
    """

    config_class = WideResNetConfig
    config: WideResNetConfig

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        if config.depth < 10 or config.depth % 6 != 4:
            raise ValueError(f"depth is {config.depth}; expected 10, 16, 22 or another 6 n + 4")
        if config.width < 1:
            raise ValueError(f"width is {config.width}; expected 1 or more")
        channels = [16, *(size * config.width for size in (16, 32, 64))]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.blocks = _stages(_WideBlock, channels, (config.depth - 4) // 6)
        self.norm = nn.BatchNorm2d(channels[-1])
        self.classifier = nn.Linear(channels[-1], len(config.id2label or ()))
        self.post_init()  # type: ignore[no-untyped-call]

    def features(self, pixel_values: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.stem(pixel_values))))


class SmallResNetConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Of a `SmallResNetForImageClassification`.

    Args:
        depth: 6 n + 2 convolutions deep: n blocks of two in each of three stages.
        width: the stages have 16, 32 and 64 times so many channels, and the stem 16, or 32 where it is 4 (CRD's).
    """

    model_type = "small_resnet"
    depth: int = 20
    width: int = 1


class SmallResNetForImageClassification(_Classifier):
    """A residual network for images of about 32x32 pixels (He et al. 2015, "Deep Residual Learning", section 4.2), with
    a convolution of one pixel beside the blocks whose size changes; four times as wide it is the ResNet-d×4 of CRD
    (Tian et al. 2020), whose stem has 32 channels.

    ``model(pixel_values, labels=None)``: pixel_values ``[B, 3, H, W]``; with labels the loss is cross-entropy.
    """

    config_class = SmallResNetConfig
    config: SmallResNetConfig

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        if config.depth < 8 or config.depth % 6 != 2:
            raise ValueError(f"depth is {config.depth}; expected 8, 14, 20 or another 6 n + 2")
        if config.width < 1:
            raise ValueError(f"width is {config.width}; expected 1 or more")
        channels = [32 if config.width == 4 else 16, *(size * config.width for size in (16, 32, 64))]
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]))
        self.blocks = _stages(_Block, channels, (config.depth - 2) // 6)
        self.classifier = nn.Linear(channels[-1], len(config.id2label or ()))
        self.post_init()  # type: ignore[no-untyped-call]

    def features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.blocks(F.relu(self.stem(pixel_values)))
        return features


class _WideBlock(nn.Module):
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


class _Block(nn.Module):
    """Two convolutions, each before batch norm, beside the identity or a convolution of one pixel; ReLU after both."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if inside != outside or stride > 1:
            conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


for _config, _model in (
    (WideResNetConfig, WideResNetForImageClassification),
    (SmallResNetConfig, SmallResNetForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)

NAMES = "wrn-DEPTH-WIDTH (depth 10, 16, 22, ...), resnet-DEPTH or resnetDEPTHxWIDTH (depth 8, 14, 20, ...)"


def image_classifier(name: str, task: Task, *, seed: int = 0) -> PreTrainedModel:
    """A classifier of the task's labels, with weights drawn from `seed`.

    Args:
        name: "wrn-16-2", a wide residual network 16 convolutions deep and twice as wide; "resnet-20", one as He et al.
            (2015, section 4.2) have for CIFAR-10; "resnet8x4", one four times as wide. The hyphens may be underscores,
            or that of a ResNet be left out.

    Raises ValueError for another name.
    """
    assert task.label_names is not None
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {label: place for place, label in enumerate(task.label_names)},
    }
    wide = re.fullmatch(r"wrn[-_](\d+)[-_](\d+)", name)
    plain = re.fullmatch(r"resnet[-_]?(\d+)(?:x(\d+))?", name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if wide:
            return WideResNetForImageClassification(WideResNetConfig(depth=int(wide[1]), width=int(wide[2]), **labels))
        if plain and int(plain[1]) >= 8 and int(plain[1]) % 6 == 2 and int(plain[2] or 1):
            return SmallResNetForImageClassification(
                SmallResNetConfig(depth=int(plain[1]), width=int(plain[2] or 1), **labels)
            )
    raise ValueError(f"{name!r} is no image classifier; expected {NAMES}")
