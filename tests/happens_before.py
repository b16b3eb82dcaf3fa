"""A happens-before checker: finds races between streams, events and threads on a machine without a GPU.

    with Checker() as checker:
        ...  # code for a GPU: device="cuda", torch.cuda.Stream, events, a ThreadPoolExecutor
    assert not checker.races

An *actor* does one thing after another: a host thread or a stream. Actors run side by side; only a launch, an event, a
future, or a copy that the host waits for orders them. A *vector clock* writes that down. Every actor numbers its own
operations, and its clock says for each actor how many of that actor's operations are certainly complete by now. Whoever
waits for another takes over what that one knows: the maximum of both clocks, entry by entry (`|` of Counters). So
operation n of actor A happens before an operation of B if and only if B's clock then says n or more for A. Two
operations on the same byte, at least one of them a write, neither before the other, are a race, even if this run
happened to compute the right numbers.

The bytes are found as follows. A tensor on the device is a `DeviceTensor`, which computes on the CPU, at once. A
dispatch mode sees all operations. An operation writes its outputs and the arguments that its schema marks as mutable,
and reads its other tensors; views touch nothing. For every storage and every actor, two arrays give each byte the
number of the last operation that read it, and of the last that wrote it; strided views of these arrays are exactly the
bytes of a tensor. Indexing with a tensor counts as touching the whole operand. A function that launches a kernel is
replaced: it counts as one operation, which touches what its declaration says.

PyTorch's allocator hands memory that Python has freed to the next allocation on the stream that it was allocated on.
That is a race, too, if another stream may still be using it.

Limits: one device; no CUDA graphs; all jobs of executors run on one worker, each within `submit`; what happens to
pinned memory that PyTorch allocates and that is freed is not followed. Of torch.cuda there is what the project calls.
"""

import contextlib
import inspect
import os
import sys
import weakref
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

