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
    return f"{low:.2f} to {high:.2f}"


def markdown(frame) -> str:
    """A DataFrame as a Markdown table without its index. None and NaN become dashes."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [["–" if pd.isna(cell) else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


FORMATS = {"MB": "{:.2f}", "same token": "{:.1%}", "of the way": "{:.0%}", "KL ratio": "{:.2f}", "recovery": "{:.3f}"}


def texts(rows):
    """A table per length: for each setting its KL, and KL against other settings' at the same bytes. Sorted by both."""
    parts = []
    for (n_prompt, n_new), part in pd.DataFrame(rows).groupby(["n_prompt", "n_new"]):
        levels = {}  # {share of dense's bytes, or else the budget: {setting: its rows by text}}
        for (share, budget, setting), group in part.groupby(["bytes_share", "budget", "setting"]):
            levels.setdefault((share, None if share else budget), {})[setting] = group.set_index("text").sort_index()
        lines = [summary(level, setting, groups) for level, groups in levels.items() for setting in groups]
        lines.sort(key=lambda line: (Fraction(line["bytes"] or 1), line["KL"]))
        table = pd.DataFrame(lines).dropna(axis=1, how="all")
        for column in table.select_dtypes("floating"):
            form = FORMATS.get(column, "{:.4f}").format
            table[column] = table[column].map(form, na_action="ignore").astype(object)
        parts += [f"{n_prompt:,} tokens, then {n_new} decoded, of {part.text.nunique()} texts", markdown(table)]
    return "\n\n".join(parts)


def summary(level, setting, groups) -> dict:
    """A line of the table. level: the share of bytes and the budget; groups: {setting: its rows by text} of the level.

    "of the way": how far the setting is on the way from streaming-llm to the oracle, in the logarithm of KL.
    """
    group, (share, budget) = groups[setting], level
    line = {"bytes": share or None, "budget": budget and f"{budget:,}", "setting": setting}
    same_texts = {name: other for name, other in groups.items() if list(other.index) == list(group.index)}
    kl = {name: np.stack(other.kl) for name, other in same_texts.items()}  # (texts, tokens) each
    mean = {name: values.mean() for name, values in kl.items()}
    line |= {"MB": group.read_bytes.mean() / 1e6, "KL": mean[setting]} | dict.fromkeys(
        ("KL ratio", "95 %", "of the way")
    )
    if "ours" in kl:
        line["KL ratio"] = mean[setting] / mean["ours"]
        line["95 %"] = interval(bootstrap(kl[setting]) / bootstrap(kl["ours"]))
    if "streaming-llm" in kl and "oracle" in kl:
        way = np.log(mean["streaming-llm"] / np.array([mean[setting], mean["oracle"]]))
        line["of the way"] = way[0] / way[1]
    recovery = [value for values in group.get("recovery", []) if isinstance(values, list) for value in values]
    return line | {"same token": np.stack(group.same).mean(), "recovery": np.mean(recovery) if recovery else None}


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
