"""Compiles every kernel ahead of time, for GPUs that need not be present: `python -m experiments.compile [target]`.

The program records the launches of the models below for a prompt and its first tokens (`experiments.roofline.decode`),
lets Triton compile them for each target, and prints the resources of each distinct kernel. The exit status is 1 if a
kernel spills registers or needs more shared memory than the target has.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pandas as pd
import torch

import kernels
from attnpred import Config, OneLineParser, exit_status
from experiments.roofline import LLAMA_31_8B, Stub, decode
from experiments.tables import markdown

Target = namedtuple("Target", "backend architecture warp_size shared_bytes")
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),  # A100
    "sm_86": Target("cuda", 86, 32, 99 * 1024),  # RTX 3090
    "sm_89": Target("cuda", 89, 32, 99 * 1024),  # RTX 4090, L40
    "sm_90": Target("cuda", 90, 32, 227 * 1024),  # H100
    "sm_100": Target("cuda", 100, 32, 227 * 1024),  # B200
    "sm_120": Target("cuda", 120, 32, 99 * 1024),  # RTX 5090
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),  # MI300
    "gfx90a": Target("hip", "gfx90a", 64, 64 * 1024),  # MI200
}
SMOLLM2 = replace(LLAMA_31_8B, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64)
DTYPES = torch.bfloat16, torch.float16, torch.float32
MODELS = {f"Llama-3.1-8B {n}K": (LLAMA_31_8B, 1024 * n) for n in (8, 32, 128)} | {"SmolLM2-135M 4K": (SMOLLM2, 4096)}


def record(model, amd, dtype=DTYPES[0]):
    """The launches of a model's prompt and first tokens, resident and offloaded: a list of roofline.Launch.

    amd: whether the launchers choose their parameters for an AMD GPU.
    """
    (m, n_tokens), launches = MODELS[model], []
    with patch.object(kernels, "is_amd", lambda: amd):
        for offload in (False, True):
            for counts in decode(Stub(m, dtype), Config(calibration_interval=4), n_tokens, 4, offload)[1]:
                launches += counts.launches
    return launches


def resources(compiled, backend):
    """(registers per thread, bytes spilled per thread, bytes of shared memory per program) of a compiled kernel."""
    if backend == "hip":
        names = ("vgpr_count", "vgpr_spill_count")
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1]) for name in names)
        return registers, 4 * spilled, compiled.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, compiled.metadata.shared


def pretend(name):
    """Make Triton compile for the target of that name, as if it were the current device."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(*TARGETS[name][:3])
    driver = SimpleNamespace(
        get_current_device=lambda: name,  # Triton caches kernels per device
        get_current_stream=lambda device: None,
        get_current_target=lambda: target,
    )
    kernels.triton.runtime.driver.set_active(driver)


def compile_all(targets):
    """Compile for the targets: a row (dict) for each distinct kernel and target."""
    rows = {}
    for name, dtype, model in itertools.product(targets, DTYPES, MODELS):
        pretend(name)
        backend = TARGETS[name].backend
        for launch in record(model, backend == "hip", dtype):
            compiled = launch.kernel.warmup(**launch.arguments, grid=launch.grid)
            if compiled.hash not in rows:
                row = dict(kernel=launch.kernel.__name__, grid="×".join(map(str, launch.grid)), model=model)
                row["dtype"] = str(dtype).removeprefix("torch.")
                registers, spilled, shared = resources(compiled, backend)
                row |= dict(target=name, registers=registers, spilled=spilled, shared=shared)
                rows[compiled.hash] = row
    return list(rows.values())


def run(arguments):
    parser = OneLineParser(prog="compile", description=__doc__.split("\n")[0])
    parser.add_argument("target", nargs="?", choices=TARGETS, help="a GPU's architecture (default: all of them)")
    target = parser.parse_args(arguments).target
    if kernels.triton.knobs is None or kernels.interpreted():
        parser.error("compiling needs Triton, and TRITON_INTERPRET unset")
    rows = compile_all([target] if target else TARGETS)
    print(markdown(pd.DataFrame(rows)))
    bad = [row for row in rows if row["spilled"] or row["shared"] > TARGETS[row["target"]].shared_bytes]
    if bad:
        form = "{kernel} on {target}: spilled {spilled}, shared {shared}".format
        sys.exit("\n".join(form(**row) for row in bad))  # status 1


def main(arguments=None):
    return exit_status("compile", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
