"""The yardsticks of `scripts/bench pipeline`, by torch and transformers alone.

    pipeline_rank.py SETTINGS      as a rank of a gloo group (RANK, WORLD_SIZE, MASTER_* are set):
                                   torch.distributed.pipelining's Schedule1F1B as it stands
    pipeline_rank.py SETTINGS      without RANK: the whole model in this process

SETTINGS is JSON: config (the model's), text, sequence, micro_batches, micro_batch, steps, threads,
attention. Each step's end is a line on stdout ({"step", "time"}); the last line has the last loss.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 0


def make_model(settings: dict[str, Any]) -> LlamaForCausalLM:
    """The whole model, drawn from the seed."""
    torch.manual_seed(SEED)
    values = {k: v for k, v in settings["config"].items() if k not in ("model_type",)}
    config = LlamaConfig(**values, use_cache=False)
    config._attn_implementation = settings["attention"]
    return LlamaForCausalLM(config).float()


class Stage(torch.nn.Module):
    """Layers [first, last) of the model; the first takes ids, the last gives logits."""

    def __init__(self, whole: LlamaForCausalLM, first: int, last: int) -> None:
        super().__init__()
        base, layers = whole.model, whole.config.num_hidden_layers
        self.embed = base.embed_tokens if first == 0 else None
        self.layers = torch.nn.ModuleList(base.layers[first:last])
        self.rotary = base.rotary_emb
        self.norm, self.head = (base.norm, whole.lm_head) if last == layers else (None, None)
        length = whole.config.max_position_embeddings
        full = torch.full((length, length), torch.finfo(torch.float32).min)
        # A mask is needed by the plain attention alone; the other one knows that it is causal.
        eager = whole.config._attn_implementation == "eager"
        self.mask = full.triu(1)[None, None] if eager else None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            value = self.embed(value)
        length = value.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        rotary = self.rotary(value, positions)
        mask = None if self.mask is None else self.mask[..., :length, :length]
        for layer in self.layers:
            found = layer(
                value,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
            )
            value = found[0] if isinstance(found, tuple) else found
        if self.norm is None or self.head is None:
            return value
        logits: torch.Tensor = self.head(self.norm(value))
        return logits


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


class Windows:
    """Inputs and labels of a step: windows of the text at random."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._text = np.fromfile(settings["text"], np.uint8)
        self._length = int(settings["sequence"]) + 1
        self._count = int(settings["micro_batches"]) * int(settings["micro_batch"])

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, labels) of all micro-batches."""
        starts = np.random.default_rng(SEED + step).integers(
            0, len(self._text) - self._length, self._count
        )
        rows = np.stack([self._text[at : at + self._length] for at in starts]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def tell(**values: object) -> None:
    print(json.dumps(values), flush=True)


def run_rank(settings: dict[str, Any]) -> None:
    """One rank of the pipeline."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    layers = int(settings["config"]["num_hidden_layers"])
    whole = make_model(settings)
    module = Stage(whole, layers * rank // world, layers * (rank + 1) // world)
    del whole
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, int(settings["micro_batches"]), loss_fn=loss_of)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-4)
    windows = Windows(settings)
    losses: list[torch.Tensor] = []
    dist.barrier()
    for step in range(int(settings["steps"])):
        ids, labels = windows.step(step)
        losses.clear()
        if rank == 0:
            schedule.step(ids)
        elif rank == world - 1:
            schedule.step(target=labels, losses=losses)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        tell(step=step, time=time.time())
    dist.barrier()
    loss = sum(float(one.detach()) for one in losses) / len(losses) if losses else None
    dist.destroy_process_group()
    tell(loss=loss)


def run_whole(settings: dict[str, Any]) -> None:
    """The whole model in this process, micro-batch by micro-batch."""
    model = make_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    windows, batches = Windows(settings), int(settings["micro_batches"])
    total = 0.0
    for step in range(int(settings["steps"])):
        ids, labels = windows.step(step)
        total = 0.0
        for number, wanted in zip(ids.chunk(batches), labels.chunk(batches), strict=True):
            loss = loss_of(model(number).logits, wanted) / batches
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        tell(step=step, time=time.time())
    tell(loss=total)


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(int(settings["threads"]))
    if "RANK" in os.environ:
        run_rank(settings)
    else:
        run_whole(settings)


if __name__ == "__main__":
    main()
