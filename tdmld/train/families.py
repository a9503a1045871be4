"""Model families: what a job's `config` may say, and what it means in tensors.

A family is a row in `FAMILIES`, never a path to code. Its config is a whitelist: a key that is
not listed is refused by name. The canonical config holds every listed key; floats are their
shortest decimal strings. Only facts stand here (names, shapes, sizes); building is `model.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tdmld.train import limits
from tdmld.train.errors import SpecError

ConfigValue = bool | int | str | None
Config = Mapping[str, ConfigValue]
Initial = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model: its name there, its shape, how it is first drawn."""

    name: str
    shape: tuple[int, ...]
    initial: Initial

    @property
    def count(self) -> int:
        """Number of values."""
        product = 1
        for size in self.shape:
            product *= size
        return product


class Family(Protocol):
    """What the rest of the package asks of a family. Layers are counted from 0."""

    name: str

    def canonical(self, given: Mapping[str, Any]) -> dict[str, ConfigValue]:
        """The canonical config of a Hugging Face config; SpecError names the key."""
        ...

    def check(self, config: Config) -> None:
        """SpecError unless `config` is canonical and consistent."""
        ...

    def hugging_face(self, config: Config) -> dict[str, Any]:
        """The config.json that transformers builds the model from, floats restored."""
        ...

    def weights(self, config: Config, first: int, last: int) -> tuple[Weight, ...]:
        """Parameters of layers [first, last), with the embedding if first is 0 and the final norm
        and head if last is the number of layers; sorted by name."""
        ...

    def layers(self, config: Config) -> int:
        """Number of decoder layers."""
        ...

    def width(self, config: Config) -> int:
        """Values per token at a cut."""
        ...

    def positions(self, config: Config) -> int:
        """Longest sequence."""
        ...

    def vocabulary(self, config: Config) -> int:
        """Number of token ids."""
        ...

    def activation_bytes(self, config: Config, first: int, last: int, tokens: int) -> int:
        """Bytes that autograd keeps for one micro-batch of `tokens` tokens (an estimate)."""
        ...


def shortest(value: float) -> str:
    """The shortest decimal string that reads back as `value`."""
    return repr(float(value))


@dataclass(frozen=True)
class _Count:
    low: int
    high: int

    def check(self, key: str, value: Any) -> ConfigValue:
        if type(value) is not int:
            raise SpecError(f"config.{key}", f"{value!r} is not an integer", "write a whole number")
        if not self.low <= value <= self.high:
            raise SpecError(
                f"config.{key}", f"{value} is out of range", f"use {self.low} to {self.high}"
            )
        return value


@dataclass(frozen=True)
class _Token:
    def check(self, key: str, value: Any) -> ConfigValue:
        return None if value is None else _Count(0, limits.VOCABULARY).check(key, value)


@dataclass(frozen=True)
class _Flag:
    def check(self, key: str, value: Any) -> ConfigValue:
        if type(value) is not bool:
            raise SpecError(f"config.{key}", f"{value!r} is no flag", "write true or false")
        return value


@dataclass(frozen=True)
class _Choice:
    options: tuple[str, ...]

    def check(self, key: str, value: Any) -> ConfigValue:
        if value not in self.options:
            known = ", ".join(self.options)
            raise SpecError(f"config.{key}", f"{value!r} is not supported", f"use one of {known}")
        return str(value)


@dataclass(frozen=True)
class _Float:
    low: float
    high: float

    def check(self, key: str, value: Any) -> ConfigValue:
        if isinstance(value, str) and len(value) <= limits.DECIMAL_CHARACTERS:
            try:
                number = float(value)
            except ValueError:
                number = float("nan")
        elif type(value) in (int, float) and abs(value) < 2**53:
            number = float(value)
        else:
            number = float("nan")
        if not self.low <= number <= self.high:
            raise SpecError(
                f"config.{key}",
                f"{value!r} is not a number from {self.low} to {self.high}",
                "write a decimal number in that range",
            )
        return shortest(number)


_Rule = _Count | _Token | _Flag | _Choice | _Float

