"""The rules of a config: each is tried, what upstream would refuse too late is refused, and each table is true."""

import inspect
import re
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import resolvable
from omegaconf import OmegaConf
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig
from trl.trainer import dpo_trainer

from smoltrain import train
from smoltrain.config import CONF, ConfigError
from smoltrain.config.compose import compose, composed
from smoltrain.config.groups import options
from smoltrain.config.origins import origins
from smoltrain.config.overrides import sorted_out
from smoltrain.config.renamed import RENAMED, successor
from smoltrain.config.rules import (
    ADAM,
    NEEDS,
    NEVER,
    NO_ARGUMENTS,
    OF_DIFFERENCES,
    RANGES,
    SMOOTHED,
    TOKENIZING,
    WRONG,
    full,
    problems,
    remarks,
)
from smoltrain.config.validate import resolved
from smoltrain.model import locate
from smoltrain.preflight import preflight

OWN = Path(__file__).parent / "conf"  # where trainer=kto is
ALL = {f.name for kind in (SFTConfig, DPOConfig, KTOConfig, GRPOConfig) for f in fields(kind)}


@cache
def values_of(*overrides: str) -> dict:
    """The config of a command line, whatever is wrong with it."""
    flags = [f"--config-dir={OWN}"] if KTO in overrides else []
    values, _ = resolved(composed(sorted_out(list(overrides), flags)[0], flags))
    return values


@cache
def found(*overrides: str) -> list[str]:
    """What the rules say of a command line."""
    flags = [f"--config-dir={OWN}"] if KTO in overrides else []
    chains = origins(sorted_out(list(overrides), flags)[0], flags)
    return [problem.text for problem in problems(values_of(*overrides), chains)]


