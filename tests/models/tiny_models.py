"""A tiny configuration of every causal language model of transformers: `tiny(model_type)` is what model.hf gets."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ALL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CONTEXT = 32  # tokens of a training sequence; a model reads twice as many
VOCABULARY = 320


def each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# The value of a key, in every configuration that has it.
SMALL: dict[str, Any] = {
    **each(
        "hidden_size hidden_size_global d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width", 32
    ),
    **each("input_embedding_size output_embedding_size attention_hidden_size", 32),
    **each("num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers", 2),
    **each("num_encoder_layers num_decoder_layers", 2),
    **each("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", 2),
    **each("num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads", 2),
    **each("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups", 1),
    **each("head_dim swa_head_dim v_head_dim qk_nope_head_dim kv_channels dim_head d_head attention_head_size", 16),
    **each("linear_head_dim index_head_dim attention_head_dim linear_key_head_dim linear_value_head_dim", 16),
    **each("q_lora_rank kv_lora_rank o_lora_rank", 16),
    **each("qk_rope_head_dim rotary_dim", 8),
    **each("intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner dff dim_ff feed_forward_size", 64),
    **each("ffn_hidden_size dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size", 64),
    **each("moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 16),
    **each("shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size", 16),
    **each("num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num", 4),
    **each("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k", 2),
    **each("n_group topk_group num_expert_group first_k_dense_replace num_dense_layers", 1),
    **each("n_shared_experts num_shared_experts moe_num_shared_experts", 1),
    **each("max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions", 2 * CONTEXT),
    **each("context_length max_source_positions", 2 * CONTEXT),
    **each("sliding_window window_size attention_window_size local_attention sliding_window_size", 8),
    **each("linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads n_mamba_heads", 2),
    **each("mamba_n_heads mamba_num_heads", 4),
    **each("mamba_d_head mamba_head_dim mamba_headdim", 16),
    **each("mamba_d_state state_size ssm_state_size index_topk chunk_size mamba_chunk_size", 8),
    **each("n_groups mamba_n_groups mamba_ngroups", 1),
    **each("mamba_dt_rank time_step_rank", 4),
    **each("hidden_size_per_layer_input ple_embed_dim hc_lowrank d_rel rel_extent gated_norm_rank laurel_rank adapter_rank", 8),
    **each("vocab_size_per_layer_input ngram_vocab_size_base", 320),
    **each("num_kv_shared_layers", 0),
    **each("encoder_hash_byte_group_vocab", 64),
}
LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")  # lists with an entry for each layer

# Where the table above does not suffice: numbers that must fit each other, and keys without a default.
BERT = {"is_decoder": True}  # otherwise bidirectional
ROBERTA = {"is_decoder": True, "pad_token_id": 0}  # positions are counted from the padding token
LATENT = {"num_key_value_heads": 2, "head_dim": 8}  # multi-head latent attention: as many keys as queries
SPECIAL: dict[str, dict[str, Any]] = {
    **each("bert bert-generation big_bird electra ernie megatron-bert rembert roc_bert roformer", BERT),
    **each("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl", ROBERTA),
    **each("axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa", LATENT),
    **each("kimi_linear minicpm3 longcat_flash youtu", LATENT),
    **each("ministral hunyuan_v1_dense hunyuan_v1_moe", {"head_dim": 16}),
    "blt": {"patcher_config": {"vocab_size": VOCABULARY}, "encoder_config": {"vocab_size": VOCABULARY}},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4},
    "modernbert-decoder": {"pad_token_id": 0},
    "nemotron": {"num_key_value_heads": 1},
    "prophetnet": {"pad_token_id": 0},
    "qwen4_exp_text": {
        **each("indexer_n_heads indexer_kv_heads", 1),
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        **{"is_decoder": True, "pad_token_id": 0},
        **{"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
        **{"attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 0},
        # It seeds its dropout from the clock, so that no run with dropout can be repeated.
        **each("hidden_dropout_prob local_attention_probs_dropout_prob lsh_attention_probs_dropout_prob", 0.0),
    },
    "xlm": {"causal": True, "pad_token_id": 0},
    "xlnet": {"attn_type": "uni"},
    "xmod": ROBERTA | {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 64},
    "zamba": {
        **{"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
        **{"attention_hidden_size": 64, "attention_head_dim": 32},
    },
    "zaya": {"num_experts_per_tok": 1},
}


def merge(keys: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    nested = {name: keys[name] | value for name, value in special.items() if isinstance(keys.get(name), dict)}
    return keys | special | nested


def tiny(model_type: str) -> dict[str, Any]:
    """The keys of a model of about two layers, with at least one of each kind that the architecture has."""
    try:
        config = AutoConfig.for_model(model_type)
    except Exception:  # some types have no valid defaults
        return {"model_type": model_type}
    if "text_config" in config.sub_configs and "vocab_size" not in config.to_dict():
        text = tiny(config.text_config.model_type)
        del text["model_type"]
        return {"model_type": model_type, "text_config": text}
    return {"model_type": model_type, **merge(shrink(config), SPECIAL.get(model_type, {}))}


def shrink(config: PretrainedConfig) -> dict[str, Any]:
    default = config.to_dict()
    keys = {name: SMALL[name] for name, value in default.items() if name in SMALL and value is not None}
    kinds = {name: list(dict.fromkeys(default[name])) for name in LAYERS if default.get(name)}
    layers = max([2, *(len(distinct) for distinct in kinds.values())])
    for name, distinct in kinds.items():
        keys[name] = [distinct[min(i, len(distinct) - 1)] for i in range(layers)]
        keys["num_hidden_layers"] = layers
    for name in config.sub_configs:
        if default.get(name):
            keys[name] = shrink(getattr(config, name))
    return keys
