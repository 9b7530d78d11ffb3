"""Trackio: one run of ours is one run there, in a folder of this project, with real steps and its final status."""

import contextlib
import io
import os
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.integrations import rewrite_logs

from smoltrain.callbacks import RunCallback
from smoltrain.config import ConfigError
from smoltrain.runs import ROOT, Run, called


def open_trackio() -> Any:
    """The trackio module, told to keep its data in multirun/trackio unless TRACKIO_DIR says otherwise.

    Trackio reads TRACKIO_DIR once, when it is imported: nothing else of smoltrain may import it.
    """
    os.environ.setdefault("TRACKIO_DIR", str((ROOT / "trackio").absolute()))
    try:
        import trackio
    except ImportError as error:
        raise ConfigError("tracking=trackio needs `pip install trackio`; tracking=none does without") from error
    return trackio


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps Trackio from asking the Hub whose token there is in the environment; it takes no answer for one."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class Trackio(RunCallback):
    """Logs to Trackio by step; its stock callback logs without steps and replaces a run that was begun before it."""

    def __init__(self, project: str, group: str) -> None:
        self.trackio = open_trackio()
        self.project, self.group = project, group
        self.run: Any = None

    def on_run_begin(self, run: Run) -> None:
        record, args = run.record, run.record["config"]["trainer"]["args"]
        flat = {  # Trackio groups runs by what stands at the top
            "trainer": record["trainer"],
            "model": record["model"],
            "seed": record["seed"],
            "learning_rate": args["learning_rate"],
            "config_hash": record["config_hash"],
            "directory": str(run.directory),
        }
        with contextlib.redirect_stdout(io.StringIO()), offline():  # its hints lack TRACKIO_DIR
            self.run = self.trackio.init(
                project=self.project,
                name=called(run.directory),
                group=self.group,
                config=flat | {"config": record["config"]},
                embed=False,
                resume="allow",
                auto_log_cpu=False,
            )
        self.run.log({"status": "running"}, step=0)  # so that an early crash is seen

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.log(rewrite_logs(kwargs["logs"]), step=state.global_step)

    def on_run_end(self, run: Run) -> None:
        if self.run is None:
            return
        final = {f"final/{name}": value for name, value in run.record["metrics"].items()}
        self.run.log({**final, "status": run.record["status"]}, step=run.record["steps"])
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()  # also ends what it would do again, aloud, when the process exits


def dashboard(overlay: str = "") -> None:
    """Opens Trackio's dashboard on this project's runs, until interrupted. Raises ConfigError where there is none.

    `overlay` is a query of its page that chooses among them, `?project=…&runs=…`.
    """
    trackio = open_trackio()
    folder = Path(os.environ["TRACKIO_DIR"])
    if not any(folder.glob("*.db")):
        raise ConfigError(f"{folder}: no run is tracked there yet; make one with `smoltrain`, then look again")
    print(f"Runs in {folder}; stop with Ctrl+C")
    if not overlay:
        trackio.show(project="smoltrain")
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it names the page of all runs
        _, url, _, _ = trackio.show(project="smoltrain", open_browser=False, block_thread=False)
    link = f"{url.rstrip('/')}/{overlay}"
    print(link, flush=True)
    webbrowser.open(link)
    threading.Event().wait()
