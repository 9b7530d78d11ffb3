"""What a hub says of a name before anything is loaded from it: each refusal told apart, within a bounded time."""

import re
import socket
import time
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from smoltrain.config import ConfigError

CONNECTING = 2.0  # seconds for finding and reaching a hub; with the handshake after it, three at most
KEYS = {"dataset": ("data.path", "data.revision"), "model": ("model.name_or_path", "model.revision")}


def commit_of(kind: str, path: str, revision: str = "main") -> str:
    """The commit that a revision of a `dataset` or a `model` stands for.

    The hub is the one that HF_ENDPOINT names. It is asked once. One that cannot be reached is given up within three
    seconds, one that was reached and is slow to answer after HF_HUB_ETAG_TIMEOUT seconds (10).
    With HF_HUB_OFFLINE set, it is the commit of when the hub was last asked.

    Raises ConfigError where there is no such name or revision, or the token in HF_TOKEN does not do.
    """
    key, revision_key = KEYS[kind]
    given, hub, token = f"{key}={path}", constants.ENDPOINT, huggingface_hub.get_token()
    if constants.HF_HUB_OFFLINE:
        return at_hand(kind, path, revision)
    api = huggingface_hub.HfApi()
    start = time.monotonic()
    try:
        reach(hub)
        left = max(1.0, start + CONNECTING - time.monotonic())
        timeout = cast(Any, httpx.Timeout(constants.HF_HUB_ETAG_TIMEOUT, connect=left))  # declared as one number
        info = api.repo_info(path, repo_type=kind, revision=revision, timeout=timeout)
    except HFValidationError as error:
        raise ConfigError(f"{given}: not a name of the hub, which are like owner/name") from error
    except GatedRepoError as error:
        mend = "HF_TOKEN's owner has no access: ask for it" if token else "Ask for access, then set HF_TOKEN,"
        page = f"{hub}/datasets/{path}" if kind == "dataset" else f"{hub}/{path}"
        raise ConfigError(f"{given}: a gated {kind}. {mend} at {page}") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{revision_key}={revision}: {path} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        mend = "the token in HF_TOKEN gives no access to it" if token else "set HF_TOKEN"
        raise ConfigError(f"{given}: no such {kind} at {hub}; if it is a private one, {mend}") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ConfigError(
                f"{given}: {hub} refuses the token in HF_TOKEN. Set one that is valid, or unset it"
            ) from error
        raise ConfigError(f"{given}: {hub} answers {str(error).splitlines()[0]}") from error
    except (httpx.HTTPError, OSError) as error:
        waited = time.monotonic() - start
        raise ConfigError(
            f"{given}: {hub} does not answer ({type(error).__name__} after {waited:.1f} s). "
            "Is there a network? With HF_HUB_OFFLINE=1, a copy on this disk is read"
        ) from error
    assert info.sha
    return info.sha


def reach(hub: str) -> None:
    """Connects to a hub, or to the proxy on the way to it, and hangs up. Raises OSError where that takes too long.

    Looking a name up has no time limit, so this is done by a thread that is not waited for.
    """
    url, proxies = urlsplit(hub), getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy)
    port = url.port or (443 if url.scheme == "https" else 80)
    ended: Queue[OSError | None] = Queue()

    def connect() -> None:
        try:
            socket.create_connection((url.hostname, port), CONNECTING).close()
            ended.put(None)
        except OSError as error:
            ended.put(error)

    Thread(target=connect, daemon=True).start()
    try:
        error = ended.get(timeout=CONNECTING)
    except Empty:
        error = TimeoutError()
    if error:
        raise error


def at_hand(kind: str, path: str, revision: str) -> str:
    """The commit that a revision stood for when the hub was last asked."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    ref = Path(constants.HF_HUB_CACHE) / f"{kind}s--{path.replace('/', '--')}" / "refs" / revision
    if not ref.is_file():
        raise ConfigError(
            f"{KEYS[kind][0]}={path}: no copy of its revision {revision} on this disk ({constants.HF_HUB_CACHE}), "
            "and HF_HUB_OFFLINE is set. Unset it"
        )
    return ref.read_text().strip()
