"""Judging a result: held-out loss and a sample of text.

Both load the result directory the way any user would, by `AutoModelForCausalLM.from_pretrained`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
from transformers.utils.logging import disable_progress_bar

from tdmld.train.data import Tokens
from tdmld.train.errors import FileError
from tdmld.train.model import mean_cross_entropy, pixel_values, token_rows
from tdmld.train.numerics import ATTENTION
from tdmld.train.prepare import ByteEncoder, Encoder
from tdmld.train.spec import Spec

HELDOUT_WINDOWS = 256
"""At most so many windows of text are read, spread evenly over what is held out."""
_BATCH = 16


def load_model(directory: Path) -> Any:
    """The model of a result directory, from local files only, without running code from it.

    FileError when the directory does not hold one.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        pictures = config.model_type == "resnet"
        kind = AutoModelForImageClassification if pictures else AutoModelForCausalLM
        model = kind.from_pretrained(
            directory,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            **({} if pictures else {"attn_implementation": ATTENTION}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FileError(f"{directory} holds no model: {error}; fetch it again") from error
    return cast(Any, model).eval()


def heldout_starts(first: int, count: int, sequence: int, width: int = 1) -> list[int]:
    """At which bytes the windows begin: adjacent ones, or HELDOUT_WINDOWS of them evenly spread.

    `count` bytes from `first` are held out; tokens have `width` bytes.
    """
    windows = (count // width - 1) // sequence
    taken = min(windows, HELDOUT_WINDOWS)
    return [first + width * sequence * (number * windows // taken) for number in range(taken)]


def heldout_loss(directory: Path, spec: Spec, data: Tokens) -> float:
    """Mean loss over the held-out data: nats a token of text, in windows of the spec's
    sequence, or nats an image.

    ValueError when the spec holds nothing out, or less than one window.
    """
    total, count = 0.0, 0
    for logits, labels in _answers(directory, spec, data):
        total += float(mean_cross_entropy(logits, labels)) * len(labels)
        count += len(labels)
    return total / count


def heldout_accuracy(directory: Path, spec: Spec, data: Tokens) -> float:
    """The share of held-out tokens or images whose label the model finds likeliest."""
    right, count = 0, 0
    for logits, labels in _answers(directory, spec, data):
        right += int((logits.argmax(dim=-1) == labels).sum())
        count += labels.numel()
    return right / count


def _answers(
    directory: Path, spec: Spec, data: Tokens
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, labels) of batches of held-out windows."""
    length, images = spec.data.sequence, spec.model.images
    starts = (
        list(range(spec.train_tokens, spec.data.tokens, spec.record))
        if images
        else heldout_starts(spec.train_tokens, spec.heldout_tokens, length, spec.data.width)
    )
    if not starts:
        raise ValueError(f"{spec.heldout_tokens} held-out tokens are less than one window")
    model = load_model(directory)
    for at in range(0, len(starts), _BATCH):
        rows = [data.window(start, spec.window_bytes) for start in starts[at : at + _BATCH]]
        read = token_rows(b"".join(rows), spec)
        with torch.no_grad():
            if images:
                pixels = pixel_values(read[:, 1:], int(str(spec.config["num_channels"])))
                yield model(pixel_values=pixels).logits, read[:, 0]
            else:
                inputs = read[:, :-1].contiguous()
                yield model(input_ids=inputs, use_cache=False).logits, read[:, 1:].contiguous()


def sample_text(
    directory: Path,
    prompt: str,
    length: int = 200,
    *,
    encoder: Encoder | None = None,
    temperature: float = 0.8,
    seed: int = 0,
    context: int | None = None,
) -> str:
    """`prompt` and `length` tokens that the model continues it with.

    `encoder` is what its data were prepared with, bytes by default. Temperature 0 takes the
    likeliest token; otherwise they are drawn by a generator seeded with `seed`. At most `context`
    tokens (the model's longest sequence by default) are looked back at.
    """
    encoder = encoder or ByteEncoder()
    model = load_model(directory)
    span = context or cast(int, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    tokens = encoder.encode([prompt])[0].tolist() or [min(10, encoder.vocabulary - 1)]
    with torch.no_grad():
        for _ in range(length):
            window = torch.tensor([tokens[-span:]], dtype=torch.long)
            logits = model(input_ids=window, use_cache=False).logits[0, -1]
            logits = logits[: encoder.vocabulary]  # the model may have room for more
            if temperature <= 0:
                tokens.append(int(logits.argmax()))
                continue
            chances = torch.softmax(logits / temperature, dim=-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return encoder.decode(tokens)
