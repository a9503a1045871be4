"""Image classification: residual networks, cut between their blocks.

A block with its skip connection and its batch norms is one layer; layers are counted through all
of the network's stages. Running statistics belong to the shared part of a state.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt, prod, sqrt
from typing import Any

from tdmld.train.errors import SpecError
from tdmld.train.family import (
    Choice,
    Config,
    ConfigValue,
    Count,
    Flag,
    Part,
    Rules,
    Sizes,
    Weight,
    by_name,
    by_rules,
    check_canonical,
    number,
    plain_values,
    restored,
    sizes,
)

_CHANNELS = 8192
_BLOCKS = 256
_SIDE = 1024
_RULES: Rules = {
    "depths": Sizes(1, _BLOCKS, 8),
    "downsample_in_bottleneck": Flag(),
    "downsample_in_first_stage": Flag(),
    "embedding_size": Count(1, _CHANNELS),
    "hidden_act": Choice(("relu", "gelu", "silu")),
    "hidden_sizes": Sizes(1, _CHANNELS, 8),
    "layer_type": Choice(("basic", "bottleneck")),
    "model_type": Choice(("resnet",)),
    "num_channels": Count(1, 4),
    "num_labels": Count(2, 256),
}
_DEFAULTS: Mapping[str, ConfigValue] = {
    "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False,
    "hidden_act": "relu",
    "layer_type": "bottleneck",
    "model_type": "resnet",
    "num_channels": 3,
}
_SILENT: Mapping[str, tuple[Any, ...]] = {
    "architectures": (["ResNetForImageClassification"], None),
    "dtype": ("float32", "bfloat16", "float16", None),
    "label2id": (),
    "out_features": (),
    "out_indices": (),
    "stage_names": (),
    "torch_dtype": ("float32", "bfloat16", "float16", None),
}
_REDUCTION = 4
"""A bottleneck's middle has so many times fewer channels."""


@dataclass(frozen=True)
class _Block:
    """One residual block: where it stands, its channels and its stride."""

    prefix: str
    channels_in: int
    channels_out: int
    stride: int

    @property
    def projects(self) -> bool:
        """Whether the skip connection has a convolution."""
        return self.channels_in != self.channels_out or self.stride != 1


