"""The job that `scripts/bench pipeline` and `commit` run: a Llama of 14.36 million parameters."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS, SEQUENCE, MICRO_BATCHES, MICRO_BATCH = 8, 128, 8, 2
TOKENS = SEQUENCE * MICRO_BATCHES * MICRO_BATCH
"""Tokens a step: 2,048."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_FILE = """\
version = 1
name = "bench"
family = "llama"
config = "config.json"
seed = {seed}
init = "seed"
privacy = "{privacy}"
class = "any"

[data]
text = "{text}"
tokenizer = "bytes"
sequence = {sequence}
heldout = "0.1"

[train]
steps = {steps}
micro_batches = {micro_batches}
micro_batch_size = {micro_batch}
precision = "fp32"
wire = "fp32"
optimizer = {{ name = "adamw", lr = "3e-4", betas = ["0.9", "0.999"], eps = "1e-8", \
weight_decay = "0.01" }}
schedule = {{ kind = "linear", warmup = 0, decay_from = {steps}, floor = "1" }}
clip = {{ kind = "none" }}

[pipeline]
cuts = {cuts}
lanes = {{ count = 1, mode = "sync" }}
segment_steps = {segment_steps}
unsettled = {unsettled}
state_every = {state_every}

[money]
slot_price_max = 200000
standby_price = 4000
audit_rate = "0"
audit_price = 1
deadline_blocks = 100000
"""


def write_job(
    directory: Path,
    *,
    steps: int,
    segment_steps: int,
    stages: int = 2,
    unsettled: int = 64,
    state_every: int = 32,
    seed: int = 0,
    privacy: str = "sealed",
) -> Path:
    """The job file, with its config beside it, for stages of equal numbers of layers. No audits;
    the standby copies a state each `state_every` segments."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    path = directory / "job.toml"
    path.write_text(
        _FILE.format(
            seed=seed,
            privacy=privacy,
            text=ROOT / "data" / "shakespeare.txt",
            sequence=SEQUENCE,
            steps=steps,
            micro_batches=MICRO_BATCHES,
            micro_batch=MICRO_BATCH,
            cuts=[LAYERS * stage // stages for stage in range(stages + 1)],
            segment_steps=segment_steps,
            unsettled=unsettled,
            state_every=state_every,
        )
    )
    return path
