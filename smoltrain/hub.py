"""What a hub says of a name before anything is loaded from it: each refusal told apart, within a bounded time."""

import re
import time
from pathlib import Path

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

KEYS = {"dataset": ("data.path", "data.revision"), "model": ("model.name_or_path", "model.revision")}


def commit_of(kind: str, path: str, revision: str = "main") -> str:
    """The commit that a revision of a `dataset` or a `model` stands for.

    The hub is the one that HF_ENDPOINT names. It is asked once, and given up after HF_HUB_ETAG_TIMEOUT seconds (10).
    With HF_HUB_OFFLINE set, it is the commit of when the hub was last asked.

    Raises ConfigError where there is no such name or revision, or the token in HF_TOKEN does not do.
    """
    key, revision_key = KEYS[kind]
    given, hub, token = f"{key}={path}", constants.ENDPOINT, huggingface_hub.get_token()
    if constants.HF_HUB_OFFLINE:
        return at_hand(kind, path, revision)
    start = time.monotonic()
    try:
        info = huggingface_hub.HfApi().repo_info(
            path, repo_type=kind, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
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
