"""The tables of experiments.evaluate: rows of results -> Markdown. evaluate.py documents the rows.

Reading order: `read_results`, `bootstrap`, `texts` (the main table), `lm_eval`.
"""

import json
import math
import pathlib
import sys
from fractions import Fraction

import numpy as np
import pandas as pd

from attnpred import InputError, require

TEXT = dict.fromkeys(("text", "sha256", "setting", "bytes_share", "model", "dtype", "predictor"), str)
NEEDED = TEXT | dict.fromkeys(("n_prompt", "n_new", "budget"), int)  # in each row, and its type
MEASURED = {"texts": dict(kl=list, read_bytes=(int, float)), "lm-eval": dict(scores=dict)}  # {task: the same}


def read_results(path) -> list[dict]:
    """The rows of a results file; of those that differ in nothing but what was measured, the last. Raises InputError.

    Lines that are no complete row, such as the last one of a run that was stopped, are reported and left out.
    """
    try:
        lines = [line for line in pathlib.Path(path).read_bytes().split(b"\n") if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    rows = list(filter(None, map(read_row, lines)))
    require(rows or not lines, f"{path} holds no results: give another file")
    if len(rows) < len(lines):
        print(f"{path}: {len(lines) - len(rows)} incomplete rows are left out, measure them again", file=sys.stderr)
    measured = {"kl", "nll", "same", "recovery", "scores"}
    keys = [json.dumps({k: v for k, v in row.items() if k not in measured and "_bytes" not in k}) for row in rows]
    return list(dict(zip(keys, rows)).values())


def read_row(line) -> dict | None:
    """The row in a line of JSON; None if it is not complete."""
    try:
        row = json.loads(line)
        needed = NEEDED | MEASURED[row["task"]]
        complete = all(isinstance(row[key], kind) for key, kind in needed.items())
        numbers = [*row.get("kl", []), *row.get("recovery", []), *row.get("scores", {}).values()]
        complete = complete and all(map(math.isfinite, numbers)) and len(row.get("kl", [])) == row["n_new"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return row if complete else None


def bootstrap(values, resamples=2000, seed=0):
    """Bootstrap of the mean over tokens and texts: values (texts, tokens) -> (resamples,).

    Tokens are drawn with replacement within each text. Calls with values of the same shape draw the same tokens, so
    differences and ratios of settings are paired.
    """
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    n = values.shape[1]
    draws = [rng.multinomial(n, np.full(n, 1 / n), resamples) @ text / n for text in values]  # (resamples,) each
    return np.mean(draws, 0)


def interval(samples):
    """The range of the middle 95 % of samples, as text."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return f"{low:.4f} to {high:.4f}"


def markdown(frame) -> str:
    """A DataFrame as a Markdown table without its index. None and NaN become dashes."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [["–" if pd.isna(cell) else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


FORMATS = {"MB": "{:.2f}", "of the way": "{:.0%}", "recovery": "{:.3f}"}


def texts(rows):
    """A table per length: for each setting its KL and the ratio to ours, with intervals, sorted by bytes, then KL."""
    parts = []
    for (n_prompt, n_new), part in pd.DataFrame(rows).groupby(["n_prompt", "n_new"]):
        keys = ["bytes_share", "budget", "setting"]
        groups = {key: group.set_index("sha256").sort_index() for key, group in part.groupby(keys)}
        baselines = {share or budget: group for (share, budget, name), group in groups.items() if name == "ours"}
        lines = [summary(key, group, baselines.get(key[0] or key[1])) for key, group in groups.items()]
        for line in lines:
            line["of the way"] = of_the_way(line, lines)
        lines.sort(key=lambda line: (Fraction(line["bytes"] or 1), line["KL"]))
        table = pd.DataFrame(lines).dropna(axis=1, how="all")
        for column in table.select_dtypes("floating"):
            form = FORMATS.get(column, "{:.4f}").format
            table[column] = table[column].map(form, na_action="ignore").astype(object)
        parts += [f"{n_prompt:,} tokens, then {n_new} decoded, of {part.sha256.nunique()} texts", markdown(table)]
    return "\n\n".join(parts)


def summary(key, group, baseline) -> dict:
    """A line of the table. group: a setting's rows by digest; baseline: those of ours at the same bytes, or None."""
    kl = np.stack(group.kl)  # (texts, tokens)
    line = dict(zip(("bytes", "budget", "setting"), key)) | {"MB": group.read_bytes.mean() / 1e6, "KL": kl.mean()}
    line |= {"KL ratio": None, "ratio 95 %": None, "of the way": None}
    if baseline is not None and list(baseline.index) == list(group.index):
        other = np.stack(baseline.kl)  # (texts, tokens)
        if min(other.mean(), *(others := bootstrap(other))) > 0:
            line |= {"KL ratio": kl.mean() / other.mean(), "ratio 95 %": interval(bootstrap(kl) / others)}
    recovery = [value for values in group.get("recovery", []) if isinstance(values, list) for value in values]
    return line | {"recovery": np.mean(recovery) if recovery else None}


def of_the_way(line, lines):
    """How far a line of `summary` is from streaming-llm (0) to the oracle (1) of the same bytes, in log KL; or None."""
    ends = {other["setting"]: other["KL"] for other in lines if other["bytes"] and other["bytes"] == line["bytes"]}
    if not {"streaming-llm", "oracle"} <= ends.keys() or min(*ends.values(), line["KL"]) <= 0:
        return None
    return np.log(ends["streaming-llm"] / line["KL"]) / np.log(ends["streaming-llm"] / ends["oracle"])


def lm_eval(rows):
    """A table of lm-eval's scores: a line per setting, a column per task and metric. A task may have several texts."""
    versions = pd.DataFrame(rows).groupby("text").sha256.unique()
    scores = []
    for row in rows:
        name = row["text"] if len(versions[row["text"]]) == 1 else f"{row['text']} {row['sha256']}"
        scores += [row | dict(score=score, column=f"{name} {metric}") for metric, score in row["scores"].items()]
    table = pd.DataFrame(scores).pivot_table("score", ["setting", "budget"], "column", sort=False)
    return f"scores of lm-eval\n\n{markdown(table.map('{:.3f}'.format, na_action='ignore').reset_index())}"


TABLES = {"texts": texts, "lm-eval": lm_eval}
