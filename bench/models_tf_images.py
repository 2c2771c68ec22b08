"""Networks on images for `bench.architectures_tf`, with channels last: Keras' own applications, narrowed, and layers.

Needs TensorFlow 2.15 with Keras 2.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras.src.applications import densenet as densenets
from keras.src.applications import efficientnet_v2 as efficientnets
from keras.src.applications import resnet as resnets

keras: Any = tf.keras
layers: Any = tf.keras.layers
CLASSES = 100
IMAGE = (None, None, 3)


def _classified(backbone: Any) -> Any:
    """Keras' applications have no top of their own where an image's size is free."""
    x = layers.GlobalAveragePooling2D()(backbone.output)
    return keras.Model(backbone.input, layers.Dense(CLASSES, activation="softmax")(x))


def mobilenet_v2() -> Any:
    """Depthwise convolutions, Relu6, ZeroPadding2D before strides of two."""
    return _classified(keras.applications.MobileNetV2(IMAGE, alpha=0.35, include_top=False, weights=None))


def mobilenet_v3() -> Any:
    """Squeeze and excite, hard swish and hard sigmoid made of Relu6."""
    return keras.applications.MobileNetV3Small(IMAGE, alpha=0.25, weights=None, classes=CLASSES)


def efficientnet() -> Any:
    """Swish, squeeze and excite, plain and depthwise blocks."""
    about = {"model_name": "efficientnetv2-s", "include_preprocessing": False, "input_shape": IMAGE}
    return _classified(efficientnets.EfficientNetV2(0.25, 0.3, 224, include_top=False, weights=None, **about))


def resnet() -> Any:
    """Bottlenecks behind ZeroPadding2D, the strides in 1x1 convolutions."""

    def stacks(x: Any) -> Any:
        x = resnets.stack1(x, 16, 2, stride1=1, name="conv2")
        return resnets.stack1(x, 32, 2, name="conv3")

    return _classified(resnets.ResNet(stacks, False, True, "resnet", False, None, input_shape=IMAGE))


def convnext() -> Any:
    """Depthwise convolutions of 7, layer norms over channels last, GELU (erf). Keras' own has groups, which tf2onnx
    leaves in a function."""
    x = image = keras.Input(IMAGE)
    for width, depth in ((16, 1), (32, 2)):
        x = layers.Conv2D(width, 4, 4)(x) if width == 16 else layers.Conv2D(width, 2, 2)(x)
        x = layers.LayerNormalization(epsilon=1e-6)(x)
        for _ in range(depth):
            y = layers.DepthwiseConv2D(7, padding="same")(x)
            y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization(epsilon=1e-6)(y))
            x = x + layers.Dense(width)(y)
    return _classified(keras.Model(image, x))


def densenet() -> Any:
    """Batch norms before activations, concatenated."""
    return _classified(densenets.DenseNet([2, 2, 2, 2], False, None, input_shape=IMAGE))


def segmenter() -> Any:
    """SAME padding at strides of two, dilated and transposed convolutions, both kinds of upsampling, group norms."""
    x = image = keras.Input((None, None, 3))
    x = layers.Conv2D(16, 3, 2, "same", activation="relu")(x)
    x = layers.SeparableConv2D(24, 3, padding="same")(x)
    x = layers.GroupNormalization(8)(x)
    high = x = layers.LeakyReLU(0.1)(x)
    x = layers.MaxPooling2D(3, 2, "same")(x)
    x = layers.Conv2D(24, 3, padding="same", dilation_rate=2)(x)
    x = layers.BatchNormalization()(x)
    x = layers.PReLU(shared_axes=[1, 2])(x)
    x = layers.AveragePooling2D(2, 2, "same")(x)
    x = layers.Conv2D(24, 1)(x)
    x = layers.ELU()(x)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    x = layers.Conv2DTranspose(24, 3, 2, "same")(x)
    x = layers.Concatenate()([x, high])
    x = layers.GroupNormalization(-1)(x)
    x = layers.Activation("swish")(x)
    x = layers.UpSampling2D(2)(x)
    x = layers.Conv2D(5, 1, activation="softmax")(x)
    return keras.Model(image, x)


def classifier(fake_quant: bool = False) -> Any:
    """A plain network; with `fake_quant` as quantisation aware training writes it: eight bits, one scale a tensor."""

    def quantised(x: Any, reach: float, bits: int = 8) -> Any:
        if not fake_quant:
            return x
        return layers.Lambda(lambda v: tf.quantization.fake_quant_with_min_max_args(v, -reach, reach, bits))(x)

    class Quantised(layers.Conv2D):
        def convolution_op(self, inputs: Any, kernel: Any) -> Any:
            if fake_quant:
                kernel = tf.quantization.fake_quant_with_min_max_args(kernel, -1.0, 1.0, narrow_range=False)
            return super().convolution_op(inputs, kernel)

    x = image = keras.Input((None, None, 3))
    x = quantised(x, 3.0)
    for width, stride in ((16, 2), (32, 1), (32, 2)):
        x = quantised(Quantised(width, 3, stride, "same", activation="relu")(x), 4.0)
    y = quantised(Quantised(32, 3, 1, "same")(x), 6.0)
    x = quantised(layers.ReLU()(layers.Add()([x, y])), 6.0)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(CLASSES)(x)
    return keras.Model(image, x)


class Positions(layers.Layer):
    """Adds what is learned for every patch."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(name="table", shape=shape[1:])

    def call(self, x: Any) -> Any:
        return x + self.table


def vit() -> Any:
    """Patches of 8 of images of 64, GELU by tanh."""
    width = 64
    x = image = keras.Input((64, 64, 3))
    x = layers.Conv2D(width, 8, 8)(x)
    x = layers.Reshape((64, width))(x)
    x = Positions()(x)
    for _ in range(2):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(4, 16, dropout=0.1)(y, y)
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(128)(y)
        y = layers.Dropout(0.1)(tf.nn.gelu(y, approximate=True))
        x = x + layers.Dense(width)(y)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(image, layers.Dense(CLASSES)(x))