ZERO = ("hardware=deepspeed", "hardware.processes=2")
ADAPTER = ("peft=lora",)
PRECOMPUTED = "trainer.args.precompute_ref_log_probs=true"
ON_THE_WAY = ("trainer.args.eval_strategy=steps", "trainer.args.eval_steps=4")
BEST = "trainer.args.load_best_model_at_end=true"
EARLY = "callbacks.early={_target_: transformers.EarlyStoppingCallback}"
STREAM = ("data=local", "data.path=rows.jsonl", "data.streaming=true")
WEIGHTED = "encode.train_on=weighted"
KTO = "trainer=kto"
MIXTURE = (
    "data=mixture",
    "+data@data.sources.sums=sums",
    "+data@data.sources.local=local",
    "data.sources.local.path=rows.jsonl",
)
BROKEN = [  # a command line, and what is said of it
    (["trainer.args.fp16=true", "trainer.args.bf16=true"], "trainer.args.fp16=true: trainer.args.bf16 is on too"),
    (["trainer.args.fp16=true"], "trainer.args.fp16=true: on a processor it is ignored"),
    (["trainer.args.activation_offloading=true"], "activation_offloading=true: it moves activations from a GPU"),
    (
        ["hardware=gpu", "trainer.args.bf16=false", "trainer.args.fp16=true", "model.dtype=float16"],
        "have to be float32",
    ),
    (["trainer.args.bf16=true", "model.dtype=float16"], "trainer.args.bf16=true: the weights are float16"),
    (["trainer.args.bf16=null", "model.dtype=float16"], "trainer.args.bf16=null: the weights are float16"),
    (["trainer.args.tf32=true"], "trainer.args.tf32=true: it needs a GPU"),
    (["model.attn_implementation=flash_attention_2"], "flash_attention_2: it needs a GPU"),
    (["peft=qlora", "trainer.peft_config=null"], "model.quantization_config: quantised weights cannot be trained"),
    ([*ADAPTER, "trainer.peft_config.target_modules=[q_proj,lm_head]"], "an adapter on it would not be trained"),
    (["trainer.args.packing=true", "trainer.args.max_length=null"], "max_length=null: packing fills rows"),
    (["trainer.args.pad_to_multiple_of=100"], "pad_to_multiple_of=100: rows would be padded beyond"),
    (["trainer.args.packing=true", "trainer.args.packing_strategy=wrapped"], "would attend to each other"),
    (["trainer.args.eval_packing=true"], "eval_packing=true: held-out rows of one pack would attend to each other"),
    (["trainer.args.padding_free=true"], "TRL takes it with trainer.args.max_length=null or trainer.args.packing"),
    (["trainer=dpo", "trainer.args.train_sampling_strategy=group_by_length"], "does not know how long a pair is"),
    ([KTO, "trainer.args.train_sampling_strategy=random"], "it needs sequential"),
    ([KTO, "trainer.args.per_device_train_batch_size=1"], "per_device_train_batch_size=1: the loss kto"),
    ([WEIGHTED, "trainer.args.packing=true"], "weighted: the weights need trainer.args.packing=false"),
    ([WEIGHTED, "trainer.args.eval_packing=true"], "weighted: the weights need trainer.args.eval_packing=false"),
    ([WEIGHTED, "trainer.args.padding_free=true"], "weighted: the weights need trainer.args.padding_free=false"),
    ([WEIGHTED, "trainer.args.loss_type=dft"], "weighted: the weights need trainer.args.loss_type=nll"),
    ([WEIGHTED, "trainer.args.label_smoothing_factor=0.1"], "the weights need trainer.args.label_smoothing_factor=0"),
    (["trainer=dpo", "trainer.args.loss_type=sigmod"], "loss_type=sigmod: DPOTrainer knows aot, .*sigmoid"),
    (["trainer=dpo", "trainer.args.loss_weights=[1,2]"], r"loss_weights=\[1, 2\]: one for each of the losses"),
    (["trainer=dpo", "trainer.args.f_divergence_type=kl"], "choose one of alpha_divergence, forward_kl"),
    (
        ["trainer=dpo", "trainer.args.f_divergence_type=forward_kl", "trainer.args.loss_type=aot"],
        "loss_type=aot is defined for reverse_kl only",
    ),
    (
        ["trainer=dpo", "trainer.args.use_weighting=true", "trainer.args.loss_type=[sigmoid,aot]"],
        "mix up their weights",
    ),
    (["trainer=dpo", "trainer.args.loss_type=exo_pair"], "label_smoothing=0.0: the loss exo_pair needs more than 0"),
    (["trainer=dpo", "trainer.args.loss_type=robust", "trainer.args.label_smoothing=0.5"], "below 0.5"),
    (["trainer=dpo", "trainer.args.sync_ref_model=true", PRECOMPUTED], "of a reference that does not move"),
    (["trainer=dpo", "trainer.args.sync_ref_model=true", *ADAPTER], "the model without it is the reference"),
    (["trainer=dpo", "trainer.args.sync_ref_model=true", "trainer.args.max_steps=9"], "the run ends at step 9, before"),
    (["trainer=dpo", *STREAM, "trainer.args.max_steps=9", PRECOMPUTED], "a stream is read while it is trained on"),
    (["trainer.args.save_strategy=best", *ON_THE_WAY], "set trainer.args.metric_for_best_model too"),
    (
        ["trainer.args.save_strategy=best", "trainer.args.metric_for_best_model=eval_loss"],
        "save_strategy=best: the best is",
    ),
    ([BEST], "load_best_model_at_end=true: the best is found by evaluating"),
    ([BEST, "trainer.args.eval_strategy=epoch"], "save_strategy=steps has to be eval_strategy=epoch, or best"),
    ([BEST, *ON_THE_WAY, "trainer.args.save_steps=6"], "save_steps=6 has to be a multiple of the steps between"),
    ([BEST, "trainer.args.eval_strategy=steps", "trainer.args.save_steps=7"], "save_steps=7 has to be a multiple"),
    ([BEST, *ON_THE_WAY, "trainer.args.save_steps=0.5"], "save_steps=0.5 has to be a multiple of the steps between"),
    (["trainer.args.lr_scheduler_type=reduce_lr_on_plateau"], "it goes by what is measured on the way"),
    ([EARLY], "callbacks.early: it stops by what is measured on the way; set trainer.args.eval_strategy"),
    ([EARLY, *ON_THE_WAY], "callbacks.early: it stops by .* set trainer.args.metric_for_best_model=eval_loss"),
    (["trainer.args.optim=galore_adamw"], "optim_target_modules=null: trainer.args.optim=galore_adamw needs it"),
    (
        ["trainer.args.optim=galore_adamw_layerwise", "trainer.args.gradient_accumulation_steps=2"],
        "galore_adamw_layerwise updates each layer",
    ),
    (
        ["trainer.args.use_liger_kernel=true", "trainer.args.liger_kernel_config={fused_linear_cross_entropy: true}"],
        "TRL has a fused head of its own",
    ),
    (
        [
            "trainer.args.gradient_accumulation_steps=2",
            "trainer.args.accelerator_config={gradient_accumulation_kwargs: {num_steps: 2}}",
        ],
        "its num_steps says what",
    ),
    ([*STREAM], "data.streaming=true: nobody knows how many rows a stream has"),
    ([*STREAM, "hardware.processes=2"], "data.streaming=true: one process reads a stream"),
    ([*STREAM, "trainer.args.dataloader_num_workers=1"], "data.streaming=true: its rows are counted as they are read"),
    ([*STREAM, "trainer.args.max_length=4096"], "may be of any length, and the model was made for 2048 tokens"),
    ([*STREAM, "trainer.args.max_length=null"], "may be of any length, and the model was made for 2048 tokens"),
    (["trainer.args._target_=trl.GRPOConfig", "trainer.args.generation_batch_size=24"], "has to be a multiple of"),
    (["trainer.args._target_=trl.GRPOConfig", "trainer.args.num_generations=3"], "has to divide the 16 rows"),
    (["trainer.args._target_=trl.DPOConfig"], "_target_=trl.DPOConfig: SFTTrainer takes SFTConfig, or what extends it"),
    (["trainer=dpo", "trainer.args._target_=trl.KTOConfig"], "DPOTrainer takes DPOConfig"),
    (["objective=loss"], "objective=loss: what is measured is called eval_"),
    (["objective=exact_match", "evaluation.max_rows=0"], "objective=exact_match: it is measured on rows that are"),
    ([*ADAPTER, "trainer.peft_config.task_type=SEQ_CLS"], "task_type=SEQ_CLS: a language model is trained"),
    (["trainer=dpo", "trainer.args.loss_type=[]"], r"loss_type=\[\]: name at least one"),
    (["trainer=dpo", "trainer.args.loss_type=[sft,sft]"], "each loss once"),
    (
        ["trainer=dpo", "trainer.args.loss_type=[sigmoid,sft]", "trainer.args.loss_weights=[1.0,-1.0]"],
        "loss_weights=.*: 0 or more each",
    ),
    (["data=local", "data.path=''"], "data.path=: name a file"),
    (["data=local", "data.path=[]"], r"data.path=\[\]: name a file"),
    ([*MIXTURE, "data.weights={sums: 1, local: -1}"], "data.weights: give each of sums, local a weight above 0"),
    ([*MIXTURE, "data.weights={sums: 1, lokal: 1}"], "data.weights: give each of sums, local a weight above 0"),
    (["trainer.args.use_liger_kernel=true"], r"use_liger_kernel=true: .*smoltrain\[liger\]"),
    (["trainer.args.activation_checkpointing_kwargs={use_reentrnt: false}"], "use_reentrnt is none of every_n_layers"),
    # numbers
    (["trainer.args.seed=-1"], "trainer.args.seed=-1: 0 to"),
    ([*MIXTURE, "data.sources.sums.train_rows=0"], "data.sources.sums.train_rows=0: at least 1 row"),
    (["trainer=dpo", "trainer.args.beta=0"], "trainer.args.beta=0: more than 0"),
    (["trainer.args.learning_rate=-1e-5"], "trainer.args.learning_rate=-1e-05: 0 or more"),
    (["trainer.args.learning_rate=nan"], "trainer.args.learning_rate=NaN: 0 or more"),
    (["trainer.args.adam_beta2=1.0"], "trainer.args.adam_beta2=1.0: 0 to below 1"),
    (["trainer.args.save_total_limit=0"], "save_total_limit=0: at least 1, or null"),
    (["trainer.args.logging_steps=2.5"], "logging_steps=2.5: a whole number of steps"),
    (["trainer.args.logging_steps=inf"], "logging_steps=Infinity: a whole number of steps"),
    ([*ADAPTER, "trainer.peft_config.lora_dropout=1"], "trainer.peft_config.lora_dropout=1: 0 to below 1"),
    (["data.test_share=2"], "data.test_share=2: a share lies between 0 and 1"),
    (["perf=auto", "global_batch_size=null"], "global_batch_size=null: perf=auto divides it"),
    (["perf=auto", "trainer.args.per_device_train_batch_size=5"], "global_batch_size=16: has to be a multiple of 5"),
    (["global_batch_size=10"], "global_batch_size=10: an update sees 16 x 1 = 16 rows"),
    (["global_batch_size=0"], "global_batch_size=0: at least 1"),
    (["hardware.processes=0"], "hardware.processes=0: at least 1"),
    (["hardware.processes=99", "trainer.args.use_cpu=false"], "hardware.processes=99: more than the .* accelerators"),
    (
        ["hardware=ddp", "hardware.processes=3"],
        "global_batch_size=16: 3 processes share a multiple of 3 rows.*are 15 and 18",
    ),
    (["hardware=ddp", "hardware.nodes=2"], "hardware.rendezvous=null: say where the nodes meet, host:port"),
    (
        ["hardware=fsdp", "hardware.processes=2", "trainer.args.fsdp_config.reshard_after_foward=false"],
        "of its keys version, auto_wrap_policy, .*reshard_after_forward",
    ),
    (["hardware=fsdp", "hardware.processes=2", "trainer.args.fsdp_config.version=1"], "with version 2"),
    (
        ["trainer=dpo", "hardware=fsdp", "hardware.processes=2", "trainer.args.sync_ref_model=true"],
        "sync_ref_model=true: a reference that moves is not saved where weights are shared out",
    ),
    (
        ["trainer=dpo", *ZERO, "trainer.args.sync_ref_model=true"],
        "sync_ref_model=true: a reference that moves is not saved where weights are shared out",
    ),
    (["trainer.args.deepspeed={zero_optimization: {stage: 2}}"], "deepspeed.*: it shares out among processes"),
    ([*ZERO, "hardware.zero.stage=1"], "not known here: zero_optimization.stage. Choose hardware=deepspeed"),
    ([*ZERO, "hardware.zero.stage3_lives=1"], "not known here: zero_optimization.stage3_lives"),
    ([*ZERO, "hardware.zero.offload_optimizer.device=nvme"], "here: zero_optimization.offload_optimizer"),
    ([*ZERO, "trainer.args.deepspeed={zero_optimization: {stage: 2}}"], "train_micro_batch_size_per_gpu, gradient_acc"),
    ([*ZERO, "trainer.args.deepspeed=ds.json"], "deepspeed=ds.json: not known here: a file. Choose hardware="),
    ([*ZERO, "trainer.args.fsdp=true"], "deepspeed: trainer.args.fsdp shares out the same"),
    ([*ZERO, "trainer.args.fp16=true"], "fp16=true: DeepSpeed scales gradients in its own way"),
    ([*ZERO, "hardware.zero.reduce_bucket_size=abc"], "not known here: zero_optimization.reduce_bucket_size"),
    ([*ZERO, "hardware.zero.sub_group_size=auto"], "not known here: zero_optimization.sub_group_size"),
    ([*ZERO, "hardware.zero.offload_optimizer=null"], "not known here: zero_optimization.offload_optimizer"),
    ([*ZERO, "hardware.zero.overlap_comm=2"], "not known here: zero_optimization.overlap_comm"),
    ([*ZERO, "hardware.zero.offload_optimizer={device: cpu, ratio: 0.5}"], "here: zero_optimization.offload_optimizer"),
    ([*ZERO, "model.dtype=bfloat16"], "model.dtype=bfloat16: DeepSpeed learns in float32"),
    ([*ZERO, "peft=qlora"], "model.quantization_config.*: DeepSpeed shares out quantised weights"),
    ([*ZERO, "trainer.args.torch_compile=true"], "torch_compile=true: what is compiled and what DeepSpeed gathers"),
    (
        [*ZERO, "trainer=dpo", "peft=lora", "trainer.args.precompute_ref_log_probs=true"],
        "precompute_ref_log_probs=true: TRL would share out the model for it",
    ),
    ([*ZERO, "trainer.args.optim=sgd"], "optim=sgd: DeepSpeed gives an optimizer all weights in one row"),
    (["hardware.slurm.dry_run=true"], "hardware.slurm: it has keys where Slurm starts the run; choose hardware=slurm"),
    (["hardware=slurm", "pause_at=5"], "pause_at=5: a job of Slurm that is not at its end is queued again"),
    (["hardware.processes=2"], "global_batch_size=null: 2 processes would see as many times the rows"),
    (["perf=auto", "hardware.processes=3"], "global_batch_size=16: has to be a multiple of 3"),
    (
        ["hardware=ddp", "hardware.processes=2", "trainer.args.gradient_accumulation_steps=1"],
        "global_batch_size=16: an update sees 4 x 1 x 2 = 8 rows",
    ),
    # not a user's to set
    ([*ADAPTER, "trainer.peft_config.base_model_name_or_path=x"], "base_model_name_or_path: the adapter is for"),
    ([*ADAPTER, "trainer.peft_config.revision=x"], "peft_config.revision: the adapter is for the model"),
    ([*ADAPTER, "trainer.peft_config.inference_mode=false"], "inference_mode: an adapter that is trained"),
    (["trainer.args.output_dir=x"], "output_dir: everything of a run is in one directory"),
    (["trainer.args.assistant_only_loss=true"], "assistant_only_loss: encode.train_on"),
    (["trainer.args.completion_only_loss=true"], "completion_only_loss: encode.train_on"),
    (["trainer.args.gradient_checkpointing=false"], "its new name is trainer.args.activation_checkpointing"),
    (["trainer.args.gradient_checkpointing=true"], "its new name is trainer.args.activation_checkpointing"),
    (["trainer.args.completion_only_loss=false"], "completion_only_loss: encode.train_on"),
    (["trainer.args.assistant_only_loss=false"], "assistant_only_loss: encode.train_on"),
    (["trainer.args.truncation_mode=keep_start"], "truncation_mode: data.on_too_long"),
    (["trainer.args.do_eval=false"], "do_eval: upstream leaves it to scripts"),
    (["trainer.args.use_cache=false"], "use_cache: TRL never reads it"),
    (["trainer.args.hub_strategy=every_save"], "hub_strategy: a run pushes nothing"),
    (["trainer.args.bf16_full_eval=true"], "would turn the weights into it for good"),
    (["trainer.args.average_tokens_across_devices=false"], "average_tokens_across_devices: the processes of a run"),
    (["trainer.args.accelerator_config={split_batches: true}"], "accelerator_config.split_batches: all processes"),
]


