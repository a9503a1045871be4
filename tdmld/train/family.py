"""What a model family is, and the rules that the values of its config obey.

A family knows facts only (names, shapes, sizes); building is `model.py`. Its config is a whitelist:
a key that is not listed is refused by name. The canonical config holds every listed key; floats
are their shortest decimal strings, lists of sizes are written "16,32".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tdmld.train import limits
from tdmld.train.errors import SpecError

ConfigValue = bool | int | str | None
Config = Mapping[str, ConfigValue]
Initial = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True)
class Weight:
    """A tensor of the whole model: its name there, its shape, how it is first drawn."""

    name: str
    shape: tuple[int, ...]
    initial: Initial
    std: float = 0.0
    """Standard deviation of a normal draw."""
    dtype: str = "F32"
    """As safetensors spells it; what is trained is F32."""

    @property
    def count(self) -> int:
        """Number of values."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(frozen=True)
class Part:
    """What of a model a slot holds: layers [first, last), counted from 0, and which ends."""

    first: int
    last: int
    entry: bool
    """The embedding or stem, before layer 0."""
    head: bool
    """Final norm or pooling and the head, after the last layer."""


class Family(Protocol):
    """What the rest of the package asks of a family."""

    @property
    def name(self) -> str:
        """As the job file spells it."""
        ...

    @property
    def images(self) -> bool:
        """Whether it reads images with a label instead of text."""
        ...

    def canonical(self, given: Mapping[str, Any]) -> dict[str, ConfigValue]:
        """The canonical config of a Hugging Face config; SpecError names the key."""
        ...

    def check(self, config: Config) -> None:
        """SpecError unless `config` is canonical and consistent."""
        ...

    def check_data(self, config: Config, tokenizer: str, sequence: int) -> None:
        """SpecError unless the model can read such data."""
        ...

    def hugging_face(self, config: Config) -> dict[str, Any]:
        """The config.json that transformers builds the model from, floats restored."""
        ...

    def weights(self, config: Config, part: Part) -> tuple[Weight, ...]:
        """The trained parameters of a part, sorted by name. A tied weight belongs to the entry."""
        ...

    def buffers(self, config: Config, part: Part) -> tuple[Weight, ...]:
        """What training changes but no optimizer does (running statistics), sorted by name."""
        ...

    def tied(self, config: Config) -> bool:
        """Whether the head uses the embedding's weight."""
        ...

    def layers(self, config: Config) -> int:
        """Number of layers that can be cut apart."""
        ...

    def boundary(self, config: Config, border: int, sequence: int) -> tuple[int, ...]:
        """Shape of what one sample passes on between layer `border` - 1 and layer `border`."""
        ...

    def activation_bytes(self, config: Config, part: Part, samples: int, sequence: int) -> int:
        """Bytes that autograd keeps for one micro-batch (an estimate)."""
        ...

    def source_names(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """Where published files hold the weight `name`: the likeliest place first, each place the
        tensors that give the weight when they are put one behind another."""
        ...


def shortest(value: float) -> str:
    """The shortest decimal string that reads back as `value`."""
    return repr(float(value))


@dataclass(frozen=True)
class Count:
    """A whole number."""

    low: int
    high: int

    def check(self, key: str, value: Any) -> ConfigValue:
        """The canonical value; SpecError."""
        if type(value) is not int:
            raise SpecError(f"config.{key}", f"{value!r} is not an integer", "write a whole number")
        if not self.low <= value <= self.high:
            raise SpecError(
                f"config.{key}", f"{value} is out of range", f"use {self.low} to {self.high}"
            )
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, key: str, value: Any) -> ConfigValue:
        """The canonical value; SpecError."""
        if type(value) is not bool:
            raise SpecError(f"config.{key}", f"{value!r} is no flag", "write true or false")
        return value


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    options: tuple[str, ...]

    def check(self, key: str, value: Any) -> ConfigValue:
        """The canonical value; SpecError."""
        if value not in self.options:
            known = ", ".join(self.options)
            raise SpecError(f"config.{key}", f"{value!r} is not supported", f"use one of {known}")
        return str(value)


