"""Limits of the training package, each with its reason. Nothing larger is parsed or built."""

SPEC_BYTES = 64 * 1024
"""A spec travels in gossip beside its offer."""
JOB_FILE_BYTES = 64 * 1024
CONFIG_FILE_BYTES = 64 * 1024
TEXT_BYTES = 700 * 1024 * 1024
"""Its shard ids (78 bytes of JSON a shard of 1 MiB) must fit into the spec."""
SHARD_BYTES = 1024 * 1024

STAGES = 64
SLOTS = 256
"""Lanes x stages, as the chain has it."""
LANES = 16
LANE_WEIGHT = 64
LANE_FRAME_BYTES = 4 * 1024 * 1024
"""Gradients travel between lanes in parts of this size at most."""
LAYERS = 1024
WIDTH = 65_536
"""Hidden, intermediate and head sizes."""
VOCABULARY = 1_048_576
SEQUENCE = 131_072
STEPS = 10_000_000
MICRO_BATCHES = 4096
MICRO_BATCH_SIZE = 4096
SEGMENT_STEPS = 4096
STEP_TOKENS = 1 << 26
"""In all micro-batches of a step: first and last stage hold them in memory."""
SEGMENT_MICRO_BATCHES = 1 << 16
"""In all steps of a segment: their digests are in memory and in one list of 16 MiB at most."""
UNSETTLED = 64
FRAME_BYTES = 64 * 1024 * 1024
"""One boundary tensor on the wire; a slot of shared memory has this size."""
DECIMAL_CHARACTERS = 24
SEED = 2**63 - 1
AMOUNT = 2**53 - 1
"""Money in a job file; what JSON readers everywhere keep exact."""
DEADLINE_BLOCKS = 2**32 - 1

STATE_HEADER_BYTES = 16 * 1024 * 1024
"""The header of a snapshot: about 150 bytes a tensor."""
STATE_TENSORS = 65_536
SOURCE_FILES = 1024
"""Safetensors files of a model that a job goes on from."""
STATE_FILE_BYTES = 2**40
LIST_BYTES = 16 * 1024 * 1024
"""A segment's digest list: 34 bytes a frame, 4 frames a micro-batch, 110 bytes a step;
gradients between lanes are frames, too."""
MANIFEST_BYTES = 64 * 1024
TOKENIZER_BYTES = 64 * 1024 * 1024
"""A tokenizer.json; the largest published ones have about 35 MB."""
DOCUMENT_BYTES = 64 * 1024 * 1024
"""One line of JSON or one row: it is in memory as a whole."""