@pytest.mark.parametrize(("overrides", "message"), BROKEN, ids=lambda value: " ".join(value)[:70])
def test_what_contradicts_itself_is_refused(overrides, message):
    assert any(re.search(message, text) for text in found(*overrides)), found(*overrides)


def test_every_rule_is_tried():
    said = "\n".join(text for overrides, _ in BROKEN for text in found(*overrides))
    for key, _, mend in WRONG:
        rule = re.sub(r"\{[^}]*\}", "\0", f"{full(key)}\0: {mend}")
        assert re.search(".*".join(map(re.escape, rule.split("\0"))), said), (key, mend)


CHOICES = [
    (group, option) for group in ("experiment", "model", "peft", "hardware", "trainer") for option in options(group, [])
]


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_what_is_shipped_breaks_no_rule_and_looks_like_no_mistake(group, option):
    assert found(f"{group}={option}") == []
    assert remarks(values_of(f"{group}={option}")) == []


FINE = [  # sound settings beside those that are refused
    ["trainer.args.packing=true", "trainer.args.eval_packing=false"],
    ["trainer.args.packing=true", "trainer.args.packing_strategy=bfd_split"],
    ["trainer.args.padding_free=true", "trainer.args.max_length=null"],
    ["trainer.args.pad_to_multiple_of=64"],
    ["trainer=dpo", "trainer.args.loss_type=[sigmoid,sft]", "trainer.args.loss_weights=[1.0,0.5]"],
    ["trainer=dpo", "trainer.args.loss_type=exo_pair", "trainer.args.label_smoothing=1e-3"],
    ["trainer=dpo", "trainer.args.f_divergence_type=js_divergence"],
    ["trainer=dpo", "trainer.args.padding_free=false"],
    [BEST, *ON_THE_WAY, "trainer.args.save_steps=8"],
    [BEST, *ON_THE_WAY, "trainer.args.save_strategy=best", "trainer.args.metric_for_best_model=eval_loss"],
    [BEST, "trainer.args.eval_strategy=steps", "trainer.args.eval_steps=0.1", "trainer.args.save_steps=0.3"],
    ["trainer.args.save_strategy=no"],  # beside the save_steps of trainer/base.yaml
    ["trainer.args.max_steps=5"],  # beside its num_train_epochs
    ["trainer.args.lr_scheduler_type=constant"],  # beside its warmup_steps
    ["trainer.args.lr_scheduler_type=constant", "trainer.args.warmup_steps=0"],
    ["trainer.args.optim=sgd", "trainer.args.optim_args='momentum=0.9'"],
    ["trainer.args.max_grad_norm=0"],
    ["trainer.args.truncation_mode=null", "trainer.args.output_dir='${hydra:runtime.output_dir}'"],
    [KTO, "trainer.args.dataset_num_proc=2"],  # TRL tokenises those rows
    ["experiment=smollm3_3b_sft", "trainer.args.lr_scheduler_type=constant"],  # its warmup_steps are from a file
]


