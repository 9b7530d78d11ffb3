"""Models and their tokenizers: from the hub, a folder, this package, or a finished run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from smoltrain.config import CONF, ConfigError
from smoltrain.config.signatures import package_folder


@dataclass
class Checkpoint:
    """A causal language model that is not loaded yet: first its tokenizer, which data needs, then its weights.

    `from_run` is a run's directory: its final model replaces the weights that `name_or_path` names, and a LoRA
    adapter found there is merged into them. Weights are of `dtype`, a torch dtype's name.
    """

    name_or_path: str
    revision: str
    from_run: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    template_date: str
    eos_token: str | None
    quantization_config: Any

    @cached_property
    def source(self) -> str:
        """What transformers loads: a folder on this disk, or a name of the hub, which is asked whether it is one.

        A revision other than main is fetched whole: DPO's reference and the base of an adapter are read again from
        where a model came, by name alone. Raises ConfigError where there is nothing of that name.
        """
        if self.from_run:
            return str(Path(self.from_run) / "model")
        name = locate(self.name_or_path)
        if Path(name).is_dir():
            if self.revision != "main":
                raise ConfigError(
                    f"model.revision={self.revision}: {self.name_or_path} is a folder and has no revisions"
                )
            return name
        from huggingface_hub import snapshot_download

        from smoltrain.data.sources import near
        from smoltrain.hub import commit_of

        if name.startswith((".", "/")) or name.count("/") > 1:
            raise ConfigError(f"model.name_or_path={self.name_or_path}: there is no such folder{near(Path(name))}")

        commit = commit_of("model", name, self.revision)
        if self.revision == "main":
            return name
        return snapshot_download(
            name, revision=commit, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt"]
        )

    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template that its rows are rendered with and the token that ends a turn.

        Raises ConfigError where there is no such model, or it has no template to train with, or no such token.
        """
        from transformers import AutoTokenizer

        from smoltrain.data.templates import training_template

        with self.as_data():
            tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        if tokenizer.backend_tokenizer is None:
            raise ConfigError(f"model {self.name_or_path}: its tokenizer has no fast form, which preparing data needs")
        if self.chat_template:
            tokenizer.chat_template = read_chat_template(self.chat_template)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model.chat_template: {self.name_or_path} has no chat template of its own; set one, e.g. chatml"
            )
        if self.eos_token:
            if self.eos_token not in tokenizer.get_vocab():
                raise ConfigError(f"model.eos_token={self.eos_token}: not a token of {self.name_or_path}")
            tokenizer.eos_token = self.eos_token
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.eos_token: {self.name_or_path} has no token that ends a turn; name one")
        tokenizer.chat_template = training_template(tokenizer, self.template_date)
        return tokenizer

    @contextmanager
    def as_data(self) -> Iterator[None]:
        """Says of a model that comes with code of its own that this is not run; transformers' advice is to run it."""
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ConfigError(
                f"model.name_or_path={self.name_or_path}: it comes with code of its own, which smoltrain does not run; "
                "choose a model whose architecture transformers has"
            ) from error

    def config(self) -> Any:
        """The architecture."""
        from transformers import AutoConfig

        adapter = Path(self.source) / "adapter_config.json"
        source = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else self.source
        with self.as_data():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config._attn_implementation = self.attn_implementation
        return config

    def skeleton(self, tokenizer: Any) -> Any:
        """The model with shapes for weights, on torch's meta device: what can be known of it before it is loaded.

        Raises ConfigError where there are no weights, or the tokenizer has more tokens than the model has embeddings.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AutoHfQuantizer

        folder = Path(self.source)
        if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            raise ConfigError(f"model.name_or_path={self.name_or_path}: no weights (*.safetensors, *.bin) in {folder}")
        if self.quantization_config is not None:
            AutoHfQuantizer.from_config(self.quantization_config, pre_quantized=False).validate_environment()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                self.config(), dtype=getattr(torch, self.dtype), attn_implementation=self.attn_implementation
            )
        embeddings = len(cast(torch.nn.Embedding, model.get_input_embeddings()).weight)
        if len(tokenizer) > embeddings:
            raise ConfigError(
                f"model.name_or_path={self.name_or_path}: {len(tokenizer)} tokens in the tokenizer, {embeddings} in "
                "the model, which has no weights for the rest; choose the tokenizer and the model of one checkpoint"
            )
        return model

    def model(self, tokenizer: Any) -> Any:
        """The model, which agrees with the tokenizer on the end of a turn."""
        from transformers import AutoModelForCausalLM

        adapter = (Path(self.source) / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(
            merged(Path(self.source)) if adapter else self.source,
            trust_remote_code=False,  # unset, transformers asks on the terminal whether to run code
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            quantization_config=self.quantization_config,
        )
        if self.eos_token:  # among those the model already stops at, as TRL does
            model.config.eos_token_id = tokenizer.eos_token_id
            known = model.generation_config.eos_token_id
            known = known if isinstance(known, list) else [known] if known is not None else []
            model.generation_config.eos_token_id = [
                tokenizer.eos_token_id,
                *(i for i in known if i != tokenizer.eos_token_id),
            ]
        return model


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
        return str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path
    package, _, folder = name_or_path.removeprefix("pkg://").partition("/")
    return str(package_folder(package) / folder)


def read_chat_template(name: str) -> str:
    """The text of a chat template: one of conf/chat_template by its name, or any .jinja file by its path."""
    from smoltrain.data.templates import shipped

    own = name.endswith(".jinja")
    if not (Path(name).is_file() if own else name in shipped()):
        choices = ", ".join(shipped())
        raise ConfigError(f"model.chat_template={name}: no such file; choose one of {choices}, or a path to a .jinja")
    file = Path(name) if own else CONF / "chat_template" / f"{name}.jinja"
    return file.read_text()
