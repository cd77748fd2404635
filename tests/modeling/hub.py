"""A hub of weights on this machine: the endpoints of the Hugging Face hub that its own client asks for files."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from safetensors.torch import save

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """Repositories by name, each with its files by name."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    """Repositories that only the token `hf_good` opens."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""
    url: str = ""

    def add_model(
        self, repository: str, arch: str, *, seed: int = 0, card: str = "", config: Any = None, **options: Any
    ) -> dict[str, Any]:
        """A repository as `timm.models.push_to_hf_hub` makes it, with random weights. Returns them."""
        torch.manual_seed(seed)
        network = timm.create_model(arch, **options)
        for name, value in network.state_dict().items():
            if value.is_floating_point() and "running_var" not in name:
                value.add_(0.02 * torch.randn_like(value))
        state = {name: value.contiguous() for name, value in network.state_dict().items()}
        about = {
            "architecture": arch,
            "num_classes": network.num_classes,
            "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9}
            | (config or {}),
        }
        files = {"model.safetensors": save(state), "config.json": json.dumps(about).encode()}
        self.repositories[repository] = files | ({"README.md": card.encode()} if card else {})
        return state


@contextmanager
def serve_hub(hub: Hub, port: int = 0) -> Iterator[Hub]:
    """Serves the hub while the context lasts, at `hub.url`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if match is None:
                self._refuse(404, "")
                return
            repository, revision, file = match.groups()
            files = hub.repositories.get(repository)
            if files is None:
                self._refuse(401, "RepoNotFound")
                return
            if repository in hub.gated and self.headers.get("Authorization") != "Bearer hf_good":
                self._refuse(403, "GatedRepo")
                return
            if revision not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
                return
            if file not in files:
                self._refuse(404, "EntryNotFound")
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(files[file]).hexdigest()}"')
            self.send_header("Content-Length", str(len(files[file])))
            self.end_headers()
            if with_body:
                self.wfile.write(files[file])

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
