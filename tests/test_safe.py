"""What a config may not do, tried: hundreds of hostile names and forms, names of runs, hubs out of reach."""

import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import QUICK
from huggingface_hub import constants
from hydra.utils import get_object
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import smoltrain as ours
from smoltrain import hub
from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.config.compose import compose
from smoltrain.config.overrides import quoted
from smoltrain.config.resolvers import label
from smoltrain.config.targets import SETTABLE, instantiate, misnamed, refusals
from smoltrain.launch import Launcher
from smoltrain.model import read_chat_template

TINY = Path(ours.__file__).parent / "tiny"

# ---------------------------------------------------------------- the hook

RAN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "ctypes.", "pickle.")
RAN += ("socket.", "shutil.", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.chmod", "os.truncate")
RAN += ("webbrowser.", "code.", "marshal.", "urllib.", "exec", "import", "os.mkdir")
seen: list[tuple[str, tuple]] | None = None


def watch(event: str, arguments: tuple) -> None:
    if seen is None:
        return
    if event == "open":
        _, mode, flags = arguments
        if set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append((event, arguments))
    elif event == "compile":  # source is parsed under no name; nothing of that is run
        if arguments[1] not in ("<unknown>", b"<unknown>"):
            seen.append((event, arguments[1:]))
    elif event.startswith(RAN):
        seen.append((event, arguments))


sys.addaudithook(watch)


@contextmanager
def watched():
    """What runs, writes, connects or is imported meanwhile."""
    global seen
    seen = []
    try:
        yield seen
    finally:
        seen = None


# ---------------------------------------------------------------- what is hostile

DANGEROUS = """
os.system os.popen os.execv os.remove os.putenv os.kill posix.system subprocess.run subprocess.call subprocess.Popen
builtins.eval builtins.exec builtins.open builtins.__import__ builtins.compile builtins.getattr torch.load
torch.hub.load torch.compile torch.utils.cpp_extension.load_inline torch.jit.load torch.save torch.ops.load_library
pandas.read_pickle pickle.loads marshal.loads shelve.open shutil.rmtree shutil.move pathlib.Path pathlib.Path.unlink
pathlib.Path.write_text runpy.run_path runpy.run_module code.interact ctypes.CDLL webbrowser.open
importlib.import_module importlib.reload hydra.utils.get_object hydra.utils.call hydra.utils.instantiate
functools.partial operator.methodcaller numpy.load yaml.unsafe_load socket.create_connection urllib.request.urlopen
multiprocessing.Process threading.Thread timeit.timeit pdb.run smoltrain.runs.discard smoltrain.runs.Run
smoltrain.__main__.main smoltrain.hub.reach smoltrain.launch.launch smoltrain.tracking.dashboard
smoltrain.report.write smoltrain.config.targets.instantiate smoltrain.model.merged evil_pkg evil_pkg.run
evil_pkg.inner.run
"""
REACHED = """
transformers.trainer.os.system transformers.trainer.shutil.rmtree transformers.trainer.importlib.import_module
transformers.dynamic_module_utils.get_class_from_dynamic_module transformers.pipeline transformers.AutoModel.register
transformers.AutoModel.from_pretrained.__func__ transformers.AutoModel.__init__.__globals__ transformers.Trainer
trl.trainer.sft_trainer.Path trl.trainer.sft_trainer.Path.unlink trl.trainer.sft_trainer.os.system
trl.SFTTrainer.__init__ trl.SFTTrainer.train trl.SFTTrainer.__subclasses__ trl.import_utils.importlib.import_module
torch.os.system peft.PeftModel torch.optim.Optimizer.__init__.__globals__ torch.optim.lr_scheduler.partial
datasets.load_dataset_builder datasets.Dataset.from_generator datasets.builder.shutil.rmtree
smoltrain.runs.shutil.rmtree smoltrain.runs.subprocess.run trl.rewards.format_rewards.re.compile
trl.rewards.other_rewards.Callable trl.rewards.accuracy_rewards.get_logger smoltrain.data.places
smoltrain.config.targets.build smoltrain.config.targets.os.system
"""
CALLABLES, ALIASES = DANGEROUS.split(), REACHED.split()
MALFORMED = [
    "os",
    ".os.system",
    "os..system",
    "os.system ",
    " os.system",
    "os.system\n",
    "os/system",
    "os:system",
    "trl",
]
MALFORMED += [
    "__import__('os').system",
    "trl.SFTTrainer;os.system",
    "\uff4f\uff53.system",
    "trl.SFTTrainer\x00",
    "",
    ".",
]
MALFORMED += ["OS.SYSTEM", "${oc.env:EVIL}", "${name}", "${hydra:evil}", "${label:os.system}", "${oc.decode:os.system}"]
NAMES = [*CALLABLES, *ALIASES, *MALFORMED]
NOT_TEXTS = [None, 3, True, 1.5, ["os.system"], {"_target_": "os.system"}, {}]

# Where one stands, as the value of the key that is named: in JSON, which YAML and Hydra's grammar read both.
SINGLE = ["trainer", "trainer.args", "data", "encode", "model", "model.quantization_config", "trainer.peft_config"]
NESTED = ["callbacks.{}", "data.columns.{}", "trainer.args.model_init_kwargs.{}", "model.chat_template_kwargs.{}"]
NESTED += ["trainer.args.lr_scheduler_kwargs.a.b.{}", "callbacks.progress.{}"]


def tree(key: str, value: object) -> dict:
    """`a.b` and a value as nested dicts."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


def merge(*trees: dict) -> dict:
    merged: dict = {}
    for one in trees:
        for key, value in one.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


@pytest.fixture
def hostile(folder, monkeypatch, capfd):
    """A folder of a user's YAML, a package that tells when it is imported, and `refused`, which tries a command."""
    (folder / "evil_pkg" / "inner").mkdir(parents=True)
    for file in ("evil_pkg/__init__.py", "evil_pkg/inner/__init__.py"):
        (folder / file).write_text(f"open({str(folder / 'RAN')!r}, 'w'); run = print")
    (folder / "evil_pkg" / "config.yaml").write_text("name: evil")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("EVIL", "subprocess.call")
    (folder / "own").mkdir()
    with pytest.MonkeyPatch.context():
        main(["trainer._target_=os.system", "--config-dir=own"])  # what is imported at all is imported now
        main(["trainer._target_=trl.trainer.sft_trainer.Path", "--cfg", "job"])
        main(["trainer._target_=os.system", "-m", "seed=1,2"])
    capfd.readouterr()
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environment |= {"LD_PRELOAD": os.environ.get("LD_PRELOAD")}
    tried = []

    class Hostile:
        own = folder / "own"
        count = tried

        def yaml(self, text: str | dict, group: str = "experiment", name: str = "evil") -> str:
            file = self.own / group / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(text, dict):  # its keys are dotted
                text = "# @package _global_\n" + json.dumps(merge(*(tree(*one) for one in text.items())))
            file.write_text(text)
            return f"{group}={name}"

        def refused(self, *arguments: str, says: tuple[str, ...] = (), count: int = 1) -> str:
            modules = {*sys.modules}
            with watched() as events:
                code = main(list(arguments))
            said = capfd.readouterr()
            assert code == 2 and not said.out, (arguments, said)
            assert events == [] and {*sys.modules} == modules, (arguments, events)
            assert not [text for text in says if text not in said.err], (arguments, said.err)
            assert "Traceback" not in said.err and said.err.strip()
            assert not (folder / "RAN").exists() and not (folder / "multirun").exists()
            assert {name: os.environ.get(name) for name in environment} == environment
            tried.extend([arguments] * count)
            return said.err

    return Hostile()


def test_the_hook_sees_what_it_is_there_for(folder):
    def attempt() -> None:
        subprocess.run(["true"], check=True)
        (folder / "file").write_text("text")
        (folder / "file").unlink()
        socket.socket().close()
        (folder / "brand_new.py").write_text("")
        sys.path.insert(0, str(folder))
        exec("import brand_new")
        sys.path.remove(str(folder))

    with watched() as events:
        attempt()
    assert {event for event, _ in events} >= {
        "subprocess.Popen",
        "open",
        "os.remove",
        "exec",
        "import",
        "socket.__new__",
    }


def test_hostile_targets_are_refused_wherever_they_stand(hostile):
    for place in NESTED:
        bad = {f"c{i}": {"_target_": name} for i, name in enumerate([*NAMES, *NOT_TEXTS])}
        chosen = hostile.yaml({place.format("all"): bad, "name": "os.system"})
        keys = tuple(f"{place.format('all')}.{name}._target_=" for name in bad)
        hostile.refused("--config-dir=own", chosen, says=keys, count=len(bad))
    for i in range(8):
        bad = dict(zip(SINGLE, [*CALLABLES, *ALIASES][i::8], strict=False))
        typed = [f"++{place}._target_={name}" for place, name in bad.items()]
        hostile.refused(*typed, says=tuple(f"{place}._target_={name}: " for place, name in bad.items()), count=len(bad))
    assert len(hostile.count) > 300


def test_what_hydra_reads_beside_a_target_is_of_its_kind(hostile):
    wrong = {
        "_args_": [[], [1], None],
        "_partial_": [1, "yes", None, {}],
        "_recursive_": [0, "no"],
        "_convert_": ["", 1, True],
    }
    places = [*SINGLE[:5], "callbacks.progress"]
    for i in range(4):
        bad = {f"{place}.{key}": values[i % len(values)] for key, values in wrong.items() for place in places}
        said = hostile.refused("--config-dir=own", hostile.yaml(bad), count=len(bad))
        assert not [key for key in bad if f"{key}=" not in said]


CRASHING = [
    "trainer.args._partial_=true",
    "trainer._recursive_=false",
    "trainer._partial_=false",
    "data._partial_=true",
]
CRASHING += [
    "trainer._convert_=none",
    "model._convert_=partial",
    "data.sources.a._convert_=all",
    "encode._convert_=all",
]
CRASHING += ["evaluation._partial_=true", "callbacks.progress._partial_=true"]
CRASHING += ["trainer.peft_config._partial_=true", "callbacks._recursive_=false"]


def test_what_hydra_reads_beside_a_target_is_as_shipped_where_the_code_counts_on_it(hostile):
    for override in CRASHING:
        hostile.refused(f"++{override}", says=(f"{override}: ", "leave it out"))
    shipped = {"trainer": {"_partial_": True, "_convert_": "all"}, "data": {"_convert_": "all"}}
    part = {"callbacks": {"a": {"_partial_": False, "_convert_": "all"}}, "model": {"_convert_": "all"}}
    assert not refusals({**shipped, **part})
    assert not refusals({"trainer": {"compute_metrics": {"_partial_": True, "_recursive_": False}}})  # of one's own


INTERPOLATED = [  # a function that takes anything, so that nothing else is wrong with them
    {"_target_": "${name}"},
    {"_target_": "${oc.env:EVIL}"},
    {"_target_": "${oc.select:name}"},
    {"_target_": "${label:${name}}"},
    {"_target_": "subprocess.${oc.decode:call}"},
    {"a": "subprocess.call", "_target_": "${.a}"},
    "${callbacks.c0}",
    "${oc.create:{_target_: subprocess.call}}",
]


def test_a_target_is_what_its_interpolation_leads_to(hostile):
    bad = {f"callbacks.c{i}": node for i, node in enumerate(INTERPOLATED)}
    said = hostile.refused("--config-dir=own", hostile.yaml({"name": "subprocess.call", **bad}), count=len(bad))
    assert not [key for key in bad if f"{key}._target_=subprocess.call: " not in said]
    for node in ("${callbacks}", {"b": "${..a}"}, ["${callbacks.a}"]):
        hostile.refused("--config-dir=own", hostile.yaml({"callbacks.a": node}), says=("callbacks.a",))
    deep = "callbacks:\n  a: " + "{x: " * 3000 + "1" + "}" * 3000
    hostile.refused("--config-dir=own", hostile.yaml(f"# @package _global_\n{deep}"))


# ---------------------------------------------------------------- code that is downloaded or unpickled

REMOTE = {
    "trust_remote_code": [True, "true", 1, "yes"],
    "weights_only": [False, None, 0],
    "auto_mapping": [{"parent_library": "os", "base_model_class": "system"}],
    "use_kernels": [True, 1],
    "megatron_core": ["evil_pkg", "os"],
    "megatron_config": [{}, {"a": 1}],
    "cache_dir": ["/elsewhere", "", "."],
    "attn_implementation": ["kernels-community/flash-attn2", "owner/kernel@main:f", {"text_config": "owner/kernel"}],
    "name_or_path": ["pkg://os", "pkg://evil_pkg/model", "pkg://evil_pkg.inner", "pkg://smoltrain.evil", "pkg://"],
}
INSIDE = ["model", "trainer.args.model_init_kwargs", "trainer.args.model_init_kwargs.a.b", "trainer.peft_config"]


def test_no_key_has_a_library_run_code_that_came_with_data(hostile):
    for i in range(5):
        bad = {f"{place}.{name}": values[i % len(values)] for name, values in REMOTE.items() for place in INSIDE}
        said = hostile.refused("--config-dir=own", hostile.yaml(bad), count=len(bad))
        assert not [key for key in bad if f"{key}=" not in said]
        assert said.count("no way yet to switch that on") == len(INSIDE)
    as_text = quoted(json.dumps({"trust_remote_code": True}))
    listed = "{a: [{trust_remote_code: true}]}"
    for value, key in ((as_text, "trust_remote_code"), (listed, "a[0].trust_remote_code")):
        hostile.refused(
            f"+trainer.args.model_init_kwargs={value}", says=(f"trainer.args.model_init_kwargs.{key}=true",)
        )


def test_a_model_that_comes_with_code_is_refused_and_nothing_is_asked(smoltrain, folder, capfd, monkeypatch):
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    smoltrain("model.name_or_path=model", code=2)
    said = capfd.readouterr().err
    assert "comes with code of its own, which smoltrain does not run" in said and not (folder / "RAN").exists()


def test_a_chat_template_is_one_of_ours_or_a_file_and_runs_nothing(smoltrain, folder, capfd):
    (folder / "secret.jinja").write_text("text")
    for name in (f"../../..{folder}/secret", "../chat_template/chatml", "chatml/", "/dev/stdin", "a\0.jinja", ""):
        with pytest.raises(ConfigError, match=r"model.chat_template=.*: no such file"):
            read_chat_template(name)
    escape = "cycler.__init__.__globals__.os.system('touch RAN')"
    (folder / "own.jinja").write_text("{% generation %}{{ " + escape + " }}{% endgeneration %}")
    smoltrain("model.chat_template=own.jinja", code=2)
    assert "unsafe" in capfd.readouterr().err and not (folder / "RAN").exists()


# ---------------------------------------------------------------- Hydra's own keys

HYDRAS: list[tuple[str, object]] = [
    ("launcher._target_", "os.system"),
    ("launcher._target_", "hydra_plugins.evil.Launcher"),
    ("sweeper._target_", "evil_pkg.run"),
    ("sweeper.params", {"hydra.callbacks.x._target_": "os.system"}),
    ("sweeper.params", {"trainer._target_": "os.system,trl.SFTTrainer"}),
    ("callbacks.x", {"_target_": "os.system"}),
    ("callbacks.x._target_", "smoltrain.callbacks.Progress"),
    ("job_logging.handlers.h", {"class": "evil_pkg.run"}),
    ("job_logging.handlers.h", {"class": "logging.FileHandler", "filename": "../out"}),
    ("job_logging.handlers.i", {"()": "os.system", "command": "true"}),
    ("job_logging.handlers.console.class", "logging.handlers.SocketHandler"),
    ("job_logging.handlers.console.stream", "ext://os.system"),
    ("job_logging.handlers.console.formatter", "cfg://evil"),
    ("job_logging.formatters.simple.()", "evil_pkg.run"),
    ("job_logging.formatters.simple.class", "evil_pkg.run"),
    ("job_logging.filters.f", {"()": "evil_pkg.run"}),
    ("job_logging.loggers.l.handlers", ["evil"]),
    ("hydra_logging.handlers.h", {"()": "evil_pkg.run"}),
    ("hydra_logging.handlers.console.stream", "ext://evil_pkg.run"),
    ("hydra_logging.root.handlers", ["h"]),
    ("help.template", "${oc.env:EVIL}"),
    ("hydra_help.template", "x"),
    ("output_subdir", "../../../out"),
    ("output_subdir", "/tmp/out"),
    ("output_subdir", None),
    ("run.dir", "/tmp/out"),
    ("run.dir", "multirun/../../out"),
    ("run.dir", "${oc.env:HOME}/out"),
    ("sweep.dir", "/tmp/out"),
    ("sweep.subdir", "../../out"),
    ("job.chdir", True),
    ("job.name", "../../out"),
    ("job.env_set.LD_PRELOAD", "evil.so"),
    ("job.env_copy", ["HOME"]),
    ("job.config.override_dirname.item_sep", "/../"),
    ("mode", "MULTIRUN"),
    ("verbose", True),
    ("runtime.output_dir", "/tmp/out"),
    ("overrides.task", ["trainer._target_=os.system"]),
    ("overrides.hydra", ["hydra.callbacks.x._target_=os.system"]),
    # what Hydra itself does not take
    ("job_logging", None),
    ("evil", 1),
    ("searchpath", ["pkg://evil_pkg"]),
    ("job.env_copy", ["NOT_THERE"]),
]
HYDRAS_OWN = 4
LOOKING = [[], ["-m"], ["--cfg", "job"], ["--cfg=hydra"], ["--hydra-help"], ["--info=all"]]


def together(pairs: list[tuple[str, object]]) -> list[dict[str, object]]:
    """Keys and values as few trees, in none of which a key is there twice, or below another."""
    packs: list[dict[str, object]] = []
    for key, value in pairs:
        for pack in packs:
            if not any(f"{key}.".startswith(f"{k}.") or f"{k}.".startswith(f"{key}.") for k in pack):
                pack[key] = value
                break
        else:
            packs.append({key: value})
    return packs


def test_hydras_own_keys_are_set_by_no_file(hostile):
    packs = together(HYDRAS[:-HYDRAS_OWN])
    for i, pack in enumerate([*packs, *({key: value} for key, value in HYDRAS[-HYDRAS_OWN:])]):
        chosen = hostile.yaml({f"hydra.{key}": value for key, value in pack.items()})
        keys = ["hydra.overrides" if key.startswith("overrides") else f"hydra.{key}" for key in pack]
        said = hostile.refused("--config-dir=own", chosen, *LOOKING[i % len(LOOKING)], count=len(pack))
        assert i >= len(packs) or not [key for key in keys if key not in said], said
    hostile.yaml("# @package hydra\n{callbacks: {x: {_target_: os.system}}, run: {dir: ../out}}", "tracking")
    hostile.refused(
        "--config-dir=own", "tracking=evil", says=("hydra.callbacks.x._target_=os.system", "hydra.run.dir=../out")
    )
    target = "_target_: os.system"
    hostile.yaml(target, "data")
    for place in ("hydra.callbacks.x", "hydra.launcher", "hydra.job.env_set"):
        hostile.refused("--config-dir=own", f"+data@{place}=evil", says=(f"{place}._target_=os.system",))
    hostile.yaml("# @package _global_\ndefaults: [/data@hydra.callbacks.x: evil]")
    hostile.refused("--config-dir=own", "experiment=evil", says=("hydra.callbacks.x._target_=os.system",))
    for i, group in enumerate(("launcher", "sweeper", "hydra_logging", "callbacks")):
        hostile.yaml(target, f"hydra/{group}", "own")
        hostile.refused(("hydra.searchpath=[own]", "--config-dir=own")[i % 2], f"hydra/{group}=own", "-m")
        hostile.yaml(f"# @package _global_\ndefaults: [override /hydra/{group}: own]")
        hostile.refused("--config-dir=own", "experiment=evil")


@pytest.mark.parametrize("signs", [1, pytest.param(4, marks=pytest.mark.torture)])
def test_of_hydras_own_keys_few_are_set_on_a_command_line(hostile, signs):
    for i, (key, value) in enumerate(HYDRAS):
        if f"hydra.{key}" not in SETTABLE:
            typed = f"hydra.{key.replace('.()', '')}={'{a: 1}' if isinstance(value, dict) else json.dumps(value)}"
            for sign in (["", "+", "++", "~"] * 2)[i % 4 :][:signs]:
                hostile.refused(sign + typed, *LOOKING[i % len(LOOKING)], says=("these can be set: hydra.run.dir",))
    for folder in ("/tmp/out", "../out", "a/../../out", "'../${name}'"):
        hostile.refused(
            f"hydra.sweep.subdir={folder}", "-m", says=("hydra.sweep.subdir", "a folder in that of the sweep")
        )
    hostile.refused("hydra.sweep.subdir=a,/b", "-m", says=("hydra.sweep.subdir=a,/b: one for the whole sweep",))
    for override in ("~hydra.run.dir", "hydra={callbacks: {}}", "hydra/launcher=../own", "~hydra/launcher"):
        hostile.refused(override, says=("hydra",))
    for override in ("hydra.launcher.x={_target_: os.system}", "hydra.sweeper.max_batch_size={_target_: os.system}"):
        hostile.refused(override)


def test_hydras_search_path_leads_to_folders_only(hostile, folder):
    (folder / "pkg:" / "evil_pkg").mkdir(parents=True)  # as a path, pkg://evil_pkg is this one
    for value in ("[pkg://evil_pkg]", "pkg://evil_pkg", '["pkg://evil_pkg"]', "[own,pkg://evil_pkg.inner]", "[none]"):
        hostile.refused(f"hydra.searchpath={value}", "-m", says=("hydra.searchpath=",))
    for value in (
        "[structured://evil]",
        "${oc.env:EVIL}",
        "['${name}']",
        "null",
        "[[own]]",
        "{a: own}",
        "[file://none]",
    ):
        hostile.refused(f"hydra.searchpath={value}", "--cfg=job", says=("hydra.searchpath=",))
    hostile.refused("+hydra.searchpath=[pkg://evil_pkg]", says=("these can be set",))
    hostile.refused("hydra.searchpath=[own]", "hydra.searchpath=[pkg://evil_pkg]", says=("hydra.searchpath=",))


OTHERS = ["--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun"]


@pytest.mark.parametrize("flags", [["--resolve"], ["--package", "trainer"], ["--config-dir=own", "-cd", "own"]])
def test_a_flag_that_would_be_passed_over_is_refused(folder, capsys, flags):
    (folder / "own").mkdir()
    for sweep in ([], ["-m", "seed=1,2"]):
        assert main([*flags, *sweep]) == 2 and flags[0].partition("=")[0] in capsys.readouterr().err
    assert not (folder / "multirun").exists()


def test_flags_that_compose_another_config_or_unpickle_one_are_refused(hostile, folder):
    (folder / "evil.pickle").write_bytes(pickle.dumps(Evil()))
    for flag in (*OTHERS, "--config-n", "--config-p", "--exp", "--rerun", "-cnx"):
        hostile.refused(f"{flag}=evil.pickle", says=(flag,))
        hostile.refused(flag, "evil.pickle", says=(flag,) if flag in OTHERS else ())
    for arguments in (["-p", "--config-name=evil"], ["-c", "-cp=evil_pkg"], ["--", "seed=1"], ["--allow"], ["-c"]):
        hostile.refused(*arguments)
    assert not (folder / "PICKLED").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("PICKLED",)


TAGS = ["!!python/object/apply:os.system ['touch RAN']", "!!python/name:os.system", "!!python/module:evil_pkg"]
TAGS += ["!!python/object:evil_pkg.run {}", "!!python/object/new:os.system ['x']", "!evil x"]


def test_yaml_makes_no_objects(hostile):
    for i, tag in enumerate(TAGS):
        text = (f"trainer: {tag}", f"name: {tag}", tag)[i % 3]
        hostile.refused("--config-dir=own", hostile.yaml(f"# @package _global_\n{text}"))


def test_what_may_be_set_of_hydras_own_keys_works(smoltrain, folder):
    smoltrain("hydra.run.dir=elsewhere/${name}", "hydra.verbose=false", "hydra/launcher=basic", "hydra.searchpath=[.]")
    assert (folder / "elsewhere" / "default" / "run.json").exists()


# ---------------------------------------------------------------- names

HOSTILE_NAMES = ["../out", "/abs", "a/b", "", ".", "..", "~", "~/a", "a\0b", "a" * 300, "a\nb", "a\n", "a.", "a ", " a"]
HOSTILE_NAMES += ["-a", "$(x)", "`x`", "${oc.env:HOME}", "${hydra:runtime.cwd}", "a\\b", "..\uff0fout", "\u2024\u2024"]
HOSTILE_NAMES += ["a\u202eb", "\ufeffa", "cafe\u0301", "trackio", "Trackio", "latest", "*", "a;b", "a|b", "<a>", "C:"]


@pytest.mark.parametrize("apart", [5, pytest.param(1, marks=pytest.mark.torture)])
def test_a_name_that_could_lead_elsewhere_is_refused(hostile, apart):
    """Whole commands with every fifth name, since each composes a config; in the long form with every one."""
    assert all(map(misnamed, HOSTILE_NAMES))
    for i, name in enumerate(HOSTILE_NAMES[::apart]):
        how = ("--config-dir=own", hostile.yaml({"name": name})) if i % 4 == 0 else (f"name={quoted(name)}",)
        hostile.refused(*how, *LOOKING[i % 3], says=("name",))
    hostile.refused("callbacks.tracking.project=../../x", says=("callbacks.tracking.project=../../x",))


@given(st.text() | st.text("./\\~a-", max_size=8))
@settings(max_examples=3000, deadline=None)
def test_whatever_the_name_a_run_lies_in_multirun(name):
    if not misnamed(name):
        root = Path("multirun").resolve()
        assert (root / name).resolve().parent == root and name.isascii() and len(name) <= 100


@given(st.text("./~$ab{}[]'\"\\ \n,=-", max_size=6))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_name_it_is_refused_or_kept_as_it_is(folder, name):
    try:
        cfg = compose([f"name={quoted(name)}"], [])
    except ConfigError as error:
        assert "name" in str(error)
    else:
        assert cfg.name == name and not misnamed(name)


@given(st.text())
def test_whatever_a_sweep_varies_its_runs_lie_beside_each_other(value):
    name = f"0_{label(f'data.path={value},seed=1')}"
    assert re.fullmatch(r"0_[\w.+-]*", name, re.ASCII) and len(name) <= 122


# ---------------------------------------------------------------- code of one's own

OWN = "+callbacks.own={_target_: my_package.parts.Stop}"
PARTS = """
import os
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_train_end(self, *_, **__):
        with open("STOPPED", "a") as file:
            file.write("x")

def late():
    ...

globals()["late"] = os.system
"""


@pytest.fixture
def own(folder, monkeypatch):
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").write_text("from os import system")
    (folder / "my_package" / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_package", "my_package.parts"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["my_package", "my_package.parts", "my_package.parts.Stop"])
def test_code_of_ones_own_runs_where_the_command_line_allows_it(own, smoltrain, name):
    (record,) = smoltrain(f"--allow={name}", OWN)
    assert (own / "STOPPED").read_text() == "x" and record["allowed"] == [name]
    assert "SMOLTRAIN_ALLOW" not in os.environ
    report = (record["directory"] / "report.md").read_text()
    said = re.search(r"`smoltrain (.*)`", report)
    assert said and f"--allow={name}" in said[1] and main(shlex.split(said[1])) == 0
    assert (own / "STOPPED").read_text() == "xx"


def test_what_is_allowed_is_allowed_to_every_verb_and_sweep_and_by_the_environment(own, smoltrain, monkeypatch, capfd):
    assert main(["check", "--allow", "my_package", *QUICK, OWN, "check.step=false"]) == 0
    assert len(smoltrain("-m", "--allow=other", "--allow=my_package", OWN, "seed=1,2")) == 2
    assert main(["--cfg", "job", "--allow", "my_package", OWN]) == 0
    monkeypatch.setenv("SMOLTRAIN_ALLOW", "other, my_package")
    (record,) = smoltrain("--allow=third", OWN)
    assert record["allowed"] == ["other", "my_package", "third"]
    assert Launcher([]).command == "smoltrain --allow=other --allow=my_package"


REFUSED_ANYWAY = [
    ((OWN,), "--allow its_package"),
    (("--allow=my_pack", OWN), "--allow its_package"),
    (("--allow=my_package.part", OWN), "callbacks.own._target_=my_package.parts.Stop"),
    (("--allow=my_package.parts.Stop", "+callbacks.own={_target_: my_package.parts.late}"), "callbacks.own._target_"),
    (("--allow=my_package", "+callbacks.own={_target_: my_package.system}"), "callbacks.own._target_"),
    (("--allow=my_package", "+callbacks.own={_target_: my_package.parts.os.system}"), "callbacks.own._target_"),
    (("--allow=my_package", "trainer._target_=os.system"), "trainer._target_=os.system"),
    (("--allow=my_package/parts", OWN), "name a package"),
    (("--allow=*", OWN), "name a package"),
    (("--allow", OWN), "name a package"),
    ((OWN, "--allow"), "name what to allow"),
    (("--config-dir=conf", "experiment=evil"), "allow"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_ANYWAY)
def test_nothing_else_of_ones_own_is_allowed(own, capfd, arguments, message):
    (own / "conf" / "experiment").mkdir(parents=True)
    text = "{allow: [my_package], SMOLTRAIN_ALLOW: my_package, callbacks: {own: {_target_: my_package.parts.Stop}}}"
    (own / "conf" / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}")
    assert main(list(arguments)) == 2
    assert message in capfd.readouterr().err and "my_package" not in sys.modules


def test_a_live_object_that_is_not_what_its_source_says_is_not_called(own, monkeypatch):
    monkeypatch.setenv("SMOLTRAIN_ALLOW", "my_package")
    node = {"callbacks": {"own": {"_target_": "my_package.parts.late", "command": "touch RAN"}}}
    with pytest.raises(ConfigError, match=r"callbacks.own._target_=my_package.parts.late: this is posix.system"):
        instantiate(OmegaConf.create(node).callbacks)
    assert not (own / "RAN").exists()


TAKEN = {
    "trainer.peft_config": "peft.LoraConfig",
    "model.quantization_config": "transformers.BitsAndBytesConfig",
    "trainer.optimizer_cls_and_kwargs": "torch.optim.AdamW",
    "trainer.reward_funcs": "trl.rewards.accuracy_reward",
    "trainer.ref_model": "transformers.AutoModelForCausalLM.from_pretrained",
}
NOWHERE = ("data.columns.a", "data.keep_where.a", "model.chat_template_kwargs.a", "trainer.compute_metrics")
NOWHERE += ("trainer.train_dataset", "trainer.data_collator", "trainer.args.model_init_kwargs.config", "encode.a")


def test_targets_of_each_kind_are_built():
    for key, target in TAKEN.items():
        place, _, name = key.partition(".")
        listed, whole = name in ("optimizer_cls_and_kwargs", "reward_funcs"), name.endswith("_config")
        part = {"_target_": target} | ({} if whole else {"_partial_": True})
        made = instantiate(OmegaConf.create({place: {"_convert_": "all", name: [part] if listed else part}})[place])[
            name
        ]
        assert (
            isinstance(made, get_object(target)) if whole else (made[0] if listed else made).func == get_object(target)
        )
    cpo = {"_target_": "trl.experimental.cpo.CPOTrainer", "args": {"_target_": "trl.experimental.cpo.CPOConfig"}}
    assert not refusals({"trainer": cpo})


@pytest.mark.parametrize("target", [*TAKEN.values(), "datasets.load_dataset", "transformers.LlamaConfig"])
def test_what_nothing_takes_is_built_nowhere(target):
    for place in NOWHERE:
        (problem,) = refusals(tree(f"{place}._target_", target))
        assert problem.text.startswith(f"{place}._target_={target}: ") and "nothing is built there" in problem.text


# ---------------------------------------------------------------- the network

WITHOUT_NETWORK = """
import sys
def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        print("CONNECTS", event, arguments, flush=True)
        raise RuntimeError(event)
sys.addaudithook(refuse)
from smoltrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def command(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, with the hub in reach as far as the environment says, and no proxy."""
    kept = [name for name in os.environ if not name.startswith("HF_HUB") and "proxy" not in name.lower()]
    clean = {name: os.environ[name] for name in kept}
    clean |= {"PYTHONPATH": str(TINY.parents[1])} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *QUICK, *arguments], env=clean, capture_output=True, text=True, timeout=120
    )


def test_no_network_unless_a_name_of_the_hub_is_used(folder):
    done = command(WITHOUT_NETWORK, "trainer=dpo", HF_HOME=str(folder / "home"))
    assert done.returncode == 0 and "CONNECTS" not in done.stdout + done.stderr, done.stderr


@pytest.fixture
def black_hole():
    """An address to which no connection is ever made: what listens there has as many waiting as it takes."""
    with socket.socket() as listening, contextlib.ExitStack() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        yield "{}:{}".format(*listening.getsockname())


@pytest.fixture
def mute():
    """An address where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield "{}:{}".format(*listening.getsockname())


def in_reach(monkeypatch, endpoint: str) -> None:
    """Has this process ask a hub, which it would not, at an address and by no proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as the command has it
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def given_up(monkeypatch, endpoint: str) -> tuple[float, str]:
    in_reach(monkeypatch, endpoint)
    start = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        hub.commit_of("model", "org/tiny")
    return time.monotonic() - start, str(refused.value)


def test_a_hub_that_cannot_be_reached_is_given_up_within_three_seconds(monkeypatch, black_hole, mute):
    for endpoint in (f"http://{black_hole}", f"https://{black_hole}", f"https://{mute}", "http://127.0.0.1:9"):
        seconds, said = given_up(monkeypatch, endpoint)
        assert seconds < 3 and f"{endpoint} does not answer" in said and "HF_HUB_OFFLINE=1" in said
    monkeypatch.setenv("HTTPS_PROXY", f"http://{black_hole}")
    seconds, _ = given_up(monkeypatch, "https://hub.invalid")
    assert seconds < 3
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(4) or [])  # a resolver that is out of reach
    seconds, said = given_up(monkeypatch, "https://hub.invalid")
    assert seconds < 3 and "TimeoutError after 2.0 s" in said


def test_a_command_says_what_to_do_about_a_hub_out_of_reach(folder, monkeypatch, capfd, black_hole):
    in_reach(monkeypatch, f"http://{black_hole}")
    assert main([*QUICK, "model=smollm2_135m"]) == 2 and not (folder / "multirun").exists()
    said = capfd.readouterr().err
    waited = re.search(r"does not answer \(\w+ after (\d\.\d) s\). Is there a network\? With HF_HUB_OFF", said)
    assert waited and float(waited[1]) <= 3, said
