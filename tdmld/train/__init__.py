"""Training: specs, data, segments, states. Torch is imported by the worker's modules only.

Without torch: spec, jobfile, families, data, digest, schedule, segment, channel, framelog,
statefile, export, numerics. With torch: draw, model, optimizer, slot, runner, reference, evaluate.
"""