@pytest.mark.parametrize("overrides", FINE, ids=" ".join)
def test_what_is_sound_is_left_alone(overrides):
    assert found(*overrides) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["peft=lora", "trainer.peft_config.target_modules=5"],
        ["trainer.args.accelerator_config={gradient_accumulation_kwargs: 5}", "trainer.args.seed=-1"],
        ["trainer.args.activation_checkpointing_kwargs=5", "trainer.args.loss_type=5"],
        ["trainer.peft_config.target_modules=true", "trainer.args.seed=-1"],
    ],
    ids=" ".join,
)
def test_of_a_value_of_the_wrong_type_no_rule_says_more(overrides):
    with pytest.raises(ConfigError):
        compose(overrides, [])


def test_a_wrong_seed_is_told_once():
    with pytest.raises(ConfigError, match=r"\Aseed=-1: 0 to \d+, as numpy takes it *\(command line\)\Z"):
        compose(["seed=-1"], [])


# ---------------------------------------------------------------- without effect

IDLE = [
    (["hardware.zero={stage: 3}"], "hardware.zero has no effect here; it needs hardware=deepspeed"),
    (["hardware.rendezvous=node-1:29500"], "hardware.rendezvous=node-1:29500 has no effect here; it needs"),
    (["trainer.args.fsdp=true"], "trainer.args.fsdp=true has no effect here; it needs hardware.processes=2"),
    (
        ["trainer.args.fsdp_config={version: 2}"],
        "trainer.args.fsdp_config has no effect here; it needs trainer.args.fsdp=true",
    ),
    (["trainer.args.ddp_timeout=5"], "trainer.args.ddp_timeout=5 has no effect here; it needs hardware.processes=2"),
    (
        ["trainer.args.eval_steps=5"],
        "trainer.args.eval_steps=5 has no effect here; it needs trainer.args.eval_strategy",
    ),
    (
        ["trainer.args.eval_strategy=steps", "trainer.args.eval_steps=9", "trainer.args.max_steps=8"],
        "eval_steps=9 has no effect.*the run ends at trainer.args.max_steps=8",
    ),
    (["evaluation.max_rows=0", "evaluation.max_new_tokens=8"], "max_new_tokens=8 has no effect.*max_rows=1 or more"),
    (["model.from_run=latest", "model.revision=v2"], "model.revision=v2 has no effect.*model.from_run wins"),
    ([*ADAPTER, "trainer.peft_config.loftq_config={loftq_bits: 4}"], "loftq_config.* has no effect.*=loftq"),
    (["trainer.args.eval_delay=5"], "eval_delay=5 has no effect"),
    (["trainer.args.save_strategy=no", "trainer.args.save_steps=5"], "save_steps=5 has no effect"),
    (["trainer.args.save_strategy=epoch", "trainer.args.save_steps=5"], "save_steps=5 has no effect"),
    (["trainer.args.save_strategy=no", "trainer.args.save_only_model=true"], "save_only_model=true has no effect"),
    (["trainer.args.logging_strategy=epoch", "trainer.args.logging_steps=3"], "logging_steps=3 has no effect"),
    (["trainer.args.metric_for_best_model=eval_loss"], "metric_for_best_model=eval_loss has no effect"),
    (["trainer.args.greater_is_better=true"], "greater_is_better=true has no effect"),
    (["trainer.args.run_name=x"], "run_name=x has no effect here; it needs trainer.args.report_to"),
    (["trainer.args.project=x"], "project=x has no effect.*callbacks.tracking.project"),
    (
        ["trainer.args.max_steps=5", "trainer.args.num_train_epochs=3"],
        "num_train_epochs=3 has no effect.*it is 5, and wins",
    ),
    (["trainer.args.lr_scheduler_type=constant", "trainer.args.warmup_steps=3"], "warmup_steps=3 has no effect"),
    (
        ["trainer.args.lr_scheduler_type=constant", "trainer.args.lr_scheduler_kwargs={a: 1}"],
        "lr_scheduler_kwargs has no effect",
    ),
    (["trainer.args.optim=sgd", "trainer.args.adam_beta1=0.8"], "adam_beta1=0.8 has no effect.*optim is sgd"),
    (["trainer.args.optim=lion_32bit", "trainer.args.adam_epsilon=1e-6"], "adam_epsilon=1e-06 has no effect"),
    (["trainer.args.optim_args='a=1'"], "optim_args=a=1 has no effect.*optim is adamw_torch_fused"),
    (["trainer.args.optim_target_modules=all-linear"], "optim_target_modules=all-linear has no effect"),
    (
        [
            "trainer.args.optim=galore_adamw",
            "trainer.args.optim_target_modules=all-linear",
            "trainer.args.weight_decay=0.1",
        ],
        "weight_decay=0.1 has no effect",
    ),
    (
        ["trainer=dpo", "trainer.args.label_smoothing=0.1"],
        "label_smoothing=0.1 has no effect.*aot, aot_unpaired, exo_pair",
    ),
    (["trainer=dpo", "trainer.args.label_smoothing_factor=0.1"], "label_smoothing_factor=0.1 has no effect"),
    (["trainer.args.loss_type=dft", "trainer.args.label_smoothing_factor=0.1"], "label_smoothing_factor=0.1 has no"),
    (["trainer=dpo", "trainer.args.discopop_tau=0.1"], "discopop_tau=0.1 has no effect"),
    (["trainer=dpo", "trainer.args.f_alpha_divergence_coef=0.1"], "f_alpha_divergence_coef=0.1 has no effect"),
    (
        ["trainer=dpo", "trainer.args.max_steps=5", "trainer.args.precompute_ref_batch_size=4"],
        "precompute_ref_batch_size=4 has no effect",
    ),
    (["trainer=dpo", "trainer.args.ref_model_sync_steps=4"], "ref_model_sync_steps=4 has no effect"),
    (["trainer=dpo", "trainer.args.padding_free=true"], "padding_free=true has no effect.*DPOTrainer pads"),
    (["trainer.args.packing_strategy=bfd_split"], "packing_strategy=bfd_split has no effect"),
    (["trainer.args.dataloader_prefetch_factor=4"], "dataloader_prefetch_factor=4 has no effect"),
    (["trainer.args.dataloader_persistent_workers=true"], "dataloader_persistent_workers=true has no effect"),
    (
        [*STREAM, "trainer.args.dataloader_drop_last=true"],
        "dataloader_drop_last=true has no effect.*data.streaming=false",
    ),
    (["data.test_share=0.2"], "data.test_share=0.2 has no effect"),
    (["data=[sums,local]", "data.stopping_strategy=first_exhausted"], "data.stopping_strategy=first_exhausted has no"),
    (["trainer.args.max_length=null", "data.on_too_long=drop"], "data.on_too_long=drop has no effect"),
    (["trainer.args.activation_checkpointing_kwargs={every_n_layers: 2}"], "activation_checkpointing_kwargs has no"),
    (["trainer.args.liger_kernel_config={rope: true}"], "liger_kernel_config has no effect"),
    (["trainer.args.torch_empty_cache_steps=4"], "torch_empty_cache_steps=4 has no effect"),
]


