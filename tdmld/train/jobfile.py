"""The job file: what a submitter writes (TOML beside a config.json and a text).

It says what the spec says, plus a name and the money, which are no part of the program. `init` is
"seed" or a directory of safetensors that training goes on from. With `tokenizer = "tokens"` the
text is a directory that `tdmld data prepare` wrote. An unknown or a missing key is an error that
names it. Paths are relative to the job file.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tdmld.train import limits
from tdmld.train.data import shard_file
from tdmld.train.digest import data_root
from tdmld.train.errors import FileError, SpecError
from tdmld.train.families import family_of
from tdmld.train.family import ConfigValue
from tdmld.train.pretrained import Pretrained
from tdmld.train.spec import Spec, spec_bytes, typed_error
from tdmld.train.speccheck import check_spec
from tdmld.train.specfields import (
    LANE_WIRE,
    Data,
    DecimalText,
    GivenInit,
    Lanes,
    LaneWire,
    NoClip,
    Pipeline,
    SeedInit,
    StageClip,
    Train,
    decimal,
)
from tdmld.train.tokens import BYTES, TOKENIZER_FILE, TOKENS_FILE, read_manifest

_Price = Annotated[int, msgspec.Meta(ge=0, le=limits.AMOUNT)]


class Money(msgspec.Struct, frozen=True):
    """What the submitter pays, in units; `audit_rate` in parts per million."""

    slot_price_max: int
    """Per slot and segment, at most."""
    standby_price: int
    """Per slot and segment."""
    audit_rate: int
    audit_price: int
    """Per audit."""
    deadline_blocks: int


class JobFile(msgspec.Struct, frozen=True):
    """A job file, read and checked, with its spec."""

    name: str
    spec: Spec
    raw: bytes
    """The spec's canonical bytes."""
    money: Money
    text_path: Path
    given_path: Path | None = None
    """The Hugging Face directory that the job goes on from."""
    tokenizer_path: Path | None = None
    """The tokenizer.json that the data were made with, if a token is more than a byte."""


class _DataSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    tokenizer: Literal["bytes", "images", "tokens"]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=limits.SEQUENCE)]
    heldout: DecimalText


class _MoneySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    slot_price_max: _Price
    standby_price: _Price
    audit_rate: DecimalText
    audit_price: _Price
    deadline_blocks: Annotated[int, msgspec.Meta(ge=1, le=limits.DEADLINE_BLOCKS)]


class _TrainSection(Train, frozen=True, kw_only=True, forbid_unknown_fields=True):
    clip: NoClip | StageClip


