"""What every rank of a run imports, imported once in the process that all are forked from (ranks.warm_up)."""

import signal

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import transformers.trainer  # noqa: F401
import trl.trainer.dpo_trainer
import trl.trainer.sft_trainer  # noqa: F401

import smoltrain.callbacks
import smoltrain.dpo
import smoltrain.evaluate
import smoltrain.preflight
import smoltrain.sft
import smoltrain.train
import smoltrain.trainers  # noqa: F401
from smoltrain.ranks import ends_with_its_parent

# The ranks end with this process, and it ends with the command, whatever ends that. What stops a run may signal all.
ends_with_its_parent(signal.SIGKILL)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