@pytest.mark.parametrize(("overrides", "message"), IDLE, ids=lambda value: " ".join(value)[:70])
def test_what_would_be_ignored_is_refused(overrides, message):
    assert any(re.search(message, text) for text in found(*overrides)), found(*overrides)


def test_every_need_is_tried():
    tried = {override.partition("=")[0] for overrides, _ in IDLE for override in overrides}
    assert [keys for keys, _, _ in NEEDS if not tried & set(map(full, keys.split()))] == []


def test_a_file_may_say_what_the_command_line_turns_off(folder):
    mine = folder / "own" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    text = "# @package _global_\ntrainer: {args: {eval_strategy: steps, eval_steps: 5, num_train_epochs: 2}}\n"
    mine.write_text(text)
    flags = [f"--config-dir={folder / 'own'}"]
    compose(["experiment=mine"], flags)
    compose(["experiment=mine", "trainer.args.eval_strategy=no", "trainer.args.max_steps=1"], flags)
    with pytest.raises(ConfigError, match=r"eval_steps=7 has no effect here"):
        compose(["experiment=mine", "trainer.args.eval_strategy=no", "trainer.args.eval_steps=7"], flags)
    mine.write_text(text.replace("eval_strategy: steps, ", ""))
    with pytest.raises(ConfigError, match=r"eval_steps=5 has no effect here.*own/experiment/mine.yaml:2"):
        compose(["experiment=mine"], flags)


