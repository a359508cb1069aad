"""Fields of the trainers' configs: none that changes what is trained stands at a library's default.

Every field of a config of TRL or transformers is either set (here, in loop.py, in a stage), or stands in a table below
with the reason why it changes nothing. A field that is neither is refused: another version of the library may have
added it, and the same key would then name another training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from typing import Any

#: Change what is trained and are no setting of a recipe: what transformers 5.23 has, so that keys keep their meaning.
FIXED: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "optim_target_modules": None,
    "adam_beta1": 0.9,
    "lr_scheduler_kwargs": None,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "average_tokens_across_devices": True,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": False,
    "dataloader_in_order": True,
    "accelerator_config": {
        "split_batches": False,
        "dispatch_batches": None,
        "even_batches": True,
        "use_seedable_sampler": True,
        "non_blocking": False,
        "gradient_accumulation_kwargs": None,
    },
    "parallelism_config": None,
    "deepspeed": None,
    "fsdp": None,
    "fp16": False,
    "tf32": None,
    "full_determinism": False,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "use_liger_kernel": False,
    "auto_find_batch_size": False,
    "save_only_model": False,
    "ignore_data_skip": False,
    "load_best_model_at_end": False,
}

_EVALUATION = "nothing is evaluated while training"
_SHOWN = "what is logged and shown"
_PUSHED = "nothing is pushed from here"
_LOADING = "how batches come into memory"
_DDP = "how gradients are exchanged, which are the same in the end"
_SCRIPTS = "read by scripts of transformers only"
_SAVED = "how checkpoints are written"
_MODEL_GIVEN = "the model is given as an object"
_ROWS_GIVEN = "the rows are tokenised already"
_PADDING = "padding changes no result"
_MEMORY = "memory against time"

#: Fields of TrainingArguments, which all configs have, that change nothing.
LEFT_ALONE: dict[str, str] = {
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"), _EVALUATION
    ),
    **dict.fromkeys(
        ("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _EVALUATION
    ),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"), _EVALUATION),
    **dict.fromkeys(("label_names", "metric_for_best_model", "greater_is_better"), _EVALUATION),
    **dict.fromkeys(("logging_strategy", "logging_first_step", "log_on_each_node", "log_level"), _SHOWN),
    **dict.fromkeys(("log_level_replica", "include_num_input_tokens_seen", "run_name", "project"), _SHOWN),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _SHOWN),
    **dict.fromkeys(("skip_memory_metrics", "debug"), _SHOWN),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUSHED),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSHED),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), _LOADING),
    "dataloader_multiprocessing_context": _LOADING,
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_static_graph"), _DDP),
    **dict.fromkeys(("ddp_backend", "local_rank"), _DDP),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), _SCRIPTS),
    **dict.fromkeys(("save_on_each_node", "enable_jit_checkpoint"), _SAVED),
    "restore_callback_states_from_checkpoint": "no callback of ours has a state there",
    **dict.fromkeys(("activation_checkpointing_kwargs", "torch_empty_cache_steps", "use_cache"), _MEMORY),
    **dict.fromkeys(
        ("gradient_checkpointing", "gradient_checkpointing_kwargs"), "old names of activation_checkpointing"
    ),
    "liger_kernel_config": "only with use_liger_kernel",
    "length_column_name": "only with train_sampling_strategy group_by_length",
    "fsdp_config": "only with fsdp",
}

_OF_ROLLOUTS: dict[str, str] = {
    "model_init_kwargs": _MODEL_GIVEN,
    "num_train_epochs": "max_steps is set",
    "num_generations_eval": _EVALUATION,
    "pad_to_multiple_of": _PADDING,
    "ds3_gather_for_generation": "only with deepspeed",
    **dict.fromkeys(("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"), _SHOWN),
    **dict.fromkeys(
        ("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
        "only with use_vllm",
    ),
    **dict.fromkeys(
        ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"), "only with use_vllm"
    ),
    **dict.fromkeys(
        ("vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
        "only with use_vllm",
    ),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), "only with sync_ref_model"),
    "transformers_continuous_batching_config": "only with use_transformers_continuous_batching",
}

#: Config -> its own fields that change nothing, beside those of LEFT_ALONE.
LEFT_ALONE_IN: dict[str, dict[str, str]] = {
    "SFTConfig": {
        "model_init_kwargs": _MODEL_GIVEN,
        **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc"), _ROWS_GIVEN),
        "truncation_mode": "only with max_length, which is none",
        "packing_strategy": "only with packing",
        "eval_packing": _EVALUATION,
        "pad_to_multiple_of": _PADDING,
        "activation_offloading": _MEMORY,
    },
    "RewardConfig": {
        "model_init_kwargs": _MODEL_GIVEN,
        "dataset_num_proc": _ROWS_GIVEN,
        "pad_to_multiple_of": _PADDING,
        "activation_offloading": _MEMORY,
    },
    "TrainingArguments": {},
    "RLOOConfig": _OF_ROLLOUTS,
    "GRPOConfig": {
        **_OF_ROLLOUTS,
        **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), "only with loss_type sapo"),
        **dict.fromkeys(
            ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), "only with loss_type vespo"
        ),
        **dict.fromkeys(
            ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
            "only with use_adaptive_entropy",
        ),
        **dict.fromkeys(("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"), "only with use_vllm"),
        **dict.fromkeys(
            ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"), "only with use_vllm"
        ),
        "vllm_importance_sampling_cap": "only with use_vllm",
        "log_completions_hub_repo": _PUSHED,
    },
}


def config_of(kind: Callable[..., Any], **arguments: Any) -> Any:
    """A config of TRL or transformers. ValueError where it has a field that is neither given nor in the tables."""
    name = kind.__name__
    there = {field.name for field in fields(kind) if field.init}  # type: ignore[arg-type]
    known = LEFT_ALONE.keys() | LEFT_ALONE_IN[name].keys()
    if new := sorted(there - arguments.keys() - known):
        raise ValueError(_other_version(name, f"has fields that this version of smoltulu does not know: {_few(new)}"))
    if gone := sorted(arguments.keys() - there):
        raise ValueError(_other_version(name, f"lacks fields that decide what is trained: {_few(gone)}"))
    return on_one_gpu(kind(**arguments))


def on_one_gpu(arguments: Any) -> Any:
    """Have a trainer use the first GPU that its process sees.

    transformers would spread each micro-batch over all of them, and so multiply the effective batch.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _other_version(name: str, what: str) -> str:
    installed = ", ".join(f"{package} {metadata.version(package)}" for package in ("trl", "transformers"))
    return (
        f"{name} of {installed} {what}. The same recipe could then be another training under the same key: "
        "install the versions of constraints.txt"
    )
