"""A model hub on this machine: it takes what huggingface_hub uploads, and remembers it."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def fake_hub(*, status=200):
    """(address, files by name) of a hub; ``status``: what it answers to an upload."""
    files = {}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.answer(*self.answer_to(body))

        def answer_to(self, body):
            if self.path.startswith("/api/repos/create"):
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                return 200, {"url": f"{address}/{name}", "id": "me/student"}
            if "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                return status, {"files": [{"path": one["path"], **modes} for one in asked]}
            if "/commit/" in self.path:
                values = [json.loads(line)["value"] for line in body.decode().splitlines()]
                sent = [value for value in values if "path" in value]
                files.update({v["path"]: base64.b64decode(v["content"]) for v in sent})
                url = f"{address}/me/student/commit/0"
                return 200, {"commitUrl": url, "commitOid": "0" * 40, "success": True}
            return 200, {}  # the card's front matter is looked at

        def do_GET(self):
            self.answer(200, {"id": "me/student", "sha": "0" * 40, "siblings": []})

        def answer(self, code, content):
            text = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, files
    finally:
        server.shutdown()
        server.server_close()
