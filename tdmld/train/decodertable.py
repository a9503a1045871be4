"""The decoders that can be cut, a row each: config keys, defaults, and the weights of a layer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tdmld.train import limits
from tdmld.train.decoders import Decoder, LayerWeight, alternating, sliding_from
from tdmld.train.family import (
    TOKEN,
    Choice,
    Config,
    ConfigValue,
    Count,
    Flag,
    Float,
    Initial,
    Optional,
    Rules,
    number,
)

_SIZE = Count(1, limits.WIDTH)
_EVEN = Count(2, limits.WIDTH)
_EPS = Float(1e-12, 1e-1)
_CAP = Optional(Float(1e-3, 1e6))
_WINDOW = Optional(Count(1, limits.SEQUENCE))
_THETA = Float(1.0, 1e12)
_SHARE = Float(1e-2, 1.0)
_ACTIVATION = Choice(("silu", "gelu", "relu", "gelu_pytorch_tanh", "gelu_new"))
_TANH = Choice(("gelu_pytorch_tanh",))

_ENDS: Rules = {
    "bos_token_id": TOKEN,
    "eos_token_id": TOKEN,
    "initializer_range": Float(1e-6, 1.0),
    "pad_token_id": TOKEN,
    "tie_word_embeddings": Flag(),
    "vocab_size": Count(2, limits.VOCABULARY),
}
_SIZES: Rules = {
    "hidden_size": _EVEN,
    "intermediate_size": _SIZE,
    "max_position_embeddings": Count(1, limits.SEQUENCE),
    "num_attention_heads": _SIZE,
    "num_hidden_layers": Count(1, limits.LAYERS),
    "rope_theta": _THETA,
}
_GROUPED: Rules = {**_SIZES, "num_key_value_heads": _SIZE}
_LLAMA_LIKE: Rules = {**_GROUPED, "hidden_act": _ACTIVATION, "rms_norm_eps": _EPS}
_QWEN_WINDOW: Rules = {
    "max_window_layers": Count(0, limits.LAYERS),
    "sliding_window": _WINDOW,
    "use_sliding_window": Flag(),
}
_DEFAULTS: Mapping[str, ConfigValue] = {
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": "0.02",
    "max_window_layers": 28,
    "pad_token_id": None,
    "rms_norm_eps": "1e-06",
    "rope_theta": "10000.0",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_NO_DROPOUT = {"attention_dropout": 0.0}
_NO_GPT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_NO_PHI_DROPOUT = {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def _silent(written: Mapping[str, Any], **more: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Keys with one possible value: those that we write, and `more`."""
    return {key: (value, int(value)) for key, value in written.items()} | more


def _linear(name: str, rows: int, columns: int, bias: object = False) -> Iterator[LayerWeight]:
    yield f"{name}.weight", (rows, columns), "normal"
    if bias:
        yield f"{name}.bias", (rows,), "zeros"


def _norms(
    size: int, *names: str, initial: Initial = "ones", bias: bool = False
) -> Iterator[LayerWeight]:
    for name in names:
        yield f"{name}.weight", (size,), initial
        if bias:
            yield f"{name}.bias", (size,), "zeros"


def _sizes(config: Config) -> tuple[int, int, int, int]:
    """Hidden size, sizes of queries and of keys, size of a head."""
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    size = number(config, "head_dim") if "head_dim" in config else hidden // heads
    key = "num_key_value_heads"
    groups = number(config, key) if key in config else heads
    return hidden, heads * size, groups * size, size


def _attention(config: Config, bias: object = False, out_bias: object = False) -> Iterator[Any]:
    hidden, query, group, _ = _sizes(config)
    yield from _linear("self_attn.q_proj", query, hidden, bias)
    yield from _linear("self_attn.k_proj", group, hidden, bias)
    yield from _linear("self_attn.v_proj", group, hidden, bias)
    yield from _linear("self_attn.o_proj", hidden, query, out_bias)


def _gated(config: Config, bias: object = False) -> Iterator[LayerWeight]:
    hidden, middle = number(config, "hidden_size"), number(config, "intermediate_size")
    yield from _linear("mlp.gate_proj", middle, hidden, bias)
    yield from _linear("mlp.up_proj", middle, hidden, bias)
    yield from _linear("mlp.down_proj", hidden, middle, bias)


