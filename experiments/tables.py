"""The tables of experiments.evaluate: rows of results -> Markdown. evaluate.py documents the rows.

Reading order: `bootstrap`, `texts` (the main table), `lm_eval`.
"""

from fractions import Fraction

import numpy as np
import pandas as pd


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
        groups = {key: group.set_index("text").sort_index() for key, group in part.groupby(keys)}
        baselines = {share or budget: group for (share, budget, name), group in groups.items() if name == "ours"}
        lines = [summary(key, group, baselines.get(key[0] or key[1])) for key, group in groups.items()]
        for line in lines:
            line["of the way"] = of_the_way(line, lines)
        lines.sort(key=lambda line: (Fraction(line["bytes"] or 1), line["KL"]))
        table = pd.DataFrame(lines).dropna(axis=1, how="all")
        for column in table.select_dtypes("floating"):
            form = FORMATS.get(column, "{:.4f}").format
            table[column] = table[column].map(form, na_action="ignore").astype(object)
        parts += [f"{n_prompt:,} tokens, then {n_new} decoded, of {part.text.nunique()} texts", markdown(table)]
    return "\n\n".join(parts)


def summary(key, group, baseline) -> dict:
    """A line of the table. group: a setting's rows by text; baseline: those of ours at the same bytes, or None."""
    kl = np.stack(group.kl)  # (texts, tokens)
    line = dict(zip(("bytes", "budget", "setting"), key)) | {"MB": group.read_bytes.mean() / 1e6, "KL": kl.mean()}
    line |= {"KL ratio": None, "ratio 95 %": None, "of the way": None}
    if baseline is not None and list(baseline.index) == list(group.index):
        other = np.stack(baseline.kl)  # (texts, tokens)
        line |= {"KL ratio": kl.mean() / other.mean(), "ratio 95 %": interval(bootstrap(kl) / bootstrap(other))}
    recovery = [value for values in group.get("recovery", []) if isinstance(values, list) for value in values]
    return line | {"recovery": np.mean(recovery) if recovery else None}


def of_the_way(line, lines):
    """How far a line of `summary` is from streaming-llm (0) to the oracle (1) of the same bytes, in log KL; or None."""
    ends = {other["setting"]: other["KL"] for other in lines if other["bytes"] and other["bytes"] == line["bytes"]}
    if not {"streaming-llm", "oracle"} <= ends.keys() or min(*ends.values(), line["KL"]) <= 0:
        return None
    return np.log(ends["streaming-llm"] / line["KL"]) / np.log(ends["streaming-llm"] / ends["oracle"])


def lm_eval(rows):
    """A table of lm-eval's scores: a line per setting, a column per task and metric."""
    scores = [
        row | dict(score=score, column=f"{row['text']} {metric}")
        for row in rows
        for metric, score in row["scores"].items()
    ]
    table = pd.DataFrame(scores).pivot_table("score", ["setting", "budget"], "column", sort=False)
    return f"scores of lm-eval\n\n{markdown(table.map('{:.3f}'.format, na_action='ignore').reset_index())}"


TABLES = {"texts": texts, "lm-eval": lm_eval}
