"""How a peer is timed: as `device_bench` times ours.

Sets of buffers are rotated so that the L2 cache does not answer. A CUDA graph holds the calls, so that the host's part of
a call is not counted. A sample is the time between two CUDA events with enough replays in between to last 2 ms; the events
of all samples are recorded before the host waits, and one replay goes ahead of the first, so the device never idles.
"""

import math
import time
from collections import deque

import torch

SAMPLE_SECONDS = 2e-3
# Each replay of a graph that draws random numbers begins with two small kernels of PyTorch's that set seed and offset.
# They are no part of a call, so a graph holds enough calls that they do not count.
CALLS_A_GRAPH = 32


class Timer:
    """Times `calls`, one for each set of buffers."""

    def __init__(self, calls):
        self.calls = calls
        # What the last round wrote stays alive, so that the next call gets other memory: outputs rotate too.
        self.written = deque(maxlen=len(calls))
        self.replays = 1
        for call in calls[:3]:  # compiles, tunes
            call()
        self.round()
        self.prepare()
        seconds = min(self.sample(3)) * self.calls_a_replay
        self.replays = max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))

    def prepare(self):
        self.calls_a_replay = len(self.calls)

    def round(self):
        for call in self.calls:
            self.written.append(call())

    replay = round

    def sample(self, count):
        """Seconds a call, `count` times."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        self.replay()
        events[0].record()
        for event in events[1:]:
            for _ in range(self.replays):
                self.replay()
            event.record()
        events[-1].synchronize()
        calls = self.replays * self.calls_a_replay
        pairs = zip(events, events[1:])
        return [start.elapsed_time(end) * 1e-3 / calls for start, end in pairs]


class EventsTimer(Timer):
    """Plain calls between the events: where the kernels are short the host's part of a call is in the time."""

    kind = "events"


class GraphTimer(Timer):
    kind = "graph"

    def prepare(self):
        rounds = -(-CALLS_A_GRAPH // len(self.calls))
        self.calls_a_replay = rounds * len(self.calls)
        self.graph = torch.cuda.CUDAGraph()
        # Autograd runs a backward kernel on the stream of its forward, so all work of the program is on one stream.
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(rounds):
                self.round()

    def replay(self):
        self.graph.replay()


class WallTimer(Timer):
    """For trying the program without a GPU: no result."""

    kind = "wall"

    def sample(self, count):
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.round()
            seconds.append((time.perf_counter() - start) / len(self.calls))
        return seconds


def timer(calls, device):
    if device == "cpu":
        return WallTimer(calls)
    try:
        return GraphTimer(calls)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # A capture that failed leaves the generator believing that it is still being captured.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        return EventsTimer(calls)
