"""As much of W&B's server as its client needs to start, fill, resume and finish a run, on loopback.

GraphQL answers (by the operation's name) and the file stream, which takes the lines of
`wandb-history.jsonl` with their offsets. A run's history is kept here, so that what arrived can be
compared with what was logged.
"""

import contextlib
import gzip
import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dist_utils import free_port

ENTITY = "someone"


def wandb_environment(home, url, **more) -> dict[str, str]:
    """Environment of a process that imports this tree, finds W&B at `url` and its files in `home`,
    and nothing outside this machine.
    """
    environment = {}
    for key, value in os.environ.items():
        if not key.upper().startswith("WANDB") and "proxy" not in key.lower():
            environment[key] = value
    environment |= {
        "HOME": str(home),
        "WANDB_BASE_URL": url,
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    return environment | more


class Server:
    """A server that can be ended and started again on the same port; the runs survive."""

    def __init__(self) -> None:
        self.runs: dict[str, dict] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.connections: list[socket.socket] = []
        self.lock = threading.Lock()
        self.port = free_port()
        self.http: ThreadingHTTPServer | None = None

    def start(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server.connections.append(self.connection)

            def log_message(self, *args) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                with server.lock:
                    content = {} if self.path == "/upload" else json.loads(body or b"{}")
                    answer = json.dumps(server.answer(self.path, content)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

        class Quiet(ThreadingHTTPServer):
            daemon_threads = allow_reuse_address = True

            def handle_error(self, *args) -> None:  # the client may leave in the middle
                pass

        self.http = Quiet(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """No connection is taken any longer, and those that there are break off."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def steps(self, run_id: str) -> list[int]:
        """The `step` of each history line that has arrived, in the order of the lines."""
        lines = self.runs[run_id]["history"]
        return [json.loads(lines[number])["step"] for number in sorted(lines)]

    def answer(self, path: str, body: dict) -> dict:
        if stream := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            return self.stream(self.runs[stream[1]], body)
        name = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        name = name[1] if name else path
        variables = body.get("variables") or {}
        self.requests.append(name)
        bucket = {}
        if name == "UpsertBucket":
            run = self.runs.setdefault(
                variables["name"], {"history": {}, "config": None, "complete": 0, "exit": None}
            )
            run["config"] = variables.get("config") or run["config"]
            bucket = {
                "id": "id",
                "name": variables["name"],
                "displayName": "a name",
                "config": "{}",
                "description": "",
                "sweepName": None,
                "historyLineCount": len(run["history"]),
                "project": {"id": "p", "name": "project", "entity": {"id": "e", "name": ENTITY}},
            }
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not run["history"]}}}
        if name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            if run:
                last = run["history"][max(run["history"])] if run["history"] else "{}"
                bucket = {
                    "id": "id",
                    "name": variables["name"],
                    "summaryMetrics": "{}",
                    "displayName": "a name",
                    "logLineCount": 0,
                    "historyLineCount": len(run["history"]),
                    "eventsLineCount": 0,
                    "historyTail": json.dumps([last]),
                    "eventsTail": "[]",
                    "config": run["config"] or "{}",
                    "tags": [],
                    "wandbConfig": '{"t": 1}',
                }
            return {
                "data": {
                    "model": {
                        "id": "p",
                        "name": "project",
                        "entity": {"id": "e", "name": ENTITY},
                        "bucket": bucket or None,
                    }
                }
            }
        if name == "Viewer":
            return {
                "data": {
                    "viewer": {
                        "id": "v",
                        "entity": ENTITY,
                        "username": ENTITY,
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            }
        if name == "ServerFeaturesQuery":
            return {"data": {"serverInfo": {"features": []}}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"http://127.0.0.1:{self.port}/upload"}
                for file in variables["files"]
            ]
            return {
                "data": {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
            }
        # "/" is our own question whether the server is there.
        if path not in ("/upload", "/"):
            self.unknown.append(name)
        return {"data": {}}

    def stream(self, run: dict, body: dict) -> dict:
        """Lines come with the number of their first one: a line that is sent twice is the same
        line.
        """
        self.requests.append("file_stream")
        history = body.get("files", {}).get("wandb-history.jsonl", {})
        for number, line in enumerate(history.get("content", []), history.get("offset", 0)):
            run["history"][number] = line
        if body.get("complete"):
            run["complete"] += 1
            run["exit"] = body.get("exitcode")
        return {}
