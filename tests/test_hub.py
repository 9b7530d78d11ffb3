"""Names of the hub: the real loading code against a small hub on loopback; nothing else is ever contacted."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import smoltrain

TINY = Path(smoltrain.__file__).parent / "tiny"
COMMITS = {"main": "b" * 40, "v1": "a" * 40}
TOKEN = "hf_right"


def lines(word: str, count: int) -> bytes:
    return "".join(json.dumps({"prompt": f"{word} {i}", "completion": "a"}) + "\n" for i in range(count)).encode()


CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
- config_name: other
  data_files: [{split: train, path: other.jsonl}]
---
"""
MODEL = {file.name: file.read_bytes() for file in TINY.iterdir() if file.suffix in (".json", ".jinja", ".safetensors")}


def dataset(word: str) -> dict[str, bytes]:
    files = {"train.jsonl": lines(word, 5), "test.jsonl": lines(f"{word} test", 2), "other.jsonl": lines("other", 1)}
    return files | {"README.md": CARD}


REPOS = {  # kind/name -> revision -> file -> content
    "datasets/org/rows": {"main": dataset("new"), "v1": dataset("old")},
    "datasets/org/private": {"main": dataset("private")},
    "datasets/org/gated": {"main": dataset("gated")},
    "datasets/org/broken": {"main": {"train.jsonl": lines("x", 3) + b'{"prompt": \n'}},
    "datasets/org/nothing": {"main": {"README.md": b"# Nothing here"}},
    "datasets/org/slow": {"main": {}},
    "datasets/org/halfway": {"main": {"train.jsonl": lines("x", 3)}},
    "models/org/tiny": {"main": MODEL, "v1": MODEL | {"chat_template.jinja": b"of v1"}},
    "models/org/private": {"main": MODEL},
    "models/org/slow": {"main": {}},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its clients use to find and fetch files."""

    protocol_version = "HTTP/1.1"
    ended = threading.Event()

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

    def tell(self, found: object) -> None:
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def do_GET(self):
        form = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        )
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/(resolve|cdn)/([^/]+)/(.+)", path)
        if found:
            repo, what, revision, name = f"{found[1]}/{found[2]}", found[3], found[4] or "main", found[5]
        elif file:
            repo, what, revision, name = f"{file[1] or 'models/'}{file[2]}", file[3], file[4], file[5]
        else:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repo.endswith("slow"):
            self.ended.wait(60)
            return None
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo.endswith("gated") and not given:
            return self.refuse(401, "GatedRepo", "Access to this repository is restricted")
        if repo not in REPOS or (repo.endswith("private") and not given):
            return self.refuse(401, "RepoNotFound", "Repository not found")
        revision = next((r for r, commit in COMMITS.items() if revision in (r, commit)), revision)
        if revision not in REPOS[repo]:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.serve(repo, REPOS[repo][revision], what, revision, name, form)

    def serve(self, repo, files, what, revision, name, form) -> None:
        commit = COMMITS[revision]
        entries = {n: {"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in files.items()}
        if what in (None, "revision"):
            siblings = [{"rfilename": n} for n in files]
            self.tell({"id": repo.split("/", 1)[1], "sha": commit, "private": False, "siblings": siblings})
        elif what == "cdn" and repo.endswith("halfway") and self.command == "GET":
            self.ended.wait(60)
        elif what == "tree":
            self.tell(list(entries.values())) if not name else self.refuse(404, "EntryNotFound", "no such entry")
        elif what == "paths-info":
            sent = json.loads(form) if form.startswith(b"{") else parse_qs(form.decode())
            self.tell([entries[n] for n in sent["paths"] if n in entries])
        elif name not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif what == "resolve" and not name.endswith((".json", ".md")):  # large files lie elsewhere
            location = self.path.replace("/resolve/", "/cdn/")
            linked = {"X_Linked_Etag": f'"{digest(files[name])}"', "X_Linked_Size": str(len(files[name]))}
            self.answer(302, X_Repo_Commit=commit, Location=location, **linked)
        else:
            self.answer(200, files[name], X_Repo_Commit=commit, ETag=f'"{digest(files[name])}"')


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Hub.ended.set()
    server.shutdown()
    server.server_close()


# The client is a process of its own, since huggingface_hub reads its environment when it is imported. It reports each
# address that it connects to.
CLIENT = """
import json, os, socket, sys, time
connect, addresses = socket.socket.connect, set()
def watched(self, address):
    addresses.add(str(address[0]))
    return connect(self, address)
socket.socket.connect = watched
from smoltrain.config import ConfigError
from smoltrain.data.sources import hub
from smoltrain.hub import commit_of
def data(path, name=None, revision="main", split="train", test_split=None, streaming=False):
    source = hub(path, name, revision, split, test_split, streaming)
    return {"train": [r["prompt"] for r in source.train], "test": [r["prompt"] for r in source.test or []],
            "fingerprint": source.fingerprint, "where": source.where("train", 1), "name": source.name}
def model(path, revision="main"):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    commit_of("model", path, revision)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    loaded = AutoModelForCausalLM.from_pretrained(path, revision=revision)
    return {"template": tokenizer.chat_template[:5], "layers": loaded.config.num_hidden_layers}
told = []
for kind, token, arguments in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    start = time.monotonic()
    try:
        said = {"data": data, "model": model}[kind](**arguments)
    except (ConfigError, OSError) as error:
        said = {"error": str(error), "type": type(error).__name__}
    told.append(said | {"seconds": time.monotonic() - start})
print("TOLD" + json.dumps([told, sorted(addresses)]))
"""


def ask(endpoint: str, home: Path, cases: list, **environment: str) -> list[dict]:
    """What the client makes of each case: (data or model, token, arguments)."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(TINY.parents[1])}
    command = [sys.executable, "-c", CLIENT, json.dumps(cases)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120)
    assert "TOLD" in done.stdout, done.stderr
    told, addresses = json.loads(done.stdout.split("TOLD")[1])
    assert set(addresses) <= {"127.0.0.1"}
    return told


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


GOOD = {
    "rows": (None, {"path": "org/rows", "test_split": "test"}),
    "revision": (None, {"path": "org/rows", "revision": "v1"}),
    "commit": (None, {"path": "org/rows", "revision": "a" * 40}),
    "name": (None, {"path": "org/rows", "name": "other"}),
    "slice": (None, {"path": "org/rows", "split": "train[:2]"}),
    "streaming": (None, {"path": "org/rows", "test_split": "test", "streaming": True}),
    "private": (TOKEN, {"path": "org/private"}),
    "gated": (TOKEN, {"path": "org/gated"}),
}
BAD = {
    "unknown": (None, {"path": "org/none"}, r"data.path=org/none: no such dataset at http.*; if .* set HF_TOKEN"),
    "no name": (None, {"path": "a/b/c"}, r"not a name of the hub, which are like owner/name"),
    "private": (None, {"path": "org/private"}, r"if it is a private one, set HF_TOKEN"),
    "no access": (TOKEN, {"path": "org/none"}, r"if it is a private one, the token in HF_TOKEN gives no access to it"),
    "wrong token": (
        "hf_wrong",
        {"path": "org/rows"},
        r"refuses the token in HF_TOKEN. Set one that is valid, or unset",
    ),
    "gated": (None, {"path": "org/gated"}, r"a gated dataset. Ask for access, then set HF_TOKEN, at .*/org/gated"),
    "revision": (None, {"path": "org/rows", "revision": "v9"}, r"data.revision=v9: org/rows has no such branch, tag"),
    "config": (None, {"path": "org/rows", "name": "x"}, r"data.name=x: .*Available: \['default', 'other'\]"),
    "split": (
        None,
        {"path": "org/rows", "split": "dev"},
        r"data.split=dev: there is no such split; there are train, te",
    ),
    "test split": (None, {"path": "org/rows", "test_split": "dev"}, r"data.test_split=dev: .*there are train, test"),
    "broken": (None, {"path": "org/broken"}, r"data.path=org/broken: a file of it cannot be read"),
    "nothing": (None, {"path": "org/nothing"}, r"data.path=org/nothing: could not be loaded"),
    "slow": (None, {"path": "org/slow"}, r"does not answer \(ReadTimeout after 1\.\d s\)"),
}


MODELS = [
    (None, {"path": "org/tiny"}),
    (None, {"path": "org/tiny", "revision": "v1"}),
    (TOKEN, {"path": "org/private"}),
    (None, {"path": "org/private"}),
    ("hf_wrong", {"path": "org/tiny"}),
    (None, {"path": "org/tiny", "revision": "v9"}),
    (None, {"path": "org/slow"}),
]


@pytest.fixture(scope="module")
def told(endpoint, home) -> dict:
    cases = [("data", *case[:2]) for case in (*GOOD.values(), *BAD.values())] + [("model", *case) for case in MODELS]
    names = [*(("good", n) for n in GOOD), *(("bad", n) for n in BAD), *(("model", n) for n in range(len(MODELS)))]
    return dict(zip(names, ask(endpoint, home, cases), strict=True))


@pytest.mark.parametrize(
    ("name", "train", "test", "commit"),
    [
        ("rows", [f"new {i}" for i in range(5)], ["new test 0", "new test 1"], "b"),
        ("revision", [f"old {i}" for i in range(5)], [], "a"),
        ("commit", [f"old {i}" for i in range(5)], [], "a"),
        ("name", ["other 0"], [], "b"),
        ("slice", ["new 0", "new 1"], [], "b"),
        ("streaming", [f"new {i}" for i in range(5)], ["new test 0", "new test 1"], "b"),
        ("private", [f"private {i}" for i in range(5)], [], "b"),
        ("gated", [f"gated {i}" for i in range(5)], [], "b"),
    ],
)
def test_a_data_set_is_read_by_name(told, name, train, test, commit):
    said, asked = told["good", name], GOOD[name][1]
    split = asked.get("split", "train")
    config = asked.get("name", "default")
    assert said.get("error") is None
    assert said["train"] == train and said["test"] == test and said["name"] == asked["path"]
    assert said["where"] == f"{asked['path']} {split} row 2"
    assert said["fingerprint"] == f"{asked['path']}@{commit * 40}:{config}:{split}:{asked.get('test_split', '')}"


@pytest.mark.parametrize("name", BAD)
def test_what_the_hub_refuses_is_told(told, name):
    said = told["bad", name]
    assert said["type"] == "ConfigError" and re.search(BAD[name][2], said["error"])
    assert said["seconds"] < 5


def test_without_a_network_the_copy_on_this_disk_is_read_and_no_other(told, home):
    cases: list[dict] = [{"path": "org/private"}, {"path": "org/rows", "name": "default", "revision": "v1"}]
    cases += [{"path": "org/rows", "name": "default"}, {"path": "org/rows", "revision": "v2"}, {"path": "org/none"}]
    said = ask("http://127.0.0.1:9", home, [("data", None, case) for case in cases], HF_HUB_OFFLINE="1")
    assert said[0]["train"][0] == "private 0" and said[1]["train"][0] == "old 0"
    assert said[1]["fingerprint"] == f"org/rows@{'a' * 40}:default:train:"
    # datasets takes its newest copy, whatever revision is asked for
    assert "revision main is commit bbbbbbbb, but the copy on this disk is of aaaaaaaa" in said[2]["error"]
    for one in said[3:]:
        assert "on this disk" in one["error"] and "HF_HUB_OFFLINE is set" in one["error"]
    (gone,) = ask("http://127.0.0.1:9", home, [("data", None, {"path": "org/rows"})])
    assert (
        re.search(r"127.0.0.1:9 does not answer \(ConnectionRefusedError after \d", gone["error"])
        and gone["seconds"] < 5
    )


def test_a_model_is_read_by_name(told):
    plain, old, private, *refused = (told["model", number] for number in range(len(MODELS)))
    layers = json.loads(MODEL["config.json"])["num_hidden_layers"]
    assert plain["layers"] == old["layers"] == private["layers"] == layers
    assert old["template"] == "of v1" != plain["template"] == MODEL["chat_template.jinja"].decode()[:5]
    for said, message in zip(
        refused,
        [
            r"model.name_or_path=org/private: no such model at .*; if it is a private one, set HF_TOKEN",
            r"model.name_or_path=org/tiny: .* refuses the token in HF_TOKEN",
            r"model.revision=v9: org/tiny has no such branch, tag or commit",
            r"model.name_or_path=org/slow: .* does not answer \(ReadTimeout after 1\.\d s\)",
        ],
        strict=True,
    ):
        assert said["type"] == "ConfigError" and re.search(message, said["error"]) and said["seconds"] < 5


@pytest.mark.torture
def test_a_download_that_stalls_is_given_up(endpoint, home):
    (said,) = ask(endpoint, home, [("data", None, {"path": "org/halfway"})])
    assert re.search(r"data.path=org/halfway: could not be loaded from http.* \(\d+ s\): ", said["error"])
    assert said["seconds"] < 60