_LLAMA: dict[str, _Rule] = {
    "attention_bias": _Flag(),
    "bos_token_id": _Token(),
    "eos_token_id": _Token(),
    "head_dim": _Count(2, limits.WIDTH),
    "hidden_act": _Choice(("silu", "gelu", "relu")),
    "hidden_size": _Count(2, limits.WIDTH),
    "initializer_range": _Float(1e-6, 1.0),
    "intermediate_size": _Count(1, limits.WIDTH),
    "max_position_embeddings": _Count(1, limits.SEQUENCE),
    "mlp_bias": _Flag(),
    "model_type": _Choice(("llama",)),
    "num_attention_heads": _Count(1, limits.WIDTH),
    "num_hidden_layers": _Count(1, limits.LAYERS),
    "num_key_value_heads": _Count(1, limits.WIDTH),
    "pad_token_id": _Token(),
    "rms_norm_eps": _Float(1e-12, 1e-1),
    "rope_theta": _Float(1.0, 1e12),
    "tie_word_embeddings": _Flag(),
    "vocab_size": _Count(2, limits.VOCABULARY),
}
_LLAMA_DEFAULTS: dict[str, ConfigValue] = {
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": "0.02",
    "mlp_bias": False,
    "model_type": "llama",
    "pad_token_id": None,
    "rms_norm_eps": "1e-06",
    "rope_theta": "10000.0",
    "tie_word_embeddings": False,
}
_LLAMA_SILENT: dict[str, tuple[Any, ...]] = {
    "architectures": (["LlamaForCausalLM"], None),
    "attention_dropout": (0, 0.0),
    "dtype": ("float32", None),
    "pretraining_tp": (1,),
    "rope_scaling": (None,),
    "torch_dtype": ("float32", None),
    "use_cache": (True, False),
}
"""Keys of a Hugging Face file that say nothing to us, with the only values they may have."""
_IGNORED = ("transformers_version", "_name_or_path")
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")


