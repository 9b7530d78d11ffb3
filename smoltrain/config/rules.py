"""What a config may not say, though each of its keys exists and each value is of the right type.

Read its tables as a handbook: `RANGES` says how large a number may be, `WRONG` what contradicts what, `NEVER` which of
upstream's fields are not a user's to set and what to set instead, `NEEDS` without what a setting has no effect, `ODD`
what is allowed and looks like a mistake. A condition sees the run: `run.beta` is `trainer.args.beta`, or the default of
that class where nobody set it. What upstream would refuse once the model is loaded costs half a second here.
"""

import ast
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from smoltrain.config import ConfigError, Problem, at, leaves, shown
from smoltrain.config.signatures import COMPUTED, REQUIRED, Parameter, find, misfit, signature
from smoltrain.config.source import Definition, module_at
from smoltrain.model import locate

ARGS = "trainer.args."
PEFT = "trainer.peft_config."
OUTPUT_DIR = "${hydra:runtime.output_dir}"


class Silent(Exception):
    """A condition asks for what this run does not have: the rule has nothing to say about it."""


class Run:
    """A resolved config as a condition sees it, less what is `refused` already; `read` is what was asked for."""

    def __init__(self, cfg: dict[str, Any], refused: Iterable[str]):
        self.cfg, self.refused = cfg, set(refused)
        self.args: dict[str, Any] = cfg["trainer"]["args"]
        self.takes = signature(self.args["_target_"]).parameters
        self.read: set[str] = set()

    def __getattr__(self, field: str) -> Any:
        """A field of `trainer.args`, its default where nobody set it.

        Raises Silent where the class has no such field, where only running it tells the default, and for what is no
        value of that field.
        """
        parameter = self.takes.get(field)
        if parameter is None or ARGS + field in self.refused:
            raise Silent
        self.read.add(field)
        value = self.args.get(field, parameter.default)
        unknown = value in (REQUIRED, COMPUTED, "???") or (isinstance(value, str) and "${" in value)
        if unknown or (field in self.args and misfit(value, parameter)):
            raise Silent
        return value

    def node(self, key: str) -> dict[str, Any]:
        """What a key stands in."""
        found = at(self.cfg, key.rpartition(".")[0])
        return found if isinstance(found, dict) else {}

    def parameter(self, key: str) -> Parameter | None:
        """What a key is to the class that its own node builds, where that is known."""
        target = self.node(key).get("_target_")
        if not isinstance(target, str) or f"{key.rpartition('.')[0]}._target_" in self.refused:
            return None
        return signature(target).parameters.get(key.rpartition(".")[2])

    @property
    def optim(self) -> str:
        self.read.add("optim")
        return str(self.args.get("optim", "adamw_torch_fused"))

    @property
    def losses(self) -> list[str]:
        """The losses that are added up, one or several."""
        given = self.loss_type
        return [str(loss) for loss in given] if isinstance(given, list) else [str(given)]

    @property
    def loss_names(self) -> str:
        return ", ".join(self.losses)

    def named(self, field: str) -> list[str]:
        """The values that the trainer's own code compares a field with; none where it does not name them."""
        found = set(re.findall(rf'{field} == "(\w+)"', self.source))
        for group in re.findall(rf"{field} (?:not )?in [\[({{]([^\])}}]*)[\])}}]", self.source):
            found |= set(re.findall(r'"(\w+)"', group))
        return sorted(found)

    def strange(self, field: str, values: list[str]) -> bool:
        """Whether a value is none of those that the trainer's own code knows."""
        known = self.named(field)
        return bool(known) and not set(values) <= set(known)

    @property
    def known_losses(self) -> str:
        return ", ".join(self.named("loss_type"))

    @property
    def known_divergences(self) -> str:
        return ", ".join(self.named("f_divergence_type"))

    @cached_property
    def source(self) -> str:
        """The text of the module of TRL that defines the trainer, or the class that it extends."""
        trainer = find(self.cfg["trainer"]["_target_"])
        if trainer.module.name.startswith("trl."):
            return trainer.module.text
        return next((base.module.text for base in trainer.ancestors if base.module.name.startswith("trl.")), "")

    @property
    def trainer(self) -> str:
        return self.cfg["trainer"]["_target_"].rpartition(".")[2]

    @property
    def wanted(self) -> Definition | None:
        """The first class that the trainer's own `args` are annotated with."""
        taken = signature(self.cfg["trainer"]["_target_"]).parameters.get("args")
        if taken is None:
            return None
        for name in re.findall(r"[^\W\d][\w.]*\w", taken.annotation):
            found = module_at(taken.file).named(ast.parse(name, mode="eval").body)
            if isinstance(found, Definition) and found.is_class:
                return found
        return None

    @property
    def foreign(self) -> bool:
        """Whether the arguments are those of another trainer."""
        given = signature(self.args["_target_"])
        own = (f"{given.module}.{given.name}", *given.bases)
        return self.wanted is not None and self.wanted.full_name not in own

    @property
    def objective(self) -> str:
        return str(self.cfg["objective"])

    @property
    def method(self) -> str:
        return "preference training" if "beta" in self.takes else "SFT"

    @property
    def trained(self) -> str:
        return "an adapter" if self.adapter else "all weights"

    @property
    def usual(self) -> tuple[float, float]:
        """The learning rates between which there is nothing to say."""
        return RATES[self.method, self.trained]

    @property
    def half(self) -> Any:
        """Whether arithmetic is bf16; to TRL null means yes, unless fp16 is set."""
        return not self.fp16 if self.bf16 is None else self.bf16

    @property
    def dtype(self) -> Any:
        return self.cfg["model"].get("dtype")

    @property
    def attention(self) -> str:
        return str(self.cfg["model"].get("attn_implementation"))

    @property
    def quantized(self) -> bool:
        return self.cfg["model"].get("quantization_config") is not None

    @property
    def adapter(self) -> dict[str, Any]:
        """The PEFT config; empty where all weights are trained, and where something in it is wrong."""
        given = self.cfg["trainer"].get("peft_config")
        wrong = any(key == PEFT[:-1] or key.startswith(PEFT) for key in self.refused)
        return given if isinstance(given, dict) and not wrong else {}

    @property
    def adapted(self) -> str | list[Any]:
        """The layers that get an adapter, as they are named."""
        given = self.adapter.get("target_modules")
        return given if isinstance(given, str | list) else []

    @cached_property
    def folder(self) -> Path | None:
        """The folder that the model is read from, where its name is that of one."""
        try:
            found = Path(locate(str(self.cfg["model"].get("name_or_path"))))
            return found if found.is_dir() else None
        except (ConfigError, ImportError, ValueError, OSError, RuntimeError):  # no name at all; refused elsewhere
            return None

    @cached_property
    def positions(self) -> float:
        """How many tokens the model was made for; infinite where nothing at hand says so."""
        file = (self.folder or Path()) / "config.json"
        if not self.folder or not file.is_file():
            return math.inf
        found = re.search(r'"(?:max_position_embeddings|n_positions)": *(\d+)', file.read_text(errors="replace"))
        return int(found[1]) if found else math.inf

    @property
    def pads_to(self) -> int:
        given = self.pad_to_multiple_of
        return given if isinstance(given, int) and given > 0 else 1

    @property
    def rows_generated(self) -> int:
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.generation_batch_size or self.per_device_train_batch_size * steps

    @property
    def accumulates_elsewhere(self) -> bool:
        given = self.accelerator_config
        inner = given.get("gradient_accumulation_kwargs") if isinstance(given, dict) else None
        return isinstance(inner, dict) and "num_steps" in inner

    @property
    def unread_by_torch(self) -> str:
        """The keys of activation_checkpointing_kwargs that nothing takes."""
        given = self.activation_checkpointing_kwargs
        return ", ".join(str(key) for key in given if key not in CHECKPOINTING) if isinstance(given, dict) else ""

    @property
    def stream(self) -> str | None:
        """The key that says that rows are streamed."""
        found = [
            key for key, value in leaves(self.cfg["data"], "data.") if key.endswith(".streaming") and value is True
        ]
        return found[0] if found else None

    @property
    def from_run(self) -> Any:
        self.read.add("model.from_run")
        return self.cfg["model"].get("from_run")

    @property
    def rows_answered(self) -> bool:
        """Whether rows may be answered by generation."""
        self.read.add("evaluation.max_rows")
        return at(self.cfg, "evaluation.max_rows") != 0

    @property
    def test_rows_given(self) -> bool:
        """Whether the source has held-out rows of its own, so that none are taken from the training rows."""
        data = self.cfg["data"]
        return bool(data.get("test_split") or data.get("test_path") or ".sums." in str(data["_target_"]))

    @property
    def nowhere(self) -> str | None:
        """The key that says where rows come from, where it names nothing."""
        paths = [(k, v) for k, v in leaves(self.cfg["data"], "data.") if re.fullmatch(r"data(\.sources\..+)?\.path", k)]
        return next(
            (key for key, value in paths if value in ("", []) or (isinstance(value, list) and "" in value)), None
        )

    @property
    def source_names(self) -> str:
        return ", ".join(map(str, at(self.cfg, "data.sources") or ()))

    @property
    def misweighed(self) -> bool:
        """Whether the weights of a mixture are not those of its sources."""
        sources, weights = at(self.cfg, "data.sources"), self.weights
        if not (isinstance(sources, dict) and isinstance(weights, dict)):
            return False
        return set(sources) != set(weights) or not all(
            isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights.values()
        )

    @property
    def weights(self) -> Any:
        return self.cfg["data"].get("weights")

    @property
    def weighted(self) -> bool:
        """Whether each turn has a weight of its own in the loss."""
        return self.cfg["encode"].get("train_on") == "weighted"

    @property
    def pairs(self) -> bool:
        """Whether rows are pairs of replies, which have no column `input_ids`."""
        return str(self.cfg["encode"]["_target_"]).endswith(".Preferences")

    @property
    def stopper(self) -> str | None:
        """The name of the callback that stops a run early."""
        made = (self.cfg.get("callbacks") or {}).items()
        found = [name for name, callback in made if callback and "EarlyStopping" in str(callback["_target_"])]
        return found[0] if found else None

    @property
    def batch(self) -> int | None:
        """The rows of an update that trainer.args leaves to be divided."""
        found = self.cfg.get("global_batch_size")
        return found if type(found) is int else None

    @property
    def passes(self) -> list[Any]:
        """Rows that go forward at once, and how often, a number or `auto` each."""
        given = [self.args.get(name, 1) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        return given if all(value == "auto" or type(value) is int for value in given) else []

    @property
    def whole(self) -> bool:
        """Whether both are numbers."""
        return bool(self.passes) and "auto" not in self.passes

    @property
    def hardware(self) -> Mapping[str, Any]:
        """The machines; a config from before there could be several has no such node."""
        return self.cfg.get("hardware") or {}

    @property
    def on_a_node(self) -> int:
        """The processes of the run on each of its nodes."""
        found = self.hardware.get("processes", 1)
        return found if type(found) is int else 1

    @property
    def nodes(self) -> int:
        """The machines of the run."""
        found = self.hardware.get("nodes", 1)
        return found if type(found) is int else 1

    @property
    def fsdp_config(self) -> dict[str, Any]:
        """How weights are shared out; a file of somebody's, which this does not read, is none of ours to judge."""
        found = self.args.get("fsdp_config")
        return found if isinstance(found, dict) else {} if found is None else {str(found): None}

    @property
    def sharing(self) -> str:
        """The keys of trainer.args.fsdp_config that checkpoints are sound with, whatever they are set to."""
        return ", ".join(SHARING)

    @property
    def unfit_for_zero(self) -> str:
        """What of trainer.args.deepspeed nothing here is known to go on from, or another key says; empty if nothing."""
        from smoltrain.config.resolvers import ZERO  # which imports Hydra; Tab reads rules too

        given = self.args.get("deepspeed")
        if not isinstance(given, dict):
            return "" if given is None else "a file"
        zero = given.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        unfit = [key for key in {**ZERO, **given} if given.get(key) != ZERO.get(key) and key != "zero_optimization"]
        judged = {key: key in BY_ZERO and BY_ZERO[key](value) for key, value in ({"stage": None} | zero).items()}
        unfit += [f"zero_optimization.{key}" for key, fits in judged.items() if not fits]
        return ", ".join(unfit)

    @property
    def stage3(self) -> bool:
        """Whether DeepSpeed shares out weights too."""
        given = self.args.get("deepspeed")
        zero = given.get("zero_optimization") if isinstance(given, dict) else None
        return isinstance(zero, dict) and zero.get("stage") == 3

    @property
    def rendezvous(self) -> Any:
        """Where they meet."""
        return self.hardware.get("rendezvous")

    @property
    def slurm(self) -> str:
        """Where the nodes of a job of Slurm meet, which its script says; empty where it is none."""
        return "node:1" if self.hardware.get("slurm") else ""

    @property
    def processes(self) -> int:
        """The processes of the run, on all its nodes."""
        return self.on_a_node * self.nodes

    @property
    def accelerators(self) -> int:
        """How many there are for them; on the machines of Slurm, as many as are asked for."""
        if self.slurm:
            return self.on_a_node
        from smoltrain.config.resolvers import accelerators  # which imports Hydra; Tab reads rules too

        return accelerators()

    @property
    def cores(self) -> int:
        """Those of this machine that it may use."""
        from smoltrain.config.resolvers import cores

        return cores()

    @property
    def at_once(self) -> int:
        """The rows that all processes see in one pass."""
        return int(self.passes[0]) * self.processes

    @property
    def indivisible(self) -> bool:
        """Whether no number of passes of several processes makes up the global batch."""
        return bool(self.processes > 1 and self.batch and self.whole and self.batch % self.at_once)

    @property
    def nearest(self) -> str:
        """The global batches next to the one that cannot be divided."""
        below = (self.batch or 0) // self.at_once * self.at_once
        return " and ".join(str(rows) for rows in (below, below + self.at_once) if rows)

    @property
    def seen(self) -> str:
        """The rows of an update that trainer.args says, for each process."""
        rows, passes = self.passes
        each = f" x {self.processes}" if self.processes > 1 else ""
        return f"{rows} x {passes}{each} = {rows * passes * self.processes}"

    @property
    def uneven(self) -> int:
        """What of rows, passes and processes is asked for, where the global batch cannot be divided by it; else 0."""
        asked = math.prod(n for n in [*self.passes, self.processes] if type(n) is int)
        return asked if "auto" in self.passes and asked > 0 and (self.batch or 0) % asked else 0

    @property
    def trackers(self) -> list[Any]:
        given = self.report_to if isinstance(self.report_to, list) else [self.report_to]
        return [name for name in given if name not in (None, "none")]

    @property
    def evaluates(self) -> bool:
        return self.eval_strategy not in ("no", False)

    @property
    def saves(self) -> bool:
        return self.save_strategy not in ("no", False)

    @property
    def picks_the_best(self) -> bool:
        """Whether something is done about which evaluation was the best."""
        best = self.load_best_model_at_end or self.save_strategy == "best" or self.stopper
        return bool(best or self.lr_scheduler_type in BY_EVALUATION)

    @property
    def saves_otherwise(self) -> bool:
        return self.save_strategy not in ("best", self.eval_strategy)

    @property
    def best_is_not_saved(self) -> bool:
        """Whether a checkpoint is written where nothing was evaluated: steps that are no multiple, or no comparison."""
        if not self.save_strategy == self.eval_strategy == "steps":
            return False
        save, evaluate = self.save_steps, self.eval_steps or self.logging_steps
        return (save < 1) != (evaluate < 1) or round(save * 1_000_000) % max(round(evaluate * 1_000_000), 1) != 0


Condition = Callable[[Run], Any]

# The tables are laid out by hand: a line of rule, a line of message.
# fmt: off

# ---------------------------------------------------------------- how large a number may be


INF = math.inf
# Of FSDP2, what decides how weights are shared out, and not what a checkpoint of them is.
SHARING: tuple[str, ...] = ("version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params")
SHARING += ("reshard_after_forward", "activation_checkpointing")



def a_flag(value: Any) -> bool:
    return isinstance(value, bool)


def a_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def a_size_or_auto(value: Any) -> bool:
    """What accelerate takes from the width of the model where it is `auto`."""
    return value == "auto" or a_size(value)


def somewhere(value: Any) -> bool:
    """Whether it says where an optimizer's state is, and nothing that asks for DeepSpeed's own one."""
    known = isinstance(value, dict) and not {*value} - {"device", "pin_memory"}
    return known and value.get("device") in ("none", "cpu") and a_flag(value.get("pin_memory", False))


# Of DeepSpeed, the same, and what it may be.
BY_ZERO: dict[str, Callable[[Any], bool]] = {"stage": lambda value: value in (2, 3), "offload_optimizer": somewhere}
BY_ZERO |= dict.fromkeys(("overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions"), a_flag)
BY_ZERO |= dict.fromkeys(("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), a_size)
BY_ZERO |= {"reduce_bucket_size": a_size_or_auto, "stage3_prefetch_bucket_size": a_size_or_auto}
BY_ZERO |= {"stage3_param_persistence_threshold": a_size_or_auto}


def steps(n: float) -> bool:
    return 0 < n < 1 or (1 <= n < INF and n == int(n))


RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("max_length per_device_train_batch_size per_device_eval_batch_size", lambda n: n >= 1, "at least 1"),
    ("global_batch_size hardware.processes hardware.nodes", lambda n: n >= 1, "at least 1"),
    ("gradient_accumulation_steps precompute_ref_batch_size ref_model_sync_steps", lambda n: n >= 1, "at least 1"),
    ("torch_empty_cache_steps pad_to_multiple_of dataloader_prefetch_factor", lambda n: n >= 1, "at least 1"),
    ("evaluation.max_new_tokens trainer.peft_config.r", lambda n: n >= 1, "at least 1"),
    ("threads data.workers", lambda n: n >= 1, "at least 1, or null for every core"),
    ("save_total_limit", lambda n: n >= 1, "at least 1, or null to keep every checkpoint"),
    ("max_steps", lambda n: n >= 1 or n == -1, "at least 1, or -1 for num_train_epochs"),
    ("logging_steps eval_steps save_steps", steps, "a whole number of steps, or below 1 a share of all of them"),
    ("beta num_train_epochs adam_epsilon", lambda x: 0 < x < INF, "more than 0"),
    ("discopop_tau neftune_noise_alpha trainer.peft_config.lora_alpha", lambda x: 0 < x < INF, "more than 0"),
    ("learning_rate weight_decay warmup_steps eval_delay", lambda x: 0 <= x < INF, "0 or more"),
    ("router_aux_loss_coef desirable_weight undesirable_weight", lambda x: 0 <= x < INF, "0 or more"),
    ("dataloader_num_workers evaluation.max_rows", lambda n: n >= 0, "0 or more"),
    ("max_grad_norm", lambda x: x >= 0, "0 or more; 0 does not clip"),
    ("adam_beta1 adam_beta2 label_smoothing label_smoothing_factor", lambda x: 0 <= x < 1, "0 to below 1"),
    ("trainer.peft_config.lora_dropout", lambda x: 0 <= x < 1, "0 to below 1"),
    ("data.test_share", lambda x: 0 < x < 1, "a share lies between 0 and 1"),
    ("data.test_rows data.max_rows data.train_rows", lambda n: n >= 1, "at least 1 row"),
    ("ref_model_mixup_alpha", lambda x: 0 < x <= 1, "more than 0 and at most 1, the share that a sync takes over"),
    ("ld_alpha", lambda x: 0 <= x <= 1, "0 to 1"),
    ("seed data.seed data_seed trainer.args.seed", lambda n: 0 <= n < 2**32, f"0 to {2**32 - 1}, as numpy takes it"),
)

# ---------------------------------------------------------------- what contradicts what

BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
BY_LENGTH = ("group_by_length", "batch_rebalance")
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
SORTING = {"aot", "aot_unpaired"}
SMOOTHED = {"robust", "exo_pair", *SORTING}
LOW_RANK = ("galore", "apollo")
# What transformers reads of it, and what torch.utils.checkpoint.checkpoint takes.
CHECKPOINTING = ("every_n_layers", "use_reentrant", "context_fn", "determinism_check", "debug", "early_stop",
                 "preserve_rng_state")
ON_THE_WAY = "set trainer.args.eval_strategy=steps trainer.args.eval_steps=…"

WRONG: tuple[tuple[str, Condition, str], ...] = (
    # what belongs together
    ("trainer.args._target_", lambda run: run.foreign,
     "{run.trainer} takes {run.wanted.name}, or what extends it"),
    ("objective", lambda run: not re.match("eval_|exact_match$", run.objective),
     "what is measured is called eval_… or exact_match; choose eval_loss"),
    ("objective", lambda run: run.objective == "exact_match" and not run.rows_answered,
     "it is measured on rows that are answered; set evaluation.max_rows to 1 or more"),

    # precision
    ("fp16", lambda run: run.fp16 and run.half,
     "trainer.args.bf16 is on too; set one of them to false"),
    ("fp16", lambda run: run.fp16 and run.use_cpu,
     "on a processor it is ignored; trainer.args.bf16=true works there"),
    ("fp16", lambda run: run.fp16 and (run.quantized or (run.dtype != "float32" and not run.adapter)),
     "its gradients are scaled, for which trained weights have to be float32: model.dtype=float32, or bf16=true"),
    ("bf16", lambda run: run.half and run.dtype == "float16",
     "the weights are float16; set model.dtype=float32 or bfloat16"),
    ("tf32", lambda run: run.tf32 and run.use_cpu,
     "it needs a GPU, and trainer.args.use_cpu is true"),
    ("activation_offloading", lambda run: run.activation_offloading and run.use_cpu,
     "it moves activations from a GPU to the processor, and trainer.args.use_cpu is true"),
    ("model.attn_implementation", lambda run: "flash" in run.attention and run.use_cpu,
     "it needs a GPU; on a processor sdpa and eager work"),
    ("model.quantization_config", lambda run: run.quantized and not run.adapter,
     "quantised weights cannot be trained; peft=qlora adds an adapter to them"),
    ("trainer.peft_config.target_modules", lambda run: "lm_head" in run.adapted,
     "the loss is computed from lm_head's own weight, an adapter on it would not be trained; leave it out"),

    ("trainer.peft_config.task_type", lambda run: run.adapter.get("task_type") not in (None, "CAUSAL_LM"),
     "a language model is trained; it is CAUSAL_LM"),

    # lengths and batches
    ("global_batch_size", lambda run: run.batch is None and "auto" in run.passes,
     "perf=auto divides it into passes; say how many rows an update sees, as global_batch_size=16"),
    ("hardware.processes", lambda run: run.processes > 1 and not run.use_cpu and run.on_a_node > run.accelerators,
     "more than the {run.accelerators} accelerators here; with trainer.args.use_cpu=true they share the processor"),
    ("hardware.rendezvous", lambda run: run.nodes > 1 and not re.fullmatch(r".+:\d+", str(run.rendezvous or run.slurm)),
     "say where the nodes meet, host:port of one of them, as node-1:29500; each runs the same command"),
    ("hardware.slurm", lambda run: run.slurm and "_target_" not in run.hardware["slurm"],
     "it has keys where Slurm starts the run; choose hardware=slurm, slurm_ddp or slurm_fsdp"),
    ("pause_at", lambda run: run.cfg.get("pause_at") is not None and run.slurm,
     "a job of Slurm that is not at its end is queued again; leave one of the two out"),
    ("fsdp_config", lambda run: {*run.fsdp_config} - {*SHARING} or run.fsdp_config.get("version", 2) != 2,
     "of its keys {run.sharing} are known here, with version 2"),
    ("deepspeed", lambda run: run.unfit_for_zero,
     "not known here: {run.unfit_for_zero}. Choose hardware=deepspeed, with hardware.zero.stage=2 or 3, "
     "hardware.zero.offload_optimizer.device=none or cpu, flags, and sizes of buckets; the rest trainer.args says"),
    ("deepspeed", lambda run: run.args.get("deepspeed") and run.processes == 1,
     "it shares out among processes, and there is one: set hardware.processes=2, or choose hardware=gpu"),
    ("deepspeed", lambda run: run.args.get("deepspeed") and run.args.get("fsdp"),
     "trainer.args.fsdp shares out the same; leave one of the two out"),
    ("fp16", lambda run: run.fp16 and run.args.get("deepspeed"),
     "DeepSpeed scales gradients in its own way, which no checkpoint has; trainer.args.bf16=true, or hardware=fsdp"),
    ("optim", lambda run: run.args.get("deepspeed") and run.optim not in ("adamw_torch", "adamw_torch_fused"),
     "DeepSpeed gives an optimizer all weights in one row, which adamw_torch and adamw_torch_fused do not mind"),
    ("model.dtype", lambda run: run.args.get("deepspeed") and run.dtype not in (None, "float32"),
     "DeepSpeed learns in float32 what a checkpoint would have to round; set model.dtype=float32"),
    ("model.quantization_config", lambda run: run.args.get("deepspeed") and run.quantized,
     "DeepSpeed shares out quantised weights in a way that nobody has tried here; choose hardware=ddp"),
    ("torch_compile", lambda run: run.stage3 and run.args.get("torch_compile") is True,
     "what is compiled and what DeepSpeed gathers do not go together; hardware.zero.stage=2, or hardware=fsdp"),
    ("precompute_ref_log_probs", lambda run: run.args.get("deepspeed") and run.adapter
     and run.args.get("precompute_ref_log_probs"),
     "TRL would share out the model for it before the adapter is known; set it to false"),
    ("sync_ref_model", lambda run: run.args.get("sync_ref_model") and (
        run.args.get("fsdp") or run.args.get("deepspeed")),
     "a reference that moves is not saved where weights are shared out; set hardware=ddp"),
    ("global_batch_size", lambda run: run.batch is None and run.processes > 1,
     "{run.processes} processes would see as many times the rows in an update as one does; say how many, as "
     "global_batch_size=16, or choose hardware=ddp, which does"),
    ("global_batch_size", lambda run: run.indivisible,
     "{run.processes} processes share a multiple of {run.at_once} rows; the nearest are {run.nearest}, or choose "
     "another hardware.processes or trainer.args.per_device_train_batch_size"),
    ("global_batch_size", lambda run: run.batch and run.whole and not run.indivisible
     and run.processes > 0 and math.prod(run.passes) * run.processes != run.batch,
     "an update sees {run.seen} rows; leave one of the two to it, as trainer.args.gradient_accumulation_steps=auto"),
    ("global_batch_size", lambda run: run.batch and run.uneven,
     "has to be a multiple of {run.uneven}, which is asked for"),
    ("max_length", lambda run: run.max_length is None and run.packing,
     "packing fills rows up to it; set it, or trainer.args.packing=false"),
    ("pad_to_multiple_of", lambda run: run.max_length and run.max_length % run.pads_to,
     "rows would be padded beyond trainer.args.max_length={run.max_length}, which is no multiple of it"),
    ("generation_batch_size", lambda run: (run.generation_batch_size or 0) % run.per_device_train_batch_size,
     "has to be a multiple of trainer.args.per_device_train_batch_size={run.per_device_train_batch_size}"),
    ("num_generations", lambda run: run.rows_generated % max(run.num_generations, 1),
     "has to divide the {run.rows_generated} rows that are generated at once"),
    ("per_device_train_batch_size", lambda run: "kto" in run.losses and run.per_device_train_batch_size < 2,
     "the loss kto compares the rows of a batch, at least 2"),
    ("accelerator_config", lambda run: run.accumulates_elsewhere and run.gradient_accumulation_steps > 1,
     "its num_steps says what trainer.args.gradient_accumulation_steps={run.gradient_accumulation_steps} says"),

    # several rows in one
    ("packing_strategy", lambda run: run.packing_strategy == "wrapped" and (run.packing or run.eval_packing),
     "rows of one pack would attend to each other, and some be cut in two; bfd and bfd_split keep them apart"),
    ("eval_packing", lambda run: run.eval_packing and not run.packing and not run.padding_free,
     "held-out rows of one pack would attend to each other; TRL keeps them apart with trainer.args.packing=true"),
    ("padding_free", lambda run: run.padding_free and not run.packing and run.max_length is not None,
     "TRL takes it with trainer.args.max_length=null or trainer.args.packing=true"),
    ("train_sampling_strategy", lambda run: run.pairs and run.train_sampling_strategy in BY_LENGTH,
     "it does not know how long a pair is; choose random or sequential"),
    ("train_sampling_strategy", lambda run: "kto" in run.losses and run.train_sampling_strategy != "sequential",
     "the loss kto compares each row with its neighbour; it needs sequential"),
    ("encode.train_on", lambda run: run.weighted and run.packing,
     "the weights need trainer.args.packing=false"),
    ("encode.train_on", lambda run: run.weighted and run.eval_packing,
     "the weights need trainer.args.eval_packing=false"),
    ("encode.train_on", lambda run: run.weighted and run.padding_free,
     "the weights need trainer.args.padding_free=false"),
    ("encode.train_on", lambda run: run.weighted and run.losses != ["nll"],
     "the weights need trainer.args.loss_type=nll"),
    ("encode.train_on", lambda run: run.weighted and run.label_smoothing_factor,
     "the weights need trainer.args.label_smoothing_factor=0"),

    # the loss
    ("loss_type", lambda run: run.strange("loss_type", run.losses),
     "{run.trainer} knows {run.known_losses}"),
    ("loss_type", lambda run: not run.losses,
     "name at least one"),
    ("loss_type", lambda run: len(set(run.losses)) < len(run.losses),
     "each loss once; trainer.args.loss_weights says how much of it counts"),
    ("loss_weights", lambda run: any(not 0 <= weight < INF for weight in run.loss_weights or ()),
     "0 or more each"),
    ("loss_weights", lambda run: run.loss_weights and len(run.loss_weights) != len(run.losses),
     "one for each of the losses, which are {run.loss_names}"),
    ("f_divergence_type", lambda run: run.strange("f_divergence_type", [run.f_divergence_type]),
     "choose one of {run.known_divergences}"),
    ("f_divergence_type", lambda run: run.f_divergence_type != "reverse_kl" and not set(run.losses) <= OF_DIFFERENCES,
     "trainer.args.loss_type={run.loss_names} is defined for reverse_kl only"),
    ("use_weighting", lambda run: run.use_weighting and set(run.losses) & SORTING,
     "trainer.args.loss_type={run.loss_names} sorts the pairs of a batch, and would mix up their weights"),
    ("label_smoothing", lambda run: "exo_pair" in run.losses and run.label_smoothing == 0,
     "the loss exo_pair needs more than 0; its paper has 1e-3"),
    ("label_smoothing", lambda run: "robust" in run.losses and run.label_smoothing >= 0.5,
     "for the loss robust it is the share of wrong labels, below 0.5"),

    # the reference of preference training
    ("sync_ref_model", lambda run: run.sync_ref_model and run.precompute_ref_log_probs,
     "what is precomputed is of a reference that does not move; set trainer.args.precompute_ref_log_probs=false"),
    ("sync_ref_model", lambda run: run.sync_ref_model and run.adapter,
     "with an adapter, the model without it is the reference, and does not move; leave peft out, or set it to false"),
    ("sync_ref_model", lambda run: run.sync_ref_model and 0 < run.max_steps < run.ref_model_sync_steps,
     "the run ends at step {run.max_steps}, before trainer.args.ref_model_sync_steps={run.ref_model_sync_steps}"),
    ("precompute_ref_log_probs", lambda run: run.precompute_ref_log_probs and run.stream,
     "a stream is read while it is trained on; set it to false, or {run.stream}=false"),

    # evaluating and saving
    ("save_strategy", lambda run: run.save_strategy == "best" and run.metric_for_best_model is None,
     "set trainer.args.metric_for_best_model too, e.g. to eval_loss"),
    ("save_strategy", lambda run: run.save_strategy == "best" and not run.evaluates,
     f"the best is found by evaluating on the way; {ON_THE_WAY}"),
    ("load_best_model_at_end", lambda run: run.load_best_model_at_end and not run.evaluates,
     f"the best is found by evaluating on the way; {ON_THE_WAY}"),
    ("load_best_model_at_end", lambda run: run.load_best_model_at_end and run.evaluates and run.saves_otherwise,
     "trainer.args.save_strategy={run.save_strategy} has to be eval_strategy={run.eval_strategy}, or best"),
    ("load_best_model_at_end", lambda run: run.load_best_model_at_end and run.best_is_not_saved,
     "trainer.args.save_steps={run.save_steps} has to be a multiple of the steps between evaluations"),
    ("lr_scheduler_type", lambda run: run.lr_scheduler_type in BY_EVALUATION and not run.evaluates,
     f"it goes by what is measured on the way; {ON_THE_WAY}"),
    ("callbacks.{run.stopper}", lambda run: run.stopper and not run.evaluates,
     f"it stops by what is measured on the way; {ON_THE_WAY}"),
    ("callbacks.{run.stopper}", lambda run: run.stopper and not (
        run.load_best_model_at_end or run.metric_for_best_model),
     "it stops by what is measured on the way; set trainer.args.metric_for_best_model=eval_loss"),

    # the optimizer, and what is patched into the model
    ("optim_target_modules", lambda run: run.optim.startswith(LOW_RANK) and run.optim_target_modules is None,
     "trainer.args.optim={run.optim} needs it, e.g. all-linear"),
    ("gradient_accumulation_steps", lambda run: "layerwise" in run.optim and run.gradient_accumulation_steps > 1,
     "trainer.args.optim={run.optim} updates each layer as its gradient comes; set it to 1"),
    ("use_liger_kernel", lambda run: run.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None,
     "the package liger-kernel is not installed; pip install smoltrain[liger]"),
    ("activation_checkpointing_kwargs", lambda run: run.unread_by_torch,
     f"{{run.unread_by_torch}} is none of {', '.join(CHECKPOINTING)}"),
    ("liger_kernel_config", lambda run: "fused_linear_cross_entropy" in (run.liger_kernel_config or ()),
     "TRL has a fused head of its own; leave fused_linear_cross_entropy out"),

    # where rows come from
    ("{run.nowhere}", lambda run: run.nowhere,
     "name a file, a folder or a data set"),
    ("data.weights", lambda run: run.misweighed,
     "give each of {run.source_names} a weight above 0, and no other"),

    # rows that are streamed
    ("{run.stream}", lambda run: run.stream and run.max_steps <= 0,
     "nobody knows how many rows a stream has; set trainer.args.max_steps=…"),
    ("{run.stream}", lambda run: run.stream and run.processes > 1,
     "one process reads a stream, and batches of several lengths are not shared; set hardware.processes=1"),
    ("{run.stream}", lambda run: run.stream and run.dataloader_num_workers,
     "its rows are counted as they are read, in this process; set trainer.args.dataloader_num_workers=0"),
    ("{run.stream}", lambda run: run.stream and (run.max_length or INF) > run.positions,
     "its rows may be of any length, and the model was made for {run.positions} tokens; set trainer.args.max_length"),
)

# ---------------------------------------------------------------- what is not a user's to set

NEVER: tuple[tuple[str, str], ...] = (
    ("output_dir",
     "everything of a run is in one directory, choose it with hydra.run.dir="),
    ("resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
     "the same command goes on with its unfinished run, resume= names another; model.from_run= starts from a model"),
    ("enable_jit_checkpoint",
     "an interrupted run would end as if it had completed; without, it ends as preempted"),
    ("push_to_hub hub_model_id hub_strategy hub_always_push hub_private_repo hub_revision",
     "a run pushes nothing; when it has completed: hf upload <you>/<name> <the run's directory>/model"),
    ("trust_remote_code",
     "no code that comes with a model is run"),
    ("model_init_kwargs",
     "the model is loaded by then; the keys of model, as model.dtype, say how"),
    ("trainer.peft_config.base_model_name_or_path trainer.peft_config.revision",
     "the adapter is for the model of this run; model= names it"),
    ("trainer.peft_config.inference_mode",
     "an adapter that is trained is not in inference"),
    ("do_train do_eval do_predict",
     "upstream leaves it to scripts; a run trains, and evaluates before and after"),
    ("gradient_checkpointing",
     "its new name is trainer.args.activation_checkpointing, which is set and wins"),
    ("gradient_checkpointing_kwargs",
     "its new name is trainer.args.activation_checkpointing_kwargs"),
    ("bf16_full_eval fp16_full_eval",
     "the evaluation before training would turn the weights into it for good; model.dtype says what they are"),
    ("auto_find_batch_size",
     "another batch would be trained on than the config says; smoltrain check tells what fits"),
    ("prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_accumulation_steps",
     "an evaluation keeps no predictions"),
    ("label_names use_cache length_column_name",
     "TRL never reads it"),
    ("parallelism_config local_rank eval_use_gather_object average_tokens_across_devices",
     "the processes of a run are started and share its batches by hardware.processes"),
    ("log_on_each_node log_level_replica save_on_each_node trainer.args.accelerator_config.split_batches",
     "all processes of a run share one folder, and the first of them writes"),
)
# Rows are tokens when TRL gets them, so these would be accepted and ignored.
TOKENIZING: tuple[tuple[str, str], ...] = (
    ("assistant_only_loss completion_only_loss",
     "encode.train_on=assistant, last, all or weighted says what is learned"),
    ("truncation_mode",
     "data.on_too_long=truncate, drop or error says what becomes of rows that are too long"),
    ("dataset_num_proc",
     "data.workers says how many processes prepare rows"),
    ("dataset_text_field",
     "data.columns={text: …} says which column it is"),
    ("dataset_kwargs",
     "rows are prepared before TRL sees them"),
    ("chat_template_path",
     "model.chat_template names the template"),
    ("eos_token",
     "model.eos_token names the token"),
)

# ---------------------------------------------------------------- what has no effect without something else

ADAM = re.compile(r"(?!galore|grok).*(adam|ademamix)")
NO_ARGUMENTS = re.compile(r"adamw_torch(_\D+)?$|adafactor|adamw_(bnb_)?8bit|paged_adamw|.*lion|.*lomo")

NEEDS: tuple[tuple[str, Condition, str], ...] = (
    # evaluating, saving, logging
    ("eval_steps", lambda run: run.eval_strategy == "steps", "trainer.args.eval_strategy=steps"),
    ("eval_steps", lambda run: run.eval_strategy != "steps" or not 0 < run.max_steps < run.eval_steps,
     "as many steps, and the run ends at trainer.args.max_steps={run.max_steps}"),
    ("evaluation.max_new_tokens", lambda run: run.rows_answered, "evaluation.max_rows=1 or more"),
    ("eval_delay", lambda run: run.evaluates, "trainer.args.eval_strategy=steps or epoch"),
    ("save_steps", lambda run: run.save_strategy == "steps", "trainer.args.save_strategy=steps"),
    ("save_total_limit save_only_model", lambda run: run.saves, "trainer.args.save_strategy=steps, epoch or best"),
    ("logging_steps", lambda run: run.logging_strategy == "steps" or (run.evaluates and not run.eval_steps),
     "trainer.args.logging_strategy=steps"),
    ("metric_for_best_model greater_is_better", lambda run: run.picks_the_best,
     "trainer.args.save_strategy=best, load_best_model_at_end=true or early stopping"),
    ("run_name", lambda run: run.trackers, "trainer.args.report_to, as tracking=wandb sets it"),
    ("project trackio_space_id trackio_bucket_id trackio_static_space_id", lambda run: "trackio" in run.trackers,
     "trainer.args.report_to=trackio; callbacks.tracking.project names that of tracking=trackio"),

    # steps and the learning rate
    ("num_train_epochs", lambda run: run.max_steps <= 0, "trainer.args.max_steps=-1; it is {run.max_steps}, and wins"),
    ("warmup_steps", lambda run: run.lr_scheduler_type not in ("constant", *BY_EVALUATION) or "free" in run.optim,
     "another trainer.args.lr_scheduler_type than {run.lr_scheduler_type}: constant_with_warmup, linear, cosine"),
    ("lr_scheduler_kwargs", lambda run: not str(run.lr_scheduler_type).startswith("constant"),
     "another trainer.args.lr_scheduler_type than {run.lr_scheduler_type}"),

    # the optimizer
    ("adam_epsilon", lambda run: ADAM.match(run.optim), "an Adam; trainer.args.optim is {run.optim}"),
    ("adam_beta1 adam_beta2", lambda run: ADAM.match(run.optim) or "lion" in run.optim,
     "an Adam or Lion; trainer.args.optim is {run.optim}"),
    ("optim_args", lambda run: not NO_ARGUMENTS.match(run.optim),
     "an optimizer that takes some; trainer.args.optim is {run.optim}"),
    ("optim_target_modules", lambda run: run.optim.startswith(LOW_RANK), "trainer.args.optim=galore_… or apollo_…"),
    ("weight_decay", lambda run: not run.optim.startswith((*LOW_RANK, "lomo", "adalomo")),
     "another trainer.args.optim than {run.optim}"),

    # the loss
    ("label_smoothing", lambda run: set(run.losses) & SMOOTHED,
     f"trainer.args.loss_type={', '.join(sorted(SMOOTHED))}"),
    ("label_smoothing_factor", lambda run: "nll" in run.losses,
     "trainer.args.loss_type=nll, SFT's; DPO has trainer.args.label_smoothing"),
    ("discopop_tau", lambda run: "discopop" in run.losses, "trainer.args.loss_type=discopop"),
    ("f_alpha_divergence_coef", lambda run: run.f_divergence_type == "alpha_divergence",
     "trainer.args.f_divergence_type=alpha_divergence"),

    # the reference
    ("precompute_ref_batch_size", lambda run: run.precompute_ref_log_probs,
     "trainer.args.precompute_ref_log_probs=true"),
    ("ref_model_mixup_alpha ref_model_sync_steps", lambda run: run.sync_ref_model, "trainer.args.sync_ref_model=true"),

    # rows and batches
    ("padding_free", lambda run: "packing" in run.takes, "SFT; TRL's {run.trainer} pads whatever it says"),
    ("packing_strategy", lambda run: run.packing or run.eval_packing, "trainer.args.packing=true"),
    ("dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order",
     lambda run: run.dataloader_num_workers, "trainer.args.dataloader_num_workers=1 or more"),
    ("dataloader_drop_last train_sampling_strategy data_seed", lambda run: not run.stream,
     "rows that are not streamed: {run.stream}=false"),
    ("data.test_share", lambda run: not run.test_rows_given, "a source without held-out rows of its own"),
    ("data.stopping_strategy", lambda run: run.weights, "data.weights"),
    ("data.on_too_long", lambda run: run.max_length is not None, "trainer.args.max_length"),

    # the machine and the model
    ("model.revision", lambda run: not run.from_run, "a model of the hub; model.from_run wins"),
    ("trainer.peft_config.loftq_config", lambda run: not run.adapter or run.adapter.get("init_lora_weights") == "loftq",
     "trainer.peft_config.init_lora_weights=loftq"),
    ("activation_checkpointing_kwargs", lambda run: run.activation_checkpointing,
     "trainer.args.activation_checkpointing=true"),
    ("liger_kernel_config", lambda run: run.use_liger_kernel, "trainer.args.use_liger_kernel=true"),
    ("ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
     lambda run: run.processes > 1, "hardware.processes=2 or more"),
    ("fsdp", lambda run: run.processes > 1, "hardware.processes=2 or more; one process has all weights, hardware=gpu"),
    ("fsdp_config", lambda run: run.args.get("fsdp"), "trainer.args.fsdp=true"),
    ("hardware.zero", lambda run: run.args.get("deepspeed"), "hardware=deepspeed, and hardware.processes=2 or more"),
    ("hardware.rendezvous", lambda run: run.nodes > 1, "hardware.nodes=2 or more"),
    ("torch_empty_cache_steps", lambda run: not run.use_cpu, "a GPU, and trainer.args.use_cpu is true"),
)

# ---------------------------------------------------------------- what looks like a mistake

# What is usual by a factor of ten either way, for Adam: of training with a reference or without, an adapter or all.
RATES = {
    ("SFT", "all weights"): (1e-7, 2e-3),
    ("SFT", "an adapter"): (1e-6, 1e-2),
    ("preference training", "all weights"): (1e-8, 1e-4),
    ("preference training", "an adapter"): (1e-7, 1e-3),
}

ODD: tuple[tuple[str, Condition, str], ...] = (
    ("learning_rate", lambda run: ADAM.match(run.optim) and not run.usual[0] <= run.learning_rate <= run.usual[1],
     "far from what is usual for {run.method} of {run.trained}, {run.usual[0]:g} to {run.usual[1]:g}"),
    ("max_length", lambda run: run.max_length is not None and run.max_length > run.positions,
     "the model was made for {run.positions} tokens; a longer row stops the run"),
    ("model.dtype", lambda run: run.dtype in ("bfloat16", "float16") and not run.adapter,
     "weights of 16 bits lose small updates; float32 with trainer.args.bf16=true computes as fast and keeps them"),
    ("hardware.processes", lambda run: run.use_cpu and run.on_a_node > run.cores,
     "more than the {run.cores} cores here, which they take turns on"),
    ("callbacks.{run.stopper}", lambda run: run.stopper and not run.load_best_model_at_end,
     "the model that is kept is the last, not the best; trainer.args.load_best_model_at_end=true keeps that"),
)
# fmt: on


# ---------------------------------------------------------------- what the tables find


def problems(cfg: dict[str, Any], chains: Mapping[str, Sequence[Any]], wrong: Iterable[str] = ()) -> list[Problem]:
    """What cannot be meant in a resolved config, and what somebody set that nothing would read.

    `chains` says who set each key (`origins.Setting`); what is ours is never idle. `wrong` are the keys of which
    something is said already. Nothing is imported to know it.
    """
    numbers = list(beyond(cfg))
    run = Run(cfg, [*wrong, *(problem.key for problem in numbers)])
    return [*numbers, *contradictions(run), *never(run, chains), *idle(run, chains)]


def remarks(cfg: dict[str, Any]) -> list[str]:
    """What a resolved config allows itself that looks like a mistake."""
    run = Run(cfg, (problem.key for problem in beyond(cfg)))
    return [f"{named(key, run)}: {text.format(run=run)}" for key, condition, text in ODD if holds(condition, run)]


def beyond(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Numbers out of their range; NaN is in none."""
    sources = at(cfg, "data.sources")
    for keys, fits, allowed in RANGES:
        named = [full(key) for key in keys.split()]
        for name in sources if isinstance(sources, dict) else ():
            named += [key.replace("data.", f"data.sources.{name}.", 1) for key in named if key.startswith("data.")]
        for key in named:
            value = at(cfg, key)
            if isinstance(value, int | float) and not isinstance(value, bool) and not fits(value):
                yield Problem(key, f"{key}={shown(value)}: {allowed}")


def contradictions(run: Run) -> Iterator[Problem]:
    for key, condition, mend in WRONG:
        if holds(condition, run):
            key = full(key.format(run=run))
            yield Problem(key, f"{named(key, run)}: {mend.format(run=run)}")


def never(run: Run, chains: Mapping[str, Sequence[Any]]) -> Iterator[Problem]:
    """Fields that somebody gave a value though they are none of a user's, be it the default; it may be a secret."""
    for key, instead in reserved(str(run.cfg["encode"]["_target_"])).items():
        if at(run.cfg, key) in (None, OUTPUT_DIR):
            continue
        leaf = leaf_of(key, chains)
        if leaf is None or set_by_someone(chains[leaf]):
            yield Problem(key, f"{key}: {instead}")


def reserved(encoder: str) -> dict[str, str]:
    """The keys that are none of a user's to set, and what to do instead; with most encoders rows are tokens by then."""
    tables = (*NEVER, *(() if encoder.endswith(".Untokenized") else TOKENIZING))
    return {full(field): instead for fields, instead in tables for field in fields.split()}


def idle(run: Run, chains: Mapping[str, Sequence[Any]]) -> Iterator[Problem]:
    """Settings that lack what they need to have an effect.

    Not those of a file that lack it because of the command line: to try an experiment without its evaluation, one
    turns that off and leaves the rest as it is.
    """
    for keys, condition, needed in NEEDS:
        for key in map(full, keys.split()):
            run.read.clear()
            if at(run.cfg, key) is None or not lacks(condition, run):
                continue
            read = [chains.get(full(field)) for field in run.read]
            leaf = leaf_of(key, chains)
            if leaf is None or not set_by_someone(chains[leaf]) or not changes(run, key, chains[leaf]):
                continue
            if chains[leaf][-1].typed or not any(chain and chain[-1].typed for chain in read):
                yield Problem(leaf, f"{named(key, run)} has no effect here; it needs {needed.format(run=run)}")


def leaf_of(key: str, chains: Mapping[str, Sequence[Any]]) -> str | None:
    """The key itself, or the first one below it, of those that were set."""
    return next((leaf for leaf in chains if leaf == key or leaf.startswith(f"{key}.")), None)


def set_by_someone(chain: Sequence[Any]) -> bool:
    """Whether the setting in force is a user's or an experiment's, and not one that merely stands in our groups."""
    return not chain[-1].shipped or "experiment/" in chain[-1].where


def changes(run: Run, key: str, chain: Sequence[Any] = ()) -> bool:
    """Whether a value asks for anything but what happens without it: what it replaces, or the class's default."""
    value = at(run.cfg, key)
    parameter = run.parameter(key)
    default = chain[-2].value if len(chain) > 1 else parameter.default if parameter else None
    if default is COMPUTED or not value:
        return bool(value) or (value is False and default is True)
    return bool(value != default)


def holds(condition: Condition, run: Run) -> bool:
    try:
        return bool(condition(run))
    except Silent:
        return False


def lacks(condition: Condition, run: Run) -> bool:
    try:
        return not condition(run)
    except Silent:
        return False


def full(key: str) -> str:
    """`beta` is short for `trainer.args.beta`."""
    return key if "." in key or key in ("seed", "threads", "objective", "global_batch_size", "pause_at") else ARGS + key


def named(key: str, run: Run) -> str:
    """A key with its value, or its default; a node without what is in it."""
    key = full(key.format(run=run))
    value = at(run.cfg, key)
    if value is None and (parameter := run.parameter(key)) and key.rpartition(".")[2] not in run.node(key):
        value = parameter.default
    return key if isinstance(value, dict) or value is COMPUTED else f"{key}={shown(value)}"
