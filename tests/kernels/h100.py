"""Inductor as it would run for an H100, without one: the code that it generates for a module."""

import ast
import contextlib
import importlib.util
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import detect_fake_mode
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t5fx.kernels.triton_kernels import launch

TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    gcnArchName="",
    is_integrated=False,
)


class Driver:
    """For the parts of Triton and Inductor that ask what they compile for; it runs nothing."""

    def get_current_target(self):
        return TARGET

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_current_device(self):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_current_stream(self, device=None):
        return 0

    def is_active(self):
        return True

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


@contextlib.contextmanager
def pretended():
    """CPU tensors pass for those of an H100 where the kernels ask."""
    with (
        mock.patch.object(launch, "check_device"),
        mock.patch.object(launch, "architecture", return_value="sm_90"),
        mock.patch.object(launch, "multiprocessors", return_value=132),
        mock.patch.object(triton.runtime.driver, "_active", Driver()),
    ):
        yield


@contextlib.contextmanager
def _forgotten():
    """torch remembers whether it found a GPU that Triton knows: not into this, nor out of it."""
    remembered = [f for f in vars(torch.utils._triton).values() if hasattr(f, "cache_clear")]
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@contextlib.contextmanager
def mocked():
    """torch takes itself to have an H100. Nothing may be run: only code can be generated."""
    answers = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda device=None: PROPERTIES,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_device_name": lambda device=None: PROPERTIES.name,
        "torch.cuda.device_of": lambda tensor: contextlib.nullcontext(),
        "torch.cuda.synchronize": lambda *args: None,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *args: None,
        "torch.cuda._exchange_device": lambda device: 0,
        "torch.cuda._maybe_exchange_device": lambda device: 0,
        "torch.cuda._lazy_init": lambda *args: None,
        "torch.version.cuda": "13.0",
    }
    of_interface = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_compute_capability": lambda device=None: 90,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: PROPERTIES,
    }
    of_worker = {
        "get_device_properties": lambda device=None: PROPERTIES,
        "current_device": lambda: 0,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_forgotten())
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        # Names that some versions of torch have.
        for name in ("init_gpu_context", "init_cuda_context"):
            name = f"torch._subclasses.fake_tensor.{name}"
            stack.enter_context(mock.patch(name, create=True))
        stack.enter_context(
            mock.patch("torch._C._cuda_getCurrentRawStream", return_value=0, create=True)
        )
        for owner, functions in ((CudaInterface, of_interface), (CudaInterface.Worker, of_worker)):
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(owner, name, staticmethod(function)))
        yield


#: Names in generated code of what is no tensor: symbolic sizes, counts of elements, streams.
NO_TENSOR = re.compile(r"[suz]\d+|ks\d+|\w*numel|\w*stream\d*|True|False|None")


class _Stop(Exception):
    """The code is generated; it is not to be compiled."""


