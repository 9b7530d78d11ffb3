"""What upstream once called otherwise, and what others call otherwise, by its name here."""

import re
from typing import Any

from smoltrain.config import shown

# Names and what to write instead; {} stands for the value, {key} for the name. Of a flag, what it means when true.
# fmt: off
RENAMED: dict[str, str] = {
    # transformers and TRL, once
    "warmup_ratio": "trainer.args.warmup_steps={}, below 1 a share of all steps",
    "evaluation_strategy": "trainer.args.eval_strategy={}",
    "evaluate_during_training": "trainer.args.eval_strategy=steps",
    "group_by_length": "trainer.args.train_sampling_strategy=group_by_length",
    "no_cuda": "trainer.args.use_cpu={}, or hardware=cpu",
    "use_mps_device": "hardware=mps",
    "use_ipex jit_mode_eval mp_parameters sharded_ddp past_index ray_scope use_legacy_prediction_loop tpu_num_cores "
    "tpu_metrics_debug save_safetensors overwrite_output_dir overwrite_cache include_inputs_for_metrics "
    "include_tokens_per_second dataset_batch_size label_pad_token_id is_encoder_decoder generate_during_eval "
    "model_adapter_name ref_adapter_name force_use_ref_model base_model_attribute_name use_logits_to_keep "
    "use_num_logits_to_keep num_of_sequences chars_per_token": "leave it out; nothing reads it any more",
    "per_gpu_train_batch_size per_device_batch_size": "trainer.args.per_device_train_batch_size={}",
    "per_gpu_eval_batch_size": "trainer.args.per_device_eval_batch_size={}",
    "fp16_backend fp16_opt_level half_precision_backend": "trainer.args.fp16=true, or bf16=true",
    "adafactor": "trainer.args.optim=adafactor",
    "logging_dir": "tracking=tensorboard, which writes into the run's directory",
    "push_to_hub_model_id push_to_hub_organization push_to_hub_token":
        "a run pushes nothing; when it has completed: hf upload <you>/<name> <the run's directory>/model",
    "torchdynamo": "trainer.args.torch_compile_backend={}",
    "split_batches dispatch_batches even_batches fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap":
        "leave it out; hardware.processes shares each batch among processes",
    "max_seq_length max_target_length": "trainer.args.max_length={}",
    "max_prompt_length max_completion_length":
        "trainer.args.max_length, which holds prompt and reply; data.on_too_long says what becomes of longer rows",
    "dpo_beta": "trainer.args.beta={}",
    "rpo_alpha": "'trainer.args.loss_type=[sigmoid,sft]' 'trainer.args.loss_weights=[1.0,{}]'",
    "dpo_alpha": "'trainer.args.loss_weights=[{}]'",
    "reference_free": "trainer.args.loss_type and another trainer: DPO always has a reference",
    "tokenizer processing_class tokenizer_name tokenizer_name_or_path":
        "the tokenizer is the model's; model.chat_template and model.eos_token change what it prints",
    "padding_value pad_token_id": "the tokenizer's own is taken",
    "formatting_func": "data.columns and data.format, which say how rows are read",
    "num_proc preprocessing_num_workers dataset_num_workers": "data.workers={}",

    # what people call it
    "lr": "trainer.args.learning_rate={}",
    "lr_scheduler scheduler scheduler_type": "trainer.args.lr_scheduler_type={}",
    "wd": "trainer.args.weight_decay={}",
    "warmup num_warmup_steps lr_warmup_steps": "trainer.args.warmup_steps={}",
    "grad_clip clip_grad_norm gradient_clipping gradient_clip_val max_norm": "trainer.args.max_grad_norm={}",
    "optimizer": "trainer.args.optim={}",
    "epochs num_epochs n_epochs train_epochs max_epochs": "trainer.args.num_train_epochs={}",
    "steps num_train_steps max_train_steps train_steps training_steps total_steps num_steps max_steps_per_epoch":
        "trainer.args.max_steps={}",
    "batch_size train_batch_size micro_batch_size train_micro_batch_size_per_gpu device_train_microbatch_size":
        "trainer.args.per_device_train_batch_size={}",
    "eval_batch_size val_batch_size": "trainer.args.per_device_eval_batch_size={}",
    "grad_accum gradient_accumulation grad_accumulation_steps accumulate_grad_batches":
        "trainer.args.gradient_accumulation_steps={}",
    "context_length max_len seq_length seq_len sequence_length": "trainer.args.max_length={}",
    "random_seed": "seed={}",
    "num_threads": "threads={}",

    # the model
    "torch_dtype": "model.dtype={}",
    "model_name model_name_or_path base_model model_path pretrained_model_name_or_path model_id":
        "model.name_or_path={}",
    "model_revision": "model.revision={}",
    "attn_impl flash_attn": "model.attn_implementation={}",
    "flash_attention use_flash_attention use_flash_attention_2": "model.attn_implementation=flash_attention_2",
    "sdp_attention": "model.attn_implementation=sdpa",
    "template": "model.chat_template={}",
    "adapter_name_or_path lora_model_dir": "model.from_run={}",
    "enable_activation_checkpointing": "trainer.args.activation_checkpointing={}",
    "enable_liger_kernel use_liger": "trainer.args.use_liger_kernel={}",
    "compile": "trainer.args.torch_compile={}",

    # adapters
    "use_peft use_lora": "peft=lora",
    "adapter finetuning_type": "peft={}",
    "load_in_4bit use_4bit use_qlora": "peft=qlora",
    "load_in_8bit": "model.quantization_config, as peft=qlora has it",
    "quantization_bit": "peft=qlora",
    "lora_r lora_rank": "peft=lora trainer.peft_config.r={}",
    "lora_alpha lora_dropout": "peft=lora trainer.peft_config.{key}={}",
    "lora_target_modules lora_target lora_modules": "peft=lora 'trainer.peft_config.target_modules={}'",
    "lora_target_linear": "peft=lora trainer.peft_config.target_modules=all-linear",

    # rows
    "dataset datasets dataset_name dataset_path train_file train_data data_path": "data.path={}",
    "dataset_config dataset_config_name": "data.name={}",
    "dataset_train_split dataset_split": "data.split={}",
    "dataset_test_split": "data.test_split={}",
    "dataset_mixer dataset_mixture": "'data=[a,b]' 'data.weights={{a: 1, b: 2}}'",
    "test_file validation_file eval_file": "data.test_path={}",
    "val_set_size val_size test_size validation_split": "data.test_share={}, or data.test_rows for a number of rows",
    "max_samples max_train_samples": "data.max_rows={}",
    "cutoff_len sequence_len max_seq_len model_max_length": "trainer.args.max_length={}",
    "sample_packing packed neat_packing": "trainer.args.packing={}",
    "eval_sample_packing": "trainer.args.eval_packing={}",
    "train_on_inputs train_on_input train_on_prompt": "encode.train_on=all",
    "train_on_responses_only": "encode.train_on=assistant",
    "mask_history": "encode.train_on=last",
    "default_system system system_message": "data.system_prompt={}",

    # the run
    "stage rl method": "trainer={}",
    "pref_beta rl_beta": "trainer.args.beta={}",
    "pref_loss": "trainer.args.loss_type={}",
    "device": "hardware={}",
    "early_stopping_patience":
        "callbacks.early={{_target_: transformers.EarlyStoppingCallback, early_stopping_patience: {}}}",
    "wandb_project use_wandb": "tracking=wandb",
    "experiment_name": "name={}",
    "log_every_n_steps log_interval": "trainer.args.logging_steps={}",
    "eval_interval": "trainer.args.eval_steps={}",
    "save_interval checkpoint_interval": "trainer.args.save_steps={}",
}
# fmt: on


def successor(key: str, value: Any) -> str:
    """What to write instead of a key that has another name here, or is needed no more; empty where nobody knows."""
    name = key.rpartition(".")[2]
    instead = next((text for names, text in RENAMED.items() if name in names.split()), "")
    if instead and value is False and "{}" not in instead:
        return "leave it out"
    return instead.format(shown(value), key=name)


def advice(key: str, value: Any) -> str:
    """As `successor`, as half a sentence."""
    said = successor(key, value)
    return f"write {said}" if re.match(r"'?[a-z_.]+=", said) else said