@dataclass(frozen=True)
class Float:
    """A number, kept as its shortest decimal string."""

    low: float
    high: float

    def check(self, key: str, value: Any) -> ConfigValue:
        """The canonical value; SpecError."""
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


@dataclass(frozen=True)
class Optional:
    """A value of another rule, or null."""

    rule: "Count | Float"

    def check(self, key: str, value: Any) -> ConfigValue:
        """The canonical value; SpecError."""
        return None if value is None else self.rule.check(key, value)


@dataclass(frozen=True)
class Sizes:
    """A list of whole numbers, kept as "16,32"."""

    low: int
    high: int
    longest: int

    def check(self, key: str, value: Any) -> ConfigValue:
        """The canonical value; SpecError."""
        if isinstance(value, str) and len(value) <= 8 * self.longest:
            words: list[Any] = [int(w) if w.isdecimal() else w for w in value.split(",")]
        else:
            words = list(value) if isinstance(value, list | tuple) else []
        if not 1 <= len(words) <= self.longest:
            raise SpecError(
                f"config.{key}", f"{value!r} is no list", f"list 1 to {self.longest} numbers"
            )
        rule = Count(self.low, self.high)
        return ",".join(str(rule.check(key, word)) for word in words)


TOKEN = Optional(Count(0, limits.VOCABULARY))
Rule = Count | Flag | Choice | Float | Optional | Sizes
Rules = Mapping[str, Rule]

_IGNORED = ("transformers_version", "_name_or_path")
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")


def plain_values(
    given: Mapping[str, Any], model_type: str, family: str, silent: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The values of a Hugging Face file without the keys that say nothing to us.

    `silent` are such keys with the only values that they may have; none means any.
    """
    values = dict(given)
    for key in _CODE_KEYS:
        if key in values:
            raise SpecError(f"config.{key}", "names code", "remove it: a job is data only")
    for key in _IGNORED:
        values.pop(key, None)
    for key, allowed in silent.items():
        if key in values and (value := values.pop(key)) not in allowed and allowed:
            raise SpecError(f"config.{key}", f"{value!r} is not supported", f"use {allowed[0]!r}")
    if (kind := values.get("model_type", model_type)) != model_type:
        raise SpecError(
            "config.model_type",
            f"{kind!r} is not of the family {family}",
            "set family to the config's model type or use another config",
        )
    return values


def by_rules(rules: Rules, values: Mapping[str, Any]) -> dict[str, ConfigValue]:
    """Every listed key in canonical form; SpecError for an unknown, missing or wrong one."""
    for key in values:
        if key not in rules:
            raise SpecError(
                f"config.{str(key)[:64]}", "unknown key", "remove it or check its spelling"
            )
    config: dict[str, ConfigValue] = {}
    for key, rule in rules.items():
        if key not in values:
            raise SpecError(f"config.{key}", "missing", "add it to the model's config")
        config[key] = rule.check(key, values[key])
    return config


def check_canonical(rules: Rules, config: Config) -> None:
    """SpecError unless every value is spelled canonically."""
    canonical = by_rules(rules, config)
    for key, value in canonical.items():
        if config[key] != value:
            raise SpecError(
                f"config.{key}",
                f"{config[key]!r} is not the shortest decimal",
                f"write {value!r}",
            )


def restored(rules: Rules, config: Config) -> dict[str, Any]:
    """The config as Hugging Face writes it: floats and lists instead of strings."""

    def value_of(key: str, value: ConfigValue) -> Any:
        rule = rules[key]
        rule = rule.rule if isinstance(rule, Optional) else rule
        if isinstance(rule, Float) and value is not None:
            return float(str(value))
        return sizes(config, key) if isinstance(rule, Sizes) else value

    return {key: value_of(key, value) for key, value in config.items()}


def number(config: Config, key: str) -> int:
    """A whole number of a checked config."""
    value = config[key]
    if type(value) is not int:
        raise SpecError(f"config.{key}", f"{value!r} is not an integer", "write a whole number")
    return value


def sizes(config: Config, key: str) -> list[int]:
    """A list of sizes of a checked config."""
    return [int(word) for word in str(config[key]).split(",")]


def by_name(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """The weights in the order of their names."""
    return tuple(sorted(weights, key=lambda weight: weight.name))