def _llama(config: Config) -> Iterator[LayerWeight]:
    bias = config.get("attention_bias", False)
    yield from _attention(config, bias, bias)
    yield from _gated(config, config.get("mlp_bias", False))
    yield from _norms(_sizes(config)[0], "input_layernorm", "post_attention_layernorm")


def _qwen2(config: Config) -> Iterator[LayerWeight]:
    yield from _attention(config, bias=True)
    yield from _gated(config)
    yield from _norms(_sizes(config)[0], "input_layernorm", "post_attention_layernorm")


def _qwen3(config: Config) -> Iterator[LayerWeight]:
    yield from _llama(config)
    yield from _norms(_sizes(config)[3], "self_attn.q_norm", "self_attn.k_norm")


def _qwen3_moe(config: Config) -> Iterator[LayerWeight]:
    hidden, _, _, size = _sizes(config)
    middle, experts = number(config, "moe_intermediate_size"), number(config, "num_experts")
    bias = config["attention_bias"]
    yield from _attention(config, bias, bias)
    yield "mlp.gate.weight", (experts, hidden), "normal"
    yield "mlp.experts.gate_up_proj", (experts, 2 * middle, hidden), "normal"
    yield "mlp.experts.down_proj", (experts, hidden, middle), "normal"
    yield from _norms(hidden, "input_layernorm", "post_attention_layernorm")
    yield from _norms(size, "self_attn.q_norm", "self_attn.k_norm")


def _gemma(config: Config) -> Iterator[LayerWeight]:
    yield from _attention(config)
    yield from _gated(config)
    names = ("input_layernorm", "post_attention_layernorm")
    yield from _norms(_sizes(config)[0], *names, initial="zeros")


def _gemma2(config: Config) -> Iterator[LayerWeight]:
    yield from _gemma(config)
    names = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    yield from _norms(_sizes(config)[0], *names, initial="zeros")


def _gemma3(config: Config) -> Iterator[LayerWeight]:
    yield from _gemma2(config)
    names = ("self_attn.q_norm", "self_attn.k_norm")
    yield from _norms(_sizes(config)[3], *names, initial="zeros")


def _phi(config: Config) -> Iterator[LayerWeight]:
    hidden, query, group, _ = _sizes(config)
    middle = number(config, "intermediate_size")
    yield from _linear("self_attn.q_proj", query, hidden, bias=True)
    yield from _linear("self_attn.k_proj", group, hidden, bias=True)
    yield from _linear("self_attn.v_proj", group, hidden, bias=True)
    yield from _linear("self_attn.dense", hidden, query, bias=True)
    yield from _linear("mlp.fc1", middle, hidden, bias=True)
    yield from _linear("mlp.fc2", hidden, middle, bias=True)
    yield from _norms(hidden, "input_layernorm", bias=True)


def _phi3(config: Config) -> Iterator[LayerWeight]:
    hidden, query, group, _ = _sizes(config)
    middle = number(config, "intermediate_size")
    yield from _linear("self_attn.qkv_proj", query + 2 * group, hidden)
    yield from _linear("self_attn.o_proj", hidden, query)
    yield from _linear("mlp.gate_up_proj", 2 * middle, hidden)
    yield from _linear("mlp.down_proj", hidden, middle)
    yield from _norms(hidden, "input_layernorm", "post_attention_layernorm")


def _gpt2(config: Config) -> Iterator[LayerWeight]:
    hidden, inner = number(config, "n_embd"), config["n_inner"]
    middle = inner if isinstance(inner, int) else 4 * hidden
    for name, rows, columns in (  # GPT-2 keeps its matrices the other way round
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, middle),
        ("mlp.c_proj", middle, hidden),
    ):
        yield f"{name}.weight", (rows, columns), "normal"
        yield f"{name}.bias", (columns,), "zeros"
    yield from _norms(hidden, "ln_1", "ln_2", bias=True)


def _gpt_neox(config: Config) -> Iterator[LayerWeight]:
    hidden, middle = number(config, "hidden_size"), number(config, "intermediate_size")
    bias = config["attention_bias"]
    yield from _linear("attention.query_key_value", 3 * hidden, hidden, bias)
    yield from _linear("attention.dense", hidden, hidden, bias)
    yield from _linear("mlp.dense_h_to_4h", middle, hidden, bias=True)
    yield from _linear("mlp.dense_4h_to_h", hidden, middle, bias=True)
    yield from _norms(hidden, "input_layernorm", "post_attention_layernorm", bias=True)


