"""Networks on images for `bench.architectures_paddle`, of the kinds of layers that Paddle's model zoos are made of.

Needs PaddlePaddle 3.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from bench.architecture import HEADS, WIDTH

HEAD = WIDTH // HEADS


class Unit(nn.Layer):
    """A convolution without bias, batch norm and an activation by its name in paddle.nn.functional."""

    def __init__(self, inside: int, outside: int, size: int, stride: int = 1, groups: int = 1, act: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2D(inside, outside, size, stride, size // 2, groups=groups, bias_attr=False)
        self.norm = nn.BatchNorm2D(outside)
        self.act = act

    def forward(self, x: Any) -> Any:
        x = self.norm(self.conv(x))
        return getattr(functional, self.act)(x) if self.act else x


class Excitation(nn.Layer):
    """Squeeze and excitation with a hard sigmoid of the slope that MobileNetV3 has (1/6) or PaddleOCR's 0.2."""

    def __init__(self, width: int, slope: float) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2D(1)
        self.down, self.up = nn.Conv2D(width, width // 4, 1), nn.Conv2D(width // 4, width, 1)
        self.slope = slope

    def forward(self, x: Any) -> Any:
        y = self.up(functional.relu(self.down(self.pool(x))))
        return x * functional.hardsigmoid(y, slope=self.slope, offset=0.5)


class Inverted(nn.Layer):
    """MobileNetV3's block: expanded, a depthwise convolution, excited, projected, with a residual where it fits."""

    def __init__(self, inside: int, wide: int, outside: int, size: int, stride: int, act: str) -> None:
        super().__init__()
        self.expand, self.deep = Unit(inside, wide, 1, act=act), Unit(wide, wide, size, stride, wide, act)
        self.excite, self.project = Excitation(wide, 0.2), Unit(wide, outside, 1)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Any) -> Any:
        y = self.project(self.excite(self.deep(self.expand(x))))
        return x + y if self.residual else y


def _classifier(features: list[Any], width: int, act: Any) -> Any:
    tail = [nn.AdaptiveAvgPool2D(1), nn.Conv2D(width, 64, 1), act, nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*features, *tail, nn.Softmax())


def mobilenet_v3() -> Any:
    blocks = [
        Inverted(8, 16, 8, 3, 2, "relu"),
        Inverted(8, 24, 8, 3, 1, "relu"),
        Inverted(8, 32, 16, 5, 2, "hardswish"),
        Inverted(16, 48, 16, 5, 1, "hardswish"),
    ]
    return _classifier([Unit(3, 8, 3, 2, act="hardswish"), *blocks], 16, nn.Hardswish())


def lcnet() -> Any:
    """PP-LCNet: depthwise and pointwise convolutions, hard swish throughout, excitation in the last blocks."""
    layers: list[Any] = [Unit(3, 8, 3, 2, act="hardswish")]
    for inside, outside, size, stride in ((8, 16, 3, 1), (16, 32, 3, 2), (32, 64, 5, 2)):
        layers.append(Unit(inside, inside, size, stride, inside, "hardswish"))
        if size == 5:
            layers.append(Excitation(inside, 1 / 6))
        layers.append(Unit(inside, outside, 1, act="hardswish"))
    return _classifier(layers, 64, nn.Hardswish())


