"""Models and their tokenizers, loaded together: from the hub, a folder, this package, or a finished run."""

from pathlib import Path
from typing import Any, cast

from smoltrain.config import CONF, ConfigError, package_folder


def load(
    name_or_path: str,
    from_run: str | None,
    dtype: str,
    attn_implementation: str,
    chat_template: str | None,
    eos_token: str | None,
    quantization_config: Any,
):
    """A causal language model and its tokenizer, which agree on end of turn and chat template.

    `from_run` is a run's directory: its final model replaces the weights that `name_or_path` names, and a
    LoRA adapter found there is merged into them. Weights are of `dtype`, a torch dtype's name.

    Raises ConfigError where the tokenizer has no chat template, no such end-of-turn token, or more tokens
    than the model has embeddings.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(Path(from_run) / "model") if from_run else locate(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if chat_template:
        tokenizer.chat_template = read_chat_template(chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(f"model.chat_template: {name_or_path} has no chat template of its own; set one, e.g. chatml")
    if eos_token:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(f"model.eos_token={eos_token}: not a token of {name_or_path}")
        tokenizer.eos_token = eos_token
    if not hasattr(torch, dtype):
        raise ConfigError(f"model.dtype={dtype}: not a torch dtype; float32, bfloat16 and float16 are")
    if (Path(source) / "adapter_config.json").exists():
        source = merged(Path(source))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=attn_implementation, quantization_config=quantization_config
    )
    embeddings = len(cast(torch.nn.Embedding, model.get_input_embeddings()).weight)
    if len(tokenizer) > embeddings:
        raise ConfigError(f"model {name_or_path}: {len(tokenizer)} tokens in the tokenizer, {embeddings} in the model")
    if eos_token:  # among those the model already stops at, as TRL does
        model.config.eos_token_id = tokenizer.eos_token_id
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known] if known is not None else []
        model.generation_config.eos_token_id = [
            tokenizer.eos_token_id,
            *(i for i in known if i != tokenizer.eos_token_id),
        ]
    return model, tokenizer


def merged(adapter: Path) -> str:
    """A folder beside an adapter with the model that it makes of its base, written once.

    It has to lie on disk: DPO's reference and the base of a further adapter are read again from where a model came.
    """
    folder = adapter.parent / "merged"
    if not folder.is_dir():
        from peft import AutoPeftModelForCausalLM

        partial = folder.with_suffix(".partial")
        AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="float32").merge_and_unload().save_pretrained(partial)
        partial.rename(folder)
    return str(folder)


def locate(name_or_path: str) -> str:
    """`pkg://smoltrain/tiny` as the folder inside the installed package; any other name as it is."""
    if not name_or_path.startswith("pkg://"):
        return name_or_path
    package, _, folder = name_or_path.removeprefix("pkg://").partition("/")
    return str(package_folder(package) / folder)


def read_chat_template(name: str) -> str:
    """The text of a chat template: one of conf/chat_template by its name, or any .jinja file by its path."""
    file = Path(name) if name.endswith(".jinja") else CONF / "chat_template" / f"{name}.jinja"
    if not file.is_file():
        choices = ", ".join(sorted(f.stem for f in (CONF / "chat_template").glob("*.jinja")))
        raise ConfigError(f"model.chat_template={name}: no such file; choose one of {choices}, or a path to a .jinja")
    return file.read_text()