class Llama:
    """Llama-type decoders: RMS norm, rotary positions, gated MLP, grouped attention."""

    name = "llama"

    def canonical(self, given: Mapping[str, Any]) -> dict[str, ConfigValue]:
        """See `Family`. Defaults are Hugging Face's, but no token id is special by default."""
        values = dict(given)
        for key in _CODE_KEYS:
            if key in values:
                raise SpecError(f"config.{key}", "names code", "remove it: a job is data only")
        for key in _IGNORED:
            values.pop(key, None)
        for key, allowed in _LLAMA_SILENT.items():
            if key in values and (value := values.pop(key)) not in allowed:
                raise SpecError(
                    f"config.{key}", f"{value!r} is not supported", f"use {allowed[0]!r}"
                )
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            if (
                not isinstance(rope, dict)
                or rope.get("rope_type", "default") != "default"
                or not set(rope) <= {"rope_theta", "rope_type"}
            ):
                raise SpecError(
                    "config.rope_parameters",
                    f"{rope!r} is not supported",
                    'use {"rope_type": "default", "rope_theta": 10000.0}',
                )
            if "rope_theta" in rope:
                values.setdefault("rope_theta", rope["rope_theta"])
        if (kind := values.get("model_type", "llama")) != "llama":
            raise SpecError(
                "config.model_type",
                f"{kind!r} is not of the family llama",
                "set family to the config's model type or use another config",
            )
        filled: dict[str, Any] = {**_LLAMA_DEFAULTS, **values}
        for key in ("hidden_size", "num_attention_heads"):
            if key not in filled:
                raise SpecError(f"config.{key}", "missing", "add it to the model's config")
            filled[key] = _LLAMA[key].check(key, filled[key])
        if filled.get("num_key_value_heads") is None:
            filled["num_key_value_heads"] = filled["num_attention_heads"]
        if filled.get("head_dim") is None:
            filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
        config = _by_rules(filled)
        self.check(config)
        return config

    def check(self, config: Config) -> None:
        """See `Family`."""
        if _by_rules(config) != dict(config):
            wrong = next(k for k, v in _by_rules(config).items() if config[k] != v)
            raise SpecError(
                f"config.{wrong}",
                f"{config[wrong]!r} is not the shortest decimal",
                f"write {_LLAMA[wrong].check(wrong, config[wrong])!r}",
            )
        if config["tie_word_embeddings"]:
            raise SpecError(
                "config.tie_word_embeddings",
                "tied embeddings cannot be cut yet: first and last "
                "stage would have to exchange a gradient in each step",
                "set it to false",
            )
        heads, groups = _int(config, "num_attention_heads"), _int(config, "num_key_value_heads")
        if _int(config, "hidden_size") % heads:
            raise SpecError(
                "config.hidden_size",
                f"{config['hidden_size']} is no multiple of {heads} heads",
                "change hidden_size or num_attention_heads",
            )
        if heads % groups:
            raise SpecError(
                "config.num_key_value_heads",
                f"{groups} does not divide {heads} heads",
                "choose a divisor of num_attention_heads",
            )
        if _int(config, "head_dim") % 2:
            raise SpecError(
                "config.head_dim", "rotary positions need an even size", "choose an even head_dim"
            )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = config[key]
            if isinstance(token, int) and token >= _int(config, "vocab_size"):
                raise SpecError(
                    f"config.{key}", f"{token} is no id of the vocabulary", "use null or a valid id"
                )

    def hugging_face(self, config: Config) -> dict[str, Any]:
        """See `Family`."""
        values: dict[str, Any] = {
            key: float(str(value)) if isinstance(_LLAMA[key], _Float) else value
            for key, value in config.items()
        }
        theta = values.pop("rope_theta")
        return values | {
            "architectures": ["LlamaForCausalLM"],
            "attention_dropout": 0.0,
            "dtype": "float32",
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "use_cache": True,
        }

    def weights(self, config: Config, first: int, last: int) -> tuple[Weight, ...]:
        """See `Family`."""
        hidden, middle = _int(config, "hidden_size"), _int(config, "intermediate_size")
        size = _int(config, "head_dim")
        query = _int(config, "num_attention_heads") * size
        group = _int(config, "num_key_value_heads") * size
        vocabulary = _int(config, "vocab_size")
        linears = [
            ("self_attn.q_proj", query, hidden, "attention_bias"),
            ("self_attn.k_proj", group, hidden, "attention_bias"),
            ("self_attn.v_proj", group, hidden, "attention_bias"),
            ("self_attn.o_proj", hidden, query, "attention_bias"),
            ("mlp.gate_proj", middle, hidden, "mlp_bias"),
            ("mlp.up_proj", middle, hidden, "mlp_bias"),
            ("mlp.down_proj", hidden, middle, "mlp_bias"),
        ]
        found: list[Weight] = []
        for layer in range(first, last):
            prefix = f"model.layers.{layer}."
            for name, rows, columns, bias in linears:
                found.append(Weight(f"{prefix}{name}.weight", (rows, columns), "normal"))
                if config[bias]:
                    found.append(Weight(f"{prefix}{name}.bias", (rows,), "zeros"))
            for name in ("input_layernorm", "post_attention_layernorm"):
                found.append(Weight(f"{prefix}{name}.weight", (hidden,), "ones"))
        if first == 0:
            found.append(Weight("model.embed_tokens.weight", (vocabulary, hidden), "normal"))
        if last == self.layers(config):
            found.append(Weight("model.norm.weight", (hidden,), "ones"))
            found.append(Weight("lm_head.weight", (vocabulary, hidden), "normal"))
        return tuple(sorted(found, key=lambda weight: weight.name))

    def layers(self, config: Config) -> int:
        """See `Family`."""
        return _int(config, "num_hidden_layers")

    def width(self, config: Config) -> int:
        """See `Family`."""
        return _int(config, "hidden_size")

    def positions(self, config: Config) -> int:
        """See `Family`."""
        return _int(config, "max_position_embeddings")

    def vocabulary(self, config: Config) -> int:
        """See `Family`."""
        return _int(config, "vocab_size")

    def activation_bytes(self, config: Config, first: int, last: int, tokens: int) -> int:
        """See `Family`: about 14 hidden and 5 intermediate values a token and layer, twice the
        attention matrix, and three copies of the logits on the last stage, 4 bytes each."""
        hidden, middle = _int(config, "hidden_size"), _int(config, "intermediate_size")
        heads = _int(config, "num_attention_heads")
        span = min(tokens, self.positions(config))
        layer = tokens * (14 * hidden + 5 * middle + 2 * heads * span)
        head = 3 * tokens * self.vocabulary(config) if last == self.layers(config) else 0
        return 4 * ((last - first) * layer + head)


def _int(config: Config, key: str) -> int:
    value = config[key]
    if type(value) is not int:
        raise SpecError(f"config.{key}", f"{value!r} is not an integer", "write a whole number")
    return value


def _by_rules(values: Mapping[str, Any]) -> dict[str, ConfigValue]:
    for key in values:
        if key not in _LLAMA:
            raise SpecError(
                f"config.{str(key)[:64]}", "unknown key", "remove it or check its spelling"
            )
    config: dict[str, ConfigValue] = {}
    for key, rule in _LLAMA.items():
        if key not in values:
            raise SpecError(f"config.{key}", "missing", "add it to the model's config")
        config[key] = rule.check(key, values[key])
    return config


FAMILIES: dict[str, Family] = {"llama": Llama()}