HOST_WAITS = {"item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}  # for the result
INTERNAL = __file__, torch.__path__[0], contextlib.__file__, mock.__file__  # not the places that reports are about


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
    """A host thread or a stream: `operations` are what it did, `clock` what it knows to be complete."""

    def __init__(self, checker, name):
        self.checker, self.name, self.clock, self.operations = checker, name, Counter(), []

    def learn(self, clock, how):
        if self.checker.orders(how):
            self.clock |= clock


class Stream(Actor):
    def wait_event(self, event):
        self.learn(event.clock, "wait_event")

    def record_event(self):
        recorded = self.checker.orders("record_event")
        return Event(self.checker, self.clock | self.checker.host.clock if recorded else Counter())


class Event:
    def __init__(self, checker, clock):
        self.checker, self.clock = checker, clock

    def synchronize(self):
        self.checker.host.learn(self.clock, "synchronize")


class Future:
    """A job of an executor. Its worker, an actor, has run it at once, but keeps its arguments until it is joined."""

    def __init__(self, checker, job):
        self.checker, self.job, caller, checker.host = checker, job, checker.host, checker.worker
        checker.jobs.add(job)
        checker.worker.clock |= caller.clock
        self.value = job()
        self.clock, checker.host = checker.worker.clock.copy(), caller

    def result(self, timeout=None):
        self.checker.host.learn(self.clock, "result")
        self.checker.jobs.discard(self.job)
        self.job = None
        return self.value


class Memory:
    """What is known of a storage: who touched each of its bytes last, and which stream's allocator it came from."""

    def __init__(self, storage, stream=None, pinned=False):
        self.stream, self.pinned, self.pointer, n_bytes = stream, pinned, storage.data_ptr(), storage.nbytes()
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


def storage_key(elem):
    return elem.untyped_storage()._cdata


class Checker(TorchDispatchMode):
    """Fakes a device while it is entered. `races` are sentences, `sites` the calls that order something.

    declared  {(module, name): touched} of functions that launch kernels: touched(arguments) -> (reads, writes), lists
              of tensors, results left out. An argument `backend` is set to "torch"
    removed   one of the sites: its calls have no effect, as if the line was not in the program
    """

    def __init__(self, declared=None, removed=None):
        super().__init__()
        self.declared, self.removed, self.sites, self.races = declared or {}, removed, set(), set()
        self.host, self.worker = Actor(self, "host"), Actor(self, "worker")  # `host` is the thread that runs now
        self.streams = [Stream(self, "default stream")]
        self.current = defaultdict(lambda: self.streams[0])  # each thread's stream
        self.memories, self.freed, self.jobs = {}, [], set()
        self.noting, self.patches = True, contextlib.ExitStack()

    def __enter__(self):
        cuda = dict(
            Stream=self.new_stream, stream=self.use_stream, current_stream=lambda: self.stream,
            synchronize=self.synchronize, _lazy_init=lambda: None,
            cudart=lambda: SimpleNamespace(cudaHostRegister=self.pin, cudaHostUnregister=self.unpin),
        )  # fmt: skip
        patches = [(torch.cuda, name, fake) for name, fake in cuda.items()]
        patches.append((torch, "Generator", lambda _=None, generator=torch.Generator: generator()))
        patches.append((ThreadPoolExecutor, "submit", lambda _, job, *args: Future(self, partial(job, *args))))
        patches += [(torch.Tensor, name, self.reader(getattr(torch.Tensor, name))) for name in ("tolist", "numpy")]
        for (module, name), touched in self.declared.items():
            patches.append((module, name, partial(self.launch, getattr(module, name), touched)))
        for patch in patches:
            self.patches.enter_context(mock.patch.object(*patch))
        self.patches.enter_context(torch.inference_mode())  # so that `to` and others are dispatched whole
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the host, then copied
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.host.clock |= self.worker.clock
        self.jobs.clear()
        self.patches.close()

    # Streams

    @property
    def stream(self):
        return self.current[self.host]

    def new_stream(self, device=None):
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def use_stream(self, stream):
        outer, self.current[self.host] = self.stream, stream
        yield
        self.current[self.host] = outer

    def synchronize(self, device=None):
        for stream in self.streams:
            self.host.learn(stream.clock, "synchronize")

    def site(self):
        """The innermost line outside of torch and of this module."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(INTERNAL):
            frame = frame.f_back
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"

    def orders(self, how):
        """Whether a call that orders something has its effect."""
        self.sites.add(site := f"{self.site()} {how}")
        return site != self.removed

    # Memory

    def memory(self, elem, **new):
        """The Memory of a CPU tensor's storage, which is described by `new` where it is not known yet."""
        storage, key = elem.untyped_storage(), storage_key(elem)
        if key not in self.memories:
            self.memories[key] = Memory(storage, **new)
            weakref.finalize(storage, self.free, key).atexit = False
        return self.memories[key]

    def free(self, key):
        memory = self.memories.pop(key)
        if memory.stream:
            self.freed.append(memory)

    def pin(self, pointer, n_bytes, flags):
        """cudaHostRegister of a whole storage."""
        (memory,) = (memory for memory in self.memories.values() if memory.pointer == pointer)
        memory.pinned = True
        return 0

    def unpin(self, pointer):
        """cudaHostUnregister, which the host may call when no stream uses the memory any more."""
        self.note("cudaHostUnregister", self.host)
        for memory in [memory for memory in self.memories.values() if memory.pointer == pointer]:
            self.check(self.host, "of the memory", memory.last)

    def reuse(self, stream):
        """An allocation on a stream may be given any memory that was freed there."""
        for memory in [memory for memory in self.freed if memory.stream is stream]:
            self.freed.remove(memory)
            self.check(stream, "is given the freed memory", memory.last)

    # Operations

    def check(self, actor, deed, last):
        """Report the last of others' operations, as in Memory.last, that `actor` does not know to be complete."""
        for (other, how), numbers in last.items():
            number = numbers.max(initial=0)
            if other is not actor and number > actor.clock[other]:
                self.races.add(f"{actor.operations[-1]} {deed} that {other.operations[number - 1]} {how}")

    def note(self, name, actor, reads=(), writes=(), new=()):
        """`actor` runs an operation that touches these CPU tensors; the storages of `new` are allocated for it."""
        if actor is not self.host:
            actor.clock |= self.host.clock  # it was launched
        actor.operations.append(f"{name} ({self.site()}, {actor.name})")
        actor.clock[actor] += 1
        for elem in new:
            self.memory(elem, stream=actor)
            self.reuse(actor)
        for how, touched in (("reads", reads), ("writes", [*writes, *new])):
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
        known = {storage_key(elem) for elem in inputs}
        new = [elem for elem in tensors(out) if storage_key(elem) not in known]
        if not to_device:
            for elem in new:
                self.memory(elem, pinned=pinned)
            writes, new = [*writes, *new], []
        if new or writes or waits:
            self.note(name, actor, reads, writes, new)
        if waits:
            self.host.clock |= actor.clock
        if not to_device:
            return out
        return tree_map_only(torch.Tensor, lambda elem: inputs[elem] if elem in inputs else DeviceTensor(elem), out)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run and note one operation of PyTorch."""
        if not self.noting:
            return func(*args, **(kwargs or {}))
        name, parameters = func._schema.name.removeprefix("aten::"), func._schema.arguments
        given = dict(zip((p.name for p in parameters), args)) | (kwargs or {})
        mutable = {p.name for p in parameters if p.alias_info and p.alias_info.is_write}
        values, mutable = elems(given), set() if torch.Tag.inplace_view in func.tags else mutable
        writes, others = (
            tensors([value for key, value in given.items() if (key in mutable) == wanted]) for wanted in (True, False)
        )
        from_device = to_device = any(map(on_device, writes + others))
        if given.get("device"):
            to_device = torch.device(given["device"]).type == "cuda"
            values["device"] = "cpu" if to_device else given["device"]
        elif name == "copy_":
            from_device, to_device = on_device(given["src"]), on_device(given["self"])
        pinned, waits, asynchronous = values.pop("pin_memory", False), name in HOST_WAITS, given.get("non_blocking")
        out = func(**values)
        crosses = name in ("copy_", "to", "_to_copy") and from_device != to_device
        if crosses:
            if name != "copy_":
                out, pinned = out.clone(), asynchronous
            elif from_device:
                asynchronous = asynchronous and self.memory(values["self"]).pinned
            waits = not asynchronous and not (to_device and others[0].dim() == 0)  # a number goes along with the launch
        reads = []
        for tensor in others:
            if on_device(tensor) or not (from_device or to_device) or self.memory(tensor).pinned:
                reads += elems([tensor])
            elif crosses or tensor.dim() == 0:
                self.note(name, self.host, [tensor])  # pageable memory is copied at the launch
            else:
                raise RuntimeError(f"{name} ({self.site()}): tensors on the host and on the device")
        return self.complete(name, given, out, reads, elems(writes), to_device, pinned, waits)

    def launch(self, launcher, touched, *args, **kwargs):
        """Run and note a declared function."""
        if not self.noting:
            return launcher(*args, **kwargs)
        call = inspect.signature(launcher).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments | ({"backend": "torch"} if "backend" in call.arguments else {})
        inputs = tensors(given)
        if any(map(on_device, inputs)) and not all(on_device(x) or self.memory(x).pinned for x in inputs):
            raise RuntimeError(f"{launcher.__name__} ({self.site()}): pageable host memory, and tensors on the device")
        values, self.noting = elems(given), False
        reads, writes = touched(SimpleNamespace(**values))
        out, self.noting = launcher(**values), True
        return self.complete(launcher.__name__, given, out, reads, writes, any(map(on_device, inputs)))

    def reader(self, method):
        """A method that gives a tensor's values to Python, without an operation."""

        def read(tensor):
            if self.noting:
                self.complete(method.__name__, [tensor], [], elems([tensor]), [], False, waits=True)
            outer, self.noting = self.noting, False
            values, self.noting = method(elems(tensor)), outer
            return values

        return read
