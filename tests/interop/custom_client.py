"""A custom client as in Kadoa's documentation: requests, websocket-client and threads, without kadoa_trio.

It gets a token, opens a socket, subscribes with the last cursor, opens a new
connection after the delay of a drain notice, and expects the old one to close
with 1001.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import requests
import websocket

PUBLIC = os.environ["KADOA_PUBLIC_API_URI"]
SOCKET = os.environ["KADOA_WSS_API_URI"]
KEY = os.environ["KADOA_API_KEY"]


class Client:
    def __init__(self) -> None:
        self.cursor: str | None = None
        self.lock = threading.Lock()

    def report(self, kind: str, value: Any) -> None:
        with self.lock:
            print(json.dumps({kind: value}), flush=True)

    def connect(self) -> None:
        answer = requests.post(
            f"{PUBLIC}/v4/oauth2/token", headers={"x-api-key": KEY, "content-type": "application/json"}, timeout=10
        )
        answer.raise_for_status()
        token = answer.json()

        def subscribe(app: websocket.WebSocketApp) -> None:
            frame = {"action": "subscribe", "channel": token["team_id"]}
            if self.cursor is not None:
                frame["lastCursor"] = self.cursor
            app.send(json.dumps(frame))

        app = websocket.WebSocketApp(
            f"{SOCKET}?access_token={token['access_token']}",
            on_open=subscribe,
            on_message=lambda _app, text: self.take(json.loads(text)),
            on_close=lambda _app, code, reason: self.report("closed", [code, reason]),
            on_error=lambda _app, error: self.report("error", repr(error)),
        )
        threading.Thread(target=app.run_forever, daemon=True).start()

    def take(self, frame: dict[str, Any]) -> None:
        match frame.get("type"):
            case "heartbeat":
                return
            case "control.draining":
                self.report("draining", frame["retryAfterMs"])
                threading.Timer(frame["retryAfterMs"] / 1000, self.connect).start()
                return
        self.cursor = frame.get("_cursor", self.cursor)
        self.report("event", frame)


Client().connect()
sys.stdin.read()
