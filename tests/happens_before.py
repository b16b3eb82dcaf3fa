"""A happens-before checker: finds races between streams, and with the host, on a machine without a GPU.

    with Checker() as checker:
        ...  # code for a GPU: device="cuda", torch.cuda.Stream, events
    assert not checker.races

The host and the streams are *actors*. An actor runs its operations one after another; actors run side by side. Only a
launch, an event, or a copy that the host waits for orders the operations of two actors. Two operations on the same
byte, at least one of them a write, are a race if nothing orders them, even if this run computes the right numbers.

*Vector clocks* record the order. Each actor numbers its operations, and its clock says up to which number each actor's
operations are certainly complete. An actor that waits for another takes over the other's clock: the maximum of both,
entry by entry (`|` of Counters). So operation n of actor A happens before an operation of actor B exactly if B's clock
then says n or more for A.

*Bytes*. A tensor on the device is a `DeviceTensor`, which computes on the CPU, at once. A dispatch mode sees each
operation: it writes its results and its mutable arguments, and reads its other tensors; views touch nothing. For each
storage and actor, one array holds for every byte the number of the last operation that read it, another that of the
last one that wrote it; the bytes of a tensor are a strided view of such an array. A function that launches a kernel
runs its PyTorch reference instead and counts as one operation, which touches what its declaration says.

*Freed memory*. PyTorch gives memory that Python has freed to the next allocation on the stream that it was allocated
on. This is a race if another stream may still use it.

Limits: one device; of a CUDA graph there is only the stream that would capture it; indexing with a tensor touches the
whole operand; pinned memory of PyTorch's own is not followed after it is freed.
"""

import contextlib
import inspect
import os
import sys
import weakref
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import kernels

HOST_WAITS = {  # operations whose result Python needs; tolist and numpy call resolve_conj
    "item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "resolve_conj",
}  # fmt: skip


