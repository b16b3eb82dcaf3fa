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

*Bytes*. A `FakeGpu` runs each operation at once. An operation writes its results and its mutable arguments, and reads
its other tensors; views touch nothing. For each storage and actor, one array holds for every byte the number of the
last operation that read it, another that of the last one that wrote it; the bytes of a tensor are a strided view of
such an array. A function that launches a kernel counts as one operation, which touches what its declaration says.

*Freed memory*. PyTorch gives memory that Python has freed to the next allocation on the stream that it was allocated
on. This is a race if another stream may still use it.

Limits: a graph's replay is not followed; indexing with a tensor touches the whole operand; pinned memory of PyTorch's
own is not followed after it is freed.
"""

from collections import Counter, defaultdict

import numpy as np

from tests.fake_gpu import Event, FakeGpu, Stream


class Actor(Stream):
    """The host or a stream: `operations` are what it did, `clock` what it knows to be complete."""

    def __init__(self, *args):
        super().__init__(*args)
        self.clock, self.operations = Counter(), []

    def learn(self, clock, how):
        if self.gpu.orders(how):
            self.clock |= clock

    def wait_event(self, event):
        self.learn(event.clock, "wait_event")

    def wait_stream(self, stream):
        self.learn(stream.clock, "wait_stream")

    def record_event(self):
        event = CheckedEvent(self)
        event.clock = self.clock.copy() if self.gpu.orders("record_event") else Counter()
        return event


class CheckedEvent(Event):
    def synchronize(self):
        self.gpu.host.learn(self.clock, "synchronize")


def bytes_of(elem, numbers):
    """The view of `numbers`, one for each byte of a storage, that has the place of the tensor in that storage."""
    size = elem.element_size()
    shape, strides = (*elem.shape, size), (*(4 * size * stride for stride in elem.stride()), 4)  # of int32, in bytes
    return np.ndarray(shape, np.int32, numbers, 4 * size * elem.storage_offset(), strides)


class Checker(FakeGpu):
    """`races` are sentences, `sites` the calls that order something.

    declared  {(module, name): touched} of functions that launch kernels: touched(arguments) -> (reads, writes), lists
              of tensors, results left out
    removed   one of the sites: its calls have no effect, as if the line was not in the program
    """

    def __init__(self, declared=None, removed=None):
        super().__init__(declared or {})
        self.removed, self.sites, self.races = removed, set(), set()
        self.host = Actor(self, None, "host")
        self.freed = defaultdict(list)  # a stream -> the touches of what was freed there

    def make_stream(self, *args):
        return Actor(self, *args)

    def synchronize(self, device=None):
        super().synchronize(device)
        for stream in self.streams:
            self.host.learn(stream.clock, "synchronize")

    def orders(self, how):
        """Whether a call that orders something has its effect."""
        self.sites.add(site := f"{self.site()} {how}")
        return site != self.removed

    def free(self, key):
        memory = super().free(key)
        if memory.device in self.devices:
            self.freed[memory.stream].append(memory.last)

    def unpin(self, address):
        """cudaHostUnregister, which the host may call when no stream uses the memory any more."""
        super().unpin(address)
        self.note("cudaHostUnregister", None)
        self.check(self.host, "of the memory", self.memories[address].last)

    def check(self, actor, deed, last):
        """Report the last operations on bytes, {(actor, how): numbers}, that `actor` does not know to be complete."""
        for (other, how), numbers in last.items():
            number = numbers.max(initial=0)
            if number > actor.clock[other]:
                self.races.add(f"{actor.operations[-1]} {deed} that {other.operations[number - 1]} {how}")

    def note(self, name, stream, reads=(), writes=(), allocates=False, waits=False):
        """A stream or the host (None) runs an operation that touches these CPU tensors."""
        actor = stream or self.host
        if stream:
            actor.clock |= self.host.clock  # it was launched
        actor.operations.append(f"{name} ({self.site()}, {actor.name})")
        actor.clock[actor] += 1
        if allocates:  # may be given any memory that was freed on this stream
            for last in self.freed.pop(actor, []):
                self.check(actor, "is given the freed memory", last)
        for how, touched in (("reads", reads), ("writes", writes)):
            for elem in (elem for elem in touched if elem.numel()):
                memory = self.memory_of(elem)
                conflicts = {
                    key: bytes_of(elem, last) for key, last in memory.last.items() if "writes" in (how, key[1])
                }
                self.check(actor, f"{how} what", conflicts)
                if (actor, how) not in memory.last:
                    memory.last[actor, how] = np.zeros(memory.size, np.int32)
                bytes_of(elem, memory.last[actor, how])[...] = actor.clock[actor]
        if waits:
            self.host.clock |= actor.clock