class Bottleneck(nn.Layer):
    """ResNet-vd's: the stride in the middle, an average pool before the shortcut's convolution."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.units = nn.Sequential(
            Unit(inside, width, 1, act="relu"), Unit(width, width, 3, stride, act="relu"), Unit(width, 4 * width, 1)
        )
        pool = [nn.AvgPool2D(2, 2, 0, ceil_mode=True)] if stride == 2 else []
        self.short = nn.Sequential(*pool, Unit(inside, 4 * width, 1)) if inside != 4 * width else nn.Identity()

    def forward(self, x: Any) -> Any:
        return functional.relu(self.units(x) + self.short(x))


def resnet_vd() -> Any:
    stem = [nn.Pad2D([0, 1, 0, 1]), nn.Conv2D(3, 8, 3, 2), nn.BatchNorm2D(8), nn.ReLU(), Unit(8, 16, 3, act="relu")]
    pooled = [nn.ZeroPad2D([1, 1, 1, 1]), nn.MaxPool2D(3, 2)]
    blocks = [Bottleneck(16, 8, 1), Bottleneck(32, 8, 1), Bottleneck(32, 16, 2), Bottleneck(64, 16, 1)]
    return nn.Sequential(
        *stem, *pooled, *blocks, nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(64, 10), nn.Softmax()
    )


class Mixing(nn.Layer):
    """SVTR's block: one product for queries, keys and values, cut by indexing; GELU; normed before or after."""

    def __init__(self, before: bool, local: Any = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.LayerList([nn.LayerNorm(WIDTH, epsilon=1e-6) for _ in range(2)])
        self.before, self.local = before, local

    def attend(self, x: Any) -> Any:
        qkv = self.qkv(x).reshape((0, -1, 3, HEADS, HEAD)).transpose((2, 0, 3, 1, 4))
        q, k, v = qkv[0] * HEAD**-0.5, qkv[1], qkv[2]
        scores = q.matmul(k.transpose((0, 1, 3, 2)))
        if self.local is not None:
            scores = scores + self.local
        y = functional.softmax(scores, axis=-1).matmul(v)
        return self.out(y.transpose((0, 2, 1, 3)).reshape((0, -1, WIDTH)))

    def widen(self, x: Any) -> Any:
        return self.down(functional.gelu(self.up(x)))

    def forward(self, x: Any) -> Any:
        first, second = self.norms
        if self.before:
            x = x + self.attend(first(x))
            return x + self.widen(second(x))
        x = first(x + self.attend(x))
        return second(x + self.widen(x))


class Svtr(nn.Layer):
    """PaddleOCR's recogniser: patches by two convolutions, local and global mixing, columns of the mean height."""

    ROWS, COLUMNS = 4, 16

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(Unit(3, 32, 3, 2, act="gelu"), Unit(32, WIDTH, 3, 2, act="gelu"))
        count = self.ROWS * self.COLUMNS
        self.places = self.create_parameter((1, count, WIDTH))
        row, column = paddle.arange(count) // self.COLUMNS, paddle.arange(count) % self.COLUMNS
        near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 2)
        local = paddle.where(near, paddle.zeros((1,)), paddle.full((1,), float("-inf"))).reshape((1, 1, count, count))
        self.blocks = nn.LayerList([Mixing(True, local), Mixing(False)])
        self.norm, self.last = nn.LayerNorm(WIDTH, epsilon=1e-6), nn.Conv2D(WIDTH, 48, 1, bias_attr=False)
        self.pool, self.head = nn.AdaptiveAvgPool2D((1, self.COLUMNS)), nn.Linear(48, 40)

    def forward(self, image: Any) -> Any:
        x = self.patches(image).flatten(2).transpose((0, 2, 1)) + self.places
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).transpose((0, 2, 1)).reshape((-1, WIDTH, self.ROWS, self.COLUMNS))
        x = functional.hardswish(self.last(self.pool(x)))
        return functional.softmax(self.head(x.squeeze(2).transpose((0, 2, 1))), axis=-1)


class Detector(nn.Layer):
    """PaddleOCR's text detector: a pyramid that is upsampled and added, two transposed convolutions, a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.LayerList([Unit(a, b, 3, 2, act="hardswish") for a, b in ((3, 16), (16, 32), (32, 64))])
        self.sides = nn.LayerList([nn.Conv2D(width, 32, 1, bias_attr=False) for width in (16, 32, 64)])
        self.excite = Excitation(32, 0.2)
        self.smooth = nn.Conv2D(96, 16, 3, padding=1)
        self.up = nn.Sequential(
            nn.Conv2DTranspose(16, 16, 2, 2), nn.BatchNorm2D(16), nn.ReLU(), nn.Conv2DTranspose(16, 1, 2, 2)
        )

    def forward(self, image: Any) -> Any:
        found, x = [], image
        for i, stage in enumerate(self.stages):
            x = stage(x)
            y = self.sides[i](x)
            found.append(y + self.excite(y))
        high, middle, low = found
        middle = middle + functional.upsample(low, scale_factor=2.0, mode="nearest", align_mode=1)
        high = high + functional.interpolate(middle, size=paddle.shape(high)[2:], mode="bilinear")
        low = functional.interpolate(low, scale_factor=4.0, mode="bilinear", align_corners=True)
        middle = functional.interpolate(middle, scale_factor=2.0, mode="bilinear", align_mode=1)
        return functional.sigmoid(self.up(self.smooth(paddle.concat([high, middle, low], axis=1))))


class ImageNorms(nn.Layer):
    """Norms of images, each after a convolution that it cannot be folded into, with an activation."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.GroupNorm(4, 16), nn.InstanceNorm2D(16), nn.GroupNorm(16, 16), nn.GroupNorm(1, 16)]
        self.norms = nn.LayerList(norms)
        self.convs = nn.LayerList([nn.Conv2D(3 if i == 0 else 16, 16, 3, padding=1) for i in range(6)])
        self.slopes, self.scale = nn.PReLU(16), nn.BatchNorm2D(16)

    def forward(self, image: Any) -> Any:
        acts = (functional.silu, self.slopes, functional.mish, functional.relu6)
        x = image
        for i, act in enumerate(acts):
            x = act(self.norms[i](self.convs[i](x)))
        x = functional.normalize(self.convs[4](x), axis=1)
        x = self.scale(functional.leaky_relu(self.convs[5](functional.pad(x, [2, 1, 1, 0], mode="reflect"))))
        return functional.pixel_shuffle(functional.swish(x), 2)
