"""CUDA graphs: a whole answer as one launch.

Seven tokens for a few images take thousands of small kernels, and a CPU launches them more slowly than the GPU runs them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch as th

Tensors = tuple["th.Tensor | None", ...]
MAX_GRAPHS = 32
"""Of the last shapes; each holds memory for its inputs and outputs."""
WARM_UPS = 2
"""Calls before a recording."""


class GraphRunner:
    """Calls a function of tensors; for each set of shapes, the first call records a graph that the next ones replay.

    :param function: runs on the device alone, and launches the same kernels for the same shapes
    :param generators: it draws random numbers from these
    """

    def __init__(self, function: Callable[..., Tensors], generators: tuple[th.Generator, ...] = ()) -> None:
        self._function = function
        self._generators = generators
        self._graphs: OrderedDict[tuple[object, ...], tuple[th.cuda.CUDAGraph, Tensors, Tensors]] = OrderedDict()
        self._pool = th.cuda.graph_pool_handle()

    def __call__(self, *inputs: th.Tensor | None) -> Tensors:
        """Results of the function, copied out of the graph's memory."""
        key = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._record(inputs)
        self._graphs.move_to_end(key)
        graph, places, outputs = self._graphs[key]
        for place, x in zip(places, inputs):
            if place is not None and x is not None:
                place.copy_(x)
        graph.replay()
        return tuple(x if x is None else x.clone() for x in outputs)

    def _record(self, inputs: Tensors) -> tuple[th.cuda.CUDAGraph, Tensors, Tensors]:
        places = tuple(x if x is None else x.clone() for x in inputs)
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):  # libraries allocate their workspaces now; in a recording they must not
            for _ in range(WARM_UPS):
                self._function(*places)
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with th.cuda.graph(graph, pool=self._pool):
            outputs = self._function(*places)
        return graph, places, outputs
