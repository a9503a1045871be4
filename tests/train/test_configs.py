"""What families read: configs as people publish them, and what they are told about others."""

from typing import Any

import pytest

from tdmld.train.errors import SpecError
from tdmld.train.families import FAMILIES, family_of
from tdmld.train.family import Part
from tests.train.support import FAMILY_CONFIGS

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "use_cache": True}
SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "transformers_version": "4.43.1",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": {
        **TOKENS,
        **SHAPE,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "max_window_layers": 21,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_bias": True,
        "bos_token_id": 0,
        "classifier_dropout": 0.1,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": 50256,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "gemma3": {
        **TOKENS,
        **SHAPE,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "resnet": {
        "architectures": ["ResNetForImageClassification"],
        "depths": [2, 2, 2, 2],
        "downsample_in_first_stage": False,
        "embedding_size": 64,
        "hidden_act": "relu",
        "hidden_sizes": [64, 128, 256, 512],
        "id2label": {str(n): f"class {n}" for n in range(100)},
        "label2id": {f"class {n}": n for n in range(100)},
        "layer_type": "basic",
        "model_type": "resnet",
        "num_channels": 3,
        "torch_dtype": "float32",
        "transformers_version": "4.18.0.dev0",
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_config_is_read(family: str) -> None:
    config = FAMILIES[family].canonical(PUBLISHED[family])
    FAMILIES[family].check(config)
    whole = Part(0, FAMILIES[family].layers(config), True, True)
    assert sum(weight.count for weight in FAMILIES[family].weights(config, whole)) > 10_000_000


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("gpt2", {"resid_pdrop": 0.1}, "config.resid_pdrop"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"n_head": 3}, "config.n_embd"),
        ("phi", {"embd_pdrop": 0.1}, "config.embd_pdrop"),
        ("phi", {"partial_rotary_factor": 0.4}, "rotary positions"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "config.rope_scaling"),
        ("gemma", {"hidden_act": "relu"}, "config.hidden_act"),
        ("gemma2", {"sliding_window": None}, "config.sliding_window"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "config.layer_types"),
        ("gemma3", {"rope_parameters": {"other": {}}}, "config.rope_parameters"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "config.layer_types"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "config.num_experts_per_tok"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "config.mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "config.decoder_sparse_step"),
        ("olmo2", {"num_key_value_heads": 0}, "config.num_key_value_heads"),
        ("mistral", {"auto_map": {}}, "names code"),
        ("resnet", {"hidden_sizes": []}, "config.hidden_sizes"),
        ("resnet", {"hidden_sizes": [4] * 9}, "config.hidden_sizes"),
        ("resnet", {"depths": [200, 200]}, "config.depths"),
        ("resnet", {"num_labels": 300}, "config.num_labels"),
        ("resnet", {"model_type": "llama"}, "config.model_type"),
    ],
)
def test_what_cannot_be_cut_or_replayed_is_named(
    family: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(SpecError) as caught:
        FAMILIES[family].canonical(FAMILY_CONFIGS[family] | change)
    assert named in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_missing_or_unknown_key_of_a_canonical_config_is_named(family: str) -> None:
    config = FAMILIES[family].canonical(FAMILY_CONFIGS[family])
    for key in config:
        with pytest.raises(SpecError, match=key):
            FAMILIES[family].check({k: v for k, v in config.items() if k != key})
    with pytest.raises(SpecError, match="unknown key"):
        FAMILIES[family].check({**config, "code": "x"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_types_and_spellings_of_a_value_are_refused(family: str) -> None:
    config = FAMILIES[family].canonical(FAMILY_CONFIGS[family])
    for key in config:
        for value in (-1, 2**70, 1.5, "x" * 100, "٣", [], {}):
            with pytest.raises(SpecError, match="config"):
                FAMILIES[family].check({**config, key: value})  # type: ignore[dict-item]


def test_two_spellings_of_one_program_are_not_both_accepted() -> None:
    config = FAMILIES["qwen2"].canonical(PUBLISHED["qwen2"])
    assert config["sliding_window"] is None
    with pytest.raises(SpecError, match="use_sliding_window is false"):
        FAMILIES["qwen2"].check({**config, "sliding_window": 4096})


def test_an_unknown_family_is_told_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"unknown model family 'bert'.*gpt2, .*resnet"):
        family_of("bert")