class _OuterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outer step. The defaults did best in `scripts/bench sync`: what is fed back already acts
    as a momentum, and a rate above 1 makes up for what is told late."""

    lr: DecimalText = "3"
    momentum: DecimalText = "0"
    nesterov: bool = False
    density: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128
    bits: Literal[2, 8] = 2
    feedback: DecimalText = "0.6"


class _LanesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: int = 1
    mode: Literal["sync", "diloco"] = "sync"
    weights: tuple[int, ...] = ()
    wire: LaneWire = LANE_WIRE
    outer: _OuterSection | None = None

    def lanes(self) -> Lanes:
        """As the spec spells them; SpecError for what it does not allow."""
        outer = self.outer or (_OuterSection() if self.mode == "diloco" else None)
        alike = len(self.weights) == self.count and set(self.weights) == {1}
        weights = () if alike else self.weights
        document = msgspec.to_builtins(msgspec.structs.replace(self, weights=weights))
        document["outer"] = msgspec.to_builtins(outer)
        try:
            return msgspec.convert(document, type=Lanes)
        except msgspec.ValidationError as error:
            found = typed_error(error)
            raise SpecError(f"pipeline.lanes.{found.field}", found.problem, found.remedy) from error


class _PipelineSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cuts: list[int]
    segment_steps: int
    unsettled: int
    state_every: int
    lanes: _LanesSection

    def pipeline(self) -> Pipeline:
        """As the spec spells it; SpecError for what it does not allow."""
        document = {name: getattr(self, name) for name in self.__struct_fields__}
        try:
            return msgspec.convert(document | {"lanes": self.lanes.lanes()}, type=Pipeline)
        except msgspec.ValidationError as error:
            found = typed_error(error)
            raise SpecError(f"pipeline.{found.field}", found.problem, found.remedy) from error


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    family: str
    config: str
    seed: Annotated[int, msgspec.Meta(ge=0, le=limits.SEED)]
    init: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    class_: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}$")] = msgspec.field(name="class")
    data: _DataSection
    train: _TrainSection
    pipeline: _PipelineSection
    money: _MoneySection
    privacy: Literal["open", "sealed", "split"] = "sealed"
    """Who only stores or carries the text shall not read it; `open` is a choice."""


def load_job_file(path: Path) -> JobFile:
    """Read a job file with its config and text; SpecError names what is wrong and the remedy.

    The text is read once, in pieces, for its shard ids; it is not kept in memory.
    """
    try:
        document = tomllib.loads(_read("job file", path, limits.JOB_FILE_BYTES))
    except tomllib.TOMLDecodeError as error:
        raise SpecError("job file", f"{path.name}: {error}", "correct the TOML") from error
    try:
        file = msgspec.convert(document, type=_File)
    except msgspec.ValidationError as error:
        raise typed_error(error) from error
    config = family_of(file.family).canonical(_read_config(path.parent / file.config))
    data, text_path, tokenizer = _data(path.parent / file.data.text, file.data, config)
    spec = Spec(
        version=file.version,
        family=file.family,
        config=config,
        seed=file.seed,
        init=SeedInit(),
        privacy=file.privacy,
        class_=file.class_,
        data=data,
        train=Train(**{key: getattr(file.train, key) for key in Train.__struct_fields__}),
        pipeline=file.pipeline.pipeline(),
        clip=file.train.clip,
    )
    given = None if file.init == "seed" else path.parent / file.init
    if given is None:
        check_spec(spec)
    else:
        spec = _going_on(spec, Pretrained(given))
    raw = spec_bytes(spec)
    if len(raw) > limits.SPEC_BYTES:
        raise SpecError("data.text", f"the spec has {len(raw)} bytes", "use a shorter text")
    return JobFile(file.name, spec, raw, _money(file.money), text_path, given, tokenizer)


def _going_on(spec: Spec, source: Pretrained) -> Spec:
    """The checked spec that begins with given weights."""
    step, unknown = 0 if source.moments is None else source.moments.step, "0" * 64
    slots = spec.slots if step else 0
    init = GivenInit((unknown,) * spec.stages, (unknown,) * slots, step)
    spec = msgspec.structs.replace(spec, init=init)
    check_spec(spec)  # before the roots: they are made along the cuts
    return msgspec.structs.replace(spec, init=source.init(spec))


def _data(
    path: Path, section: _DataSection, config: Mapping[str, ConfigValue]
) -> tuple[Data, Path, Path | None]:
    """The spec's data, the file that they are in, and the tokenizer's."""
    manifest, tokenizer = None, None
    if section.tokenizer == "tokens":
        try:
            manifest = read_manifest(path)
        except FileError as error:
            problem, _, remedy = str(error).partition("; ")
            raise SpecError("data.text", problem, remedy) from error
        known = config.get("vocab_size")
        if isinstance(known, int) and known < manifest.vocabulary:
            raise SpecError(
                "config.vocab_size",
                f"{known} is less than the tokenizer's {manifest.vocabulary} tokens",
                f"use {manifest.vocabulary} or more",
            )
        if manifest.tokenizer != BYTES:
            tokenizer = path / TOKENIZER_FILE
        path = path / TOKENS_FILE
    shards = _shards(path)
    root = data_root(shards).hex()
    if manifest is not None and root != manifest.root:
        raise SpecError(
            "data.text", f"{path} is not what its manifest says", "prepare the data again"
        )
    data = Data(
        tokenizer=section.tokenizer if manifest is None else manifest.data_tokenizer,
        sequence=section.sequence,
        heldout=section.heldout,
        tokens=sum(size for _, size in shards),
        shards=tuple((name.hex(), size) for name, size in shards),
        root=root,
        width=1 if manifest is None else manifest.width,
    )
    return data, path, tokenizer


def parts_per_million(field: str, text: str) -> int:
    """A rate from 0 to 1 with at most six decimals, exactly."""
    scaled = decimal(field, text, "0", "1") * 1_000_000
    if scaled != scaled.to_integral_value():
        raise SpecError(field, f"{text} has more than six decimals", "round it")
    return int(scaled)


def _money(section: _MoneySection) -> Money:
    return Money(
        section.slot_price_max,
        section.standby_price,
        parts_per_million("money.audit_rate", section.audit_rate),
        section.audit_price,
        section.deadline_blocks,
    )


def _read(field: str, path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise SpecError(field, f"cannot read {path}: {error.strerror}", "check the path") from error
    if len(raw) > limit:
        raise SpecError(field, f"{path} has more than {limit} bytes", "make it smaller")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(field, f"{path} is not UTF-8", "save it as UTF-8") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read("config", path, limits.CONFIG_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        raise SpecError("config", f"{path.name} is not JSON: {error}", "correct it") from error
    if not isinstance(config, dict):
        raise SpecError("config", f"{path.name} is not a JSON object", "use a Hugging Face config")
    return config


def _shards(path: Path) -> list[tuple[bytes, int]]:
    try:
        size = path.stat().st_size
        if not path.is_file() or not 0 < size <= limits.TEXT_BYTES:
            raise SpecError(
                "data.text", f"{path} is no file of 1 to {limits.TEXT_BYTES} bytes", "choose a text"
            )
        return list(shard_file(path))
    except OSError as error:
        raise SpecError("data.text", f"{path}: {error.strerror}", "check the path") from error


__all__ = ["JobFile", "Money", "load_job_file", "parts_per_million"]