class ResNet:
    """Hugging Face's ResNet with basic or bottleneck blocks and a linear head."""

    name = "resnet"
    images = True

    def canonical(self, given: Mapping[str, Any]) -> dict[str, ConfigValue]:
        """See `Family`. `id2label` is read as the number of labels."""
        values = plain_values(given, "resnet", self.name, _SILENT)
        labels = values.pop("id2label", None)
        if isinstance(labels, dict):
            values.setdefault("num_labels", len(labels))
        config = by_rules(_RULES, {**_DEFAULTS, **values})
        self.check(config)
        return config

    def check(self, config: Config) -> None:
        """See `Family`."""
        check_canonical(_RULES, config)
        depths, channels = sizes(config, "depths"), sizes(config, "hidden_sizes")
        if len(depths) != len(channels):
            raise SpecError(
                "config.depths",
                f"{len(depths)} depths for {len(channels)} hidden_sizes",
                "give one depth a size",
            )
        if sum(depths) > _BLOCKS:
            raise SpecError("config.depths", f"more than {_BLOCKS} blocks", "use fewer blocks")
        if config["layer_type"] == "bottleneck" and any(size % _REDUCTION for size in channels):
            raise SpecError(
                "config.hidden_sizes",
                f"a bottleneck needs multiples of {_REDUCTION}",
                'change the sizes, or use layer_type "basic"',
            )

    def check_data(self, config: Config, tokenizer: str, sequence: int) -> None:
        """See `Family`: `sequence` counts the bytes of an image, channels x side x side."""
        if tokenizer != "images":
            raise SpecError(
                "data.tokenizer", f"resnet reads images, not {tokenizer}", 'use "images"'
            )
        channels = number(config, "num_channels")
        side = isqrt(sequence // channels)
        if channels * side * side != sequence or not 4 <= side <= _SIDE:
            raise SpecError(
                "data.sequence",
                f"{sequence} is not {channels} x side x side with a side from 4 to {_SIDE}",
                "count the bytes of one square image",
            )

    def hugging_face(self, config: Config) -> dict[str, Any]:
        """See `Family`. Labels are named by their numbers."""
        values = restored(_RULES, config)
        labels = values.pop("num_labels")
        return values | {
            "architectures": ["ResNetForImageClassification"],
            "dtype": "float32",
            "id2label": {str(label): str(label) for label in range(labels)},
            "label2id": {str(label): label for label in range(labels)},
        }

    def weights(self, config: Config, part: Part) -> tuple[Weight, ...]:
        """See `Family`. Convolutions are drawn with the variance 2 / (outputs x kernel area)."""
        found: list[Weight] = []
        for name, shape in self._convolutions(config, part):
            std = sqrt(2 / (shape[0] * shape[2] * shape[3]))
            found += [
                Weight(f"{name}.convolution.weight", shape, "normal", std),
                Weight(f"{name}.normalization.weight", shape[:1], "ones"),
                Weight(f"{name}.normalization.bias", shape[:1], "zeros"),
            ]
        if part.head:
            labels, width = number(config, "num_labels"), sizes(config, "hidden_sizes")[-1]
            std = sqrt(1 / (3 * width))
            found.append(Weight("classifier.1.weight", (labels, width), "normal", std))
            found.append(Weight("classifier.1.bias", (labels,), "zeros"))
        return by_name(found)

    def buffers(self, config: Config, part: Part) -> tuple[Weight, ...]:
        """See `Family`: mean, variance and count of each batch norm."""
        return by_name(
            weight
            for name, shape in self._convolutions(config, part)
            for weight in (
                Weight(f"{name}.normalization.running_mean", shape[:1], "zeros"),
                Weight(f"{name}.normalization.running_var", shape[:1], "ones"),
                Weight(f"{name}.normalization.num_batches_tracked", (), "zeros", dtype="I64"),
            )
        )

    def tied(self, config: Config) -> bool:
        """See `Family`: never."""
        return False

    def layers(self, config: Config) -> int:
        """See `Family`: the blocks of all stages."""
        return sum(sizes(config, "depths"))

    def boundary(self, config: Config, border: int, sequence: int) -> tuple[int, ...]:
        """See `Family`: (channels, side, side)."""
        side = isqrt(sequence // number(config, "num_channels"))
        side = _halved(_halved(side))
        channels = number(config, "embedding_size")
        for block in _blocks(config)[:border]:
            channels, side = block.channels_out, _halved(side) if block.stride == 2 else side
        return channels, side, side

    def activation_bytes(self, config: Config, part: Part, samples: int, sequence: int) -> int:
        """See `Family`: about six values for each one that a block gives and one for each that it
        takes; for each value of the stem before its pooling about four."""
        values = 0
        for border in range(part.first, part.last):
            values += prod(self.boundary(config, border, sequence))
            values += 6 * prod(self.boundary(config, border + 1, sequence))
        if part.entry:
            side = _halved(isqrt(sequence // number(config, "num_channels")))
            values += 4 * number(config, "embedding_size") * side * side + sequence
        return 4 * samples * values

    def source_names(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """See `Family`: as in the live model."""
        return ((name,),)

    def _convolutions(
        self, config: Config, part: Part
    ) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """Name and shape of each convolution that has a batch norm behind it."""
        if part.entry:
            stem = (number(config, "embedding_size"), number(config, "num_channels"), 7, 7)
            yield "resnet.embedder.embedder", stem
        bottleneck = config["layer_type"] == "bottleneck"
        for block in _blocks(config)[part.first : part.last]:
            into, out = block.channels_in, block.channels_out
            if block.projects:
                yield f"{block.prefix}.shortcut", (out, into, 1, 1)
            inner = out // _REDUCTION
            shapes = (
                [(inner, into, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)]
                if bottleneck
                else [(out, into, 3, 3), (out, out, 3, 3)]
            )
            for place, shape in enumerate(shapes):
                yield f"{block.prefix}.layer.{place}", shape


def _halved(side: int) -> int:
    """What a convolution or a pooling with stride 2 leaves of a side."""
    return (side + 1) // 2


def _blocks(config: Config) -> list[_Block]:
    """All blocks in order, through the stages of the network."""
    found, before = [], number(config, "embedding_size")
    rows = zip(sizes(config, "hidden_sizes"), sizes(config, "depths"), strict=True)
    for stage, (channels, depth) in enumerate(rows):
        for place in range(depth):
            first = place == 0 and (stage > 0 or config["downsample_in_first_stage"] is True)
            prefix = f"resnet.encoder.stages.{stage}.layers.{place}"
            found.append(_Block(prefix, before, channels, 2 if first else 1))
            before = channels
    return found