def _olmo2(config: Config) -> Iterator[LayerWeight]:
    hidden, query, group, _ = _sizes(config)
    bias = config["attention_bias"]
    yield from _attention(config, bias, bias)
    yield from _gated(config)
    yield from _norms(hidden, "post_attention_layernorm", "post_feedforward_layernorm")
    yield from _norms(query, "self_attn.q_norm")
    yield from _norms(group, "self_attn.k_norm")


def _row(
    name: str,
    architecture: str,
    layer: Callable[[Config], Iterator[LayerWeight]],
    rules: Rules,
    defaults: Mapping[str, ConfigValue] | None = None,
    written: Mapping[str, Any] = _NO_DROPOUT,
    silent: Mapping[str, tuple[Any, ...]] | None = None,
    model_type: str | None = None,
    **more: Any,
) -> Decoder:
    kind = model_type or name
    every = dict(sorted({**_ENDS, **rules, "model_type": Choice((kind,))}.items()))
    usual = {key: value for key, value in _DEFAULTS.items() if key in every}
    return Decoder(
        name=name,
        architecture=architecture,
        layer=layer,
        rules=every,
        defaults=usual | dict(defaults or {}),
        silent=_silent(written, **(silent or {})),
        written=written,
        model_type=kind,
        **more,
    )