# ---------------------------------------------------------------- what looks like a mistake


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.args.learning_rate=1"], "learning_rate=1: far from what is usual for SFT of all weights"),
        (["trainer.args.learning_rate=2e-9"], "learning_rate=2e-09: far from what is usual"),
        (["trainer=dpo", "trainer.args.learning_rate=1e-3"], "usual for preference training of all weights, 1e-08"),
        (["trainer=dpo", *ADAPTER, "trainer.args.learning_rate=2e-3"], "preference training of an adapter"),
        (
            ["hardware=ddp", "hardware.processes=64", "global_batch_size=64"],
            "hardware.processes=64: more than the .* cores",
        ),
        (["trainer.args.max_length=4096"], "the model was made for 2048 tokens; a longer row stops the run"),
        (["model.dtype=bfloat16"], "model.dtype=bfloat16: weights of 16 bits lose small updates"),
        ([EARLY, *ON_THE_WAY, "trainer.args.metric_for_best_model=eval_loss"], "the model that is kept is the last"),
    ],
)
def test_what_looks_like_a_mistake_is_remarked(overrides, message):
    said = remarks(values_of(*overrides))
    assert any(re.search(message, text) for text in said) and found(*overrides) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.args.learning_rate=1e-3"],
        ["trainer=dpo", "trainer.args.learning_rate=3e-5"],
        ["trainer.args.learning_rate=5", "trainer.args.optim=sgd"],
        ["trainer=dpo", *ADAPTER, "trainer.args.learning_rate=5e-5"],
        [*ADAPTER, "model.dtype=bfloat16"],
    ],
)
def test_what_is_usual_is_not(overrides):
    assert remarks(values_of(*overrides)) == []