class DeviceTensor(torch.Tensor):
    """A tensor on the fake device; `elem` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, elem):
        layout = elem.stride(), elem.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(cls, elem.shape, *layout, dtype=elem.dtype)
        tensor.elem = elem
        return tensor

    device, is_cuda, is_cpu = torch.device("cuda", 0), True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a DeviceTensor, and no Checker is entered")


class Actor:
    """The host or a stream: `operations` are what it did, `clock` what it knows to be complete."""

    def __init__(self, checker, name):
        self.checker, self.name, self.clock, self.operations = checker, name, Counter(), []

    def learn(self, clock, how):
        if self.checker.orders(how):
            self.clock |= clock

    def wait_event(self, event):
        self.learn(event.clock, "wait_event")

    def wait_stream(self, stream):
        self.learn(stream.clock, "wait_stream")

    def record_event(self):
        return Event(self.checker, self.clock.copy() if self.checker.orders("record_event") else Counter())


class Event:
    def __init__(self, checker, clock):
        self.checker, self.clock = checker, clock

    def synchronize(self):
        self.checker.host.learn(self.clock, "synchronize")


class Memory:
    """A storage: the stream it was allocated on, if any, whether it is pinned, and who touched its bytes last."""

    def __init__(self, storage, stream, pinned):
        self.stream, self.pinned, n_bytes = stream, pinned, storage.nbytes()
        self.last = defaultdict(lambda: np.zeros(n_bytes, np.int32))  # (actor, "reads" or "writes") -> numbers


def bytes_of(elem, numbers):
    """The view of `numbers`, one for each byte of a storage, that has the place of the tensor in that storage."""
    size = elem.element_size()
    shape, strides = (*elem.shape, size), (*(4 * size * stride for stride in elem.stride()), 4)  # of int32, in bytes
    return np.ndarray(shape, np.int32, numbers, 4 * size * elem.storage_offset(), strides)


def tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def on_device(tensor):
    return isinstance(tensor, DeviceTensor)


def elems(x):
    """x with CPU tensors in the places of its device tensors."""
    return tree_map_only(DeviceTensor, lambda tensor: tensor.elem, x)


def pointer(elem):
    return elem.untyped_storage().data_ptr()


class Checker(TorchDispatchMode):
    """Fakes a device while it is entered. `races` are sentences, `sites` the calls that order something.

    declared  {(module, name): touched} of functions that launch kernels: touched(arguments) -> (reads, writes), lists
              of tensors, results left out. An argument `backend` is set to "torch"
    removed   one of the sites: its calls have no effect, as if the line was not in the program
    """

    def __init__(self, declared=None, removed=None):
        super().__init__()
        self.declared, self.removed, self.sites, self.races = declared or {}, removed, set(), set()
        self.host, self.streams = Actor(self, "host"), [Actor(self, "default stream")]
        self.stream = self.streams[0]  # the current one
        self.memories = {}  # by address
        self.freed = defaultdict(list)  # a stream -> Memory.last of what was freed there
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        cuda = dict(
            Stream=self.new_stream, stream=self.use_stream, current_stream=lambda: self.stream,
            synchronize=self.synchronize, _lazy_init=lambda: None,
            CUDAGraph=object, graph=lambda _: SimpleNamespace(capture_stream=self.new_stream()),
            cudart=lambda: SimpleNamespace(cudaHostRegister=self.pin, cudaHostUnregister=self.unpin),
        )  # fmt: skip
        enter = self.patches.enter_context
        enter(mock.patch.multiple(torch.cuda, **cuda))
        enter(mock.patch.object(kernels, "n_multiprocessors", lambda device: 4))
        enter(mock.patch.object(torch, "Generator", lambda device, make=torch.Generator: make()))
        for (module, name), touched in self.declared.items():
            enter(mock.patch.object(module, name, partial(self.launch, getattr(module, name), touched)))
        enter(torch.inference_mode())  # so that `to` and others are dispatched whole
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the host, then copied
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    # Streams

    def new_stream(self, device=None):
        self.streams.append(Actor(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def use_stream(self, stream):
        outer, self.stream = self.stream, stream
        yield
        self.stream = outer

    def synchronize(self, device=None):
        for stream in self.streams:
            self.host.learn(stream.clock, "synchronize")

    def site(self):
        """The innermost line outside of torch and of this module."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith((__file__, torch.__path__[0])):
            frame = frame.f_back
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"

    def orders(self, how):
        """Whether a call that orders something has its effect."""
        self.sites.add(site := f"{self.site()} {how}")
        return site != self.removed

    # Memory

    def memory(self, elem, stream=None, pinned=False):
        """The Memory of a CPU tensor's storage, which is new where it is not known yet."""
        storage, key = elem.untyped_storage(), pointer(elem)
        if key not in self.memories:
            self.memories[key] = Memory(storage, stream, pinned)
            weakref.finalize(storage, self.free, key).atexit = False
        return self.memories[key]

    def free(self, key):
        memory = self.memories.pop(key)
        if memory.stream:
            self.freed[memory.stream].append(memory.last)

    def pin(self, address, n_bytes, flags):
        """cudaHostRegister of a whole storage."""
        self.memories[address].pinned = True
        return 0

    def unpin(self, address):
        """cudaHostUnregister, which the host may call when no stream uses the memory any more."""
        self.note("cudaHostUnregister", self.host)
        self.check(self.host, "of the memory", self.memories[address].last)

    # Operations

    def check(self, actor, deed, last):
        """Report the last operations, as in Memory.last, that `actor` does not know to be complete."""
        for (other, how), numbers in last.items():
            number = numbers.max(initial=0)
            if number > actor.clock[other]:
                self.races.add(f"{actor.operations[-1]} {deed} that {other.operations[number - 1]} {how}")

    def note(self, name, actor, reads=(), writes=(), allocates=False):
        """`actor` runs an operation that touches these CPU tensors."""
        if actor is not self.host:
            actor.clock |= self.host.clock  # it was launched
        actor.operations.append(f"{name} ({self.site()}, {actor.name})")
        actor.clock[actor] += 1
        if allocates:  # may be given any memory that was freed on this stream
            for last in self.freed.pop(actor, []):
                self.check(actor, "is given the freed memory", last)
        for how, touched in (("reads", reads), ("writes", writes)):
            for elem in (elem for elem in touched if elem.numel()):
                last = self.memory(elem).last
                conflicts = {key: bytes_of(elem, last[key]) for key in list(last) if "writes" in (how, key[1])}
                self.check(actor, f"{how} what", conflicts)
                bytes_of(elem, last[actor, how])[...] = actor.clock[actor]

    def complete(self, name, given, out, reads, writes, to_device, pinned=False, waits=False):
        """Note an operation that was given tensors and returned `out`, CPU tensors. Returns what its caller gets.

        to_device  whether the results are on the device; pinned  or else in pinned memory; waits  whether the host does
        """
        inputs = {x.elem if on_device(x) else x: x for x in tensors(given)}
        actor = self.stream if to_device or any(map(on_device, inputs.values())) else self.host
        for x in inputs.values():
            if actor is not self.host and not (on_device(x) or self.memory(x).pinned or x.dim() == 0 or waits):
                raise RuntimeError(f"{name} ({self.site()}): pageable memory of the host is used by {actor.name}")
        known = {pointer(elem) for elem in inputs}
        new = [elem for elem in tensors(out) if pointer(elem) not in known]
        for elem in new:
            self.memory(elem, actor if to_device else None, pinned)
        if new or writes or waits:
            self.note(name, actor, reads, [*writes, *new], allocates=to_device and new)
        if waits:
            self.host.clock |= actor.clock
        if not to_device:
            return out
        return tree_map_only(torch.Tensor, lambda elem: inputs[elem] if elem in inputs else DeviceTensor(elem), out)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run and note one operation of PyTorch."""
        name, parameters = func._schema.name.removeprefix("aten::"), func._schema.arguments
        given = dict(zip((p.name for p in parameters), args)) | (kwargs or {})
        mutable = {p.name for p in parameters if p.alias_info and p.alias_info.is_write}
        writes = tensors([value for key, value in given.items() if key in mutable])
        reads = tensors([value for key, value in given.items() if key not in mutable])
        from_device = to_device = any(map(on_device, reads + writes))
        values = elems(given)
        pinned, waits = values.pop("pin_memory", False), name in HOST_WAITS
        if given.get("device"):
            to_device, values["device"] = torch.device(given["device"]).type == "cuda", "cpu"
        elif name == "copy_":
            from_device, to_device = on_device(given["src"]), on_device(given["self"])
        out = func(**values)
        if name in ("copy_", "to") and from_device != to_device:
            number = to_device and reads[0].dim() == 0  # goes along with the launch
            waits = not given.get("non_blocking") and not number
            out = out.clone() if name == "to" else out
        return self.complete(name, given, out, elems(reads), elems(writes), to_device, pinned, waits)

    def launch(self, launcher, touched, *args, **kwargs):
        """Run and note a declared function."""
        call = inspect.signature(launcher).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments | ({"backend": "torch"} if "backend" in call.arguments else {})
        values = elems(given)
        with _disable_current_modes():
            reads, writes = touched(SimpleNamespace(**values))
            out = launcher(**values)
        return self.complete(launcher.__name__, given, out, reads, writes, any(map(on_device, tensors(given))))
