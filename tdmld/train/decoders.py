"""Decoders of text: the families of Hugging Face causal LMs that can be cut, as one table.

A row says which keys the config has, what they are by default, and which weights a layer and the
two ends have, under the names that the weights have in the live model. No token id is special by
default; dropout is refused, for a replay has no random numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tdmld.train.errors import SpecError
from tdmld.train.family import (
    Config,
    ConfigValue,
    Initial,
    Part,
    Rules,
    Weight,
    by_name,
    by_rules,
    check_canonical,
    number,
    plain_values,
    restored,
)

LayerWeight = tuple[str, tuple[int, ...], Initial]
"""Name inside the layer, shape, first value."""
_TYPES = ("full_attention", "sliding_attention")
_SILENT: Mapping[str, tuple[Any, ...]] = {
    "cache_implementation": (),
    "dtype": ("float32", "bfloat16", "float16", None),
    "rope_scaling": (None,),
    "torch_dtype": ("float32", "bfloat16", "float16", None),
    "use_cache": (True, False),
}
"""Keys of a Hugging Face file that say nothing to us, with the only values that they may have (none
means any). The type of published values says nothing about the precision of training."""


@dataclass(frozen=True)
class Decoder:
    """A family of decoders. `keys` maps our names of sizes to the config's."""

    name: str
    architecture: str
    layer: Callable[[Config], Iterator[LayerWeight]]
    rules: Rules
    defaults: Mapping[str, ConfigValue]
    silent: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=lambda: {"attention_dropout": 0.0})
    """What the config.json says beside the config's own keys."""
    model_type: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    base: str = "model"
    layer_list: str = "layers"
    embedding: str = "embed_tokens"
    table: str | None = None
    """A learned table of positions."""
    norm: str = "norm"
    norm_initial: Initial = "ones"
    norm_bias: bool = False
    head_bias: bool = False
    windows: Callable[[Config], list[str]] | None = None
    """The attention type of each layer, where layers differ."""
    images = False

    def _key(self, key: str) -> str:
        return self.keys.get(key, key)

    def _size(self, config: Config, key: str) -> int:
        return number(config, self._key(key))

    def canonical(self, given: Mapping[str, Any]) -> dict[str, ConfigValue]:
        """See `Family`."""
        model_type = self.model_type or self.name
        silent = {"architectures": ([self.architecture], None), **_SILENT, **self.silent}
        values = plain_values(given, model_type, self.name, silent)
        layer_types = values.pop("layer_types", None)
        _unfold(self, values)
        if "sliding_window_pattern" in self.rules and isinstance(layer_types, list):
            values.setdefault("sliding_window_pattern", _pattern(layer_types))
        filled: dict[str, Any] = {**self.defaults, "model_type": model_type, **values}
        for name in ("hidden_size", "num_attention_heads"):
            key = self._key(name)
            if key not in filled:
                raise SpecError(f"config.{key}", "missing", "add it to the model's config")
            filled[key] = self.rules[key].check(key, filled[key])
        hidden, heads = (filled[self._key(n)] for n in ("hidden_size", "num_attention_heads"))
        for key, usual in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
            if key in self.rules and filled.get(key) is None:
                filled[key] = usual
        if "use_sliding_window" in self.rules and not filled["use_sliding_window"]:
            filled["sliding_window"] = None
        config = by_rules(self.rules, filled)
        self.check(config)
        if layer_types is not None and layer_types != self.layer_types(config):
            raise SpecError(
                "config.layer_types",
                "is not what the other keys give",
                "remove it, or use a config whose layers alternate regularly",
            )
        return config

    def check(self, config: Config) -> None:
        """See `Family`."""
        check_canonical(self.rules, config)
        heads, groups = self._size(config, "num_attention_heads"), self.groups(config)
        if self._size(config, "hidden_size") % heads:
            key = self._key("hidden_size")
            raise SpecError(
                f"config.{key}",
                f"{config[key]} is no multiple of {heads} heads",
                f"change {key} or {self._key('num_attention_heads')}",
            )
        if heads % groups:
            raise SpecError(
                "config.num_key_value_heads",
                f"{groups} does not divide {heads} heads",
                f"choose a divisor of {self._key('num_attention_heads')}",
            )
        share = float(str(config.get("partial_rotary_factor", 1)))
        if self.table is None and (int(self.head_size(config) * share) % 2 or not share):
            raise SpecError(
                "config.head_dim" if "head_dim" in config else f"config.{self._key('hidden_size')}",
                "rotary positions need an even size",
                "choose an even size of a head",
            )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = config[key]
            if isinstance(token, int) and token >= number(config, "vocab_size"):
                raise SpecError(
                    f"config.{key}", f"{token} is no id of the vocabulary", "use null or a valid id"
                )
        if config.get("use_sliding_window") is False and config["sliding_window"] is not None:
            raise SpecError(
                "config.sliding_window", "set, but use_sliding_window is false", "use null"
            )
        if "num_experts" in config:
            used, experts = number(config, "num_experts_per_tok"), number(config, "num_experts")
            if used > experts:
                raise SpecError(
                    "config.num_experts_per_tok",
                    f"{used} exceeds {experts} experts",
                    "use at most num_experts",
                )

    def check_data(self, config: Config, tokenizer: str, sequence: int) -> None:
        """See `Family`."""
        if tokenizer not in ("bytes", "tokens"):
            raise SpecError(
                "data.tokenizer",
                f"{self.name} reads text, not {tokenizer}",
                'use "bytes", or "tokens" for what `tdmld data prepare` made',
            )
        if tokenizer == "bytes" and (vocabulary := number(config, "vocab_size")) < 256:
            raise SpecError(
                "config.vocab_size",
                f"{vocabulary} does not fit the tokenizer bytes",
                "use 256 or more",
            )
        key = self._key("max_position_embeddings")
        if sequence > number(config, key):
            raise SpecError(
                "data.sequence",
                f"{sequence} exceeds {key} {config[key]}",
                f"shorten the sequence or raise {key} in the config",
            )

    def hugging_face(self, config: Config) -> dict[str, Any]:
        """See `Family`."""
        values = restored(self.rules, config)
        share = values.pop("partial_rotary_factor", None)
        if "rope_theta" in values:
            rope = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
            if share is not None:
                rope["partial_rotary_factor"] = share
            if "rope_local_base_freq" in values:
                local = {"rope_theta": values.pop("rope_local_base_freq"), "rope_type": "default"}
                rope = {"full_attention": rope, "sliding_attention": local}
            values["rope_parameters"] = rope
        if self.windows is not None:
            values["layer_types"] = self.layer_types(config)
        return (
            values
            | dict(self.written)
            | {"architectures": [self.architecture], "dtype": "float32", "use_cache": True}
        )

    def layer_types(self, config: Config) -> list[str] | None:
        """The attention type of each layer, or None where all are the same by the config."""
        return None if self.windows is None else self.windows(config)

    def weights(self, config: Config, part: Part) -> tuple[Weight, ...]:
        """See `Family`."""
        std = float(str(config["initializer_range"]))
        hidden, base = self._size(config, "hidden_size"), f"{self.base}."
        found = [
            Weight(f"{base}{self.layer_list}.{index}.{name}", shape, initial, std)
            for index in range(part.first, part.last)
            for name, shape, initial in self.layer(config)
        ]
        vocabulary = number(config, "vocab_size")
        if part.entry:
            name = f"{base}{self.embedding}.weight"
            found.append(Weight(name, (vocabulary, hidden), "normal", std))
            if self.table is not None:
                shape = (self._size(config, "max_position_embeddings"), hidden)
                found.append(Weight(f"{base}{self.table}.weight", shape, "normal", std))
        if part.head:
            found.append(Weight(f"{base}{self.norm}.weight", (hidden,), self.norm_initial))
            if self.norm_bias:
                found.append(Weight(f"{base}{self.norm}.bias", (hidden,), "zeros"))
            if not self.tied(config):
                found.append(Weight("lm_head.weight", (vocabulary, hidden), "normal", std))
            if self.head_bias:
                found.append(Weight("lm_head.bias", (vocabulary,), "zeros"))
        return by_name(found)

    def buffers(self, config: Config, part: Part) -> tuple[Weight, ...]:
        """See `Family`: none."""
        return ()

    def tied(self, config: Config) -> bool:
        """See `Family`."""
        return config["tie_word_embeddings"] is True

    def layers(self, config: Config) -> int:
        """See `Family`."""
        return self._size(config, "num_hidden_layers")

    def boundary(self, config: Config, border: int, sequence: int) -> tuple[int, ...]:
        """See `Family`: (sequence, hidden size) everywhere."""
        return sequence, self._size(config, "hidden_size")

    def groups(self, config: Config) -> int:
        """Number of key and value heads."""
        key = "num_key_value_heads"
        return self._size(config, key if key in config else "num_attention_heads")

    def head_size(self, config: Config) -> int:
        """Size of a head."""
        if "head_dim" in config:
            return number(config, "head_dim")
        return self._size(config, "hidden_size") // self._size(config, "num_attention_heads")

    def middle(self, config: Config) -> int:
        """Size inside the MLP that a token passes."""
        if "num_experts" in config:
            return number(config, "moe_intermediate_size") * number(config, "num_experts_per_tok")
        inner = config.get(self._key("intermediate_size"))
        return inner if isinstance(inner, int) else 4 * self._size(config, "hidden_size")

    def activation_bytes(self, config: Config, part: Part, samples: int, sequence: int) -> int:
        """See `Family`: about 14 hidden and 5 intermediate values a token and layer, 4 hidden ones
        for each expert that it goes to, twice the attention matrix, and three copies of the logits
        at the head, 4 bytes each."""
        heads = self._size(config, "num_attention_heads")
        hidden = max(self._size(config, "hidden_size"), heads * self.head_size(config))
        experts = number(config, "num_experts_per_tok") if "num_experts" in config else 0
        tokens = samples * sequence
        values = (14 + 4 * experts) * hidden + 5 * self.middle(config) + 2 * heads * sequence
        layer = tokens * values
        head = 3 * tokens * number(config, "vocab_size") if part.head else 0
        return 4 * ((part.last - part.first) * layer + head)

    def source_names(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """See `Family`: as in the live model, or without the base's prefix; a name of its own for
        GPT-NeoX's head; experts that the live model keeps in one tensor, one by one."""
        found: list[tuple[str, ...]] = [(name,), (name.removeprefix(f"{self.base}."),)]
        if self.name == "gpt_neox" and name.startswith("lm_head."):
            found.append((name.replace("lm_head", "embed_out"),))
        place, _, leaf = name.rpartition(".")
        if place.endswith(".experts"):
            kinds = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            experts = range(shape[0])
            found.append(tuple(f"{place}.{n}.{kind}.weight" for n in experts for kind in kinds))
        return tuple(found)


def _pattern(layer_types: list[Any]) -> int:
    """Each how many layers one looks at everything."""
    full = "full_attention"
    return layer_types.index(full) + 1 if full in layer_types else len(layer_types) + 1


def _unfold(family: Decoder, values: dict[str, Any]) -> None:
    """Other spellings of keys; `rope_parameters` becomes the plain keys of the canonical config."""
    for old, new in _OLD_KEYS:
        if old in values and new in family.rules:
            values.setdefault(new, values.pop(old))
    rope = values.pop("rope_parameters", None)
    if rope is None:
        return
    parts = {"rope_theta": rope}
    if "rope_local_base_freq" in family.rules and isinstance(rope, dict) and set(rope) <= {*_TYPES}:
        parts = {
            "rope_theta": rope.get("full_attention", {}),
            "rope_local_base_freq": rope.get("sliding_attention", {}),
        }
    known = {"rope_theta", "partial_rotary_factor"} & set(family.rules)
    for key, part in parts.items():
        if (
            not isinstance(part, dict)
            or part.get("rope_type", "default") != "default"
            or not set(part) <= known | {"rope_type"}
        ):
            raise SpecError(
                "config.rope_parameters",
                f"{rope!r} is not supported",
                'use {"rope_type": "default", "rope_theta": 10000.0}',
            )
        for name, value in part.items():
            if name in known:
                values.setdefault(key if name == "rope_theta" else name, value)


_OLD_KEYS = (
    ("num_local_experts", "num_experts"),
    ("rotary_emb_base", "rope_theta"),
    ("rotary_pct", "partial_rotary_factor"),
)


def sliding_from(config: Config) -> list[str]:
    """Qwen: the layers from `max_window_layers` on look at a window, when that is switched on."""
    layers, first = number(config, "num_hidden_layers"), number(config, "max_window_layers")
    slides = config["use_sliding_window"] is True and config["sliding_window"] is not None
    return [_TYPES[slides and index >= first] for index in range(layers)]


def alternating(config: Config) -> list[str]:
    """Gemma: all but each n-th layer look at a window."""
    pattern = number(config, "sliding_window_pattern") if "sliding_window_pattern" in config else 2
    return [_TYPES[(n + 1) % pattern != 0] for n in range(number(config, "num_hidden_layers"))]
