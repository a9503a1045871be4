"""`tdmld evaluate`: the held-out loss of a trained model, and a sample of what it writes."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tdmld.cli.common import AsJson, emit
from tdmld.cli.exits import Exit
from tdmld.cli.reference import read_job, training_errors
from tdmld.errors import UserError
from tdmld.plaintext import plain


def evaluate(
    model: Annotated[Path, Parameter(help="Directory of the model, as fetched.")],
    *,
    job: Annotated[Path, Parameter(help="The job file: it names the text and what is held out.")],
    prompt: Annotated[str, Parameter(help="What the sample begins with.")] = "\n",
    length: Annotated[int, Parameter(help="Tokens to sample; 0 for none.")] = 200,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, Parameter(help="Of the sample.")] = 0,
    json: AsJson = False,
) -> int:
    """Measure a trained model on the job's held-out text, and let it write a little."""
    if not (model / "config.json").is_file():
        raise UserError(
            f"{model} holds no model",
            why="there is no config.json",
            next="tdmld job fetch JOB --out DIRECTORY",
            exit_code=Exit.NOT_FOUND,
        )
    if not 0 <= length <= 100_000 or not 0 <= temperature <= 100 or not 0 <= seed < 2**63:
        raise UserError(
            "length, temperature or seed is out of range",
            next="lengths to 100000, temperatures to 100, seeds below 2^63, none negative",
            exit_code=Exit.USAGE,
        )
    with training_errors():
        found = read_job(job)
        spec = found.spec
        from tdmld.train.data import Tokens
        from tdmld.train.evaluate import heldout_accuracy, heldout_loss, sample_text
        from tdmld.train.numerics import check_torch
        from tdmld.train.prepare import encoder_of

        check_torch()
        encoder = encoder_of(str(found.tokenizer_path or "bytes"))
        tokens = Tokens.from_text(spec, found.text_path)
        loss = heldout_loss(model, spec, tokens) if spec.has_heldout else None
        images = spec.model.images
        right = heldout_accuracy(model, spec, tokens) if images and spec.has_heldout else None
        sample = (
            ""
            if images
            else sample_text(
                model,
                prompt,
                length,
                encoder=encoder,
                temperature=temperature,
                seed=seed,
                context=spec.data.sequence,
            )
        )
    document = {
        "loss_heldout": loss,
        "accuracy_heldout": right,
        "heldout_tokens": spec.heldout_tokens // spec.data.width,
        "sample": sample,
    }
    unit = "a byte" if encoder.identity == "bytes" else "a token"
    text = [f"held-out loss  {loss} nats {'an image' if images else unit}"]
    text += [f"accuracy       {right}"] if images else ["", *map(plain, sample.split("\n"))]
    emit(document, text, as_json=json)
    return Exit.OK
