"""What a node declines before it looks at anything else."""

import pytest

from tdmld.node.offers import check_supported
from tdmld.train.errors import SpecError
from tests.train.support import family_spec


def test_lines_from_a_seed_are_supported() -> None:
    for family, stages in (("llama", 3), ("resnet", 2), ("gpt2", 1)):
        check_supported(family_spec(family, stages))


def test_a_ring_and_given_weights_are_declined_with_a_remedy() -> None:
    roots = ["00" * 32] * 2
    for spec, field in (
        (family_spec("gpt2", 2), "config.tie_word_embeddings"),
        (family_spec("llama", 2, init={"kind": "given", "roots": roots}), "init"),
    ):
        with pytest.raises(SpecError) as caught:
            check_supported(spec)
        assert caught.value.field == field