def test_small_updates_are_lost_in_weights_of_16_bits():
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        weight = torch.nn.Parameter(torch.full((8,), 0.1, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert bool((weight != torch.full((8,), 0.1, dtype=dtype)).all()) is moves


# ---------------------------------------------------------------- what upstream makes of it


def build(**settings):
    """The live trainer of a config whose values no rule has seen."""
    base = settings.pop("base", ())
    cfg = resolvable(["data.train_rows=24", "data.test_rows=8", *base])
    for key, value in settings.items():
        OmegaConf.update(cfg, full(key), value, force_add=True)
    ready = preflight(cfg)
    ready.refuse()
    return train.build(cfg, ready, callbacks=[])


PACKED = {"packing": True, "max_length": 128, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        (PACKED, True),
        (PACKED | {"packing_strategy": "bfd_split"}, True),
        (PACKED | {"base": ("model.attn_implementation=eager",)}, True),
        (PACKED | {"eval_packing": False, "held_out": True}, True),
        ({"padding_free": True, "max_length": None, "per_device_train_batch_size": 2}, True),
        (PACKED | {"packing_strategy": "wrapped"}, False),
        ({"eval_packing": True, "max_length": 128, "held_out": True}, False),
    ],
    ids=str,
)
def test_rows_of_one_pack_are_kept_apart_where_no_rule_says_otherwise(settings, exact):
    settings = dict(settings)
    held_out = settings.pop("held_out", False)
    trainer = build(**settings)
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    batch = next(iter(trainer.get_eval_dataloader() if held_out else trainer.get_train_dataloader()))
    begin = tokenizer("<|im_start|>user", add_special_tokens=False)["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    with torch.no_grad():
        logits = model(**{name: values for name, values in batch.items() if name != "labels"}, use_cache=False).logits
        apart = []
        for ids, said, kept in zip(batch["input_ids"], logits, mask, strict=True):
            ids = ids[: int(kept.sum())].tolist()
            starts = [i for i in range(len(ids)) if ids[i : i + len(begin)] == begin] + [len(ids)]
            for start, end in pairwise(starts):
                alone = model(input_ids=torch.tensor([ids[start:end]])).logits[0]
                apart.append(float((said[start:end] - alone).abs().max()))
    assert len(apart) > 1 and (max(apart) < 1e-4 if exact else max(apart) > 1)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"padding_free": True}, ValueError),
        ({"base": ("trainer=dpo",), "sync_ref_model": True, "precompute_ref_log_probs": True}, ValueError),
        ({"base": ("trainer=dpo", "peft=lora"), "sync_ref_model": True}, NotImplementedError),
        ({"base": ("trainer=dpo",), "loss_type": "exo_pair"}, ValueError),
        ({"base": ("trainer=dpo",), "f_divergence_type": "forward_kl", "loss_type": "aot"}, ValueError),
        ({"base": ("trainer=dpo",), "use_weighting": True, "loss_type": "aot"}, NotImplementedError),
        ({"save_strategy": "best", "eval_strategy": "steps"}, ValueError),
        ({"base": ("peft=lora",), "trainer.peft_config.target_modules": ["q_proj", "lm_head"]}, ValueError),
        ({"fp16": True, "bf16": True}, ValueError),
        ({"packing": True, "max_length": None}, ValueError),
        ({"base": ("trainer=dpo",), "loss_type": "sigmoid", "dataloader_prefetch_factor": 2}, ValueError),
        ({"load_best_model_at_end": True}, ValueError),
    ],
    ids=str,
)
def test_what_the_rules_refuse_upstream_refuses_too_late(settings, error):
    with pytest.raises((ConfigError, error)):
        build(**settings)


def test_dpo_cannot_sort_pairs_by_length():
    with pytest.raises(ValueError, match="input_ids"):
        build(base=("trainer=dpo",), train_sampling_strategy="group_by_length").get_train_dataloader()


def test_fp16_is_ignored_on_a_processor_and_cannot_scale_weights_of_16_bits():
    assert not build(fp16=True).accelerator.native_amp
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_activations_cannot_be_offloaded_from_a_processor():
    with pytest.raises(AttributeError):
        build(activation_offloading=True, max_steps=1).train()


def test_the_old_name_of_activation_checkpointing_is_ignored():
    assert build(gradient_checkpointing=True).args.activation_checkpointing is False


