"""Torch computes under the pinned settings in these tests, as in a worker."""

from tdmld.train.numerics import pin_process

pin_process()
