"""A machine with two GPUs, to test with where there is none. It is as strict as PyTorch and CUDA are.

    with FakeGpu():
        ...  # code for a GPU: device="cuda", torch.cuda.Stream, graphs, Triton's kernels

A `DeviceTensor` says that it is on a GPU, and computes on the CPU, at once. A dispatch mode sees each operation. What
PyTorch checks in Python runs as it is, because only the functions below it are replaced. `FakeTensorMode`, PyTorch's
own model of devices and dtypes, judges each operation and tells where its results are. Kernels run in Triton's
interpreter. What is left to refuse here is what CUDA alone notices: pageable memory on a stream, pointers to another
device, a lack of memory, an error that an earlier call left behind, and all that a capture forbids.

A graph records launches while it captures, and runs none. Every number of the host and every address is then fixed: a
replay reads and writes the memory of the capture, whatever the program's variables have come to mean.
"""

import contextlib
import inspect
import os
import sys
import weakref
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import kernels

CPU = torch.device("cpu")
HOST_WAITS = {  # operations whose result Python needs; tolist and numpy call resolve_conj
    "item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "resolve_conj",
}  # fmt: skip


class DeviceTensor(torch.Tensor):
    """A tensor on a fake GPU; `elem` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, elem, device):
        layout = elem.stride(), elem.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(cls, elem.shape, *layout, dtype=elem.dtype)
        tensor.elem, tensor.place = elem, device
        return tensor

    device, is_cuda, is_cpu = property(lambda self: self.place), True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a DeviceTensor, and no FakeGpu is entered")


def convert(x, change):
    """x, perhaps nested, with change(tensor) in the place of each tensor."""
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, dict):
        return {key: convert(value, change) for key, value in x.items()}
    return type(x)(convert(value, change) for value in x) if type(x) in (list, tuple) else x


def tensors(x):
    convert(x, (found := []).append)
    return found


def on_device(tensor):
    return isinstance(tensor, DeviceTensor)


def elems(x):
    """x with CPU tensors in the places of its device tensors."""
    return convert(x, lambda tensor: tensor.elem if on_device(tensor) else tensor)


def pointer(elem):
    return elem.untyped_storage().data_ptr()


class Stream:
    """A stream of a device; `used` from its first operation on."""

    def __init__(self, gpu, device, name):
        self.gpu, self.device, self.name, self.used = gpu, device, name, False

    def record_event(self):
        return Event(self)

    def wait_event(self, event):
        self.gpu.require(event.graph is self.gpu.graph_of(self), "a capture waits for what it did not capture")

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())


class Event:
    def __init__(self, stream):
        self.gpu, self.graph = stream.gpu, stream.gpu.graph_of(stream)

    def synchronize(self):
        self.gpu.synchronize()


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, gpu):
        self.gpu, self.launches, self.number = gpu, [], len(gpu.replays)
        gpu.replays.append(0)

    def capture_begin(self, **options):
        self.stream = self.gpu.stream()
        self.gpu.require(self.stream not in self.gpu.default_streams, "a default stream cannot be captured")
        self.gpu.require(self.stream.used, "no step ran on this stream before, so libraries are not ready")
        self.gpu.graph = self

    def capture_end(self):
        self.gpu.graph = None

    def replay(self):
        self.gpu.require(self.launches and not self.gpu.graph, "there is nothing to replay, or a capture is under way")
        self.gpu.replays[self.number] += 1
        with _disable_current_modes():
            for launch in self.launches:
                launch()


def unseen(make, *args):
    """make(*args), which creates a subclass of Tensor, in ways that no mode may see."""
    with _disable_current_modes():
        return make(*args)


def launch_into(out, run):
    """What a graph does for an operation: `out` are the results that the capture made."""
    for old, new in zip(tensors(out), tensors(run())):
        old.copy_(new)


def clone(x):
    """A copy with the same strides, which launchers may check."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


