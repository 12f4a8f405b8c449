"""Talk to a running ComfyUI: queue a graph, follow it over the websocket, fetch its pictures."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Graph = dict[str, dict[str, Any]]
Event = dict[str, Any]


class RunFailed(Exception):
    """The server refused a graph or a node of it failed; the message says which and why."""

    def __init__(self, message: str, *, node_id: str = "", details: Any = None):
        super().__init__(message)
        self.node_id = node_id
        self.details = details


class WebSocket:
    """The small part of RFC 6455 that a client of ComfyUI needs: read messages, answer pings."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 60.0):
        self._socket = socket.create_connection((host, port), timeout=timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise ConnectionError(f"no websocket at {path}: {head[:80]!r}")

    def _fill(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _send(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + body)

    def receive(self, timeout: float | None = None) -> str | bytes:
        """Return the next whole message: str for text, bytes for binary.

        Raises `TimeoutError` after `timeout` seconds of silence; nothing is lost by that.
        """
        message, kind = b"", 1
        while True:
            self._socket.settimeout(timeout)
            while len(self._buffer) < 2:
                self._fill()
            # From here on a frame is under way: give the rest of it time to come.
            self._socket.settimeout(60)
            first, second = self._take(2)
            length = second & 0x7F
            if length > 125:
                length = struct.unpack(
                    *((">H", self._take(2)) if length == 126 else (">Q", self._take(8)))
                )[0]
            payload = self._take(length)
            opcode = first & 0x0F
            if opcode == 8:
                raise ConnectionError("the server closed the connection")
            if opcode == 9:
                self._send(10, payload[:125])
            elif opcode in (0, 1, 2):
                kind = opcode or kind
                message += payload
                if first & 0x80:
                    return message.decode("utf-8", "replace") if kind == 1 else message

    def close(self) -> None:
        """Close the connection; calling it again does no harm."""
        self._socket.close()


class Client:
    """One client of one server.

    Attributes:
        url: address of the server, "http://host:port".
        client_id: what the server knows this client's websocket by.
    """

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"
        self.client_id = uuid.uuid4().hex

    def request(
        self, path: str, data: bytes | None = None, kind: str = "application/json"
    ) -> bytes:
        """GET `path`, or POST `data` to it, and return the body."""
        headers = {"Content-Type": kind} if data is not None else {}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        # The server is on this machine: a configured proxy must not stand between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        """GET `path` and decode the JSON answer."""
        return json.loads(self.request(path))

    def post(self, path: str, value: Any) -> Any:
        """POST `value` as JSON; returns the decoded answer, None when it is empty."""
        body = self.request(path, json.dumps(value).encode())
        return json.loads(body) if body.strip() else None

    def object_info(self) -> dict[str, Any]:
        """What the server tells of every node type (`/object_info`)."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Stop the graph that is running."""
        self.post("/interrupt", {})

    def submit(self, graph: Graph, workflow: dict | None = None) -> str:
        """Put a graph (API format) into the queue and return its prompt id.

        Raises `RunFailed` when the server refuses it, with every complaint of every node.
        """
        value: dict[str, Any] = {"prompt": graph, "client_id": self.client_id}
        if workflow is not None:
            value["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return self.post("/prompt", value)["prompt_id"]
        except urllib.error.HTTPError as error:
            try:
                answer = json.loads(error.read())
            except ValueError:
                raise RunFailed(f"the server answered {error.code} to the graph") from error
            raise RunFailed(_complaints(answer, graph), details=answer) from error

    def run(
        self,
        graph: Graph,
        *,
        timeout: float = 600.0,
        on_event: Callable[[Event], None] | None = None,
        workflow: dict | None = None,
    ) -> dict[str, Any]:
        """Queue a graph (API format), wait for its end and return its entry of `/history`.

        Args:
            timeout: seconds without any message after which `TimeoutError` is raised.
            on_event: called with each websocket message `{"type": …, "data": …}`.
            workflow: UI-format graph to put into the pictures' metadata.

        Raises `RunFailed` when it is refused, fails or is interrupted.
        """
        socket_ = WebSocket(self.host, self.port, f"/ws?clientId={self.client_id}")
        try:
            prompt_id = self.submit(graph, workflow)
            for event in self._events(socket_, timeout):
                data = event.get("data") or {}
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                if on_event:
                    on_event(event)
                if event["type"] == "execution_error":
                    raise RunFailed(_failure(data), node_id=str(data.get("node_id")), details=data)
                if event["type"] == "execution_interrupted":
                    raise RunFailed("the run was interrupted", details=data)
                if event["type"] == "execution_success":
                    break
        finally:
            socket_.close()
        return self.history(prompt_id)

    @staticmethod
    def _events(socket_: WebSocket, timeout: float) -> Iterator[Event]:
        while True:
            message = socket_.receive(timeout)
            if isinstance(message, str):
                yield json.loads(message)
            else:
                yield {"type": "preview", "data": {"bytes": message}}

    def wait(self, prompt_id: str, timeout: float = 300.0) -> dict[str, Any]:
        """Wait for the end of a graph that somebody else queued; returns its history entry."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.get(f"/history/{prompt_id}")
            if prompt_id in found:
                return found[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(f"the run {prompt_id} did not end within {timeout:.0f} s")

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The entry of one finished graph: `outputs` by node id, `status`, …"""
        # The server tells of the end a moment before it writes the entry.
        return self.wait(prompt_id, 120.0)

    def image(self, entry: dict[str, str]) -> bytes:
        """The bytes of one picture, given its entry {"filename", "subfolder", "type"}."""
        fields = {key: entry.get(key, "") for key in ("filename", "subfolder", "type")}
        return self.request("/view?" + urllib.parse.urlencode(fields))

    def upload_image(self, picture: str | Path | bytes, name: str | None = None) -> str:
        """Put a picture into the server's input folder; returns the name LoadImage takes."""
        if not isinstance(picture, bytes):
            name = name or Path(picture).name
            picture = Path(picture).read_bytes()
        boundary = uuid.uuid4().hex
        body = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; '
            f'filename="{name or "image.png"}"\r\nContent-Type: image/png\r\n\r\n'
        ).encode()
        body += picture + f"\r\n--{boundary}--\r\n".encode()
        answer = self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return json.loads(answer)["name"]


def images_of(history: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The picture entries of a finished graph, by node id."""
    outputs = history.get("outputs", {})
    found = {node: [e for e in out.get("images", ()) if e] for node, out in outputs.items()}
    return {node: entries for node, entries in found.items() if entries}


def _complaints(answer: dict[str, Any], graph: Graph) -> str:
    lines = []
    for node, problems in (answer.get("node_errors") or {}).items():
        kind = problems.get("class_type") or graph.get(node, {}).get("class_type", "?")
        for error in problems.get("errors", ()):
            lines.append(f"node {node} ({kind}): {error.get('message')}: {error.get('details')}")
    if not lines:
        error = answer.get("error", answer)
        error = error if isinstance(error, dict) else {"message": error}
        details = error.get("details") or ""
        lines = [f"{error.get('message')}{': ' + str(details) if details else ''}"]
    return "; ".join(lines)


def _failure(data: dict[str, Any]) -> str:
    message = str(data.get("exception_message", "")).strip()
    return f"node {data.get('node_id')} ({data.get('node_type')}): {message}"
