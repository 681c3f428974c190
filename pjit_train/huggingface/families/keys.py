"""Keys of config.json of no family: which change nothing, and which what is computed.

`transformers` passes over what its class of a family does not know. Where such a key would change
a model, a folder that has it was made by something else, and is not what it seems.
"""

from typing import Any

EMPTY: tuple[Any, ...] = (None, False, "", [], {})
"""Values that ask for nothing."""

_HARMLESS = """
architectures model_type dtype torch_dtype transformers_version use_cache name_or_path
_name_or_path auto_map transformers.js_config
bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id
decoder_start_token_id id2label label2id num_labels problem_type finetuning_task
task_specific_params prefix tokenizer_class
return_dict output_hidden_states output_attentions return_dict_in_generate torchscript
chunk_size_feed_forward use_bfloat16 gradient_checkpointing
attn_implementation _attn_implementation _attn_implementation_autoset cache_implementation
attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout layerdrop activation_dropout
hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
initializer_range initializer_factor init_std pretraining_tp is_llama_config is_decoder
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
reorder_and_upcast_attn n_ctx encoder_stride pooler_act pooler_output_size
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
begin_suppress_tokens exponential_decay_length_penalty
quantization_config
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Of tokens, of training, of how a model runs, of what text is drawn from it; or checked apart."""

_MEANINGFUL = """
alibi attention_bias attention_multiplier attn_logit_softcapping attn_temperature_tuning
clip_qkv embedding_multiplier final_logit_softcapping head_dim hidden_act hidden_activation
add_cross_attention is_encoder_decoder layer_norm_eps layer_types logit_scale
logits_scaling mlp_bias moe_intermediate_size no_rope_layers num_experts
num_experts_per_tok num_local_experts parallel_attn partial_rotary_factor qk_layernorm qk_norm
query_pre_attn_scalar residual_multiplier rope_interleaved rope_local_base_freq rope_parameters
rope_scaling rope_theta rotary_pct sliding_window sliding_window_pattern
use_bidirectional_attention use_mrope use_parallel_residual use_qk_norm use_sliding_window
"""
MEANINGFUL = frozenset(_MEANINGFUL.split())
"""Of models that are computed otherwise than a family that does not know them."""