class FakeGpu(TorchDispatchMode):
    """Fakes two GPUs while it is entered. `replays` counts how often each graph was replayed.

    references  None, or {(module, name of a launcher): None}: their PyTorch reference runs as one operation, and
                those of other launchers as operations of PyTorch (happens_before.py has functions in place of None)
    memory      bytes of each GPU; of these the program is told `promised`, if given
    pinnable    whether the host's memory can be pinned
    """

    def __init__(self, references=None, memory=1 << 40, promised=None, pinnable=True):
        super().__init__()
        self.references, self.memory, self.promised, self.pinnable = references, memory, promised, pinnable
        self.devices = torch.device("cuda", 0), torch.device("cuda", 1)
        self.index, self.allocated = 0, dict.fromkeys(self.devices, 0)  # of the current device; bytes
        self.streams = []
        self.default_streams = [self.new_stream(device) for device in self.devices]
        self.current = list(self.default_streams)  # each device's
        self.memories = {}  # by address
        self.graph, self.replays = None, []  # the graph that captures
        self.faults = []  # what happened where an error goes unnoticed: in a finaliser
        self.last_error = False  # left by a function of CUDA: the next launch reports it
        self.rules, self.judged = FakeTensorMode(), {}  # judged: what the rules said before
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        cudart = SimpleNamespace(
            cudaHostRegister=self.pin, cudaHostUnregister=self.unpin, cudaMemGetInfo=self.memory_info
        )
        patched = {
            torch._C: dict(
                _cuda_getDeviceCount=lambda: 2, _cuda_getDevice=lambda: self.index, _cuda_setDevice=self.set_index,
                _host_emptyCache=lambda: None,
            ),
            torch.cuda: dict(
                _lazy_init=lambda: None, _exchange_device=self.set_index, _maybe_exchange_device=self.set_index,
                device_count=lambda: 2, Stream=self.new_stream, current_stream=self.stream,
                set_stream=self.set_stream, synchronize=self.synchronize, CUDAGraph=partial(Graph, self),
                _get_device_properties=lambda i: SimpleNamespace(multi_processor_count=3), cudart=lambda: cudart,
            ),
            torch.cuda.graph: dict(default_capture_stream=None),
            bias: dict(causal_lower_right=partial(unseen, bias.causal_lower_right)),
            torch: dict(Generator=lambda device, make=torch.Generator: self.place(device) and make()),
        }  # fmt: skip
        if self.references is None:
            kind = type(kernels._pool_kernel)  # what Triton's interpreter makes of a kernel
            patched[kind] = dict(run=lambda kernel, *args, **options: self.run(kind_run, kernel, *args, **options))
            kind_run = kind.run
        else:
            patched[kernels] = dict(use_triton=lambda backend, device: False)
        for owner, names in patched.items():
            for name, value in names.items():
                self.patches.enter_context(mock.patch.object(owner, name, value, create=True))
        for (module, name), touched in (self.references or {}).items():
            launcher = partial(self.launch, getattr(module, name), touched)
            self.patches.enter_context(mock.patch.object(module, name, launcher))
        self.patches.enter_context(torch.inference_mode())  # so that `to` and others are dispatched whole
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the host, then copied
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        self.patches.callback(kernels.finished_splits.cache_clear)  # a tensor of this GPU
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def require(self, condition, message):
        if not condition:
            raise RuntimeError(f"CUDA error: {message}")

    # Devices, streams and memory

    def place(self, device):
        """A torch.device with the index that PyTorch gives it."""
        if torch.device(device).type != "cuda":
            return torch.device(device)
        index = torch.cuda._utils._get_device_index(torch.device(device), optional=True)
        self.require(index < 2, "invalid device ordinal")
        return self.devices[index]

    def set_index(self, index):
        self.index, before = self.place(f"cuda:{index}").index, self.index
        return before

    def new_stream(self, device="cuda", priority=0):
        self.streams.append(self.make_stream(self.place(device), f"stream {len(self.streams)}"))
        return self.streams[-1]

    def make_stream(self, *args):
        return Stream(self, *args)

    def stream(self, device=None):
        return self.current[self.place("cuda" if device is None else device).index]

    def set_stream(self, stream):
        self.index, self.current[stream.device.index] = stream.device.index, stream

    def graph_of(self, stream):
        """The graph that captures the stream, if any."""
        return self.graph if self.graph and self.graph.stream is stream else None

    def synchronize(self, device=None):
        self.place("cuda" if device is None else device)
        self.require(not self.graph, "the host waits for what is captured")

    def memory_of(self, elem, device=None, stream=None, pinned=False):
        """What is known of a CPU tensor's storage. One that is not known yet has just been allocated."""
        storage, key = elem.untyped_storage(), pointer(elem)
        if key not in self.memories:
            memory = SimpleNamespace(device=device, stream=stream, pinned=pinned, registered=False, last={})
            memory.size = storage.nbytes()
            if device in self.devices:
                if self.allocated[device] + memory.size > self.memory:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                self.allocated[device] += memory.size
            self.memories[key] = memory
            weakref.finalize(storage, self.free, key).atexit = False
        return self.memories[key]

    def free(self, key):
        memory = self.memories.pop(key)
        if memory.registered:
            self.faults.append("memory was freed that CUDA has registered")
        if memory.device in self.devices:
            self.allocated[memory.device] -= memory.size
        return memory

    def memory_info(self, index):
        free = self.memory - self.allocated[self.devices[index]]
        return self.promised or free, self.memory

    def pin(self, address, n_bytes, flags):
        """cudaHostRegister of a whole storage."""
        memory, self.last_error = self.memories[address], not self.pinnable
        memory.pinned = memory.registered = self.pinnable
        return int(self.last_error)

    def unpin(self, address):
        self.memories[address].pinned = self.memories[address].registered = False

    # Operations

    def judge(self, func, given):
        """The devices of an operation's results, in order. PyTorch's own errors are raised."""

        def describe(x):
            if isinstance(x, list | tuple):
                return tuple(map(describe, x))
            return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x)

        def fake(x):
            meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            return FakeTensor(self.rules, meta, x.device)

        given = {name: x for name, x in given.items() if not isinstance(x, torch._C.Generator)}
        key = func, *given, describe([*given.values()])
        if key not in self.judged:
            with self.rules:
                self.judged[key] = [x.device for x in tensors(func(**convert(given, fake)))]
        return self.judged[key]

    def operate(self, name, given, run, reads, writes, devices, dry=None, pinned=False, waits=False):
        """Run an operation. Returns what its caller gets.

        run      computes with CPU tensors. In a capture, `dry` runs instead, for the results' shapes
        reads    and writes: the CPU tensors given that are touched; devices  of the results
        pinned   whether the results are in pinned memory; waits  whether the host waits
        """
        inputs = {elem: x for elem, x in zip(tensors(elems(given)), tensors(given))}
        ends = {x.device for x in inputs.values()} | (set(devices) if isinstance(devices, list) else {devices})
        stream = next((self.stream(device) for device in ends if device.type == "cuda"), None)
        for elem, x in inputs.items() if stream else ():
            if x.is_cpu and x.dim() and not waits and not self.memory_of(elem).pinned:
                raise RuntimeError(f"{name} ({self.site()}): pageable memory of the host is used by {stream.name}")
        recording = self.graph and (stream or pinned)
        out = dry() if recording and dry else run()
        devices = devices if isinstance(devices, list) else [devices] * len(tensors(out))
        known = {pointer(elem) for elem in inputs}
        new = {elem: device for elem, device in zip(tensors(out), devices) if pointer(elem) not in known}
        for elem, device in new.items():
            self.memory_of(elem, device, stream, pinned)
        if stream and (new or writes or waits):
            stream.used, error, self.last_error = True, self.last_error, False
            self.require(not error, f"{name} reports the error of an earlier call")
        if recording and (new or writes or waits):
            self.require(not waits and not pinned, f"{name}: the host waits for what is captured")
            self.require(self.graph_of(stream), f"{name} runs on another stream than the one that is captured")
            for elem in new:
                elem.fill_(torch.nan if elem.is_floating_point() else 0)
            self.graph.launches.append(partial(launch_into, list(new), run))
        if new or writes or waits:
            self.note(name, stream, reads, [*writes, *new], "cuda" in {d.type for d in new.values()}, waits)
        devices = iter(devices)

        def give(elem):
            device = next(devices)
            return inputs[elem] if elem in inputs else DeviceTensor(elem, device) if device.type == "cuda" else elem

        return convert(out, give)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """An operation of PyTorch."""
        name, parameters = func._schema.name.removeprefix("aten::"), func._schema.arguments
        given = dict(zip((p.name for p in parameters), args)) | (kwargs or {})
        mutable = {p.name for p in parameters if p.alias_info and p.alias_info.is_write}
        writes = tensors([value for key, value in given.items() if key in mutable])
        reads = tensors([value for key, value in given.items() if key not in mutable])
        ends = {x.device.type for x in reads + writes}
        if given.get("device"):
            given["device"] = self.place(given["device"])
            ends.add(given["device"].type)
        if "meta" in ends and "cuda" not in ends:
            return func(**given)
        waits = name in HOST_WAITS
        devices = CPU if waits or "cuda" not in ends else self.judge(func, given)
        values = elems(given) | ({"device": CPU} if given.get("device") else {})
        pinned, run = values.pop("pin_memory", False), lambda: func(**values)
        if name in ("copy_", "to", "_to_copy") and len(ends) == 2:
            number = reads[0].dim() == 0 and reads[0].is_cpu  # goes along with the launch
            waits = not given.get("non_blocking") and not number
            run = run if name == "copy_" else lambda: func(**values).clone()
        dry = (lambda: elems(writes[0])) if writes else None
        return self.operate(name, given, run, elems(reads), elems(writes), devices, dry, pinned, waits)

    def launch(self, launcher, touched, *args, **kwargs):
        """A launcher of `references`."""
        call = inspect.signature(launcher).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments | ({"backend": "torch"} if "backend" in call.arguments else {})
        values, device = elems(given), next((x.device for x in tensors(given) if on_device(x)), CPU)
        with _disable_current_modes():
            reads, writes = touched(SimpleNamespace(**values)) if touched else ([], tensors(values))
            dry = partial(launcher, **convert(values, clone))
            return self.operate(launcher.__name__, given, partial(launcher, **values), reads, writes, device, dry)

    def run(self, run, kernel, *args, grid, warmup, **options):
        """A Triton kernel."""
        for i, x in enumerate(args):
            pinned = isinstance(x, torch.Tensor) and not on_device(x) and self.memory_of(x).pinned
            if isinstance(x, torch.Tensor) and not pinned and x.device != self.devices[self.index]:
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)")
        values, device = elems(args), self.devices[self.index]
        run = partial(run, kernel, *values, grid=grid, warmup=warmup, **options)
        with _disable_current_modes():
            self.operate(kernel.__name__, args, run, [], tensors(values), device, lambda: None)

    def note(self, name, stream, reads, writes, allocates, waits):
        """Called for every operation that is no view, see happens_before.py; stream is None on the host."""

    def site(self):
        """The innermost line outside of torch and of the fakes."""
        frame, fakes = sys._getframe(1), os.path.dirname(__file__)
        names = [os.path.join(fakes, name) for name in ("fake_gpu.py", "happens_before.py")]
        while frame.f_code.co_filename.startswith((*names, torch.__path__[0])):
            frame = frame.f_back
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def to_device(module):
    """Move a module's parameters and buffers, which nn.Module.to cannot do with such tensors."""
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            named.update({name: tensor.data.to("cuda") for name, tensor in named.items() if tensor is not None})
    return module
