"""Every YAML file that is shipped: it composes, it builds what it names, and every value in it has an effect."""

import inspect
import json
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from conftest import resolvable
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from smoltrain.config import BASE, CONF, ConfigError
from smoltrain.config.groups import description
from smoltrain.config.overrides import read
from smoltrain.model import locate, read_chat_template

FILES = sorted(CONF.glob("*/*.yaml"))
CHOICES = [f"{file.parent.name}={file.stem}" for file in FILES if file.stem != BASE]
ARCHITECTURES = json.loads((Path(__file__).parent / "fixtures" / "architectures.json").read_text())


def options(*groups: str) -> list[str]:
    return [choice for choice in CHOICES if choice.split("=")[0] in groups]


def source(choice: str) -> DictConfig:
    return OmegaConf.load(CONF / f"{choice.replace('=', '/')}.yaml")


@cache
def compose(*overrides: str) -> DictConfig:
    """The checked config, with a value for whatever the chosen files leave to the user (a path)."""
    blanks = [f"{c.split('=')[0]}.{key}=given" for c in overrides if c in CHOICES for key in open_keys(source(c))]
    return resolvable([*overrides, *blanks])


def open_keys(cfg: DictConfig) -> list[str]:
    return [key for key in cfg if OmegaConf.is_missing(cfg, key)]


def leaves(tree: dict, path: str = "") -> dict[str, object]:
    """`{"trainer": {"args": {"beta": 1}}}` as `{"trainer.args.beta": 1}`."""
    pairs = [leaves(v, f"{path}{k}.") if isinstance(v, dict) and v else {f"{path}{k}": v} for k, v in tree.items()]
    return dict(chain.from_iterable(pair.items() for pair in pairs))


