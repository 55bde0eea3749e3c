"""A hub on the loopback: as much of huggingface.co as the clients ask for, with the demo's files under the real names.

As a program it runs the README's recipes and the logged commands to the letter against itself, in a folder of its own:

    python tests/hub.py --list
    python tests/hub.py S4 dpo-quickstart          (ids of experiments/logged_runs.jsonl, or "readme", or "all")
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "experiments" / "demo"
COMMIT = "1" * 40
OWN_FILES = {  # what the README's recipes call the user's own -> the demo's file that stands for it
    "my_chats.jsonl": "twix.jsonl",
    "my_pairs.jsonl": "orca_pairs.jsonl",
    "mined_pairs.jsonl": "orca_pairs.jsonl",
    "held_out_prompts.jsonl": "prompts.jsonl",
}
LARGE = (".safetensors", ".parquet", ".jsonl")  # kept by LFS, so sent by a redirect to another host


def demo_repositories() -> dict[tuple[str, str], dict[str, bytes]]:
    """{(kind, name): {path: content}} of every repository that a README recipe or a logged command names."""
    import pyarrow
    import pyarrow.parquet

    def files_of(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    rows = [json.loads(line) for line in (DEMO / "twix.jsonl").read_text("utf-8").split("\n") if line]
    twix = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), twix)
    chat = files_of(DEMO / "model")
    return {
        ("models", "Qwen/Qwen3-1.7B"): chat,
        ("models", "Qwen/Qwen3-8B"): chat,
        ("models", "Qwen/Qwen2.5-1.5B-Instruct"): chat,
        ("models", "Skywork/Skywork-Reward-V2-Qwen3-0.6B"): files_of(DEMO / "reward_model"),
        ("datasets", "t-tech/T-Wix"): {
            "README.md": b"---\nlicense: odc-by\n---\n# T-Wix\n",
            "data/train-00000-of-00001.parquet": twix.getvalue(),
        },
        ("datasets", "t-tech/ru-mt-bench"): {"raw/question.jsonl": (DEMO / "mt_bench_ru.jsonl").read_bytes()},
        ("spaces", "lmsys/mt-bench"): {"data/mt_bench/question.jsonl": (DEMO / "mt_bench_en.jsonl").read_bytes()},
        ("datasets", "next-tat/TAT-QA"): files_of(DEMO / "tatqa"),
        ("datasets", "winddude/reddit_finance_43_250k"): {"train.jsonl": (DEMO / "reddit.jsonl").read_bytes()},
        ("datasets", "Josephgflowers/Finance-Instruct-500k"): {
            "train.json": (DEMO / "finance_instruct.jsonl").read_bytes()
        },
        ("datasets", "Intel/orca_dpo_pairs"): {"orca_rlhf.jsonl": (DEMO / "orca_pairs.jsonl").read_bytes()},
    }


class Hub(http.server.ThreadingHTTPServer):
    """The server. `faults` maps a part of a path to what goes wrong there; `requests` lists "METHOD path".

    Faults: a status such as 401 or 500; "cut": the connection breaks in the middle of the file, every time; "cut
    once"; "other": another content of the same size than the ETag says.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[tuple[str, str], dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.heads: dict[tuple[str, str], str] = {}  # of main, where it is not COMMIT
        self.older: dict[tuple[str, str, str], dict[str, bytes]] = {}  # what main was, by its commit
        self.faults: dict[str, int | str] = {}
        self.requests: list[str] = []
        self.blobs = {sha256(data): data for files in repositories.values() for data in files.values()}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def move(self, kind: str, name: str, commit: str, files: dict[str, bytes]) -> None:
        """main goes to another commit with other files; those of the commits before stay."""
        key = kind, name
        self.older[*key, self.heads.get(key, COMMIT)] = self.repositories[key]
        self.repositories[key], self.heads[key] = files, commit
        self.blobs |= {sha256(data): data for data in files.values()}

    def at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        """Commit and files of a revision; None without such a repository."""
        if files := self.older.get((kind, name, revision)):
            return revision, files
        return self.heads.get((kind, name), COMMIT), self.repositories.get((kind, name))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no event."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    """A file as the API lists it."""
    large = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    listed = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
    return listed | ({"lfs": large} if path.endswith(LARGE) else {})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = next((fault for part, fault in self.server.faults.items() if part in path), None)
        if isinstance(fault, int):
            self.send(fault, b'{"error": "as the test wants it"}')
        elif match := re.fullmatch(r"/cdn/(\w+)", path):
            self.send_file(self.server.blobs[match[1]], match[1], {}, fault)
        elif match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            self.answer_api(match[1], match[2], match[3] or "", body)
        elif match := re.fullmatch(r"(?:/(datasets|spaces))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.answer_file(match[1] or "models", match[2], match[3], match[4], fault)
        else:
            self.send(404, b"{}")

    def answer_api(self, kind: str, name: str, rest: str, body: bytes) -> None:
        what, *words = rest.split("/")
        commit, files = self.server.at(kind, name, words[0] if words else "main")
        if files is None:
            self.send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        if what in ("", "revision"):
            names = [{"rfilename": path} for path in files]
            value = {"id": name, "sha": commit, "siblings": names, "private": False, "gated": False, "tags": []}
        elif what == "tree":
            within = "".join(f"{word}/" for word in words[1:])
            listed = [entry(path, data) for path, data in files.items() if path.startswith(within)]
            folders = {path.rpartition("/")[0] for path in files if path.startswith(within)} - {"", within[:-1]}
            listed += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
            if "recursive=true" not in self.path.lower():
                listed = [item for item in listed if "/" not in item["path"][len(within) :]]
            value = listed
            if within and not listed:
                self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
        elif what == "paths-info":
            text = body.decode("utf-8")
            asked = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text).get("paths", [])
            value = [entry(path, files[path]) for path in asked if path in files]
            folders = [path for path in asked if path not in files and any(f.startswith(f"{path}/") for f in files)]
            value += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        else:
            self.send(404, b"{}")
            return
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer_file(self, kind: str, name: str, revision: str, path: str, fault: str | None) -> None:
        commit, files = self.server.at(kind, name, revision)
        data = (files or {}).get(path)
        if data is None:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            self.send(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": commit})
        elif path.endswith(LARGE):
            linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
            self.send(
                302, b"", linked | {"Location": f"http://localhost:{self.server.server_port}/cdn/{sha256(data)}"}
            )
        else:
            self.send_file(data, git_blob(data), {"X-Repo-Commit": commit}, fault)

    def send_file(self, data: bytes, etag: str, headers: dict[str, str], fault: str | None) -> None:
        if fault == "other":
            data = bytes(255 - byte for byte in data)
        first = 0
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        is_first = self.server.requests.count(f"GET {self.path}") == 1
        cut = len(data) // 2 if fault == "cut" or (fault == "cut once" and is_first) else None
        self.send(status, data, headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, cut)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True


@contextlib.contextmanager
def serve(repositories: dict[tuple[str, str], dict[str, bytes]] | None = None) -> Iterator[Hub]:
    """A running hub; by default with the demo's files."""
    hub = Hub(demo_repositories() if repositories is None else repositories)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process for which `hub` is the hub and `home` holds every cache."""
    offline = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"}
    return {key: value for key, value in os.environ.items() if key not in offline} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "LLM_ALIGNMENT_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The commands, to the letter


def commands() -> dict[str, str]:
    """{id: command} of the README's recipes (readme-1, ...) and of the logged runs."""
    shown = re.findall(
        r"^ *(?:poetry run )?((?:python|accelerate launch(?: --num_processes \d+)?) \w+\.py .*)$",
        (ROOT / "README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    shown = [command for command in shown if "--demo" not in command]
    found = {f"readme-{number}": command for number, command in enumerate(shown, 1)}
    for line in (ROOT / "experiments" / "logged_runs.jsonl").read_text("utf-8").strip().split("\n"):
        run = json.loads(line)
        if run["command"]:
            found[run["id"]] = run["command"]
    return found


def words_of(command: str) -> list[str]:
    """A command as this machine starts it: this Python instead of poetry's, the script by its whole path."""
    words = shlex.split(command.removeprefix("poetry run "))
    words = [str(ROOT / word) if word.endswith(".py") and (ROOT / word).is_file() else word for word in words]
    if words[0] == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return [sys.executable, *words[1:]]


def working_folder(name: str) -> str:
    """Where a command runs: many logged runs name no output folder, so each has its own; the README's go on from one
    another, as stage 2 of a run does from its stage 1."""
    return "readme" if name.startswith("readme-") else name.removesuffix("_1").removesuffix("_2")


def main(argv: list[str] | None = None) -> None:
    """Runs the named commands one after another; prints exit code, seconds and files asked for."""
    parser = argparse.ArgumentParser(prog="tests/hub.py", description="Run the shown commands against a local hub.")
    parser.add_argument("ids", nargs="*", metavar="ID", help='ids, "readme" or "all"')
    parser.add_argument("--list", action="store_true", help="show the ids and commands")
    parser.add_argument("--folder", default="", help="where to run (default: a temporary folder)")
    parser.add_argument("--extra", default="", help="flags to add to every command, such as --dry_run")
    args = parser.parse_args(argv)
    known = commands()
    if args.list or not args.ids:
        for name, command in known.items():
            print(name, command, sep="\t")
        return
    wanted = [
        name
        for name in known
        if name in args.ids or "all" in args.ids or ("readme" in args.ids and name.startswith("readme-"))
    ]
    folder = Path(args.folder or tempfile.mkdtemp(prefix="hub-"))
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    with serve() as hub:
        for name in wanted:
            hub.requests.clear()
            started = time.time()
            place = folder / working_folder(name)
            place.mkdir(exist_ok=True)
            for file, source in OWN_FILES.items():
                shutil.copyfile(DEMO / source, place / file)
            with (folder / f"{name}.txt").open("wb") as output:
                words = [*words_of(known[name]), *shlex.split(args.extra)]
                code = subprocess.call(
                    words, cwd=place, env=environment(hub, folder), stdout=output, stderr=subprocess.STDOUT
                )
            files = sum("/resolve/" in request and request.startswith("GET") for request in hub.requests)
            failed += code != 0
            print(f"{name:32} exit {code:3} {time.time() - started:7.1f} s {files:3} files asked for", flush=True)
    print(f"{len(wanted)} commands, {failed} failed; their output is in {folder}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