_GEMMA_SILENT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}
_GEMMA_DEFAULTS: dict[str, ConfigValue] = {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA2: Rules = {
    **_GROUPED,
    "attn_logit_softcapping": _CAP,
    "final_logit_softcapping": _CAP,
    "head_dim": _SIZE,
    "hidden_activation": _TANH,
    "query_pre_attn_scalar": _SIZE,
    "rms_norm_eps": _EPS,
    "sliding_window": Count(1, limits.SEQUENCE),
}
_GEMMA2_DEFAULTS: dict[str, ConfigValue] = {
    **_GEMMA_DEFAULTS,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
}
_ANY: tuple[Any, ...] = ()

DECODERS = (
    _row(
        "llama",
        "LlamaForCausalLM",
        _llama,
        {**_LLAMA_LIKE, "attention_bias": Flag(), "head_dim": _EVEN, "mlp_bias": Flag()},
        {"mlp_bias": False},
        silent={"pretraining_tp": (1,)},
    ),
    _row(
        "mistral",
        "MistralForCausalLM",
        _llama,
        {**_LLAMA_LIKE, "head_dim": _EVEN, "sliding_window": _WINDOW},
    ),
    _row(
        "qwen2",
        "Qwen2ForCausalLM",
        _qwen2,
        {**_LLAMA_LIKE, **_QWEN_WINDOW},
        windows=sliding_from,
    ),
    _row(
        "qwen3",
        "Qwen3ForCausalLM",
        _qwen3,
        {**_LLAMA_LIKE, **_QWEN_WINDOW, "attention_bias": Flag(), "head_dim": _EVEN},
        {"head_dim": 128},
        windows=sliding_from,
    ),
    _row(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        {
            **{key: rule for key, rule in _LLAMA_LIKE.items() if key != "intermediate_size"},
            "attention_bias": Flag(),
            "head_dim": _EVEN,
            "moe_intermediate_size": _SIZE,
            "norm_topk_prob": Flag(),
            "num_experts": Count(1, 4096),
            "num_experts_per_tok": Count(1, 4096),
        },
        {"norm_topk_prob": False},
        silent={
            "decoder_sparse_step": (1,),
            "intermediate_size": _ANY,
            "max_window_layers": _ANY,
            "mlp_only_layers": ([], None),
            "output_router_logits": (False,),
            "router_aux_loss_coef": _ANY,
            "sliding_window": _ANY,
            "use_sliding_window": (False,),
        },
    ),
    _row(
        "gemma",
        "GemmaForCausalLM",
        _gemma,
        {**_GROUPED, "head_dim": _EVEN, "hidden_act": _TANH, "rms_norm_eps": _EPS},
        {**_GEMMA_DEFAULTS, "hidden_act": "gelu_pytorch_tanh"},
        silent={**_GEMMA_SILENT, "hidden_activation": ("gelu_pytorch_tanh", None)},
        norm_initial="zeros",
    ),
    _row(
        "gemma2",
        "Gemma2ForCausalLM",
        _gemma2,
        _GEMMA2,
        {**_GEMMA2_DEFAULTS, "attn_logit_softcapping": "50.0", "final_logit_softcapping": "30.0"},
        silent={**_GEMMA_SILENT, "hidden_act": ("gelu_pytorch_tanh",)},
        norm_initial="zeros",
        windows=alternating,
    ),
    _row(
        "gemma3",
        "Gemma3ForCausalLM",
        _gemma3,
        {
            **_GEMMA2,
            "rope_local_base_freq": _THETA,
            "sliding_window_pattern": Count(1, limits.LAYERS + 1),
        },
        {
            **_GEMMA2_DEFAULTS,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_local_base_freq": "10000.0",
            "rope_theta": "1000000.0",
            "sliding_window_pattern": 6,
        },
        silent={**_GEMMA_SILENT, "_sliding_window_pattern": _ANY},
        model_type="gemma3_text",
        norm_initial="zeros",
        windows=alternating,
    ),
    _row(
        "phi",
        "PhiForCausalLM",
        _phi,
        {
            **_GROUPED,
            "hidden_act": _ACTIVATION,
            "layer_norm_eps": _EPS,
            "partial_rotary_factor": _SHARE,
        },
        {"hidden_act": "gelu_new", "layer_norm_eps": "1e-05", "partial_rotary_factor": "0.5"},
        written=_NO_PHI_DROPOUT,
        silent={"qk_layernorm": (False,)},
        norm="final_layernorm",
        norm_bias=True,
        head_bias=True,
    ),
    _row(
        "phi3",
        "Phi3ForCausalLM",
        _phi3,
        {
            **_LLAMA_LIKE,
            "original_max_position_embeddings": Count(1, limits.SEQUENCE),
            "partial_rotary_factor": _SHARE,
            "sliding_window": _WINDOW,
        },
        {
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": "1.0",
            "rms_norm_eps": "1e-05",
            "sliding_window": None,
        },
        written=_NO_PHI_DROPOUT,
        silent={"attention_bias": (False,)},
    ),
    _row(
        "gpt2",
        "GPT2LMHeadModel",
        _gpt2,
        {
            "activation_function": _ACTIVATION,
            "layer_norm_epsilon": _EPS,
            "n_embd": _EVEN,
            "n_head": _SIZE,
            "n_inner": Optional(_SIZE),
            "n_layer": Count(1, limits.LAYERS),
            "n_positions": Count(1, limits.SEQUENCE),
            "scale_attn_weights": Flag(),
        },
        {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": "1e-05",
            "n_inner": None,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        written=_NO_GPT_DROPOUT,
        silent={
            "add_cross_attention": (False,),
            "n_ctx": _ANY,
            "reorder_and_upcast_attn": (False,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "summary_activation": _ANY,
            "summary_first_dropout": _ANY,
            "summary_proj_to_labels": _ANY,
            "summary_type": _ANY,
            "summary_use_proj": _ANY,
            "task_specific_params": _ANY,
        },
        keys={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        base="transformer",
        layer_list="h",
        embedding="wte",
        table="wpe",
        norm="ln_f",
        norm_bias=True,
    ),
    _row(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _gpt_neox,
        {
            **_SIZES,
            "attention_bias": Flag(),
            "hidden_act": _ACTIVATION,
            "layer_norm_eps": _EPS,
            "partial_rotary_factor": _SHARE,
            "use_parallel_residual": Flag(),
        },
        {
            "attention_bias": True,
            "hidden_act": "gelu",
            "layer_norm_eps": "1e-05",
            "partial_rotary_factor": "0.25",
            "use_parallel_residual": True,
        },
        written={"attention_dropout": 0.0, "hidden_dropout": 0.0},
        silent={"classifier_dropout": _ANY, "is_decoder": _ANY},
        base="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        norm_bias=True,
    ),
    _row(
        "olmo2",
        "Olmo2ForCausalLM",
        _olmo2,
        {**_LLAMA_LIKE, "attention_bias": Flag()},
        {"rms_norm_eps": "1e-05"},
    ),
)
