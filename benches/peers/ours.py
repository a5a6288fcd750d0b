"""Our side: `device_bench --serve`, a line of JSON each way. It answers when the device has finished."""

import contextlib
import json
import shlex
import subprocess


class Turns:
    """Times one point; the counterpart of timing.Timer."""

    kind = "graph"

    def __init__(self, server, point, p):
        self.server, self.request = server, point.request() | {"p": p}
        self.bytes = None  # the least bytes by the server's own count

    def sample(self, count):
        answer = self.server.ask(self.request | {"samples": count})
        self.bytes = answer["bytes"]
        return answer["seconds"]


class Ours:
    """The server. `device` is what it said of the device when it started."""

    def __init__(self, program, environment, stderr=None):
        command = [*shlex.split(program), "--serve"]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            bufsize=1,
        )
        self.device = self.line()
        if "error" in self.device:
            raise RuntimeError(self.device["error"])

    def line(self):
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server ended with status {self.process.wait()}")
        return json.loads(answer)

    def timer(self, point, p):
        return Turns(self, point, p)

    def ask(self, request):
        """Nothing else may be running on the device."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
        except BrokenPipeError:
            pass  # line() tells why
        answer = self.line()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self):
        with contextlib.suppress(BrokenPipeError):  # what it did not read, having ended
            self.process.stdin.close()
        self.process.wait()
