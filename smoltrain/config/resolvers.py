"""What our YAML takes for granted: its resolvers and its schema, made known to Hydra by `register`."""

import os
import re
from datetime import datetime
from functools import cache
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from smoltrain.config.schema import KEYS, NODES


@cache
def stamp() -> str:
    """Names a run directory: when this process started its run, and four letters against a twin of that second."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def label(overrides: str) -> str:
    """`trainer.args.beta=0.1,data.path=a/b` as a directory's name: `beta-0.1_path-a_b`, at most 120 letters.

    It holds nothing that a shell or Hydra's grammar wants quoted, so that `model.from_run=` takes it as it is.
    """
    short = "_".join(re.sub(r"^[^=]*\.(?=[^.=]+=)", "", part) for part in overrides.split(",") if part)
    return re.sub(r"[^\w.+-]", "_", short.replace("=", "-"), flags=re.ASCII)[:120].rstrip("_")


@cache
def accelerator() -> str:
    """`cuda`, `mps` or `cpu`, read off the machine without importing torch."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
        return "cuda"
    machine = os.uname()
    return "mps" if (machine.sysname, machine.machine) == ("Darwin", "arm64") else "cpu"


def register() -> None:
    """Makes the resolvers `${stamp:}`, `${label:…}` and `${accelerator_is:…}` known to Hydra, and the schema.

    In it every node takes any key from any side. What does not belong there is found afterwards, all of it at once
    (`validate`), where Hydra would stop at the first and advise to force it in with `+`.
    """
    node = OmegaConf.create({}, flags={"struct": False})
    ConfigStore.instance().store("schema", {key: node if key in NODES else MISSING for key in KEYS})
    OmegaConf.register_new_resolver("stamp", stamp, replace=True)
    OmegaConf.register_new_resolver("label", label, replace=True)
    OmegaConf.register_new_resolver("accelerator_is", lambda kind: accelerator() == kind, replace=True)