@pytest.mark.parametrize("choice", options("sweep"))
def test_every_way_of_choosing_trials_is_one(choice):
    from smoltrain.sweep.search import axis, search
    from smoltrain.sweep.space import settings

    found = settings([choice], [])
    varied = [axis(read(f"{key}={values}")) for key, values in found.params.items()]
    varied = varied or [axis(read("trainer.args.learning_rate=1e-4,1e-3"))]
    assert search(found, varied, "eval_loss", 64, Path("optuna.log")).ask()


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in options("sweep")])
def test_every_option_composes_and_every_value_in_it_resolves(choice):
    OmegaConf.to_container(compose(choice), resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_option_says_what_it_is_in_its_first_line(file):
    first, second, *_ = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert first.startswith("# ") and not second.startswith("#")
    assert description(file) == first.removeprefix("# ")  # what --help prints


def test_what_the_machine_decides_is_not_also_in_the_trainers():
    machine = {key for choice in options("hardware") for key in source(choice)}
    assert machine and not machine & set(source(f"trainer={BASE}").args)


# ---------------------------------------------------------------- what the files name


@pytest.mark.parametrize("choice", options("data", "model", "tracking", "experiment"))
def test_targets_exist_and_take_exactly_the_keys_given(choice):
    cfg = OmegaConf.to_container(compose(choice), resolve=True)
    for node in (cfg["data"], cfg["model"], *cfg["callbacks"].values()):
        keys = {key: value for key, value in node.items() if not key.startswith("_")}
        inspect.signature(get_object(node["_target_"])).bind(**keys)


@pytest.fixture(scope="module")
def parameters():
    """Counts the parameters of an architecture without allocating them; a tied head is counted once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    @cache
    def count(name: str) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[name]["config"]))
        return sum(p.numel() for p in model.parameters())

    return count


CHECKPOINTS = {
    c: name for c in options("model") if not (name := source(c).get("name_or_path", "pkg:")).startswith("pkg:")
}


def test_every_checkpoint_has_its_published_architecture_and_no_other_is_kept():
    assert set(CHECKPOINTS.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize("choice", CHECKPOINTS)
def test_a_checkpoint_is_an_architecture_that_transformers_builds_at_its_published_size(choice, parameters):
    assert parameters(CHECKPOINTS[choice]) == ARCHITECTURES[CHECKPOINTS[choice]]["parameters"]


@pytest.mark.parametrize("choice", options("experiment", "trainer", "hardware"))
def test_the_trainers_arguments_are_built_with_every_configured_value(choice):
    args = compose(choice, "trainer.args.use_cpu=true").trainer.args  # bf16 is refused without a GPU otherwise
    built = instantiate(args)
    assert type(built) is get_object(args._target_)
    for key, value in OmegaConf.to_container(args, resolve=True).items():
        if key != "_target_":
            as_kept = {"report_to": [] if value == "none" else [value], "loss_type": [value]}  # lists in TRL
            kept = getattr(built, key)
            if isinstance(value, dict):  # to which defaults are added
                kept = {name: kept[name] for name in value}
            assert kept in (value, as_kept.get(key, value)), key


def test_lora_is_a_lora_config_of_the_promised_size():
    import peft

    lora = instantiate(compose("peft=lora").trainer.peft_config)
    assert type(lora) is peft.LoraConfig
    assert (lora.r, lora.lora_alpha, lora.task_type) == (16, 32, "CAUSAL_LM")


def test_qlora_is_the_same_adapter_beside_weights_in_four_bits():
    lora, qlora = compose("peft=lora"), compose("peft=qlora")
    assert qlora.trainer.peft_config == lora.trainer.peft_config
    quantization = OmegaConf.to_container(qlora.model.quantization_config)
    target = get_object(quantization.pop("_target_"))
    assert quantization.pop("load_in_4bit") is True
    assert set(quantization) <= set(inspect.signature(target).parameters)


# ---------------------------------------------------------------- experiments


def settings(choice: str) -> list[str]:
    """An experiment as the command line that does the same, less its name; ++, for keys that only its own data has."""
    tree = OmegaConf.to_container(source(choice))
    groups = [
        f"{key.split('/')[-1]}={option}" for e in tree.pop("defaults") if e != "_self_" for key, option in e.items()
    ]
    tree.pop("name")
    return [*groups, *(f"++{key}={json.dumps(value)}" for key, value in leaves(tree).items())]


def composed(*overrides: str) -> dict:
    return OmegaConf.to_container(compose(*overrides)) | {"name": None}


EXPERIMENTS = options("experiment")


@pytest.mark.parametrize("choice", EXPERIMENTS)
def test_an_experiment_is_called_like_its_file_and_does_what_its_settings_say(choice):
    assert compose(choice).name == choice.split("=")[1]
    assert composed(choice) == composed(*settings(choice))


@pytest.mark.parametrize(("choice", "setting"), [(choice, s) for choice in EXPERIMENTS for s in settings(choice)])
def test_an_experiment_says_only_what_it_changes(choice, setting):
    try:
        without = composed(*(s for s in settings(choice) if s != setting))
    except ConfigError:  # what is left is no config at all, as the keys of a source without it
        return
    assert without != composed(choice)


@pytest.mark.parametrize("choice", EXPERIMENTS)
def test_an_experiments_rows_fit_the_positions_of_its_model(choice):
    cfg = compose(choice)
    assert cfg.trainer.args.max_length <= ARCHITECTURES[cfg.model.name_or_path]["config"]["max_position_embeddings"]


PROMISED = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_steps": 1000,
    "max_length": 4096,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
}


@pytest.mark.parametrize(
    ("method", "more", "adapter"),
    [
        ("sft", {"_target_": "trl.SFTConfig"}, None),
        ("dpo", {"_target_": "trl.DPOConfig", "beta": 0.1, "loss_type": "sigmoid"}, {"r": 16, "lora_alpha": 32}),
    ],
)
def test_the_smollm3_experiments_are_the_promised_ones(method, more, adapter):
    cfg = compose(f"experiment=smollm3_3b_{method}")
    assert cfg.model.name_or_path == "HuggingFaceTB/SmolLM3-3B"
    assert {key: cfg.trainer.args[key] for key in PROMISED | more} == PROMISED | more
    lora = cfg.trainer.peft_config
    assert (lora and {key: lora[key] for key in adapter}) == adapter


# ---------------------------------------------------------------- chat templates

TEMPLATES = sorted(file.stem for file in (CONF / "chat_template").glob("*.jinja"))
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5."},
    {"role": "user", "content": " And twice that?\n"},
    {"role": "assistant", "content": "\n5 + 5 = 10. "},
]
# The instruct models' own, from tokenizer_config.json of HuggingFaceTB/SmolLM2-135M-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))


@pytest.mark.parametrize("talk", [TALK, [SYSTEM, *TALK]], ids=["bare", "system"])
@pytest.mark.parametrize("template", TEMPLATES)
class TestChatTemplates:
    def test_only_replies_and_their_ends_are_learned(self, tokenizer, template, talk):
        kwargs = {"return_dict": True, "return_assistant_tokens_mask": True}
        row = tokenizer.apply_chat_template(talk, chat_template=read_chat_template(template), **kwargs)
        learned = [i for i, m in zip(row["input_ids"], row["assistant_masks"], strict=True) if m]
        replies = [m["content"] for m in talk if m["role"] == "assistant"]
        assert tokenizer.decode(learned) == "".join(f"{reply}<|im_end|>" for reply in replies)

    def test_a_reply_is_asked_for_with_what_it_was_learned_after(self, tokenizer, template, talk):
        kwargs = {"chat_template": read_chat_template(template), "return_dict": False}
        for tokenize in (False, True):
            whole = tokenizer.apply_chat_template(talk, tokenize=tokenize, **kwargs)
            prompt = tokenizer.apply_chat_template(talk[:-1], tokenize=tokenize, add_generation_prompt=True, **kwargs)
            reply = talk[-1]["content"] + "<|im_end|>"
            assert whole == prompt + (tokenizer(reply)["input_ids"] if tokenize else reply)


@pytest.mark.parametrize("talk", [TALK, TALK[:3], [SYSTEM, *TALK]], ids=["bare", "prompt", "system"])
def test_smollm2_is_the_checkpoints_own_template_with_marks(tokenizer, talk):
    def text(template: str) -> str:
        prompt = talk[-1]["role"] == "user"
        return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, add_generation_prompt=prompt)

    ours = text(read_chat_template("smollm2"))
    assert ours == text(SMOLLM2).removesuffix("<|im_end|>\n") + "<|im_end|>" * (talk[-1]["role"] == "assistant")
    assert ("named SmolLM" in ours) == (talk[0] != SYSTEM)


def test_the_embedded_model_speaks_the_shipped_chatml(tokenizer):
    assert tokenizer.chat_template == read_chat_template("chatml")