def generated(
    module: nn.Module, *args: torch.Tensor, dynamic: bool, training: bool
) -> list["Code"]:
    """What Inductor would run of a call on an H100: [forward, backward], or [inference].

    The module and its arguments are traced on the CPU, where they are; then every tensor of the
    graph is declared to be on the GPU.
    """
    found: list[Code] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any, *, backward: bool = False) -> Any:
        values = [n.meta["val"] for n in graph.graph.nodes if "val" in n.meta]
        tensors = [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
        fake_mode = detect_fake_mode(tensors)

        def stop(lowering: GraphLowering, *rest: Any) -> None:
            code = lowering.codegen()[0]
            found.append(Code(getattr(code, "value", code)))
            raise _Stop

        with (
            mocked(),
            torch.no_grad(),
            V.set_fake_mode(fake_mode),
            mock.patch.object(GraphLowering, "_compile_to_module", stop, create=True),
            mock.patch.object(GraphLowering, "compile_to_module", stop),
        ):
            _move_to_cuda(graph, fake_mode)
            inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
            before = len(found)
            try:
                compile_fx.compile_fx_inner(graph, inputs, is_backward=backward)
            except Exception:
                if len(found) == before:
                    raise
        return lambda *args: None

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=lambda graph, inputs: compiler(graph, inputs, backward=True),
        inference_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with (
        pretended(),
        torch.set_grad_enabled(training),
        functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
        inductor_config.patch(compile_threads=1, fx_graph_cache=False),
        contextlib.suppress(IndexError),  # what is compiled returns nothing
    ):
        torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return found


def _move_to_cuda(graph: torch.fx.GraphModule, fake_mode: Any) -> None:
    moved: dict[int, tuple[Any, Any]] = {}  # the original too, so that no other gets its id

    def move(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cuda", 0)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in moved:
            with fake_mode:
                there = torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device="cuda:0"
                )
            moved[id(value)] = value, there
        return moved[id(value)][1]

    for node in graph.graph.nodes:
        for name in ("val", "eager_input_vals"):
            if name in node.meta:
                node.meta[name] = map_aggregate(node.meta[name], move)
        node.meta.pop("tensor_meta", None)
        node.args = map_aggregate(node.args, move)
        node.kwargs = map_aggregate(node.kwargs, move)
    graph.recompile()


@contextlib.contextmanager
def _captured():
    """What a file of Inductor's has compiled: [function, first configuration, triton_meta]."""
    captured = []

    def cached_autotune(size_hints, configs, triton_meta, *args, **kwargs):
        def decorate(function):
            captured.extend([function, configs[0], triton_meta])
            return function

        return decorate

    with (
        mocked(),
        pretended(),
        mock.patch.object(triton_heuristics, "cached_autotune", cached_autotune),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        yield captured


class Launch(NamedTuple):
    """A kernel's launch, or a call of a library, in generated code."""

    name: str  # "inner_gradient_2", "triton_poi_fused_add_0", "addmm", ...
    tensors: list[str]  # the arguments that are tensors, as names of memory
    sizes: list[str]  # the others
    out: str | None  # where a library writes


@dataclass
class Code:
    """Generated code: its kernels by name, and what it launches in order."""

    source: str

    def __post_init__(self) -> None:
        tree = ast.parse(self.source)
        self.kernels: dict[str, str] = {
            node.targets[0].id: node.value.args[1].value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and getattr(node.value.func, "attr", "") == "triton"
        }
        self.launches: list[Launch] = []
        #: Of memory that is used again: what it was before.
        self.reused: dict[str, str] = {}
        memory: dict[str, str] = {}
        lines = self.source.splitlines()
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.Call))]
        for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
            if isinstance(node, ast.Assign):
                source = _tensor(node.value, memory)
                for target in node.targets:
                    if isinstance(target, ast.Name) and source is not None:
                        again = "# reuse" in lines[node.lineno - 1]
                        (self.reused if again else memory)[target.id] = source
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                owner, name = node.func.value.id, node.func.attr
                tensors = [_tensor(a, memory) for a in node.args]
                sizes = [ast.unparse(a) for a, t in zip(node.args, tensors, strict=True) if not t]
                out = next(
                    (_tensor(k.value, memory) for k in node.keywords if k.arg == "out"), None
                )
                tensors = [t for t in tensors if t]
                if owner in self.kernels and name == "run":
                    self.launches.append(Launch(owner, tensors, sizes, None))
                elif owner == "extern_kernels":
                    self.launches.append(Launch(name, tensors, sizes, out))

    def is_ours(self, name: str) -> bool:
        """Whether a kernel was written by us, not by Inductor."""
        return "user_autotune" in self.kernels.get(name, "")

    def compiled(self, folder: Path) -> dict[str, Any]:
        """Each kernel compiled for an H100 as Inductor would: sizes of 1, and such of which it
        knows no other value, are constants. ``folder``: for the kernels' files.
        """
        kernels = {}
        for name, source in self.kernels.items():
            path = folder / f"{name}_{len(list(folder.iterdir()))}.py"
            path.write_text(source, encoding="utf-8")
            with _captured() as captured:
                spec = importlib.util.spec_from_file_location(path.stem, path)
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            function, settings, meta = captured
            constants = {**meta["constants"], **settings.kwargs}
            signature = {**meta["signature"], **dict.fromkeys(settings.kwargs, "constexpr")}
            places = {(function.arg_names.index(n),): value for n, value in constants.items()}
            ast_source = ASTSource(function, signature, places, meta["configs"][0])
            options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
            options["enable_fp_fusion"] = True
            kernels[name] = triton.compile(ast_source, target=TARGET, options=options)
        return kernels

    @property
    def ours(self) -> list[Launch]:
        return [launch for launch in self.launches if self.is_ours(launch.name)]

    @property
    def fused(self) -> list[Launch]:
        """Launches of kernels that Inductor wrote."""
        return [x for x in self.launches if x.name in self.kernels and not self.is_ours(x.name)]

    @property
    def libraries(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.name not in self.kernels]

    def reads(self, launch: Launch) -> list[str]:
        """Its tensors, and of one that it changes in its place what lay there."""
        before = "in_out_ptr" in self.kernels.get(launch.name, "") and not self.is_ours(launch.name)
        more = [self.reused[t] for t in launch.tensors if t in self.reused] if before else []
        return launch.tensors + more

    def copies(self, numbers: int) -> list[Launch]:
        """Launches that move at least so many numbers, or an unknown count, without computing."""

        def count(launch: Launch) -> float:
            total = 1.0
            for size in launch.sizes:
                total *= int(size) if size.isdigit() else torch.inf
            return total

        return [x for x in self.fused if only_moves(self.kernels[x.name]) and count(x) >= numbers]


def _tensor(node: ast.expr, memory: dict[str, str]) -> str | None:
    """The memory that an expression is a view of: the first name that it had."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("reinterpret_tensor", "copy_if_misaligned"):
            return _tensor(node.args[0], memory)
    if isinstance(node, ast.Name) and not NO_TENSOR.fullmatch(node.id):
        return memory.get(node.id, node.id)
    return None


def only_moves(kernel: str) -> bool:
    """Whether what a kernel of Inductor's stores anywhere is as it was loaded, or cast."""
    made: dict[str, ast.expr] = {}
    stored: list[ast.expr] = []
    for node in ast.walk(ast.parse(kernel)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made[node.targets[0].id] = node.value
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store":
            stored.append(node.args[1])

    def loaded(value: ast.expr) -> bool:
        if isinstance(value, ast.Name):
            return value.id in made and loaded(made[value.id])
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            if value.func.attr in ("to", "broadcast_to"):
                own = value.func.attr == "to"
                return loaded(value.func.value if own else value.args[0])
            return ast.unparse(value.func) == "tl.load"
        return False

    return any(loaded(value) for value in stored)
