"""`pytest test_kernels.py --exercise FILE`: a learner's kernel takes the place of the one in kernels.py, the property
tests of its launcher run on it, and a failure becomes a verdict: the smallest case that hypothesis finds, expected and
actual values, and every access out of bounds.
"""

import importlib.util
import inspect
import pathlib
import sys
import traceback
from functools import partial, wraps

import numpy as np
import pytest
from hypothesis import Phase, is_hypothesis_test, settings

MAX_SHRINKS = 30  # cases tried after a failing one, to find a smaller one that fails
RUNS = [dict(phases=[Phase.generate, Phase.shrink]), dict(phases=[Phase.explicit])]  # explicit ones are not shrunk


def pytest_addoption(parser):
    parser.addoption("--exercise", metavar="FILE", help="judge the kernel in this file, one of exercises/")


def pytest_configure(config):
    if file := config.getoption("--exercise"):
        judge = Judge(file)
        config.option.maxfail, config.option.disable_warnings = 1, True  # one verdict at a time
        config.option.dist, config.option.tx = "no", []  # in this process
        config.pluginmanager.register(judge)
        config.add_cleanup(judge.remove)


def load_kernel(file):
    """The name of the kernel that a file defines, and the kernel. Raises UsageError in one line."""
    import kernels  # not before conftest.py has asked for the interpreter

    path = pathlib.Path(file).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--exercise: there is no file {file}")
    spec = importlib.util.spec_from_file_location("exercise", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise pytest.UsageError(f"{file}{line_of(error, path)}: {one_line(error)}")
    names = [name for name, own in vars(module).items() if hasattr(own, "fn") and own.fn.__module__ == "exercise"]
    names = [name for name in names if hasattr(getattr(kernels, name, None), "fn")]
    if len(names) != 1:
        raise pytest.UsageError(f"{file}: one kernel of kernels.py must be defined here with @triton.jit, not {names}")
    kernel, (name,) = getattr(module, names[0]), names
    signature = inspect.signature(getattr(kernels, name).fn)
    if inspect.signature(kernel.fn) != signature:
        raise pytest.UsageError(f"{file}: the signature in kernels.py is {name}{signature}")
    return name, kernel


def line_of(error, path):
    """ ", line 12" where the error left the learner's file, or an empty string."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def one_line(error):
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}".partition("\n")[0]


class Judge:
    """The plugin of one run. It stands in for the kernel, and sees every launch and every memory access."""

    def __init__(self, file):
        import kernels

        self.file, self.path = file, pathlib.Path(file).resolve()
        self.name, self.kernel = load_kernel(file)
        functions = [f for f in vars(kernels).values() if inspect.isfunction(f)]
        self.launchers = [f.__name__ for f in functions if self.name in f.__code__.co_names]
        self.tensors = {}  # of the launch, by argument
        self.stray = self.verdict = None  # the first access out of bounds of this case; what to tell
        self.failing, self.cases_since = set(), 0
        self.restore = [(kernels, self.name, getattr(kernels, self.name))]
        self.interpreted = kernels.interpreted()
        if self.interpreted:
            from triton.runtime.interpreter import InterpreterBuilder as builder

            for method, mask_index in (("create_masked_load", 0), ("create_masked_store", 1)):
                access = getattr(builder, method)
                self.restore.append((builder, method, access))
                setattr(builder, method, self.watched(access, mask_index))
        setattr(kernels, self.name, self)

    def remove(self):
        for owner, name, value in self.restore:
            setattr(owner, name, value)

    # ---- the kernel

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **kwargs):
        self.tensors = {
            name: arg
            for name, arg in zip(inspect.signature(self.kernel.fn).parameters, args)
            if hasattr(arg, "data_ptr") and arg.numel()
        }
        try:
            self.kernel[grid](*args, **kwargs)
        finally:
            self.tensors = {}

    def watched(self, access, mask_index):
        """A load or store that leaves out, and reports, what lies in none of the launch's tensors."""

        def watched_access(builder, ptrs, *rest):
            if not self.tensors:  # another kernel runs
                return access(builder, ptrs, *rest)
            mask = rest[mask_index]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            address, valid = ptrs.data.astype(np.int64), ~mask.data
            for tensor in self.tensors.values():
                if not valid.all():
                    valid = valid | inside(address, size, tensor)
            if not valid.all():
                self.report(address[~valid].flat[0].item(), ("reads", "writes")[mask_index])
                mask = type(mask)(mask.data & valid, mask.dtype)
            return access(builder, ptrs, *rest[:mask_index], mask, *rest[mask_index + 1 :])

        return watched_access

    def report(self, address, verb):
        if self.stray is None:
            name = min(self.tensors, key=lambda name: distance(address, self.tensors[name]))
            offset, frame = (address - self.tensors[name].data_ptr()) // self.tensors[name].itemsize, sys._getframe()
            while frame and frame.f_code.co_filename != str(self.path):
                frame = frame.f_back
            shape, strides = tuple(self.tensors[name].shape), self.tensors[name].stride()
            self.stray = (
                f"OUT OF BOUNDS: line {frame.f_lineno} {verb} {name} {'-' if offset < 0 else '+'} {abs(offset)},"
            )
            self.stray += f" but this tensor has the shape {shape} and the strides {strides}."

    # ---- the tests

    def pytest_collection_modifyitems(self, config, items):
        """The launcher's tests with the Triton backend, and no others."""
        chosen = [item for item in items if any(name in item.name for name in self.launchers)]
        chosen = [item for item in chosen if "torch" not in item.name]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        test, self.failing, self.cases_since = pyfuncitem.obj, set(), 0
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        if not is_hypothesis_test(test):
            self.judged(test)(**arguments)
            return True
        inner, used = test.hypothesis.inner_test, test._hypothesis_internal_use_settings
        test.hypothesis.inner_test = self.judged(inner)
        try:
            for run in RUNS:
                test._hypothesis_internal_use_settings = settings(used, **run, report_multiple_bugs=False)
                test(**arguments)
        finally:
            test.hypothesis.inner_test, test._hypothesis_internal_use_settings = inner, used
        return True

    def judged(self, test):
        """The test of one case, which fails with a verdict."""

        @wraps(test)
        def judged_test(**case):
            if self.failing:
                self.cases_since += 1
                if self.cases_since > MAX_SHRINKS and repr(case) not in self.failing:
                    return
            self.stray = error = None
            try:
                test(**case)
            except Exception as caught:
                error = caught
            if self.stray or error:
                self.failing.add(repr(case))
                self.verdict = self.describe(test.__name__, case, error)
                raise AssertionError(self.verdict)

        return judged_test

    def describe(self, test, case, error):
        case = ", ".join(f"{name}={value}" for name, value in case.items() if name != "backend")
        lines = [f"{self.file}: {self.name} is not right yet. The smallest case found that fails:"]
        lines += [f"{test}: {case}", ""]
        if isinstance(error, AssertionError):
            lines += str(error).partition("\nassert ")[0].splitlines()
            if self.interpreted and not self.stray:
                lines += ["Nothing was read or written out of bounds."]
        elif error:
            while error.__cause__:
                error = error.__cause__
            lines += [f"{self.file}{line_of(error, self.path)}: {one_line(error)}"]
        if self.stray:
            lines += [self.stray, *([] if error else ["The values are right if this access is left out."])]
        return "\n    ".join(lines)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and self.verdict:
            report.longrepr, report.sections = self.verdict, []
        return report

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        if exitstatus == 0:
            terminalreporter.write_line(f"{self.file}: solved. Compare with {self.name} in kernels.py.", green=True)


def inside(address, size, tensor):
    """Where an array of addresses lies in a tensor that may be strided."""
    offset = address - tensor.data_ptr()
    valid = np.ones_like(offset, dtype=bool)
    for stride, n in sorted(zip(tensor.stride(), tensor.shape), reverse=True):
        if n > 1 and stride > 0:
            index = offset // (stride * tensor.itemsize)
            valid &= (index >= 0) & (index < n)
            offset = offset - index * (stride * tensor.itemsize)
    return valid & (offset >= 0) & (offset + size <= tensor.itemsize)


def distance(address, tensor):
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) * tensor.itemsize
    return max(tensor.data_ptr() - address, address - tensor.data_ptr() - last)