def test_evaluating_in_bf16_would_train_in_bf16():
    trainer = build(bf16_full_eval=True)
    trainer.evaluate()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_dpo_needs_a_token_that_ends_a_turn(smoltrain, folder, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "bare")
    smoltrain("trainer=dpo", "model.name_or_path=./bare", code=2)
    assert "model.eos_token: ./bare has no token that ends a turn; name one" in capsys.readouterr().err


def test_rows_beyond_the_models_positions_stop_the_run(smoltrain, folder, capsys):
    import shutil

    bare = Path(shutil.copytree(locate("pkg://smoltrain/tiny"), folder / "short")) / "config.json"
    bare.write_text(bare.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 32'))
    smoltrain("model.name_or_path=./short", code=2)
    assert re.search(r"max_length=1024: rows have up to \d+ tokens.* made for 32; set it", capsys.readouterr().err)
    smoltrain(
        "model.name_or_path=./short",
        "trainer.args.max_length=32",
        "data.on_too_long=drop",
        "data.train_rows=64",
        code=2,
    )
    assert "positions" not in capsys.readouterr().err


# ---------------------------------------------------------------- the tables are true


def test_the_tables_name_what_there_is():
    keys = [key for table in (RANGES, NEEDS, NEVER, TOKENIZING) for row in table for key in row[0].split()]
    keys += [key for key, _, _ in WRONG if "." not in key]
    assert {key for key in keys if "." not in key} - ALL <= {
        "seed",
        "threads",
        "objective",
        "global_batch_size",
        "pause_at",
    }


def test_every_field_of_a_loss_is_needed_where_trl_reads_it():
    source = inspect.getsource(dpo_trainer)
    blocks = re.split(r'(?:el)?if loss_type == "(\w+)":', source)[1:]
    losses = dict(zip(blocks[::2], blocks[1::2], strict=True))
    assert {name for name, block in losses.items() if "self.label_smoothing" in block} == SMOOTHED
    assert {name for name, block in losses.items() if "discopop_tau" in block} == {"discopop"}
    assert set(re.findall(r'"(\w+)"', re.search(r"f_divergence_loss_types = (\{.*?\})", source)[1])) == OF_DIFFERENCES


@pytest.mark.parametrize("optimizer", OptimizerNames)
def test_an_optimizer_reads_what_the_rules_say(optimizer):
    handler = trainer_optimizer._OPTIMIZER_HANDLERS[optimizer]
    if handler is trainer_optimizer._get_bitsandbytes_optimizer:  # one for all of them
        family = re.search("adamw|ademamix|lion|rmsprop", optimizer.value)[0]
        reads_adam, reads_args = family in ("adamw", "ademamix"), family in ("ademamix", "rmsprop")
    else:
        source = inspect.getsource(handler)
        reads_adam, reads_args = "adam_kwargs" in source, "optim_args" in source
    if optimizer is OptimizerNames.SCHEDULE_FREE_SGD:  # shares a handler with those that do
        reads_adam = False
    assert bool(ADAM.match(optimizer.value)) is reads_adam
    assert bool(NO_ARGUMENTS.match(optimizer.value)) is not reads_args


# ---------------------------------------------------------------- other names


def renamed() -> list[str]:
    return [name for names in RENAMED for name in names.split()]


def test_a_renamed_field_is_no_field_and_its_successor_is_one():
    trained = {f.name for kind in (SFTConfig, DPOConfig, KTOConfig) for f in fields(kind)}
    assert set(renamed()) & trained == set() and len(set(renamed())) == len(renamed())
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    known = {
        key
        for group, option in (("data", "hub"), ("data", "local"), ("peft", "lora"))
        for key in origins([f"{group}={option}"], [])
    }
    known |= {"model.quantization_config", "data.weights", "callbacks.early", "encode.train_on"}
    for name in renamed():
        for key in re.findall(
            r"(?:trainer|model|data|encode|callbacks|threads|seed|name)[.\w]*(?==)", successor(name, 1)
        ):
            assert key.removeprefix("trainer.args.") in trained or key in known or key in groups, (name, key)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("trainer.args.warmup_ratio", 0.1, "trainer.args.warmup_steps=0.1, below 1 a share of all steps"),
        ("group_by_length", True, "trainer.args.train_sampling_strategy=group_by_length"),
        ("group_by_length", False, "leave it out"),
        ("trainer.args.max_seq_length", 512, "trainer.args.max_length=512"),
        ("trainer.args.evaluation_strategy", "steps", "trainer.args.eval_strategy=steps"),
        ("trainer.args.dpo_beta", 0.2, "trainer.args.beta=0.2"),
        ("lora_alpha", 32, "peft=lora trainer.peft_config.lora_alpha=32"),
        ("micro_batch_size", 4, "trainer.args.per_device_train_batch_size=4"),
        ("rpo_alpha", 0.5, "'trainer.args.loss_type=[sigmoid,sft]' 'trainer.args.loss_weights=[1.0,0.5]'"),
        ("nothing", 1, ""),
    ],
)
def test_a_successor_is_named_with_its_value(key, value, text):
    assert successor(key, value) == text


def test_rpo_is_what_its_successor_says():
    instead = [part.strip("'") for part in successor("rpo_alpha", 0.5).split()]
    assert found("trainer=dpo", *instead) == []
